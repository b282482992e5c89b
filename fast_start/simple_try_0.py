"""Load a model, and an adapter, and talk to it.

    python fast_start/simple_try_0.py --prompt "Who are you?"
    python fast_start/simple_try_0.py --adapter finetune/io_file/output_data/RUN      # no prompt: a chat

In: a question, or a chat typed in the terminal (/new begins again, /exit ends). Out: the answer alone on
standard output, as it is written; everything else, a thought too, goes to standard error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import chat


def main() -> int:
    return chat.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
