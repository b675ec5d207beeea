"""Helpers that read a source, and the check that its shards have every record once and in order."""

from collections.abc import Sequence

from jaxinfra.config import validate
from jaxinfra.prepare.sources.record import BadRecord, Record, Source, SourceShard

WHOLE = 1 << 60


def shards_of(source: Source, shard_bytes: int = WHOLE) -> Sequence[SourceShard]:
    validate(source)
    return source.list_shards(shard_bytes)


def read_all(source: Source, shard_bytes: int = WHOLE) -> list[Record | BadRecord]:
    return [found for shard in shards_of(source, shard_bytes) for found in source.read(shard)]


def found(source: Source, shard_bytes: int = WHOLE) -> list[Record]:
    everything = read_all(source, shard_bytes)
    good = [each for each in everything if isinstance(each, Record)]
    assert good == everything, "bad records"
    return good


def bad(source: Source, shard_bytes: int = WHOLE) -> list[str]:
    return [f"{each.location}: {each.cause}" for each in read_all(source, shard_bytes) if isinstance(each, BadRecord)]


def assert_shards_do_not_matter(source: Source, splits: Sequence[int], most: int = 0) -> list[Record]:
    """Returns the records; the smallest of `splits` must give at least `most` shards."""
    whole = found(source)
    keys = [each.key for each in whole]
    assert len(set(keys)) == len(keys)
    counts = []
    for shard_bytes in splits:
        shards = shards_of(source, shard_bytes)
        counts.append(len(shards))
        order = [(shard.name, shard.start) for shard in shards]
        assert order == sorted(set(order))
        records = [each for shard in shards for each in source.read(shard)]
        assert [(each.key, each.fields) for each in records if isinstance(each, Record)] == [
            (each.key, each.fields) for each in whole
        ]
        assert len(records) == len(whole)
    assert max(counts) >= most
    return whole
