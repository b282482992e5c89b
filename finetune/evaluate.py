"""How good is a model, or an adapter, on conversations that it has not seen?

    python finetune/evaluate.py --adapter finetune/io_file/output_data/demo \
        -d finetune/io_file/input_data/example_eval_data.jsonl --compare base

In: held-out conversations. Out: loss, perplexity and token accuracy of the replies; where tools are offered,
how often the model called the right ones rightly, called without need, or did not call; confidence intervals,
a confusion table, the worst cases in full. What has been computed is kept (by the content of model and data),
so a run that was killed goes on, and the same question asked again is answered at once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import evaluate


def main() -> int:
    return evaluate.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
