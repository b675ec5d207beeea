"""Decodes ids one at a time, as a model samples them."""

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
        self._context: list[int] = []
        self._pending: list[int] = []
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
