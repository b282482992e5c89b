"""Fine-tune a chat model on conversations: full, LoRA or Q-LoRA.

    python finetune/finetune.py -d finetune/io_file/input_data/example_data.jsonl --use_lora True

Without -m the small demo model is tuned. For several processes use finetune.sh; it passes every flag on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import tune
from qwen_chat.training import run_folder


def main() -> int:
    return tune.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(run_folder.tell_status(errors.run(main)))
