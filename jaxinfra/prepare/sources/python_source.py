"""Records that a function of the user's own yields: for what no other source reads.

What else a source knows of its files is unknown here: the name of the function, its `version` if it has one, and the
number of shards stand for the contents. A function that yields other records needs another `version`.
"""

import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count
from jaxinfra.errors import ConfigError, DataError, JaxinfraError
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record, Source, read_as

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class PythonSource(Source):
    """What `function()` yields, or `function(shard, shards)` for each of several shards.

    It yields mappings, or texts for records `{"text": str}`; the same ones in the same order whenever it is called.
    The key of a record is its shard and its number in it, so other `shards` hold out other records.

    Attributes:
        factory: `package.module:function`, importable wherever the source is read. An attribute `version` of the
            function (a text or number) says that what it yields has changed.
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


def _record(value: Any) -> Record:
    record = {"text": value} if isinstance(value, str) else value
    if not isinstance(record, Mapping):
        raise ValueError(f"is {type(value).__name__}, expected a mapping or a text")
    return record


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
