"""A service that holds itself to its certificates at start."""

import shutil
from pathlib import Path

import pytest

from qwen_chat.certificate.lock import LOCK_FILE, FormatLock, Replies
from qwen_chat.inference.loading import load_engine
from qwen_chat.service import self_check


@pytest.fixture(scope="module")
def certified(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_model_path, tmp_path_factory.mktemp("certified") / "model"))
    engine = load_engine(folder)
    lock = FormatLock.make(
        engine.fmt, base={"name": "m", "hash": "0"}, longest=None, greedy=lambda *_: Replies((), "none")
    )
    lock.write(folder)
    return folder


def test_a_service_agrees_with_its_own_certificate(certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "SECONDS_OF_A_START", 60.0)
    lock = FormatLock.read(certified)
    (line,) = self_check.check_formats(load_engine(certified), certified, {})
    told = f"format.lock of the model: {len(lock.entries)} prompts, {len(lock.answers)} replies with calls"
    assert line.startswith(f"{told} and the stop tokens agree (")


def test_a_template_that_was_changed_since_is_one_warning(certified: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(certified, tmp_path / "model"))
    template = folder / "chat_template.jinja"
    template.write_text("{{- 'Odd' }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    (line,) = self_check.check_formats(load_engine(folder), folder, {})
    assert line.startswith("warning: format.lock of the model: prompts differ; ")
    assert "\n" not in line and "Odd" in line


def test_a_certificate_that_is_damaged_is_one_warning(certified: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(certified, tmp_path / "model"))
    file = folder / LOCK_FILE
    file.write_bytes(file.read_bytes()[:-20])
    (line,) = self_check.check_formats(load_engine(folder), folder, {})
    assert line.startswith("warning: format.lock of the model: ")


def test_without_a_certificate_nothing_is_said(tiny_model_path: Path) -> None:
    assert list(self_check.check_formats(load_engine(tiny_model_path), tiny_model_path, {})) == []


def test_time_that_is_up_is_said(certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "SECONDS_OF_A_START", 0.0)
    (line,) = self_check.check_formats(load_engine(certified), certified, {})
    assert "1 prompts of " in line and "(there was no time for more)" in line


def test_whatever_a_certificate_brings_about_the_service_starts(
    certified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise TypeError("of a\x1b[2J kind that nobody thought of")

    monkeypatch.setattr(self_check, "_wrong", wrong)
    (line,) = self_check.check_formats(load_engine(certified), certified, {})
    assert line.startswith("warning: format.lock of the model: cannot be replayed (TypeError: of a")
    assert line.isprintable()
