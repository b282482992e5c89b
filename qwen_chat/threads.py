"""Threads that compute and end, so that their OpenMP workers end with them.

In: a function. Out: the same, run in a thread of its own.
"""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

ParametersT = ParamSpec("ParametersT")
ResultT = TypeVar("ResultT")


def in_own_thread(function: Callable[ParametersT, ResultT]) -> Callable[ParametersT, ResultT]:
    """Run `function` in a thread that ends with it; its result or its exception is the caller's.

    A thread that has computed with torch keeps its OpenMP workers until it ends. Where the workers of several
    threads are more than the machine has cores, libgomp no longer lets them spin: they sleep after every
    product. Loading a model in the main thread therefore halved the engine's speed.
    """

    @functools.wraps(function)
    def run(*args: ParametersT.args, **kwargs: ParametersT.kwargs) -> ResultT:
        results: list[ResultT] = []
        failures: list[Exception] = []

        def work() -> None:
            try:
                results.append(function(*args, **kwargs))
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=work, name=function.__name__, daemon=True)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return results[0]

    return run
