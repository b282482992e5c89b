"""Call the service with requests, plain or streamed.

    python fast_start/try_call_service.py --prompt "What is the capital of France?" --stream

In: the service's address and a question. Out: the answer on standard output, token counts on standard error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import call


def main() -> int:
    return call.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
