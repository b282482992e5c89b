"""Write a model as other programs serve it: a GGUF file, Ollama's Modelfile, OpenVINO's, GPTQ's or
compressed weights, a command for vLLM, a folder for a hub.

    python finetune/export.py --adapter finetune/io_file/output_data/demo --to gguf --type q8_0 -o exported

In: a model's folder, or an adapter's (merged first, and compared). Out: a new folder. Nothing is sent anywhere.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import export


def main() -> int:
    return export.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
