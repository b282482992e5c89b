"""Quantise a model by another project's library, in that library's own environment: nothing of ours is imported here.

    PYTHON_OF_THAT_ENVIRONMENT qwen_chat/export/worker.py JOB.json

In: a JSON file (`WorkerJob` in elsewhere.py): the library, its settings, the model's folder, the new one, token ids to
calibrate on, token ids with labels to measure the loss on. Out: the folder; as the last line on standard output
{"before": loss, "after": loss, "tokens": number of supervised tokens}.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any


def run_job() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(job["model"]).float()
    before, tokens = loss(lambda ids: model(input_ids=ids).logits, job["held_out"])
    after, _ = loss(MAKERS[job["to"]](job, model), job["held_out"])
    print(json.dumps({"before": before, "after": after, "tokens": tokens}))


def loss(logits_of: Callable[[Any], Any], held_out: list[dict[str, list[int]]]) -> tuple[float, int]:
    """Mean over the supervised tokens (label -100: none), in nats, and their number."""
    import torch

    total, count = 0.0, 0
    for one in held_out:
        labels = torch.tensor(one["labels"][1:])
        logits = torch.as_tensor(logits_of(torch.tensor([one["ids"]])))[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return (total / count if count else math.nan), count


def openvino(job: dict[str, Any], model: Any) -> Callable[[Any], Any]:
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    config = OVWeightQuantizationConfig(**job["settings"])
    made = OVModelForCausalLM.from_pretrained(job["model"], export=True, quantization_config=config)
    made.save_pretrained(job["folder"])
    return lambda ids: made(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def gptq(job: dict[str, Any], model: Any) -> Callable[[Any], Any]:
    import torch
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoTokenizer

    texts = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        for ids in job["calibration"]
    ]
    quantizer = GPTQQuantizer(dataset=texts, **job["settings"])
    torch.set_grad_enabled(True)
    made = quantizer.quantize_model(model, AutoTokenizer.from_pretrained(job["model"]))
    torch.set_grad_enabled(False)
    quantizer.save(made, job["folder"])
    return lambda ids: made(input_ids=ids).logits


def compressed(job: dict[str, Any], model: Any) -> Callable[[Any], Any]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    rows = Dataset.from_list(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["calibration"]]
    )
    oneshot(
        model=model,
        dataset=rows,
        recipe=[GPTQModifier(**job["settings"])],
        max_seq_length=max(map(len, job["calibration"])),
        num_calibration_samples=len(job["calibration"]),
    )
    model.save_pretrained(job["folder"], save_compressed=True)
    return lambda ids: model(input_ids=ids).logits


MAKERS = {"openvino": openvino, "gptq": gptq, "compressed": compressed}

if __name__ == "__main__":
    run_job()
