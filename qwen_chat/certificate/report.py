"""What a replay found, for a person and for a program.

In: a Outcome, and what it is about. Out: lines, in colour on a terminal; or one JSON object.
"""

from __future__ import annotations

from dataclasses import asdict

from qwen_chat.certificate.causes import Finding, FirstDifference
from qwen_chat.certificate.lock import FormatLock
from qwen_chat.certificate.replay import Outcome
from qwen_chat.conversation import Json

GREEN, RED, YELLOW, DIM, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


def lines(verdict: Outcome, lock: FormatLock, *, colour: bool) -> list[str]:
    """What differs first, then warnings, what agrees, what cannot be seen."""

    def paint(code: str, text: str) -> str:
        return f"{code}{text}{PLAIN}" if colour else text

    found = []
    for finding in sorted(verdict.findings, key=lambda one: one.level):
        code = RED if finding.level == "differs" else YELLOW
        found.append(f"{paint(code, finding.level)}  {finding.cause}{where_it_is(finding, lock)}")
        if finding.first is not None:
            found += difference_lines(finding.first, colour=colour)
        found.append(f"         {finding.cure}")
    found += [f"{paint(GREEN, 'agrees')}   {line}" for line in verdict.agrees]
    found += [f"{paint(DIM, 'unseen')}   {line}" for line in verdict.unseen]
    return found


def difference_lines(first: FirstDifference, *, colour: bool) -> list[str]:
    """The first byte that differs, in both texts; what is equal before it is dim."""
    how = "" if first.seen else " (as this cause would write it: the number of tokens fits)"
    before = repr(first.before)[1:-1]
    expected, got = repr(first.expected)[1:-1], repr(first.found)[1:-1]
    if colour:
        before, expected, got = f"{DIM}{before}{PLAIN}", f"{GREEN}{expected}{PLAIN}", f"{RED}{got}{PLAIN}"
    else:
        before = f"{before}[]" if not (expected and got) else f"{before}|"
    return [
        f"         conversation {first.number}, byte {first.byte}{how}",
        f"         trained: {before}{expected}",
        f"         served:  {before}{got}",
    ]


def where_it_is(finding: Finding, lock: FormatLock) -> str:
    if not finding.numbers:
        return ""
    kinds: dict[str, int] = {}
    for k in finding.numbers:
        kind = lock.entries[k].case.kind
        kinds[kind] = kinds.get(kind, 0) + 1
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f": {len(finding.numbers)} prompts ({told})"


def to_json(verdict: Outcome, *, url: str, model: str, software: str, channel: str) -> Json:
    """One object: `status`, `findings` with their first difference, `agrees`, `unseen`."""
    return {
        "status": verdict.status,
        "url": url,
        "model": model,
        "software": software,
        "channel": channel,
        "findings": [asdict(finding) for finding in verdict.findings],
        "agrees": list(verdict.agrees),
        "unseen": list(verdict.unseen),
    }
