"""Prompt lookup: guesses at the next tokens, copied from where the context has said the same before.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_quant.runtime.session import Logits, Session


class PromptLookup:
    """Drafts of up to `draft_max` tokens that may follow a context.

    A draft is what followed the last occurrence of the context's final n tokens, n from LONGEST down to
    SHORTEST. It begins with FIRST tokens, and its length follows how it went before: a wrong one is work for
    nothing.
    """

    LONGEST = 4
    SHORTEST = 2
    FIRST = 2

    def __init__(self, context: Sequence[int], draft_max: int) -> None:
        self._tokens = list(context)
        self._follower: dict[tuple[int, ...], int] = {}  # n tokens -> where what followed them last begins
        self._draft_max = draft_max
        self._length = min(self.FIRST, draft_max)
        for end in range(len(self._tokens)):
            self._remember(end)

    def append(self, token: int) -> None:
        """The context has grown by a token."""
        self._tokens.append(token)
        self._remember(len(self._tokens) - 1)

    def _remember(self, end: int) -> None:
        """The token at `end` follows the n-grams before it."""
        for n in range(self.SHORTEST, min(self.LONGEST, end) + 1):
            self._follower[tuple(self._tokens[end - n : end])] = end

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may come next; none when nothing of the kind was said before."""
        length = min(self._length, limit)
        for n in range(self.LONGEST, self.SHORTEST - 1, -1):
            start = self._follower.get(tuple(self._tokens[-n:]))
            if start is not None and length > 0:
                return self._copy(start, length)
        return []

    def _copy(self, start: int, length: int) -> list[int]:
        """`length` tokens from `start` on; where the context ends, the draft itself goes on, so a loop goes round."""
        draft = self._tokens[start : start + length]
        while len(draft) < length:
            draft.append(draft[len(draft) - (len(self._tokens) - start)])
        return draft

    def learn(self, drafted: int, accepted: int) -> None:
        """How a draft went: the next ones are longer after one that was right, else little longer than it was."""
        self._length = min(2 * drafted, self._draft_max) if drafted == accepted else max(accepted, 1)


class LookupSteps:
    """The steps of a session, several at once where a draft is right.

    A draft is run together with the token before it, which costs little more than that token alone, as the
    weights are read once. A row of logits does not depend on what else is in the batch, to the last bit, and
    is used only if the tokens before it were chosen: the text is the one that single steps give, whatever the
    way of choosing.
    """

    def __init__(self, session: Session, draft_max: int) -> None:
        self._session = session
        self._lookup = PromptLookup(session.tokens, draft_max)
        self._draft: list[int] = []  # what is left of it, and the logits that follow each token
        self._logits: list[Logits] = []
        self._draft_size = 0
        self._n_chosen = (
            session.n_past
        )  # tokens of the context that were chosen; a draft may stand behind them
        self.drafted = 0
        self.accepted = 0

    def step(self, token: int, limit: int) -> Logits:
        """Appends one token to the context; logits [V] of what follows it. No more than `limit` will follow."""
        self._lookup.append(token)
        if self._draft and self._draft[0] == token:
            del self._draft[0]
            self.accepted += 1
        else:
            self._run(token, limit)
        self._n_chosen += 1
        return self._logits.pop(0)

    def _run(self, token: int, limit: int) -> None:
        session = self._session
        if self._draft_size:
            self._lookup.learn(self._draft_size, self._draft_size - len(self._draft))
        self.close()
        self._draft = self._lookup.draft(min(limit, session.n_ctx - session.n_past - 1))
        self._draft_size = len(self._draft)
        self.drafted += self._draft_size
        self._logits = list(session.extend([token, *self._draft]))

    def close(self) -> None:
        """Takes out of the context what was guessed and not chosen."""
        self._session.truncate(self._n_chosen)
