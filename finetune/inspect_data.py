"""Look at data before it costs a run: is every line good, what will be learnt, how long is it?

    python finetune/inspect_data.py -d finetune/io_file/input_data/example_data.jsonl --show 2

In: data files and the model (for its tokenizer and chat template). Out: every problem as
`file:line: message`, the token budget, the first conversations coloured by what is learnt, a histogram of
their lengths. What is tokenised here is kept: a run with the same options does not tokenise again. Ends with
0 (good) or 2 (bad data).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import check


def main() -> int:
    return check.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
