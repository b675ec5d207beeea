import numpy as np
import pytest

from jaxinfra.data.packing import Packs, pack


def best_fit_decreasing(lengths: list[int], room: int) -> int:
    """Rows that the plain algorithm needs, one piece after the other."""
    rooms: list[int] = []
    rows = 0
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in rooms if left >= length]
        if fitting:
            rooms.remove(min(fitting))
        else:
            rows += 1
        left = (min(fitting) if fitting else room) - length
        rooms += [left] if left else []
    return rows


def random_lengths(seed: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(seed)
    seq_len = int(rng.choice([1, 2, 7, 16, 64, 100]))
    lengths = (np.exp(rng.normal(2 + seed % 3, 1.2, int(rng.integers(0, 300)))) + rng.integers(0, 2)).astype(np.uint32)
    return lengths, seq_len


def rows_of(packs: Packs, array: np.ndarray) -> list[np.ndarray]:
    return np.split(array, packs.row_offsets[1:-1]) if packs.rows else []


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_token_but_the_first_is_a_target_once(seed, by_length):
    lengths, seq_len = random_lengths(seed)
    packs = pack(lengths, seq_len, by_length=by_length)
    learned = [np.zeros(int(n), int) for n in lengths]
    for document, skip, length in zip(packs.piece_document, packs.piece_skip, packs.piece_length, strict=True):
        assert skip + length < len(learned[document]), "a piece reads one token more than it has targets"
        learned[document][skip + 1 : skip + 1 + length] += 1
    for counts in learned:
        assert not counts[:1].any()
        assert (counts[1:] == 1).all()
    pieces = np.bincount(packs.piece_document, minlength=len(lengths))
    assert pieces.tolist() == [-(-max(int(n) - 1, 0) // seq_len) for n in lengths], "no piece more than needed"
    assert packs.cut_documents == (pieces > 1).sum()


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_rows_are_never_too_full_and_rise(seed, by_length):
    lengths, seq_len = random_lengths(seed)
    packs = pack(lengths, seq_len, by_length=by_length)
    rows = rows_of(packs, packs.piece_length)
    assert all(0 < row.sum() <= seq_len for row in rows)
    assert all((np.diff(row) <= 0).all() for row in rows)
    longest = [row[0] for row in rows]
    assert longest == sorted(longest)
    if by_length:
        assert all((row[0] - 1).item().bit_length() == (row[-1] - 1).item().bit_length() for row in rows)
    assert packs.efficiency == (sum(row.sum() for row in rows) / (len(rows) * seq_len) if rows else 1)


@pytest.mark.parametrize("seed", range(20))
def test_no_more_rows_than_best_fit_decreasing(seed):
    lengths, seq_len = random_lengths(seed)
    packs = pack(lengths, seq_len)
    assert packs.rows == best_fit_decreasing(packs.piece_length.tolist(), seq_len)


def test_packing_is_deterministic_and_does_not_depend_on_the_integer_type():
    lengths = np.random.default_rng(0).integers(0, 300, 5000)
    for again in (lengths, lengths.astype(np.uint16)):
        found, expected = pack(again, 256), pack(lengths, 256)
        for name in ("piece_document", "piece_skip", "piece_length", "row_offsets"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
    dtypes = [array.dtype for array in (found.piece_document, found.piece_skip, found.piece_length, found.row_offsets)]
    assert dtypes == [np.int64, np.int64, np.int32, np.int64]


def test_documents_like_those_of_text_fill_the_rows():
    lengths = np.exp(np.random.default_rng(0).normal(6.3, 1.3, 20_000)).astype(np.int64) + 1
    packs = pack(lengths, 2048)
    assert packs.efficiency > 0.999
    assert packs.cut_documents == (lengths > 2049).sum()


def test_a_long_document_gives_whole_rows_and_a_rest():
    packs = pack(np.array([9, 3, 1, 0]), 4)
    assert packs.piece_document.tolist() == [1, 0, 0]
    assert packs.piece_skip.tolist() == [0, 0, 4]
    assert packs.piece_length.tolist() == [2, 4, 4]
    assert packs.row_offsets.tolist() == [0, 1, 2, 3]


def test_rows_far_longer_than_any_table_of_16_bits():
    packs = pack(np.array([70_000, 131_073, 61_074]), 2**17)
    assert packs.rows == 2
    assert packs.efficiency == 1.0


@pytest.mark.parametrize(("lengths", "seq_len"), [([3, -1], 4), ([3], 0), ([3], 2**31)])
def test_arguments_out_of_range_are_refused(lengths, seq_len):
    with pytest.raises(ValueError, match="seq_len"):
        pack(np.array(lengths), seq_len)
