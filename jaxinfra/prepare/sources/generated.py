"""Sources without files: records that a Python function yields, and synthetic documents."""

import itertools
import pkgutil
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, override

from annotated_types import Ge

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonNegativeInt, PositiveInt
from jaxinfra.errors import ConfigError, DataError, JaxinfraError
from jaxinfra.prepare.sources.files import split_files
from jaxinfra.prepare.sources.record import Fields, Record, Records, Source, SourceShard, parse_record
from jaxinfra.storage.files import FileInfo

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_NUM_SYLLABLES = len(_CONSONANTS) * len(_VOWELS)  # 70: a consonant and a vowel each
_SENTENCE_WORDS = 12
# Which of the three words that may follow comes next, drawn from these with equal probability; 0 draws any word.
_FOLLOWERS = (1, 1, 1, 1, 2, 2, 3, 0)


@dataclass(frozen=True, kw_only=True)
class PythonSource(Source):
    """Reads what `function()` yields, or `function(shard, num_shards)` for each shard.

    The function yields mappings, or strings for records `{"text": str}`, always the same ones in the same order. If you
    change it to yield other records, change its attribute `version` too, a string or number, so that the store is made
    again. The key of a record is its shard and its index there, so another `num_shards` changes the validation split.

    Attributes:
        factory: `package.module:function`, importable by every worker.
        num_shards: shards that are read in parallel; if it is 1, the function takes no arguments.
    """

    factory: str = ""
    num_shards: PositiveInt = 1

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the fields."""
        if not _FACTORY.fullmatch(self.factory):
            yield Problem(fields=("factory",), message="names no function", fix="use factory=package.module:function")

    @override
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        stamp = f"{self.num_shards}:{getattr(self._function(), 'version', '')}"
        return [  # the real size of a shard is unknown, so it is taken to be `shard_bytes`
            SourceShard(name=self.factory, start=shard, end=shard + 1, size_bytes=shard_bytes, stamp=stamp)
            for shard in range(self.num_shards)
        ]

    @override
    def read(self, shard: SourceShard) -> Records:
        function = self._function()
        name, index = f"{self.factory}/{shard.start}", 0
        try:
            for value in function(shard.start, self.num_shards) if self.num_shards > 1 else function():
                yield parse_record(_to_fields, value, key=f"{name}#{index}", location=f"{name} record {index}")
                index += 1
        except JaxinfraError:
            raise
        except Exception as error:
            cause = f"the function raised after {index} records ({_first_line(error)})"
            raise DataError(f"{name}: {cause}; correct the function") from error

    def _function(self) -> Callable[..., Iterable[object]]:
        try:
            return pkgutil.resolve_name(self.factory)
        except Exception as error:  # an imported module can raise anything
            cause = f"cannot be imported ({_first_line(error)})"
            raise ConfigError(f"factory={self.factory}: {cause}; install it or set PYTHONPATH") from error


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Synthetic documents `{"text": str}` that a model can learn in part, for tests, benchmarks and first runs.

    Seven of eight words are one of the three words that may follow the previous one. A document is a function of the
    seed and its number, so any range can be generated alone. Another seed gives other documents of the same language.

    Attributes:
        num_documents: number of documents.
        mean_words: words per document, uniform from half to one and a half of it.
        vocab_size: distinct words.
        seed: seed of the documents.
    """

    num_documents: PositiveInt = 1000
    mean_words: PositiveInt = 200
    vocab_size: Annotated[int, Ge(2)] = 1000
    seed: NonNegativeInt = 0

    @override
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        size_bytes = self.num_documents * self.mean_words * (2 * self._syllables_per_word() + 1)
        stamp = f"1:{self.mean_words}:{self.vocab_size}:{self.seed}"  # 1 is the version of the algorithm
        file = FileInfo(name="synthetic", size_bytes=size_bytes, stamp=stamp)
        return split_files([file], lambda _: self.num_documents, shard_bytes)

    @override
    def read(self, shard: SourceShard) -> Iterator[Record]:
        for number in range(shard.start, self.num_documents if shard.end is None else shard.end):
            key, location = f"{shard.name}#{number}", f"{shard.name} document {number}"
            yield Record(key=key, location=location, fields={"text": self._document(number)})

    def _document(self, number: int) -> str:
        rng = random.Random(f"{self.seed}:{number}")
        words, syllables = [], self._syllables_per_word()
        word = rng.randrange(self.vocab_size)
        for _ in range(rng.randint((self.mean_words + 1) // 2, self.mean_words + self.mean_words // 2)):
            words.append(_word_text(word, syllables))
            follower = _FOLLOWERS[int(rng.random() * len(_FOLLOWERS))]
            # Any fixed function of the word and the follower would do.
            word = (7 * word + 31 * follower**2) % self.vocab_size if follower else rng.randrange(self.vocab_size)
        return "".join(" ".join(sentence) + ".\n" for sentence in itertools.batched(words, _SENTENCE_WORDS))

    def _syllables_per_word(self) -> int:
        """Returns the least number of syllables that gives `vocab_size` different words."""
        return next(count for count in itertools.count(1) if _NUM_SYLLABLES**count >= self.vocab_size)


def _to_fields(value: object) -> Fields:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"is {type(value).__name__}, expected a mapping or a string")
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@lru_cache(maxsize=1 << 16)
def _word_text(word: int, syllables: int) -> str:
    """Writes the number of a word with one syllable for each digit in base `_NUM_SYLLABLES`."""
    text = ""
    for _ in range(syllables):
        word, syllable = divmod(word, _NUM_SYLLABLES)
        text += _CONSONANTS[syllable % len(_CONSONANTS)] + _VOWELS[syllable // len(_CONSONANTS)]
    return text
