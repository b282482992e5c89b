"""What a service allows and how it samples.

In: nothing but numbers. Out: `ServiceSettings`, which whoever starts a service fills in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_chat.service.prepare import SamplingDefaults

# Names the base model, whatever its own name is.
ANY_MODEL = "default"


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What a service allows. Times in seconds."""

    model_name: str = ANY_MODEL
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    # Choices that may wait; the batch's places come on top.
    max_queue: int = 64
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 20.0
    request_seconds: float = 600.0
    # That a reader may leave one piece of its answer unread.
    write_seconds: float = 60.0
    # Between two pieces of a reply that runs alone, but for its first and its end: tokens that come faster go together.
    pace_seconds: float = 0.02
    # Without a byte, after which a stream carries a comment; balancers cut at 60.
    quiet_seconds: float = 10.0
    # To tokenise a prompt and read its schemas.
    prepare_seconds: float = 20.0
    log_prompts: bool = False
