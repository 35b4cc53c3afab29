"""From tokens to text, as they arrive."""

import codecs
from collections.abc import Collection, Sequence
from typing import Any


def _byte_of_character() -> dict[str, int]:
    """What each character of a byte-level vocabulary stands for: printable ones for themselves, the rest in order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token of a byte-level vocabulary stands for, alone perhaps no whole character."""
    name = tokenizer.convert_ids_to_tokens(token) or ""  # rows of the vocabulary without a token have none
    try:
        return bytes(_BYTE_OF[character] for character in name)
    except KeyError:  # an added token, whose name is its text
        return name.encode()


class TextStream:
    """The text of one answer, as its tokens arrive.

    Text comes out as soon as it is certain: bytes of an unfinished character, and what may become the beginning
    of a stop text, are held back.

    Args:
        tokenizer: a byte-level one, as Qwen's.
        stop: texts that end the answer, and are not part of it.
        ends: ids that end it.
        max_new_tokens: after so many it ends as well.

    Attributes:
        finish_reason: `stop` or `length` once the answer has ended, else None.
        tokens: the ids so far, one that ends the answer included.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        ends: Collection[int] = (),
        max_new_tokens: int | None = None,
    ):
        self._tokenizer, self._stop, self._ends = tokenizer, tuple(stop), frozenset(ends)
        added = tokenizer.added_tokens_decoder
        self._silent = {token for token, about in added.items() if about.special}
        self._limit = max_new_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.finish_reason: str | None = None
        self.tokens: list[int] = []

    def push(self, token: int) -> str:
        """The text that the next token makes certain.

        Raises:
            ValueError: the answer has ended.
        """
        if self.finish_reason:
            raise ValueError("the answer has ended")
        self.tokens.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
            return self.flush()
        self._held += self._bytes.decode(self._bytes_of(token))
        text = self._released()
        if self.finish_reason is None and len(self.tokens) == self._limit:
            self.finish_reason = "length"
            text += self.flush()
        return text

    def flush(self) -> str:
        """What is still held back; for an answer that is broken off."""
        self._held += self._bytes.decode(b"", final=True)
        text, self._held = self._held, ""
        return text

    def _bytes_of(self, token: int) -> bytes:
        return b"" if token in self._silent else token_bytes(self._tokenizer, token)

    def _released(self) -> str:
        """Takes out of the held text what no stop text can begin with; ends the answer at a whole one."""
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            self._bytes.reset()
            self.finish_reason = "stop"
            return text
        kept = max(
            (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
        end = len(self._held) - kept
        text, self._held = self._held[:end], self._held[end:]
        return text
