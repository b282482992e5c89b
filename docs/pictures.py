"""The pictures of the two READMEs, made anew: what was measured, and what of a conversation is learnt.

    python docs/pictures.py

In: benchmarks/results/, and the function-calling example that each README shows. Out: docs/pictures/*.svg; a picture
says nothing that these do not. Each is light text on a dark ground, as a terminal is, and reads the same on any page.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
READMES = {"": ROOT / "README.md", ".zh-CN": ROOT / "README.zh-CN.md"}
WIDTH, LINE = 900, 20  # pixels
COLUMNS = 100  # letters in a line of the conversation; a Chinese one counts twice
BAR, NAMES = 500, 190  # the longest bar, and the room for names to its left
WORDS = {
    "": {
        "chat": "Training, LoRA, Qwen2.5-0.5B's shape, chat: tokens/s",
        "tools": "Training, LoRA, Qwen2.5-0.5B's shape, tool conversations: tokens/s",
        "float": "Serving the demo model in float32, 8 at once: tokens/s",
        "whole": "Serving the demo model in int8, 8 at once: tokens/s",
        "ours": "this toolkit",
    },
    ".zh-CN": {
        "chat": "训练，LoRA，Qwen2.5-0.5B 的形状，普通对话：token/s",
        "tools": "训练，LoRA，Qwen2.5-0.5B 的形状，工具对话：token/s",
        "float": "服务演示模型，float32，8 路并发：token/s",
        "whole": "服务演示模型，int8，8 路并发：token/s",
        "ours": "本工具",
    },
}
PEERS = {
    "float": {
        "ours": "ours",
        "llama-server-f32": "llama-server",
        "vllm": "vLLM",
        "openvino-f32": "OpenVINO GenAI",
    },
    "whole": {
        "ours-int8": "ours",
        "llama-server-q8": "llama-server Q8_0",
        "openvino-int8": "OpenVINO GenAI int8",
    },
}
Group = tuple[str, list[tuple[str, float]]]


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, text in pictures():
        (PICTURES / name).write_text(text, encoding="utf-8")


def pictures() -> Iterator[tuple[str, str]]:
    """(file name, SVG) of every picture."""
    from qwen_chat import demo_model

    tokenizer = demo_model.qwen_tokenizer("qwen2_5")
    for language, readme in READMES.items():
        yield f"measured{language}.svg", bars(measured(WORDS[language]))
        yield f"learnt{language}.svg", learnt(tokenizer, example(readme))


def measured(words: dict[str, str]) -> list[Group]:
    """Tokens a second of ours and of each peer in the same arithmetic, from the committed records."""
    train = json.loads((RESULTS / "train.json").read_text("utf-8"))["rows"]
    serve = json.loads((RESULTS / "serve.json").read_text("utf-8"))["rows"]
    groups: list[Group] = []
    for name, data in (("chat", "a"), ("tools", "b")):
        row = next(row for row in train if (row["data"], row["against"]) == (data, "trl"))
        groups.append(
            (words[name], [(words["ours"], row["tokens_per_s"]), ("TRL", row["tokens_per_s_theirs"])])
        )
    speed = {(row["server"], row["model"], row["concurrency"]): row["tokens_per_s"] for row in serve}
    for kind, peers in PEERS.items():
        found = [
            (words.get(name, name), speed[server, "demo", 8])
            for server, name in peers.items()
            if (server, "demo", 8) in speed
        ]
        groups.append((words[kind], found))
    return groups


def bars(groups: Sequence[Group]) -> str:
    """Each group with a scale of its own: a title, then a bar for each name."""
    parts, y = [], 10
    for title, found in groups:
        y += LINE
        parts.append(f'<text x="16" y="{y}" class="title">{escape(title)}</text>')
        longest = max(value for _, value in found)
        for number, (name, value) in enumerate(found):
            y += LINE + 2
            wide = BAR * value / longest
            kind = "peer" if number else "ours"
            parts += [
                f'<text x="{NAMES}" y="{y}" class="name">{escape(name)}</text>',
                f'<rect x="{NAMES + 10}" y="{y - 13}" width="{wide:.1f}" height="16" rx="2" class="{kind}"/>',
                f'<text x="{NAMES + 18 + wide:.1f}" y="{y}">{value:,.0f}</text>',
            ]
        y += LINE // 2
    return svg(parts, y + 10)


def example(readme: Path) -> dict[str, Any]:
    """The conversation with function calling that a README shows."""
    blocks = re.findall(r"^```json\n(.*?)^```", readme.read_text("utf-8"), re.M | re.S)
    return next(line for line in map(json.loads, blocks) if "tools" in line)


def learnt(tokenizer: Any, conversation: dict[str, Any]) -> str:
    """The text that a Qwen2.5 model reads of a conversation; what it learns is green."""
    from qwen_chat.chat.format import ChatFormat
    from qwen_chat.conversation import Conversation

    (encoded,) = ChatFormat(tokenizer).encode_conversation(Conversation.from_openai(conversation))
    edges = [0, *(edge for span in encoded.spans for edge in span), len(encoded.input_ids)]
    pieces = [
        (tokenizer.decode(encoded.input_ids[begin:end], skip_special_tokens=False), number % 2 == 1)
        for number, (begin, end) in enumerate(pairwise(edges))
    ]
    lines = list(wrapped(pieces))
    parts = []
    for number, line in enumerate(lines):
        spans = "".join(
            f'<tspan class="{"learnt" if is_learnt else "read"}">{escape(text, quote=False)}</tspan>'
            for text, is_learnt in line
        )
        parts.append(f'<text x="16" y="{30 + number * LINE}" xml:space="preserve">{spans}</text>')
    return svg(parts, 24 + len(lines) * LINE)


def wrapped(pieces: Sequence[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Lines of at most COLUMNS letters, each as its pieces."""
    line: list[tuple[str, bool]] = []
    used = 0
    for text, is_learnt in pieces:
        for letter in text:
            wide = 2 if unicodedata.east_asian_width(letter) in "WF" else 1
            if letter == "\n" or used + wide > COLUMNS:
                yield line
                line, used = [], 0
            if letter == "\n":
                continue
            used += wide
            if line and line[-1][1] == is_learnt:
                line[-1] = (line[-1][0] + letter, is_learnt)
            else:
                line.append((letter, is_learnt))
    if line:
        yield line


def svg(parts: Sequence[str], height: int) -> str:
    style = (
        "text{font:14px ui-monospace,Menlo,Consolas,'Noto Sans Mono CJK SC',monospace;fill:#c9d1d9}"
        ".title{font-weight:bold;fill:#fff}.name{text-anchor:end}.ours{fill:#3fb950}.peer{fill:#6e7681}"
        ".read{fill:#8b949e}.learnt{fill:#3fb950;font-weight:bold}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<style>{style}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#0d1117"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
