"""The pieces of HTML that a page is made of, each text in two languages.

In: texts, which are escaped already. Out: HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def both(english: str, chinese: str) -> str:
    """Text in the language that is chosen."""
    return f'<span class="en">{english}</span><span class="zh">{chinese}</span>'


def figure(value: object, form: str = ",.4g") -> str:
    """A number; a dash where there is none."""
    return format(value, form) if isinstance(value, (int, float)) else "–"


def section(english: str, chinese: str, body: str) -> str:
    """A heading and what stands below it; nothing where there is nothing."""
    return f"<h2>{both(english, chinese)}</h2>{body}" if body else ""


def captioned(picture: str, caption: str) -> str:
    """A picture with what it shows; nothing of none."""
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>" if picture else ""


def listed(lines: Iterable[object]) -> str:
    """Plain texts as a list; nothing of none."""
    items = "".join(f"<li>{escape(str(line))}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def as_table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Cells in rows; where the screen is too narrow it scrolls by itself."""
    heading = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{heading}{body}</table></div>'
