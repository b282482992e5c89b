"""The environments of peers: one a set of versions, whole or absent."""

from pathlib import Path

import pytest

from benchmarks import peers


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What would be run; the cache is empty."""
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path))
    seen: list[list[str]] = []

    def run(command: list[str]) -> str:
        seen.append([str(word) for word in command])
        if "no-such-package==1" in command:
            raise peers.PeerMissing("pip says no")
        return str(tmp_path)

    monkeypatch.setattr(peers, "_run", run)
    return seen


def test_other_versions_are_another_environment(commands: list[list[str]]) -> None:
    first = peers.python_of(["trl==1.16.0"])
    assert first == peers.python_of(["trl==1.16.0"]), "built once"
    assert len(commands) == 2
    others = [
        peers.python_of(["trl==1.15.0"]),
        peers.python_of(["trl==1.16.0"], remove=["torchvision"]),
        peers.python_of(["trl==1.16.0"], beside_ours=True),
    ]
    assert len({first, *others}) == 4
    assert ["uninstall", "--quiet", "--yes", "torchvision"] in [command[3:] for command in commands]


def test_what_cannot_be_installed_leaves_nothing(commands: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(peers.PeerMissing, match="pip says no"):
        peers.python_of(["no-such-package==1"])
    assert [path.name for path in (tmp_path / "peers").iterdir() if not path.name.endswith(".lock")] == []


def test_our_own_versions_are_pins_without_a_build_tag() -> None:
    (pin,) = peers.ours("torch")
    assert pin.startswith("torch==") and "+" not in pin
