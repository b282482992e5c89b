"""The models that may be asked for: the base, where it is served, and its adapters.

In: an engine, and the name that a request gives. Out: `Served`, the cards of GET /v1/models, adapters loaded and
unloaded. A name that stands for nothing is an APIError.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from qwen_chat.errors import ChatError, ModelError
from qwen_chat.inference.engine import Engine
from qwen_chat.service.errors import APIError, bad_value, unknown_model
from qwen_chat.service.prepare import Served
from qwen_chat.service.protocol import ModelCard
from qwen_chat.service.settings import ANY_MODEL, ServiceSettings
from qwen_chat.service.workers import Workers


class Catalog:
    """The models of one engine by name."""

    def __init__(self, engine: Engine, settings: ServiceSettings) -> None:
        self._engine = engine
        self._base = settings.model_name
        self._sampling = settings.sampling
        self._created = int(time.time())
        self._context = min(engine.context_length, engine.kv_tokens)
        self._workers = Workers("adapters", 1)
        # Adapters that are being loaded.
        self._loading: set[str] = set()

    def names(self) -> list[str]:
        """What may be asked for: the base, where it is served, and the adapters."""
        return [*([self._base] if self._engine.serves_base else []), *self._engine.adapters]

    def card(self, name: str) -> ModelCard:
        """An adapter's parent is the base beside which it runs; one that is merged into it has none here."""
        is_child = name != self._base and self._engine.serves_base
        return ModelCard(
            id=name,
            object="model",
            created=self._created,
            owned_by="qwen_chat",
            max_model_len=self._context,
            **({"parent": self._base} if is_child else {}),
        )

    def served(self, name: str | None) -> Served:
        """The model that a request names; none named is the base, or the only one that there is."""
        names = self.names()
        if name in (None, ANY_MODEL) and (self._engine.serves_base or len(names) == 1):
            name = names[0]
        if name not in names:
            raise unknown_model(name or ANY_MODEL, names)
        adapter = None if name == self._base else name
        fmt = self._engine.format_of(adapter)
        return Served(
            name=adapter or self._base,
            adapter=adapter,
            fmt=fmt,
            context=self._context,
            vocabulary=self._engine.decoder.vocabulary,
            end_tokens=frozenset((*self._engine.stop_token_ids, *fmt.stop_token_ids)),
            defaults=self._sampling,
        )

    async def load_adapter(self, name: str, folder: Path, *, request_id: str) -> None:
        """For as long as it takes: it ends loaded or refused, never in between. `request_id` marks what is said
        of a failure on standard error."""
        if name in (self._base, ANY_MODEL, *self._engine.adapters):
            raise bad_value("lora_name", f"Invalid 'lora_name': '{name}' is loaded already; unload it first.")
        if name in self._loading:
            text = f"The adapter '{name}' is being loaded by another request; GET /v1/models shows when it is there."
            raise APIError(409, text, param="lora_name", code="adapter_loading", retry_after=1)
        self._loading.add(name)
        running = self._workers.submit(lambda: self._engine.load_adapter(name, folder))
        running.add_done_callback(lambda _: self._loading.discard(name))
        try:
            await asyncio.wrap_future(running)
        except (ChatError, OSError) as error:
            # It names paths: only for us.
            print(f"{request_id}: {error}", file=sys.stderr, flush=True)
            text = "Invalid 'lora_path': no adapter that fits this model can be read there."
            raise bad_value("lora_path", text) from None

    def unload_adapter(self, name: str) -> None:
        """Raise APIError where it is not loaded, or merged into the model."""
        if name not in self._engine.adapters:
            raise unknown_model(name, self._engine.adapters, param="lora_name")
        try:
            self._engine.unload_adapter(name)
        except ModelError:
            text = f"Invalid 'lora_name': '{name}' is part of the model; it cannot be unloaded."
            raise bad_value("lora_name", text) from None
