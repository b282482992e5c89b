"""TRL's SFTTrainer over prompts and completions; bench_function_calling.py starts it in TRL's environment.

In: one JSON object as the only argument (model, data, output and the benchmark's settings). Out: an adapter
in `output`. Nothing of this toolkit is imported: what runs is TRL as its users run it, with the loss on the
completion.
"""

import json
import sys
from typing import Any


def main() -> int:
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    s: dict[str, Any] = json.loads(sys.argv[1])
    on_cpu = not torch.cuda.is_available()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(s["model"], dtype="float32" if on_cpu else "bfloat16"),
        processing_class=AutoTokenizer.from_pretrained(s["model"]),
        train_dataset=datasets.load_dataset("json", data_files=s["data"], split="train"),
        peft_config=LoraConfig(
            r=s["rank"],
            lora_alpha=s["alpha"],
            lora_dropout=s["dropout"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=s["output"],
            num_train_epochs=s["epochs"],
            # The same optimizer step, a conversation at a time: its fastest here, where several only pad.
            per_device_train_batch_size=1,
            gradient_accumulation_steps=s["batch"] * s["accumulation"],
            learning_rate=s["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=0.01,
            adam_beta2=0.95,
            max_length=2048,
            bf16=not on_cpu,
            gradient_checkpointing=False,
            use_cpu=on_cpu,
            seed=s["seed"],
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model(s["output"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
