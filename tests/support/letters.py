"""A format without a tokenizer: one token a character."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwen_chat.chat.encoded import Encoded
from qwen_chat.conversation import Conversation
from qwen_chat.errors import FormatError


@dataclass
class Letters:
    """A format of one token a character, between 1 and 2; what the assistant says is learnt, with its 2.

    A text with "bad" in it is refused; `turns` gives one sequence a turn; tools cost one token each.
    """

    fingerprint: str = "letters"
    turns: bool = False
    asked: int = 0
    audited: int = 0

    def audit(self, conversations: Iterable[Conversation]) -> None:
        self.audited = len(list(conversations))

    def encode_many(
        self, conversations: Sequence[Conversation], train_on: str = "all"
    ) -> list[list[Encoded]]:
        self.asked += len(conversations)
        return [self._one(conversation, train_on) for conversation in conversations]

    def _one(self, conversation: Conversation, train_on: str) -> list[Encoded]:
        if conversation.document is not None:
            ids = [*map(ord, conversation.document), 3]
            return [Encoded(ids, [(0, len(ids))])]
        ids, spans, made = [9] * len(conversation.tools), [], []
        for k, message in enumerate(conversation.messages):
            if "bad" in message.content:
                raise FormatError(f"message {k}: bad")
            start = len(ids) + 1
            ids += [1, *map(ord, message.content), 2]
            if train_on == "everything" or (message.role == "assistant" and message.train is not False):
                spans.append((start, len(ids)))
            if self.turns and message.role == "assistant":
                made.append(Encoded(list(ids), spans))
                spans = []
        return made if self.turns else [Encoded(ids, spans)]
