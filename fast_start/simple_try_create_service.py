"""Serve a model over HTTP, in OpenAI's protocol.

    python fast_start/simple_try_create_service.py
    python fast_start/simple_try_create_service.py -m Qwen/Qwen2-7B-Instruct --adapter mine=DIR --port 8000

In: a model (a folder, a hub name, or nothing: the demo model, or what an adapter names), adapters.
Out: POST /v1/chat/completions and its siblings (docs/service.md) until Ctrl-C or SIGTERM; one JSON line a
request in fast_start/fast_api_svc.log. `--engine vllm` hands the process over to vLLM. Without a key it
answers this machine only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import serve


def main() -> int:
    return serve.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
