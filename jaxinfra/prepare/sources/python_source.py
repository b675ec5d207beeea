"""Records that a function of the user's own yields: for what no other source reads.

What else a source knows of its files is unknown here: the name of the function, its `version` if it has one, and the
number of shards stand for the contents. A function that yields other records needs another `version`.
"""

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count
from jaxinfra.errors import ConfigError, DataError, JaxinfraError
from jaxinfra.prepare.sources.record import Bad, Found, Piece

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class PythonSource:
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

    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """One piece a shard, taken to be of `split_bytes`: how much it yields is not known.

        Raises:
            ConfigError: there is no such function.
        """
        stamp = f"{self.shards}:{getattr(self._function(), 'version', '')}"
        return [
            Piece(name=self.factory, start=shard, end=shard + 1, size_bytes=split_bytes, stamp=stamp)
            for shard in range(self.shards)
        ]

    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields what the function does for a shard.

        Raises:
            ConfigError: there is no such function.
            DataError: the function raised; its error is the cause.
        """
        function = self._function()
        name = f"{self.factory}/{piece.start}"
        index = 0
        try:
            for value in function(piece.start, self.shards) if self.shards > 1 else function():
                where = f"{name} record {index}"
                record = {"text": value} if isinstance(value, str) else value
                if isinstance(record, Mapping):
                    yield Found(key=f"{name}#{index}", where=where, record=record)
                else:
                    yield Bad(where=where, cause=f"is {type(value).__name__}, expected a mapping or a text")
                index += 1
        except JaxinfraError:
            raise
        except Exception as error:
            cause = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise DataError(f"{name}: raised after {index} records ({cause}); mend the function") from error

    def _function(self) -> Any:
        module, _, function = self.factory.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except AttributeError:
            cause = f"{module} has no {function}"
        except Exception as error:  # the module may do anything when it is imported
            cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"factory={self.factory}: cannot be imported ({cause}); run where it can, or mend it")
