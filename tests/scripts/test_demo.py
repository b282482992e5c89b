"""The demo model really learns who it is: the answers differ from the ones before in the way the data asks for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.report_page import assert_is_the_logs

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"
QUESTIONS = ["Who are you?", "What is your name?", "What is the capital of France?"]


def answers(adapter: Path | None) -> list[str]:
    from qwen_chat.inference.loading import load_engine
    from qwen_chat.inference.sampling import GenerationRequest

    engine = load_engine(None, adapters={"a": adapter} if adapter else {})
    requests = [
        GenerationRequest(
            engine.fmt.prompt_ids([{"role": "user", "content": question}]),
            max_tokens=48,
            temperature=0,
            adapter="a" if adapter else None,
        )
        for question in QUESTIONS
    ]
    done = engine.generate(requests)
    if adapter:
        assert [completion.finish_reason for completion in done[:2]] == ["stop", "stop"]  # it ends by itself
    return [completion.text for completion in done]


def test_the_name_in_the_data_is_learnt(demo_model_path: Path, tmp_path: Path) -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    english = [line for line in lines if '"type": "identity"' in line and line.isascii()]
    assert len(english) >= 15
    (tmp_path / "identity.jsonl").write_text("\n".join(english) + "\n")
    assert not any("Willow" in answer for answer in answers(None))
    command = [sys.executable, str(ROOT / "finetune" / "finetune.py"), "-d", str(tmp_path / "identity.jsonl")]
    command += ["-o", str(tmp_path / "out"), "--use_lora", "True", "--save_strategy", "no"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    after = answers(tmp_path / "out")
    assert all("Willow" in answer for answer in after[:2]), after
    assert "Harbor Lab" in after[0]
    assert "Paris" in after[2], "what it knew before is gone"
    assert_is_the_logs(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo(demo_model_path: Path, tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "finetune" / "demo.sh"), str(tmp_path / "demo")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stderr
    before, after = re.split(r"== fine-tuning ==", done.stdout)
    assert [f"> {question}" in part for part in (before, after) for question in QUESTIONS] == [True] * 6
    assert "Willow" not in before and after.count("Willow") >= 2 and "Paris" in after
    assert_is_the_logs(tmp_path / "demo")
