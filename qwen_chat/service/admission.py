"""Who is let in: a bound on the choices that run and wait.

In: how many places a request takes. Out: what gives them back, or an APIError 429 that says when to come again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from qwen_chat.service.errors import APIError, bad_value


class Admission:
    """Places for choices: those in the batch and those that may wait. Beyond them nobody is let in."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0
        # Seconds that a request lately took, smoothed.
        self._seconds = 1.0

    def take(self, count: int) -> Callable[[bool], None]:
        """Take `count` places; returns what gives them back, told whether the request was served. Raise
        APIError 429 where there are too few."""
        if count > self.places:
            raise bad_value("n", f"Invalid 'n': {count} choices never fit the queue of {self.places}.")
        if self.taken + count > self.places:
            text = f"Too many requests: {self.taken} of {self.places} places are taken. Try again later."
            seconds = max(1, min(60, math.ceil(self._seconds)))
            raise APIError(429, text, code="rate_limit_exceeded", retry_after=seconds)
        self.taken += count
        began = time.monotonic()

        def give_back(served: bool) -> None:
            self.taken -= count
            # One that was refused took no time: it says nothing of how long a place stays taken.
            if served:
                self._seconds += 0.2 * (time.monotonic() - began - self._seconds)

        return give_back
