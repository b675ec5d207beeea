"""A byte-level BPE that is trained on the text of a recipe."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import override

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxinfra.config import Problem
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.prepare.tokenizers.common import Vocabulary


@dataclass(frozen=True, kw_only=True)
class TrainBpe(Vocabulary):
    """A byte-level BPE that is trained on the text of the recipe.

    Attributes:
        vocab_size: the largest vocabulary; a small text gives fewer tokens.
        special_tokens: more of them, such as those of a template; their ids follow that of the end of a document, 0.
    """

    vocab_size: int = 8192
    special_tokens: tuple[str, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        least = 257 + len(self.special_tokens)
        if self.vocab_size < least:
            message = "a byte-level vocabulary needs 256 bytes, the end of a document and its special tokens"
            yield Problem(fields=("vocab_size",), message=message, fix=f"use vocab_size={least} or more")


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, end_of_document: str, special_tokens: Sequence[str] = ()
) -> JsonTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2); its id 0 ends documents.

    The same texts in the same order give the same tokenizer.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return JsonTokenizer.adopt(backend, end_of_document, "the trained tokenizer")
