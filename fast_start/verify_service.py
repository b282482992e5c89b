"""Hold a server to the format that a model was trained in.

    python fast_start/verify_service.py --url http://127.0.0.1:8000 --lock finetune/io_file/output_data/demo

In: a chat service (ours, vLLM, llama-server, transformers serve, Ollama, LM Studio, SGLang), and the folder of the
model that it serves, with its format.lock. Out: what agrees, what differs from the first byte on and why, what cannot
be seen there. Status 0: it agrees; 1: it differs; 2: it could not be asked.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import verify


def main() -> int:
    return verify.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
