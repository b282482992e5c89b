"""What a run needs before anything is loaded: memory for each method and engine, disk, steps, tokens.

    python finetune/plan.py -m Qwen/Qwen2-7B-Instruct --ranks 8 --gpu_gib 80
    python finetune/plan.py -m Qwen/Qwen2-7B-Instruct --use_lora True --gpu_gib 24 --simulate True
    python finetune/plan.py --models        # which families are trained and served, and what shows it

In: a model (its config.json alone is read), any flag of finetune.py, and the data where it is known. Out: a
table of full / LoRA / Q-LoRA x none / ZeRO-2 / ZeRO-3 / offload x gradient checkpointing on and off, what fits
the devices seen here (or those that are named), and the flags to give. Ends with 0, or 2 where nothing fits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import plan


def main() -> int:
    return plan.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
