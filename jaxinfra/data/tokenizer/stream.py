"""Decoding of ids that come one at a time, as a model draws them."""

from jaxinfra.data.tokenizer.base import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes that are not (yet) UTF-8 decode to


class StreamDecoder:
    """Decodes ids one at a time; what was pushed so far plus `flush` is the text of all ids.

    Text is held back only while its last bytes may still become one character. The ids of the last complete
    piece stay as left context, for decoders that treat the first token of a text in a special way; ids that show
    nothing, or only white space, which some decoders take from the beginning of a text, are no context by themselves.

    One kind of decoder cannot be followed exactly: the byte fallback of a tokenizer.json judges a run of byte tokens
    as a whole. Characters of such a run that came out stay out when a later byte shows that it is not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._emitted = 0  # characters of the pending text that are out already

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._pending.append(token_id)
        text = self._pending_text()
        complete = text.rstrip(_REPLACEMENT)
        piece = complete[self._emitted :]
        if complete == text:
            self._context = self._pending if text.strip() else self._context + self._pending
            self._pending, self._emitted = [], 0
        else:
            self._emitted = max(self._emitted, len(complete))
        return piece

    def flush(self) -> str:
        """What is left when no more ids come; unfinished bytes become U+FFFD."""
        piece = self._pending_text()[self._emitted :]
        self._context, self._pending, self._emitted = [], [], 0
        return piece

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]
