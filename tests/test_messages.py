"""Every sentence that the package says to a person, held against a stored table: none changes unseen.

A message that is bettered on purpose: `python tests/test_messages.py` writes the table anew; its difference belongs
into the same commit, and into CHANGELOG.md where a user could have met the old one.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "golden" / "messages.txt"
FEWEST_WORDS = 4  # less is a key, a flag or a format


def sentences(source: str) -> Iterator[str]:
    """The texts of a module that hold a sentence, `{}` where a value stands; docstrings and --help are not said."""
    tree = ast.parse(source)
    silent = {id(text) for node in ast.walk(tree) for text in _not_said(node)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in silent:
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent | inside
        ):
            text = node.value
        else:
            continue
        if len(text.split()) >= FEWEST_WORDS:
            yield " ".join(text.split())


def _not_said(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr):
            yield first.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "option":
        yield from ast.walk(node)


def current() -> list[str]:
    """Sorted, each once: a message may move to another module, and stands in the table all the same."""
    files = [
        path for folder in ("qwen_chat", "finetune", "fast_start") for path in (ROOT / folder).rglob("*.py")
    ]
    return sorted({text for path in files for text in sentences(path.read_text(encoding="utf-8"))})


def test_every_message_stands_in_the_table() -> None:
    stored = TABLE.read_text(encoding="utf-8").splitlines()
    now = current()
    assert sorted(set(now) - set(stored)) == [], "new or changed: run python tests/test_messages.py"
    assert sorted(set(stored) - set(now)) == [], "gone or changed: run python tests/test_messages.py"


def test_a_changed_message_would_be_seen() -> None:
    (text,) = sentences(
        'def f(x):\n    """Four words are here."""\n    raise E(f"{x}: no such file; expected one")\n'
    )
    assert text == "{}: no such file; expected one"


if __name__ == "__main__":
    TABLE.write_text("\n".join(current()) + "\n", encoding="utf-8")
