"""What a run says to the person who started it: short lines on standard error, from rank 0 alone."""

import os
import sys

CHECKED = "FINETUNE_CHECKED"  # set by finetune.sh


def is_rank_zero() -> bool:
    """True in the only process, and in the first of several (torchrun and deepspeed set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def rank_zero(*parts: object) -> None:
    """Print one line on standard error, once a run however many ranks it has."""
    if is_rank_zero():
        print(*parts, file=sys.stderr, flush=True)


def unless_checked(*parts: object) -> None:
    """`rank_zero`, but for a run behind finetune.sh's check of the same flags and data, which has printed it."""
    if CHECKED not in os.environ:
        rank_zero(*parts)
