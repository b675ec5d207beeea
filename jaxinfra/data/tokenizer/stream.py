"""Decodes ids one at a time, as a model samples them, and finds where the text ends."""

from collections.abc import Sequence

from jaxinfra.data.tokenizer.base import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes that are not (yet) UTF-8 decode to


class StreamDecoder:
    """Decodes ids one at a time; the results of `push` and `flush` concatenate to the text of all ids.

    Text is held back only while its last bytes may still become a character. Some decoders treat the first token of a
    text in a special way, for example by removing its leading space. So the ids of the last text that was more than
    white space, and all after it, are decoded again as left context.

    One kind of decoder gives another result: the byte fallback of a tokenizer.json decodes a run of byte tokens as a
    whole. If a later byte of the run is not UTF-8, the characters that were already returned stay.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids whose text was returned, as the left context of the pending ones
        self._pending: list[int] = []  # ids after them, whose text may end in an unfinished character
        self._emitted = 0  # characters of the pending text that were returned

    def push(self, token_id: int) -> str:
        """Returns the text that this id completes, "" if a character is unfinished."""
        self._pending.append(token_id)
        text = self._pending_text()
        complete = text.rstrip(_REPLACEMENT)
        new = complete[self._emitted :]
        if complete == text:  # no character is unfinished
            self._context = self._pending if text.strip() else self._context + self._pending
            self._pending, self._emitted = [], 0
        else:
            self._emitted = max(self._emitted, len(complete))
        return new

    def flush(self) -> str:
        """Returns the rest of the text after the last id; unfinished bytes become U+FFFD."""
        rest = self._pending_text()[self._emitted :]
        self._context, self._pending, self._emitted = [], [], 0
        return rest

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


class StopStrings:
    """Ends a text before the first of some strings; the text comes in pieces.

    Text is held back only while it may be the beginning of such a string.
    """

    def __init__(self, strings: Sequence[str]):
        self.found = False  # whether a string was found; nothing belongs to the text any more
        self._strings, self._held = strings, ""  # `_held` is text that may be the beginning of a string

    def push(self, piece: str) -> str:
        """Returns the text that this piece completes."""
        text, self._held = self._held + piece, ""
        starts = [start for string in self._strings if (start := text.find(string)) >= 0]
        if starts:
            self.found = True
            return text[: min(starts)]
        # The sizes of all beginnings of strings that the text ends with.
        sizes = (size for string in self._strings for size in range(1, len(string)) if text.endswith(string[:size]))
        end = len(text) - max(sizes, default=0)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Returns the rest of a text without such a string."""
        rest, self._held = self._held, ""
        return rest
