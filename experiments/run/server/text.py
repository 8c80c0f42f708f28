"""From tokens to text that can be shown as it comes.

A token is not always whole characters, and a text may be about to become a stop string: what can still change
is held back. Only the last tokens are decoded again with every new one, so that a long text costs what it is
long.
"""

from collections.abc import Sequence

import numpy as np

from effjax.data.text import Tokenizer

# What is no UTF-8, or not yet.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer, up to the first of some stop strings.

    Args:
      tokenizer: of the model.
      stops: strings that end the text, and are no part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens: list[int] = []
        # The tokens before `_shown` have become text; those from `_from` on stand before it, since how a
        # token is written may depend on the one before it.
        self._from = self._shown = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown now that this token is there."""
        self._tokens.append(token)
        return self._release(self._fresh(whole=True))

    def finish(self) -> str:
        """What was held back, when no token will come any more."""
        text = self._release(self._fresh(whole=False))
        rest, self._held = self._held, ""
        return text + rest

    def _fresh(self, whole: bool) -> str:
        """Text of the new tokens; nothing if only whole characters will do, and the last is not whole."""
        before = self._decode(self._from, self._shown)
        text = self._decode(self._from, len(self._tokens))
        if whole and text.endswith(UNFINISHED):
            return ""
        self._from, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(np.asarray(self._tokens[start:stop], np.int32))

    def _release(self, fresh: str) -> str:
        if self.stopped:
            return ""
        text = self._held + fresh
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Of the end of a text the most characters that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
