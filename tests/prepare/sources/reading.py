"""What every source must do: its pieces, however they are cut, have every record once and in the same order."""

from collections.abc import Sequence

from jaxinfra.config import validate
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Source

WHOLE = 1 << 60


def pieces_of(source: Source, split_bytes: int = WHOLE) -> Sequence[Piece]:
    validate(source)
    return source.pieces(split_bytes)


def read_all(source: Source, split_bytes: int = WHOLE) -> list[Found | Bad]:
    return [found for piece in pieces_of(source, split_bytes) for found in source.read(piece)]


def found(source: Source, split_bytes: int = WHOLE) -> list[Found]:
    everything = read_all(source, split_bytes)
    good = [each for each in everything if isinstance(each, Found)]
    assert good == everything, "bad records"
    return good


def bad(source: Source, split_bytes: int = WHOLE) -> list[str]:
    return [f"{each.where}: {each.cause}" for each in read_all(source, split_bytes) if isinstance(each, Bad)]


def assert_cuts_do_not_matter(source: Source, splits: Sequence[int], most: int = 0) -> list[Found]:
    """Returns the records; `most` is a number of pieces that the finest cut must reach."""
    whole = found(source)
    keys = [each.key for each in whole]
    assert len(set(keys)) == len(keys)
    counts = []
    for split_bytes in splits:
        pieces = pieces_of(source, split_bytes)
        counts.append(len(pieces))
        order = [(piece.name, piece.start) for piece in pieces]
        assert order == sorted(set(order))
        records = [each for piece in pieces for each in source.read(piece)]
        assert [(each.key, each.record) for each in records if isinstance(each, Found)] == [
            (each.key, each.record) for each in whole
        ]
        assert len(records) == len(whole)
    assert max(counts) >= most
    return whole
