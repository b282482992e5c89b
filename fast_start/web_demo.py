"""A chat page in the browser, in Chinese and English: a client of the service.

    python fast_start/simple_try_create_service.py &
    python fast_start/web_demo.py --url http://127.0.0.1:8000

In: the service's address. Out: a page on http://127.0.0.1:7860 that streams answers, with a picker for models
and adapters, a system prompt, sampling, and example tools whose calls and results are shown. Needs gradio
(pip install gradio). Nothing is sent to anybody but the service, and nothing is loaded from elsewhere: the
browser is told so too (POLICY), since an answer may hold pictures and forms that point anywhere.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.cli import page


def main() -> int:
    return page.main(sys.argv[1:], about=str(__doc__))


if __name__ == "__main__":
    sys.exit(errors.run(main))
