"""Decodes ids one at a time, as a model samples them."""

from jaxinfra.data.tokenizer.base import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes that are not (yet) UTF-8 decode to


class StreamDecoder:
    """Decodes ids one at a time; the results of `push` and `flush` concatenate to the text of all ids.

    Text waits only while its last bytes may still become a character. Some decoders treat the first token of a text in
    a special way, such as removing white space, so the ids of the last text stay as left context, from the last one
    that shows more than white space.

    The result differs for one kind of decoder: the byte fallback of a tokenizer.json decodes a run of byte tokens as a
    whole. If a later byte of a run is not UTF-8, its characters that were already returned stay.
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
        if complete == text:
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
