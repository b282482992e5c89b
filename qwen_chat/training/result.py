"""What a run leaves: the adapter or model with its tokenizer and certificate, run.json, a report for a person.

In: a Session, the trainer that has run, its log. Out: a folder that `--adapter` or `-m` loads and whose
generation ends where the trained replies end.
"""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qwen_chat import hardware, models, place
from qwen_chat.certificate.lock import FormatLock, Replies
from qwen_chat.chat.format import ChatFormat
from qwen_chat.console import is_rank_zero, rank_zero
from qwen_chat.flags.run_options import Run
from qwen_chat.training import adapters, checkpoints, fused, memory_plan
from qwen_chat.training.before_after import GENERAL, HELD_OUT
from qwen_chat.training.greedy import replies
from qwen_chat.training.session import Session
from qwen_chat.training.step_log import StepLog
from qwen_chat.training.trainer import ChatTrainer

UNLEARNT = "nothing was learnt: every step ran at a rate of 0 (warming up); give --warmup_steps 0"
VERSIONS = ("torch", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes", "tokenizers")


def save(session: Session, trainer: ChatTrainer, initial: Mapping[str, torch.Tensor]) -> None:
    """Adapter or model, tokenizer with its template, generation config, format.lock: complete, on rank 0.

    initial: the adapter's first values (PiSSA); else empty.
    """
    run, fmt = session.run, session.fmt
    trainer.model_loss.remove()
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights: dict[str, torch.Tensor] | None = None  # the model has them
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        # ZeRO-3 has cut them up; of an adapter, those that were trained are put together.
        if hasattr(model, "peft_config"):
            import deepspeed

            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            with deepspeed.zero.GatheredParameters(list(trained.values())):
                weights = {name: p.detach().cpu().clone() for name, p in trained.items()}
        else:
            weights = trainer.accelerator.get_state_dict(trainer.deepspeed)
    if not is_rank_zero():
        return
    model.config.use_cache = True
    stop_where_trained(model, fmt)
    aside = session.folder / checkpoints.ASIDE
    aside.mkdir(exist_ok=True)
    if run.lora.use_lora:
        base = models.name_of(run.model.model, session.model_path)
        adapters.save_adapter(model, aside, base=base, initial=initial, state_dict=weights)
        model.generation_config.save_pretrained(aside)
    else:
        model.save_pretrained(aside, state_dict=weights)
        for file in models.PROCESSORS:  # what prepares pictures, which no step has changed
            if (session.model_path / file).is_file():
                shutil.copy2(session.model_path / file, aside / file)
    fmt.complete_tokenizer()
    fmt.tokenizer.save_pretrained(aside)
    # By the layers that were trained: a base as narrow as it is stored computes through them alone.
    certify(session, model, cut_up=weights is not None).write(aside)
    fused.remove(model)
    checkpoints.move_into(aside, session.folder)


def certify(session: Session, model: PreTrainedModel, *, cut_up: bool) -> FormatLock:
    """The certificate of the format that was trained, with this model's own replies where it is not `cut_up`."""

    def greedy(prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> Replies:
        if cut_up:
            return Replies((), "none: the model's weights are cut up over the ranks (ZeRO-3)")
        return replies(model, prompts, ends)

    name = models.name_of(session.run.model.model, session.model_path)
    base = {"name": name, "hash": str(session.shaped_by["model"])}
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    made = FormatLock.make(session.fmt, base=base, longest=context, greedy=greedy)
    rank_zero(f"format.lock: {len(made.entries)} prompts; greedy replies: {made.greedy.note}")
    return made


def stop_where_trained(model: PreTrainedModel, fmt: ChatFormat) -> None:
    """A generation config that stops where the trained replies stop, whatever the base's said."""
    config = model.generation_config
    old = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = list(dict.fromkeys([*fmt.stop_token_ids, *(t for t in old if t is not None)]))
    config.pad_token_id = fmt.tokenizer.pad_token_id


def record(session: Session, choices: Mapping[str, Any], decisions: Sequence[str]) -> dict[str, Any]:
    """What run.json holds from the start on: every option, the versions, the data."""
    run, data, verdict = session.run, session.data, session.verdict
    budget = {"fingerprint": data.fingerprint, "epoch_conversations": len(data.train)}
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    apart = {"held_out": data.held_out_json()}
    if data.general is not None:
        apart["general"] = data.general.summary.to_json()
    return {
        "state": "running",
        "shaped_by": dict(session.shaped_by),
        "choices": dict(choices),
        "plan": {"row": verdict.row, **verdict.need.to_json()},
        "method": run.method,
        "model": str(session.model_path),
        "options": run.as_dict(),
        "given": sorted(run.given),
        "preset": [asdict(choice) for choice in run.chosen],
        "decisions": [*(f"--preset {run.train.preset}: {choice}" for choice in run.chosen), *decisions],
        "warnings": list(session.warnings),
        "data": {**budget, **data.summary.to_json()},
        **{name: budget for name, budget in apart.items() if budget},
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def outcome(trainer: ChatTrainer, log: StepLog, evaluation: Mapping[str, float]) -> dict[str, Any]:
    """What run.json gets at the end: losses, token counts, times (of this start, where it was resumed)."""
    args, state = trainer.args, trainer.state
    whole = len(log.losses) == state.global_step  # else this start saw the end of it alone
    warnings = [*trainer.run_record.get("warnings", ()), *trainer.told]
    if whole and state.global_step and log.highest_rate == 0:
        warnings.append(UNLEARNT)
    best: dict[str, Any] = {"best_checkpoint": state.best_model_checkpoint}
    if state.best_model_checkpoint is not None:
        best["best"] = {
            "step": state.best_global_step,
            "metric": args.metric_for_best_model,
            "value": state.best_metric,
            "saved_step": state.best_global_step if args.load_best_model_at_end else state.global_step,
        }
    return {
        "state": "finished",
        "steps": state.global_step,
        "losses": {"first": log.losses[0], "last": log.losses[-1]} if log.losses else {},
        "tokens": log.tokens,
        "supervised_tokens": log.supervised,
        "seconds": round(log.seconds, 2),
        "tokens_per_s": round(log.tokens / max(log.seconds, 1e-9), 1),
        "peak_memory_gib": round(hardware.peak_memory() / memory_plan.GIB, 3),
        "highest_learning_rate": log.highest_rate if whole else None,
        "evaluation": dict(evaluation),
        **best,
        "warnings": warnings,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def report(run: Run, folder: Path, outcome: Mapping[str, Any]) -> str:
    """A few lines for a person: what came of it, and what to type next."""
    losses, evaluation = outcome["losses"], outcome["evaluation"]
    lines = [
        f"{outcome['steps']} steps, {outcome['tokens']:,} tokens in {outcome['seconds']:.0f} s"
        f" ({outcome['tokens_per_s']:,.0f} tokens/s)"
        + (f"; loss {losses['first']:.4f} -> {losses['last']:.4f}" if losses else "")
    ]
    if evaluation:
        lines.append(
            f"held out: loss {evaluation['eval_loss']:.4f}, perplexity {evaluation['eval_perplexity']:.2f}, "
            f"token accuracy {evaluation['eval_token_accuracy']:.1%}"
        )
    lines += [
        said for name, change in outcome.get("changes", {}).items() if (said := _what_moved(name, change))
    ]
    if outcome["steps"] and outcome.get("highest_learning_rate") == 0:
        lines.append(UNLEARNT)
    best = outcome.get("best")
    if best is not None:
        name, metric = Path(outcome["best_checkpoint"]).name, str(best["metric"]).removeprefix("eval_")
        same = best["step"] == best["saved_step"]
        lines.append(
            f"best on held-out data: {name} ({metric} {best['value']:.4f}); "
            + ("that is what is saved" if same else f"what is saved is step {best['saved_step']}")
        )
    flag = "--adapter" if run.lora.use_lora else "-m"
    lines += [
        f"saved in {folder}; now talk to it:",
        f"  {place.invocation('chat')} {flag} {shlex.quote(str(folder))}",
    ]
    return "\n".join(lines)


def _what_moved(name: str, change: Mapping[str, Any]) -> str:
    """What the run did to conversations that it did not learn, as one sentence; none of held-out ones whose loss
    before the first step is not known."""
    kind = {GENERAL: "general data", HELD_OUT: "held out"}[name]
    moved = change["difference"]
    if moved is None and name == HELD_OUT:
        return ""
    if moved is None:
        return (
            f"{kind}: loss {change['after']:.4f} after the last step; before the first it was not measured, as the"
            " run began without these conversations"
        )
    said = (
        f"{kind}: loss {change['before']:.4f} before the first step, {change['after']:.4f} after the last:"
        f" {moved['value']:+.4f} [{moved['low']:+.4f}, {moved['high']:+.4f}] (95 %, bootstrap over"
        f" {change['conversations']:,} conversations)"
    )
    if name == HELD_OUT:
        return said
    lost = (
        "some of what it knew is forgotten"
        if moved["low"] > 0
        else "nothing is forgotten that this could tell"
    )
    return f"{said}; {lost}"
