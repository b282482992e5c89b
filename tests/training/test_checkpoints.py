"""Checkpoints: whole or not there, verified, pruned late; the lock, the changes, the modes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_chat.errors import CheckpointError, OutputError, TrainingError
from qwen_chat.training import checkpoints


def nothing() -> None:
    """A barrier of one."""


def write(folder: Path, step: int, content: bytes = b"weights " * 1000) -> Path:
    name = f"checkpoint-{step}"
    with checkpoints.written_aside(folder, name, first=True, barrier=nothing, record={"step": step}) as aside:
        (aside / name / "deep").mkdir(parents=True)
        (aside / name / "model.safetensors").write_bytes(content)
        (aside / name / "deep" / "文件.pt").write_bytes(b"\x00\x01")
        assert not (folder / name).exists()
    return folder / name


def test_a_checkpoint_appears_whole_with_a_manifest_of_every_file(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    listed = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert {name: size for name, (size, _) in listed.items()} == {
        "deep/文件.pt": 2,
        "model.safetensors": 8000,
        "run.json": len('{"step": 3}\n'),
    }
    assert listed["deep/文件.pt"][1] == "b413f47d13ee2fe6c845b2ee141af81de858df4ec549a58b7970bb96645bc8d2"
    assert checkpoints.damage(path) is None
    assert os.listdir(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda p: (p / "model.safetensors").write_bytes(b"w"),
            "model.safetensors has 1 bytes, expected 8,000",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"Weights " * 1000),
            "model.safetensors has other content than was written",
        ),
        (lambda p: (p / "deep" / "文件.pt").unlink(), "deep/文件.pt is missing"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json (it was never finished)"),
        (lambda p: (p / "manifest.json").write_text('{"files": '), "manifest.json cannot be read"),
    ],
    ids=["cut", "changed", "missing", "unfinished", "no manifest"],
)
def test_damage_is_named_and_passed_over(harm, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, 2)
    newest = write(tmp_path, 10)
    harm(newest)
    assert checkpoints.damage(newest) == said
    assert checkpoints.newest_sound(tmp_path) == (
        tmp_path / "checkpoint-2",
        [f"checkpoint-10 is damaged ({said}): passed over"],
    )


def test_all_damaged_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    found, notes = checkpoints.newest_sound(tmp_path)
    assert found is None
    assert len(notes) == 1


def test_a_failed_write_leaves_the_older_ones_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    writing = checkpoints.written_aside(tmp_path, "checkpoint-2", first=True, barrier=nothing, record={})
    said = r"No space left on device.*Sound checkpoints: checkpoint-1\. Free"
    with pytest.raises(TrainingError, match=said), writing as aside:
        (aside / "checkpoint-2").mkdir()
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert checkpoints.damage(tmp_path / "checkpoint-1") is None


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    writing = checkpoints.written_aside(tmp_path, "checkpoint-2", first=True, barrier=nothing, record={})
    with pytest.raises(ZeroDivisionError), writing:
        raise ZeroDivisionError
    assert checkpoints.is_write_error(
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    )
    assert not checkpoints.is_write_error(RuntimeError("shape mismatch"))
    assert not checkpoints.is_write_error(ConnectionResetError("peer"))


def test_prune_keeps_the_newest_the_best_and_removes_what_was_given_up(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 20):
        write(tmp_path, step)
    checkpoints.prune(tmp_path, 8, 2, tmp_path / "checkpoint-4")
    assert [step for step, _ in checkpoints.steps(tmp_path)] == [4, 8]
    for no_limit in (None, 0, -1):
        checkpoints.prune(tmp_path, 8, no_limit)
    assert [step for step, _ in checkpoints.steps(tmp_path)] == [4, 8]
    write(tmp_path, 10)
    checkpoints.prune(tmp_path, 10, 1)
    assert [step for step, _ in checkpoints.steps(tmp_path)] == [10]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        (tmp_path / "a.safetensors").write_bytes(b"x")
        (tmp_path / "a.safetensors").chmod(0o600)
        checkpoints.open_to_umask(tmp_path)
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_link_keeps_its_targets_mode(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("x")
    target.chmod(0o640)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(target)
    checkpoints.open_to_umask(tmp_path / "folder")
    assert target.stat().st_mode & 0o777 == 0o640


def test_changes_are_named(tmp_path: Path) -> None:
    then = {
        "options": {"lr": 0.1, "d": ["a"], "free": 1, "gone": None},
        "data": "x",
        "model": "m",
        "world_size": 1,
    }
    now = {
        "options": {"lr": 0.2, "d": ("a",), "free": 2, "new": True},
        "data": "y",
        "model": "m",
        "world_size": 2,
    }
    found = checkpoints.differences(then, now, frozenset({"free"}))
    assert found == [
        "--lr: 0.1 then, 0.2 now",
        "--new: not given then, True now",
        "the data has other content",
        "the number of processes: 1 then, 2 now",
    ]
    with pytest.raises(CheckpointError, match=r"--lr: 0\.1 then, 0\.2 now"):
        checkpoints.check_unchanged(found, tmp_path, anyway=False)
    assert len(checkpoints.check_unchanged(found, tmp_path, anyway=True)) == 4
    assert checkpoints.check_unchanged([], tmp_path, anyway=False) == []


def test_a_models_fingerprint_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(100_000))
    first = checkpoints.model_fingerprint(tmp_path)
    os.utime(file, (1, 1))
    assert checkpoints.model_fingerprint(tmp_path) == first
    file.write_bytes(bytes(99_999) + b"\x01")
    assert checkpoints.model_fingerprint(tmp_path) != first


HOLDER = """
import sys, time
from pathlib import Path
from qwen_chat.training import checkpoints
lock = checkpoints.lock(Path(sys.argv[1])); print("held", flush=True); time.sleep(60)
"""


def test_the_lock_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    holder = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=rf"a run is writing into it \(process {holder.pid} on "):
            checkpoints.lock(tmp_path / "out")
    finally:
        holder.kill()
        holder.wait()
    lock = checkpoints.lock(tmp_path / "out")
    lock.release()
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_result_moves_in_file_by_file(tmp_path: Path) -> None:
    aside = tmp_path / ".writing"
    (aside / "deep").mkdir(parents=True)
    (aside / "deep" / "a").write_text("new")
    (aside / "b").write_text("new")
    (tmp_path / "b").write_text("old")
    checkpoints.move_into(aside, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "deep"]
    assert (tmp_path / "b").read_text() == (tmp_path / "deep" / "a").read_text() == "new"
