"""The trained model's likeliest replies to a few prompts, for its certificate: from memory, before anything is loaded.

In: a model that can be run alone, prompts as token ids. Out: of each the likeliest tokens with their log-probabilities,
within a time; else none, and why.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qwen_chat.certificate.lock import SECONDS, TOKENS, GreedyReply, Replies

DIGITS = 4  # of a log-probability


@torch.no_grad()
def replies(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], ends: Sequence[int], seconds: float = SECONDS
) -> Replies:
    """All prompts in one batch, padded on the left. It is given up as soon as it is seen to take over `seconds`; a pass
    over one token is the first look: all prompts at once cost a large model minutes on a CPU, and memory."""
    began = time.perf_counter()
    was_training = model.training
    model.eval()
    # transformers' own forward of a hybrid tells each time that kernels are missing, which training did not need.
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    width = max(map(len, prompts), default=0)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids, mask = ids.to(model.device), mask.to(model.device)
    too_slow = Replies((), f"none: the model would take more than {seconds:.0f} s for them here")
    first_step = 0.0
    positions, cache = (mask.cumsum(-1) - 1).clamp_min(0), None
    found: list[list[tuple[int, float, float]]] = [[] for _ in prompts]
    try:
        if prompts:
            model(input_ids=ids[:1, -1:], use_cache=False, logits_to_keep=1)
            if (time.perf_counter() - began) * TOKENS > seconds:
                return too_slow
        for step in range(TOKENS if prompts else 0):
            given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            out = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            best = out.logits[:, -1].float().log_softmax(-1).topk(2, dim=-1)
            chosen = best.indices[:, :1]
            for reply, token, (first, second) in zip(
                found, chosen.squeeze(1).tolist(), best.values.tolist(), strict=True
            ):
                if not reply or reply[-1][0] not in ends:
                    reply.append((token, round(first, DIGITS), round(second, DIGITS)))
            took = time.perf_counter() - began
            # The first step reads the prompts, which takes longer than a token does.
            first_step = took if step == 0 else first_step
            if took + (took - first_step) / max(1, step) * (TOKENS - 1 - step) > seconds:
                return too_slow
            ids, positions = chosen, positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(chosen)], dim=1)
    finally:
        quiet.setLevel(level)
        model.train(was_training)
    kept = tuple(GreedyReply(*(tuple(column) for column in zip(*reply, strict=True))) for reply in found)  # type: ignore[arg-type]
    return Replies(kept, f"{len(kept)} of at most {TOKENS} tokens")
