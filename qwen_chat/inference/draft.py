"""Drafts: tokens that a row will probably say next, computed in the same step as its last one.

In: a row's tokens, prompt and reply, as they come. Out: what followed the same tokens before, as far as it pays.

A draft changes no reply: the sampler chooses at each place as ever, and the draft counts only where it is what was
chosen (engine.py). It can cost time alone. So a `Drafter` checks its guess at every token, tried or not, and knows how
often a guess comes true after how long a repetition; and a `StepCost` measures what one more token costs a step.
"""

from __future__ import annotations

from collections.abc import Callable

MOST = 16  # drafts of one row in a step
JUMP = 64  # tokens of one row that its grammar forces, between two steps
_LONGEST = 8  # repeated tokens that are told apart
_TRIED = 8  # places that a repetition is sought at
# How often a guess is expected to come true after 2, 3, ... repeated tokens, until the row has shown its own.
_FIRST_RATES = (0.0, 0.0, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
_LEARNING = 0.1  # the newest guess's part in its rate
# A draft is tried where it is expected to bring this much more than it costs.
_MARGIN = 1.25
_SMALL_STEP = 64  # tokens
_FADING = 0.98  # a step's part in the fit after another


class Drafter:
    """Guesses of one row: what followed where most of its last tokens stood before, the newest of such places."""

    def __init__(self, tokens: list[int]) -> None:
        """tokens: the row's own list, which grows; `see` is called after each token."""
        self._tokens = tokens
        self._newest: dict[tuple[int, int], int] = {}  # where what followed two tokens lies
        self._older = [0, 0]  # for each place, the one before it that followed the same two
        self._rates = list(_FIRST_RATES)
        self._source = 0  # where the guess lies; 0: nowhere
        self._repeated = 0  # how many tokens before it are the row's last
        for end in range(2, len(tokens)):
            self._note(end)
        self._find()

    def see(self) -> None:
        """A token was added: was it what would have been guessed?"""
        if self._source:
            hit = self._tokens[self._source] == self._tokens[-1]
            self._rates[self._repeated] += _LEARNING * (hit - self._rates[self._repeated])
            self._source = self._source + 1 if hit else 0
            self._repeated = min(self._repeated + 1, _LONGEST)
        if self._source:
            self._note(len(self._tokens))
        else:
            self._find()

    def guess(self, room: int, pays: Callable[[float], bool]) -> list[int]:
        """The next tokens, at most `room`; each is asked for with the probability that it and all before come true."""
        drafts: list[int] = []
        if self._source:
            distance = len(self._tokens) - self._source
            chance, repeated = 1.0, self._repeated
            while len(drafts) < min(room, MOST):
                chance *= self._rates[repeated]
                if not pays(chance):
                    break
                place = len(drafts)
                drafts.append(
                    drafts[place - distance] if place >= distance else self._tokens[place - distance]
                )
                repeated = min(repeated + 1, _LONGEST)
        return drafts

    def _note(self, end: int) -> None:
        """What follows the first `end` tokens follows the last two of them."""
        pair = self._tokens[end - 2], self._tokens[end - 1]
        self._older.append(self._newest.get(pair, 0))
        self._newest[pair] = end

    def _find(self) -> None:
        """Where the most of the row's last tokens stood before."""
        tokens, end = self._tokens, len(self._tokens)
        if end < 2:
            return
        self._note(end)
        place, self._repeated = self._older[end], 1
        for _ in range(_TRIED):
            if not place or self._repeated == _LONGEST:
                return
            same, most = 2, min(_LONGEST, place)
            while same < most and tokens[place - same - 1] == tokens[end - same - 1]:
                same += 1
            if same > self._repeated:
                self._source, self._repeated = place, same
            place = self._older[place]


class StepCost:
    """Seconds of a step as a + b x its tokens, fitted to the newest steps.

    Until steps of different size were seen, and a little afterwards, b is taken to be an eighth of a.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # weight, tokens, tokens squared, seconds, tokens x seconds

    def observe(self, tokens: int, seconds: float) -> None:
        """A step was made. Large ones (prompts) say nothing of small ones."""
        if tokens <= _SMALL_STEP:
            new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
            self._sums = [_FADING * old + one for old, one in zip(self._sums, new, strict=True)]

    def bet(self, rows: int) -> Callable[[float], bool]:
        """For a step of one token each of `rows`: whether one more pays that comes true with a given probability.

        It pays where it raises the tokens expected in a second; those that pay are counted in.
        """
        a, b = self._line()
        expected, seconds = float(rows), a + b * rows

        def pays(chance: float) -> bool:
            nonlocal expected, seconds
            if chance * seconds <= _MARGIN * b * expected:
                return False
            expected, seconds = expected + chance, seconds + b
            return True

        return pays

    def _line(self) -> tuple[float, float]:
        weight, tokens, squares, seconds, products = self._sums
        if not weight:
            return 8.0, 1.0
        tokens, seconds = tokens / weight, seconds / weight
        assumed = seconds / (tokens + 8)
        covariance, variance = products / weight - tokens * seconds, squares / weight - tokens * tokens
        b = min(max((covariance + assumed) / (variance + 1), assumed / 8), seconds / tokens)
        return seconds - b * tokens, b
