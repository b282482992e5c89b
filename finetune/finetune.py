"""Fine-tune a chat model on conversations: full, LoRA or Q-LoRA.

    python finetune/finetune.py -d finetune/io_file/input_data/example_data.jsonl --use_lora True

Without -m the small demo model is tuned. For several processes use finetune.sh; it passes every flag on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors, models
from qwen_chat.cli import run_options
from qwen_chat.console import is_rank_zero, rank_zero
from qwen_chat.training import checkpoints, memory_plan, run_folder


def main() -> int:
    checkpoints.die_with_parent()
    run = run_options.read_run(sys.argv[1:], about=__doc__ or "")
    for note in run.notes:
        rank_zero(f"note: {note}")
    folder = run_folder.choose(run)
    run_folder.check(folder)

    path = models.resolve(run.model.model, for_training=True)

    # torch comes in here: --help, a wrong flag and a model that cannot be trained are answered at once
    from qwen_chat.chat.format import ChatFormat
    from qwen_chat.training import probe, rehearsal
    from qwen_chat.training import trainer as training_trainer

    rehearsal.rehearse(run)
    run_folder.check_disk(
        folder, memory_plan.disk_needed(memory_plan.Shape.of(models.read_config(path)), run)
    )
    tokenizer = models.load_tokenizer(path, trust_remote_code=run.model.trust_remote_code)
    fmt = ChatFormat(tokenizer, tool_style=run.data.tool_style, language=run.data.tool_language)

    data = training_trainer.read_data(run, fmt)
    shaped_by = run_folder.shaped_by(run, data.fingerprint, path)
    before = run_folder.resume(run, folder, shaped_by)
    rank_zero(data.describe())
    verdict = training_trainer.plan(run, path, data)
    if run.train.check:
        rank_zero("everything is in order, short of loading the model")
        return 0
    rank_zero("the first example (what is learnt is marked):")
    rank_zero(training_trainer.first_example(tokenizer, data, colour=sys.stderr.isatty()))

    args, session = training_trainer.start(run, folder, data, verdict, before)
    folder = session.folder
    lock = checkpoints.Lock.take(folder) if is_rank_zero() else None
    checkpoint, notes = training_trainer.share(run_folder.checkpoint(before) if is_rank_zero() else None)
    loaded = training_trainer.load(run, path, args)
    model, adapter, initial = training_trainer.wrap(run, loaded.model, tokenizer, args)
    fusing = training_trainer.fuse(model, args, session.choices)
    proven = probe.check(model, run.train.layout)
    decisions = (*session.decisions, *loaded.decisions, *adapter, *fusing, proven, *before.notes, *notes)
    for decision in decisions:
        rank_zero(decision)

    record = training_trainer.record(run, shaped_by, data, decisions, path, session.choices, verdict)
    if is_rank_zero():
        run_folder.write_run(folder, record)
    log = training_trainer.StepLog(folder)
    trainer = training_trainer.trainer(run, args, model, tokenizer, data, log)
    rank_zero(
        f"training into {folder}; stopped with Ctrl-C, the same command with -o goes on from its checkpoint"
    )
    trainer.record = record
    if not training_trainer.train(trainer, log, checkpoint):
        rank_zero(
            f"stopped after step {trainer.state.global_step}; the same command with -o {folder} goes on"
        )
        training_trainer.leave()
        return checkpoints.STOPPED
    evaluation = trainer.evaluate() if data.held_out is not None else {}
    training_trainer.save(trainer, run, fmt, folder, models.name_of(run.model.model, path), initial)

    if is_rank_zero():
        outcome = training_trainer.outcome(trainer, log, evaluation)
        run_folder.write_run(folder, record | outcome)
        rank_zero(training_trainer.report(run, folder, outcome))
        if lock is not None:
            lock.release()
    training_trainer.leave()
    return 0


if __name__ == "__main__":
    sys.exit(run_folder.tell_status(errors.run(main)))
