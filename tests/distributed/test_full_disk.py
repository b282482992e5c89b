"""A disk that is too small, or fills up in the middle: said at once, nothing lost, and the run can go on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import finish, last_step, start, weights

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk(small_disk: Path, tiny: Path, conversations: Path, tmp_path: Path) -> None:
    words = ["-m", str(tiny), "-d", str(conversations), "--use_lora", "True", "--lora_r", "4"]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_steps", "60"]
    words += ["--save_strategy", "steps", "--save_steps", "5"]
    folder = small_disk / "run"

    # Too many checkpoints are to be kept for this disk: refused before anything is loaded.
    refused = start([*words, "--save_total_limit", "20"], folder)
    assert refused.wait() == [2]
    assert "its disk can give 0.2 GiB, the run writes up to 0.4" in refused.said()
    assert not folder.exists()

    # It fills up in the middle.
    run = start([*words, "--save_total_limit", "2"], folder)
    assert run.until(6)
    with (small_disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(MIB))
        except OSError:
            pass
    assert run.wait() == [1], run.said()
    said = run.said()
    assert "could not be written (" in said
    assert "the same command with -o" in said
    assert "Traceback" not in said
    kept = [path for path in folder.glob("checkpoint-*") if (path / "manifest.json").exists()]
    assert kept
    assert not (folder / ".writing").exists()

    # With room again it goes on to what it would have been.
    (small_disk / "ballast").unlink()
    resumed = finish([*words, "--save_total_limit", "2"], folder)
    assert "resumed from checkpoint-" in resumed.said()
    assert last_step(folder) == 60
    finish([*words, "--save_total_limit", "2"], tmp_path / "whole")
    assert weights(folder) == weights(tmp_path / "whole")
