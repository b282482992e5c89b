"""Fine-tune a chat model on conversations: full, LoRA or Q-LoRA.

    qwen-chat tune -d conversations.jsonl --use_lora True

Without -m the small demo model is tuned. On several GPUs it runs one process for
each, or GPUS_PER_NODE of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_chat import errors, models
from qwen_chat.console import is_rank_zero, rank_zero, unless_checked
from qwen_chat.flags import run_problems
from qwen_chat.report.page import write_page
from qwen_chat.training import checkpoints, memory_plan, run_folder, stop_signal


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    stop_signal.die_with_parent()
    run = run_problems.read_run(argv, about=about)
    for note in run.notes:
        unless_checked(f"note: {note}")
    folder = run_folder.choose_folder(run)
    run_folder.check_usable(folder)
    model_path = models.resolve(run.model.model, for_training=True)

    # torch comes in here: --help, a wrong flag and a model that cannot be trained are answered at once
    from qwen_chat.data.mixture import first_example
    from qwen_chat.evaluation.scores import loss_changes
    from qwen_chat.training import before_after, ranks, rehearsal, result, session, tuned_model
    from qwen_chat.training.step_log import StepLog

    rehearsal.rehearse(run)
    shape = memory_plan.Shape.of(models.read_config(model_path))
    run_folder.check_disk(folder, memory_plan.disk_needed(shape, run))
    prepared = session.prepare(run, folder, model_path)
    if run.train.check:
        rank_zero("everything is in order, short of loading the model")
        return 0
    rank_zero("the first example (what is learnt is marked):")
    rank_zero(first_example(prepared.fmt.tokenizer, prepared.data, colour=sys.stderr.isatty()))

    joined = session.join(prepared)
    folder = joined.folder
    lock = checkpoints.lock(folder) if is_rank_zero() else None
    checkpoint, notes = ranks.from_rank_zero(lambda: run_folder.checkpoint(joined.before))
    tuned = tuned_model.build(joined)
    decisions = (*joined.decisions, *tuned.decisions, *joined.before.notes, *notes)
    for decision in decisions:
        rank_zero(decision)
    record = result.record(joined, tuned.choices, decisions)
    if is_rank_zero():
        run_folder.write_run_json(folder, record)

    unlearnt = before_after.BeforeAfter(joined)
    with StepLog(folder) as log:
        trainer = joined.trainer(tuned.model, record, log, unlearnt.ready)
        rank_zero(
            f"training into {folder}; stopped with Ctrl-C, the same command with -o goes on from its checkpoint"
        )
        finished = trainer.run(checkpoint)
    if not finished:
        step = trainer.state.global_step
        rank_zero(f"stopped after step {step}; the same command with -o {folder} goes on")
        ranks.leave()
        return stop_signal.STOPPED
    evaluation = unlearnt.end(trainer)
    result.save(joined, trainer, tuned.initial)
    if is_rank_zero():
        outcome = result.outcome(trainer, log, evaluation) | {"changes": loss_changes(unlearnt.losses)}
        run_folder.write_run_json(folder, record | outcome)
        leave_page(folder)
        rank_zero(result.report(joined.run, folder, outcome))
        if lock is not None:
            lock.release()
    ranks.leave()
    return 0


def leave_page(folder: Path) -> None:
    """The run's report; where there is no room for it, a line: the run is whole without it."""
    try:
        write_page(folder)
    except errors.OutputError as error:
        rank_zero(f"note: {error}")


if __name__ == "__main__":  # a rank that launch.py has torchrun start
    sys.exit(run_folder.tell_status(errors.run(lambda: main(sys.argv[1:]))))
