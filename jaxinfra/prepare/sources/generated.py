"""Records that no file holds: what a function of the user's own yields, and documents of made-up words."""

import itertools
import pkgutil
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, override

from annotated_types import Ge

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count, Natural
from jaxinfra.errors import ConfigError, DataError, JaxinfraError
from jaxinfra.prepare.sources.files import cut
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record, Source, read_as
from jaxinfra.storage.files import FileInfo

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = len(_CONSONANTS) * len(_VOWELS)
_WORDS_A_SENTENCE = 12
_FOLLOWERS = (1, 1, 1, 1, 2, 2, 3, 0)  # which of a word's followers comes next; 0 is any word at all


@dataclass(frozen=True, kw_only=True)
class PythonSource(Source):
    """Reads what `function()` yields, or `function(shard, shards)` for each of several shards.

    It yields mappings, or texts for records `{"text": str}`; the same ones in the same order whenever it is called.
    The key of a record is its shard and its number in it, so other `shards` validate on other records.

    Attributes:
        factory: `package.module:function`, importable wherever the source is read. An attribute `version` of the
            function (a text or number) says that what it yields has changed, and nothing else does.
        shards: parts that are read in parallel, each called with its number, from 0, and their count; with 1 the
            function takes no arguments.
    """

    factory: str = ""
    shards: Count = 1

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        if not _FACTORY.fullmatch(self.factory):
            yield Problem(fields=("factory",), message="names no function", fix="use factory=package.module:function")

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Lists one piece a shard, taken to be of `split_bytes`: how much it yields is not known."""
        stamp = f"{self.shards}:{getattr(self._function(), 'version', '')}"
        return [
            Piece(name=self.factory, start=shard, end=shard + 1, size_bytes=split_bytes, stamp=stamp)
            for shard in range(self.shards)
        ]

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields what the function does for a shard; what it raises is the cause of a DataError."""
        function = self._function()
        name, index = f"{self.factory}/{piece.start}", 0
        try:
            for value in function(piece.start, self.shards) if self.shards > 1 else function():
                yield read_as(_record, value, key=f"{name}#{index}", where=f"{name} record {index}")
                index += 1
        except JaxinfraError:
            raise
        except Exception as error:
            raise DataError(f"{name}: raised after {index} records ({_cause(error)}); mend the function") from error

    def _function(self) -> Any:
        try:
            return pkgutil.resolve_name(self.factory)
        except Exception as error:  # the module may do anything when it is imported
            cause = f"cannot be imported ({_cause(error)})"
            raise ConfigError(f"factory={self.factory}: {cause}; run where it can, or mend it") from error


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Records `{"text": str}` of words, seven in eight of which are one of three that may follow the word before.

    A model can learn to predict them in part: for tests, benchmarks and first runs. Every document is a function of the
    seed and its number alone, so any range of them is made without the others.

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
        made = FileInfo(name="synthetic", size_bytes=size_bytes, stamp=stamp)
        return cut([made], lambda file: self.documents, split_bytes)

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


def _record(value: Any) -> Record:
    record = {"text": value} if isinstance(value, str) else value
    if not isinstance(record, Mapping):
        raise ValueError(f"is {type(value).__name__}, expected a mapping or a text")
    return record


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@lru_cache(maxsize=1 << 16)
def _spelled(word: int, syllables: int) -> str:
    spelled = ""
    for _ in range(syllables):
        word, syllable = divmod(word, _SYLLABLES)
        spelled += _CONSONANTS[syllable % len(_CONSONANTS)] + _VOWELS[syllable // len(_CONSONANTS)]
    return spelled
