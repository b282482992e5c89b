"""A run as a page: what it learnt from, how it went, what came of it; several runs beside each other.

    python finetune/report.py finetune/io_file/output_data/demo
    python finetune/report.py finetune/io_file/output_data/demo --samples 10     # asked before and after tuning
    python finetune/report.py RUN_A RUN_B                                       # compared.html

In: folders of runs, finished or not. Out: one HTML file that needs no network: `report.html` in the run's folder with
the loss as `loss.png` beside it, `compared.html` here for several, or where -o says. Training writes it by itself,
without samples: they take a model's time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import report


def main() -> int:
    return report.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
