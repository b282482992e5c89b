"""Merge an adapter into its base, a layer at a time, and compare the two before the new folder is there.

    python finetune/merge_adapter.py --adapter finetune/io_file/output_data/demo -o merged

In: an adapter's folder (several with --weights), its base, some of the run's data. Out: a folder that every program
loads as it loads the base. The base stays unquantised, for Q-LoRA too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import merge


def main() -> int:
    return merge.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
