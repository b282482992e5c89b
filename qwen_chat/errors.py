"""Every error that a person can meet, and how a script ends on one.

In: an exception. Out: one line on standard error (what, where, cure) and an exit status: 2 for bad input, 1 where
something went wrong after it began.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_chat.place import pip_install


class ChatError(Exception):
    """Bad input, told in one line: what was found, where, and the cure."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one line of a data file."""

    where: str  # "file:line"
    message: str  # "field: what was found; what was expected; cure"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class DataError(ChatError):
    """A data file that cannot be used. `problems` holds what was listed, `total` counts all that were found."""

    def __init__(self, message: str, problems: Sequence[Problem] = (), total: int | None = None) -> None:
        self.problems = tuple(problems)
        self.total = len(self.problems) if total is None else total
        lines = [message, *(f"  {problem}" for problem in self.problems)]
        if self.total > len(self.problems) > 0:
            lines.append(f"  ... and {self.total - len(self.problems)} more")
        super().__init__("\n".join(lines))


class FormatError(ChatError):
    """A conversation that the chat template cannot carry. `message`: the number of the one at fault, if it is one."""

    def __init__(self, text: str, message: int | None = None) -> None:
        self.message = message
        super().__init__(text)


class OptionError(ChatError):
    """A flag, or a combination of flags, that cannot work; the message names the flag and the cure."""


class ModelError(ChatError):
    """A model, tokenizer or adapter that is missing, damaged or of the wrong kind."""


class OutputError(ChatError):
    """An output folder, disk or lock that stands in the way."""


class MissingDependency(ChatError):
    """An optional package that is not installed."""

    def __init__(
        self, package: str, needed_for: str, install: str | None = None, *, extra: str | None = None
    ) -> None:
        """install: what pip is given instead of the package's name. extra: the wheel's that brings it."""
        cure = pip_install(install or package, extra)
        super().__init__(f"{needed_for} needs the package '{package}'; run: {cure}")


class ToolError(ChatError):
    """A tool that cannot be described, found or run."""


class CheckpointError(ChatError):
    """A checkpoint that is damaged or belongs to another run."""


class TrainingError(ChatError):
    """A run that went wrong after it began (a loss that is not a number, a full disk, a lost rank)."""

    exit_status = 1


class ServiceError(ChatError):
    """A request that failed, or a service that cannot be reached."""

    exit_status = 1


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of a message, cut: libraries add paragraphs of advice for their own users."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def printable(text: str, longest: int = 500) -> str:
    """A text of somebody else's for a terminal: one line, no control characters or lone surrogates, not endless."""
    if len(text) > longest:
        text = f"{text[: longest - 100]} ... {text[-90:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run(main: Callable[[], int | None]) -> int:
    """Run a script's `main`; return its exit status. Errors of ours are one line, not a traceback."""
    try:
        return main() or 0
    except ChatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has left: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(
            f"error: {printable(str(error.filename), 200)}: too long for a name; give another",
            file=sys.stderr,
        )
        return 2
