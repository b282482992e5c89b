"""An engine that fails is started again, and until then nobody is let in.

In: an engine. Out: whether it takes requests, and how often it was started again.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback

from qwen_chat.inference.engine import Engine
from qwen_chat.service.errors import engine_unavailable

# Seconds from an engine's failure to its next start.
FIRST_RESTART, LAST_RESTART = 0.5, 30.0
# Seconds in which failures count as following each other.
FAILURE_WINDOW = 120.0


class EngineWatch:
    """Starts an engine again when it fails, each time later while failures follow each other closely."""

    def __init__(self, engine: Engine) -> None:
        self.restarts = 0
        self._engine = engine
        self._failures: list[float] = []
        engine.on_failure = self.restart

    def check(self) -> None:
        """Raise APIError 503 where the engine does not run."""
        if not self._engine.is_running:
            raise engine_unavailable()

    def restart(self, error: BaseException) -> None:
        """The engine failed with `error`: say so, and start it again after a while."""
        print("engine failed:", "".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        self.restarts += 1
        now = time.monotonic()
        self._failures = [when for when in self._failures if now - when < FAILURE_WINDOW] + [now]
        delay = min(FIRST_RESTART * 2 ** (len(self._failures) - 1), LAST_RESTART)
        timer = threading.Timer(delay, self._engine.start)
        timer.daemon = True
        timer.start()
