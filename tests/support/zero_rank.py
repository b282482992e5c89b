"""One rank of a real run under DeepSpeed, in main memory, whose tensors are counted.

In: a stage, "full" or "lora", tokens of a row, layers of the demo model's shape; the launcher's variables.
Out: one line, the peak of live bytes from the third step on.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_chat import demo_model
from qwen_chat.flags.run_options import LoraArguments
from qwen_chat.training import adapters, attention, ranks
from qwen_chat.training.loss import ModelLoss
from qwen_chat.training.stand_in import StandIn

STEPS = 3


def settings(stage: int, hidden: int) -> dict[str, Any]:
    """DeepSpeed's file as finetune/ds_config_zero*.json with transformers' values for "auto"."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    zero |= {"reduce_bucket_size": hidden * hidden}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": int(0.9 * hidden * hidden)}
        zero |= {"stage3_param_persistence_threshold": 10 * hidden, "stage3_max_live_parameters": 2 * 10**7}
        zero |= {"stage3_max_reuse_distance": 2 * 10**7}
    return zero


def main(stage: int, method: str, row: int, layers: int) -> int:
    ranks.start_deepspeed(False)
    device = StandIn("cpu")
    with device:
        config = AutoConfig.from_pretrained(demo_model.ensure(), num_hidden_layers=layers)
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention.register()
        )
        if method == "lora":
            model = adapters.wrap(
                model, LoraArguments(use_lora=True, lora_dropout=0, trainable_tokens=()), None
            ).model
        for tensor in (*model.parameters(), *model.buffers()):
            device.count(tensor)
        loss = ModelLoss(model)
        learnt = [p for p in model.parameters() if p.requires_grad]
        file = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": settings(stage, model.config.hidden_size),
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(learnt, fused=True), config=file
        )
        ids = torch.arange(row)[None] % 1000
        batch = {
            "input_ids": ids,
            "position_ids": torch.arange(row)[None],
            "segments": torch.tensor([[0, row, row]]),
        }
        batch |= {"logits_to_keep": torch.arange(row), "labels": ids, "shift_labels": ids}
        for step in range(2 * STEPS):
            if step == 4:
                device.reset_peak()
            result = loss(engine, batch)
            engine.backward(result.loss_sum / row)
            del result
            engine.step()
        peak = device.peak
    if engine.global_rank == 0:
        print(json.dumps({"peak": peak}), flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
