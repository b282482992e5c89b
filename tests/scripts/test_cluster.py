"""The cluster files: the Slurm script with a stand-in for Slurm, the TrainJob against the published types."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "finetune" / "cluster" / "slurm.sh"
MANIFEST = ROOT / "finetune" / "cluster" / "trainjob.yaml"


def stand_in(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment as Slurm makes it: srun runs the task here, as machine 1 of 2."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_in(commands, "srun", '[ "$1" = --kill-on-bad-exit=1 ] && shift; SLURM_NODEID=1 exec "$@"')
    stand_in(
        commands,
        "scontrol",
        f'echo "scontrol $*" >> {tmp_path}/calls; [ "$1" = show ] && echo -e "n1\\nn2"; true',
    )
    stand_in(commands, "scancel", f'echo "scancel $*" >> {tmp_path}/calls')
    own = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    own |= {"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_SUBMIT_DIR": str(ROOT)}
    return os.environ | own | {"PATH": f"{commands}:{os.environ['PATH']}"}


def test_shellcheck_is_content() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    subprocess.run([checker, str(SLURM)], check=True)


def test_slurm_starts_finetune_sh_on_each_machine(slurm: dict[str, str], tmp_path: Path) -> None:
    words = ["bash", str(SLURM), "-d", "data with space.jsonl", "--use_lora", "True", "--dry_run"]
    done = subprocess.run(words, env=slurm, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "--nnodes 2",
        "--node_rank 1",
        "--nproc_per_node 4",
        "--master_addr n1",
        "--master_port 24711",
    ):
        assert part in done.stdout
    assert "data\\ with\\ space.jsonl" in done.stdout


def test_slurm_queues_a_stopped_run_again(slurm: dict[str, str], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "finetune").mkdir(parents=True)
    (repository / "finetune" / "finetune.sh").write_text("exit 143\n")
    done = subprocess.run(
        ["bash", str(SLURM)], env=slurm | {"REPOSITORY": str(repository)}, capture_output=True
    )
    assert done.returncode == 143
    assert "scontrol requeue 4711" in (tmp_path / "calls").read_text()
    (repository / "finetune" / "finetune.sh").write_text("exit 1\n")
    done = subprocess.run(
        ["bash", str(SLURM)], env=slurm | {"REPOSITORY": str(repository)}, capture_output=True
    )
    assert done.returncode == 1
    assert (tmp_path / "calls").read_text().count("requeue") == 1


def manifest() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    return found


def test_the_manifests_command_is_finetune_sh(tmp_path: Path) -> None:
    trainer = manifest()["spec"]["trainer"]
    own = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "REPOSITORY": str(ROOT)}
    own |= {"PET_MASTER_ADDR": "finetune-node-0-0.finetune", "PET_MASTER_PORT": "29500"}
    words = [*trainer["command"], *trainer["args"], "--dry_run"]
    done = subprocess.run(words, env=os.environ | own, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "--nnodes 2",
        "--node_rank 1",
        "--nproc_per_node 8",
        "--master_port 29500",
        "-o /shared/output",
    ):
        assert part in done.stdout
    assert "--master_addr finetune-node-0-0.finetune" in done.stdout


@pytest.mark.slow
def test_the_manifest_has_the_published_types() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    written = manifest()
    job = models.TrainerV1alpha1TrainJob.from_dict(written)
    assert job.to_dict() == written  # an unknown field would be lost on the way
    with pytest.raises(ValueError):
        written["spec"]["trainer"]["numNodes"] = "two"
        models.TrainerV1alpha1TrainJob.from_dict(written)
