"""Documents of made-up words that a model can learn to predict in part: for tests, benchmarks and first runs.

Every document is a function of the seed and its number alone, so any range of them is made without the others.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, override

from annotated_types import Ge

from jaxinfra.config.limits import Count, Natural
from jaxinfra.prepare.sources.files import cut
from jaxinfra.prepare.sources.record import Found, Piece, Source
from jaxinfra.storage.files import File

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = len(_CONSONANTS) * len(_VOWELS)
_WORDS_A_SENTENCE = 12
_FOLLOWERS = (1, 1, 1, 1, 2, 2, 3, 0)  # which of a word's followers comes next; 0 is any word at all


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Records `{"text": str}` of words; seven in eight are one of three that may follow the word before.

    Attributes:
        documents: how many.
        words: of a document in the mean; its length is between half and one and a half of it.
        vocabulary: different words.
        seed: other seeds give other documents of the same language.
    """

    documents: Count = 1000
    words: Count = 200
    vocabulary: Annotated[int, Ge(2)] = 1000
    seed: Natural = 0

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        size_bytes = self.documents * self.words * (2 * self._syllables() + 1)
        stamp = f"1:{self.words}:{self.vocabulary}:{self.seed}"  # 1: what is made of these numbers
        return cut(File(name="synthetic", size_bytes=size_bytes, stamp=stamp), self.documents, split_bytes)

    @override
    def read(self, piece: Piece) -> Iterator[Found]:
        for number in range(piece.start, self.documents if piece.end is None else piece.end):
            key = f"{piece.name}#{number}"
            yield Found(key=key, where=f"{piece.name} document {number}", record={"text": self._document(number)})

    def _document(self, number: int) -> str:
        rng = random.Random(f"{self.seed}:{number}")
        words, syllables, size = [], self._syllables(), self.vocabulary
        word = rng.randrange(size)
        for _ in range(rng.randint((self.words + 1) // 2, self.words + self.words // 2)):
            words.append(_spelled(word, syllables))
            follower = _FOLLOWERS[int(rng.random() * len(_FOLLOWERS))]
            word = (7 * word + 31 * follower**2) % size if follower else rng.randrange(size)
        return "".join(" ".join(sentence) + ".\n" for sentence in itertools.batched(words, _WORDS_A_SENTENCE))

    def _syllables(self) -> int:
        """Returns how many syllables a word must have for the vocabulary to be spelled."""
        return next(count for count in itertools.count(1) if _SYLLABLES**count >= self.vocabulary)


@lru_cache(maxsize=1 << 16)
def _spelled(word: int, syllables: int) -> str:
    spelled = ""
    for _ in range(syllables):
        word, syllable = divmod(word, _SYLLABLES)
        spelled += _CONSONANTS[syllable % len(_CONSONANTS)] + _VOWELS[syllable // len(_CONSONANTS)]
    return spelled
