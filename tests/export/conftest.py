"""llama.cpp's own converter, where it can be had."""

from collections.abc import Callable

import pytest

from benchmarks import llama_cpp, peers


@pytest.fixture(scope="session")
def their_converter() -> Callable[..., None]:
    """`llama_cpp.convert`, whose source and environment are there."""
    try:
        llama_cpp.source()
        peers.python_of(("sentencepiece",), beside_ours=True)
    except peers.PeerMissing as missing:
        pytest.skip(str(missing))
    return llama_cpp.convert
