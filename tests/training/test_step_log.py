"""What a person sees of a run, and when it says that the run will end."""

import time
from types import SimpleNamespace

import pytest
import torch

from qwen_chat.training import step_log
from qwen_chat.training.pulse import Pulse, StepPlace
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "ends about 10:00, in 0 s"),
        (89, "ends about 10:01, in 89 s"),
        (600, "ends about 10:10, in 10 min"),
        (4 * 3600 + 1200, "ends about 14:20, in 4 h 20 min"),
        (20 * 3600, "ends about 2026-05-07 06:00, in 20 h 0 min"),
        (75 * 3600, "ends about 2026-05-09 13:00, in 3 days 3 h"),
    ],
)
def test_when_it_ends(seconds, told):
    now = time.mktime((2026, 5, 6, 10, 0, 0, 0, 0, -1))
    assert step_log.ending(seconds, now) == told


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_row_is_told_forward_and_back(checkpointing):
    model = tiny_model("qwen2", checkpointing=checkpointing, lora=True).train()
    places: list[StepPlace] = []
    pulse = Pulse(model, 2, places.append)
    ids = torch.arange(7)[None]
    for _ in range(2):
        pulse.begin_row()
        model(input_ids=ids).logits.sum().backward()
    with torch.no_grad():
        model(input_ids=ids)
    assert [(p.row, p.layer, p.back) for p in places] == [
        (row, layer, back) for row in (1, 2) for layer, back in ((1, False), (2, False), (2, True), (1, True))
    ]
    assert [round(p.share, 3) for p in places] == [0.083, 0.167, 0.333, 0.5, 0.583, 0.667, 0.833, 1.0]
    assert str(places[-2]) == "row 2 of 2, backward, layer 2 of 2"


@pytest.mark.parametrize("terminal", [False, True], ids=["a file", "a terminal"])
def test_a_step_that_takes_hours_tells_where_it_is_and_when_the_run_ends(
    terminal, tmp_path, monkeypatch, capsys
):
    """16 rows of 10 minutes a step, 3 steps: the first lines tell the place alone, later ones the end too."""
    now = [1000.0]
    noon = time.mktime((2026, 5, 6, 12, 0, 0, 0, 0, -1))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(step_log.time, "time", lambda: noon + now[0] - 1000)
    monkeypatch.setattr(step_log.sys.stderr, "isatty", lambda: terminal)
    log = step_log.StepLog(tmp_path)
    log.on_train_begin(
        SimpleNamespace(disable_tqdm=False), SimpleNamespace(global_step=0, max_steps=3), SimpleNamespace()
    )
    told = []
    for row in (1, 9):
        for layer in (1, 14, 28):
            now[0] = 1000 + 600 * (row - 1) + 600 * layer / 28 / 3
            log.place(StepPlace(row, 16, layer, 28, back=False))
            log.place(StepPlace(row, 16, layer, 28, back=False))  # at once: not told twice
            told.append(log.bar.postfix if terminal else capsys.readouterr().err)
    log.__exit__()
    where = "" if terminal else "step 1 of 3: "
    assert told[2].strip() == f"{where}row 1 of 16, forward, layer 28 of 28"
    assert told[5].strip() == f"{where}row 9 of 16, forward, layer 28 of 28, ends about 20:00, in 6 h 37 min"
