"""Sequences of consecutive tokens, and documents packed into rows."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.data.packing import PackedRows, pack_documents
from jaxinfra.data.sequences import num_sequences, packed_batch, split_inputs_targets
from jaxinfra.ops.attention import KERNELS, AttentionSpec, reference

EOT = 0


def naive(tokens, eot_id):
    """Computes segments, positions and weights of one sequence, position by position."""
    segment, position, rows = 1, 0, []
    for t, token in enumerate(tokens[:-1]):
        if t and tokens[t - 1] == eot_id:
            segment, position = segment + 1, 0
        rows.append((segment, position, 0.0 if token == eot_id else 1.0))
        position += 1
    return np.array(rows).T


def test_sequences_equal_a_loop_over_positions():
    tokens_BW = np.random.default_rng(0).integers(0, 4, (50, 21)).astype(np.uint32)
    batch = split_inputs_targets(tokens_BW, eot_id=EOT, mask_documents=True)
    integers = dict.fromkeys(("inputs", "targets", "segments", "positions"), np.int32)
    assert {name: array.dtype for name, array in batch.items()} == {**integers, "weights": np.float32}
    for tokens in (tokens_BW, [[EOT] * 5] * 2, [[1] * 5] * 2, [[1, 1, 1, EOT, 1]], [[1] * 4 + [EOT]]):
        batch = split_inputs_targets(np.array(tokens), eot_id=EOT, mask_documents=True)
        for row, own in enumerate(np.array(tokens)):
            found = [batch[name][row] for name in ("segments", "positions", "weights")]
            np.testing.assert_array_equal(found, naive(own.tolist(), EOT))


def test_without_masks_there_are_only_inputs_and_targets():
    batch = split_inputs_targets(np.zeros((2, 5), np.uint16), eot_id=EOT, mask_documents=False)
    assert set(batch) == {"inputs", "targets"}


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_sequences_share_one_token_and_end_inside_the_split(tokens, sequences):
    assert num_sequences(tokens, 4) == sequences
    assert sequences * 4 + 1 <= max(tokens, 1)


def test_a_target_has_weight_only_if_it_is_learned():
    tokens = np.array([[5, 6, EOT, 7, 8]], np.uint16)
    mask = np.array([[1, 0, 1, 1, 1]], np.uint8)
    batch = split_inputs_targets(tokens, eot_id=EOT, mask_documents=True, mask_BW=mask)
    assert batch["weights"].tolist() == [[0, 1, 0, 1]]  # the first of a document follows the end of another
    plain = split_inputs_targets(tokens, eot_id=EOT, mask_documents=False, mask_BW=mask)
    assert set(plain) == {"inputs", "targets", "weights"}
    assert plain["weights"].tolist() == [[0, 1, 1, 1]]
    assert plain["weights"].dtype == np.float32


@pytest.mark.parametrize("seed", range(10))
def test_a_packed_batch_equals_a_loop_over_segments(seed):
    rng, seq_len = np.random.default_rng(seed), int(3 + 7 * seed)
    documents = [rng.integers(0, 2**17, n).astype(np.uint32) for n in rng.integers(1, 40, 50)]
    masks = [rng.integers(0, 2, len(document)) for document in documents]
    packs = pack_documents(np.array([len(document) for document in documents]), seq_len)
    chosen = rng.integers(0, packs.num_rows, 6)
    segments = [np.arange(packs.row_offsets[row], packs.row_offsets[row + 1]) for row in chosen]
    columns = packs.segment_document, packs.segment_start, packs.segment_length
    parts = [tuple(column[p] for column in columns) for p in np.concatenate(segments)]
    expected = {name: np.zeros((6, seq_len)) for name in ("inputs", "targets", "segments", "positions", "weights")}
    for row, own in enumerate(segments):
        at = 0
        for number, p in enumerate(own, start=1):
            document, start, length = (int(column[p]) for column in columns)
            place, targets = (row, slice(at, at + length)), slice(start + 1, start + length + 1)
            expected["inputs"][place] = documents[document][start : start + length]
            expected["targets"][place] = documents[document][targets]
            expected["segments"][place], expected["positions"][place] = number, np.arange(length)
            expected["weights"][place] = masks[document][targets]
            at += length
        expected["positions"][row, at:] = np.arange(seq_len - at)
    batch = packed_batch(
        np.concatenate([documents[d][start : start + n + 1] for d, start, n in parts]),
        np.array([n for _, _, n in parts]),
        np.array([len(own) for own in segments]),
        seq_len=seq_len,
        mask_N=np.concatenate([masks[d][start : start + n + 1] for d, start, n in parts]),
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(batch[name], array)
        assert batch[name].dtype == (np.float32 if name == "weights" else np.int32)


@pytest.mark.parametrize("kernel", [reference, partial(KERNELS["splash"].attend, interpret=True)])
def test_documents_do_not_attend_to_padding(kernel):
    """Attention treats padding as a document of its own."""
    rng = np.random.default_rng(0)
    batch = packed_batch(np.arange(102, dtype=np.uint16), np.array([40, 60]), np.array([2]), seq_len=128)
    ids, real_T = jnp.asarray(batch["segments"]), batch["segments"][0] > 0
    q, k, v, noise = rng.normal(size=(4, 1, 128, 2, 128)).astype(np.float32)
    other = np.where(real_T[None, :, None, None], 0, noise)

    def attended(*keys_and_values: np.ndarray) -> np.ndarray:
        arrays = map(jnp.asarray, (q, *keys_and_values))
        return np.asarray(kernel(*arrays, AttentionSpec(), segments=(ids, ids)))[0]

    plain, moved = attended(k, v), attended(k + other, v + other)
    assert np.isfinite(plain).all()
    np.testing.assert_array_equal(plain[real_T], moved[real_T])
    assert not np.array_equal(plain[~real_T], moved[~real_T])


def best_fit_decreasing(lengths: list[int], room: int) -> int:
    """Counts the rows that the plain algorithm needs, segment by segment."""
    rooms, rows = [], 0
    for length in sorted(lengths, reverse=True):
        best = min((left for left in rooms if left >= length), default=None)
        if best is None:
            best, rows = room, rows + 1
        else:
            rooms.remove(best)
        rooms.append(best - length)
    return rows


def random_lengths(seed: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(seed)
    seq_len = int(rng.choice([1, 2, 7, 16, 64, 100]))
    lengths = (np.exp(rng.normal(2 + seed % 3, 1.2, int(rng.integers(0, 300)))) + rng.integers(0, 2)).astype(np.uint32)
    return lengths, seq_len


def rows_of(packs: PackedRows, array: np.ndarray) -> list[np.ndarray]:
    return np.split(array, packs.row_offsets[1:-1]) if packs.num_rows else []


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_token_but_the_first_is_a_target_once(seed, by_length):
    lengths, seq_len = random_lengths(seed)
    packs = pack_documents(lengths, seq_len, by_length=by_length)
    learned = [np.zeros(int(n), int) for n in lengths]
    for document, start, length in zip(packs.segment_document, packs.segment_start, packs.segment_length, strict=True):
        assert start + length < len(learned[document]), "a segment has one token more than it has targets"
        learned[document][start + 1 : start + 1 + length] += 1
    for counts in learned:
        assert not counts[:1].any()
        assert (counts[1:] == 1).all()
    segments = np.bincount(packs.segment_document, minlength=len(lengths))
    assert segments.tolist() == [-(-max(int(n) - 1, 0) // seq_len) for n in lengths], "no more segments than needed"
    assert packs.cut_documents == (segments > 1).sum()


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_rows_fit_and_are_sorted_by_their_longest_segment(seed, by_length):
    lengths, seq_len = random_lengths(seed)
    packs = pack_documents(lengths, seq_len, by_length=by_length)
    rows = rows_of(packs, packs.segment_length)
    assert all(0 < row.sum() <= seq_len for row in rows)
    assert all((np.diff(row) <= 0).all() for row in rows)
    longest = [row[0] for row in rows]
    assert longest == sorted(longest)
    if by_length:
        assert all((row[0] - 1).item().bit_length() == (row[-1] - 1).item().bit_length() for row in rows)
    assert packs.efficiency == (sum(row.sum() for row in rows) / (len(rows) * seq_len) if rows else 1)


@pytest.mark.parametrize("seed", range(20))
def test_as_many_rows_as_best_fit_decreasing(seed):
    lengths, seq_len = random_lengths(seed)
    packs = pack_documents(lengths, seq_len)
    assert packs.num_rows == best_fit_decreasing(packs.segment_length.tolist(), seq_len)


def test_packing_is_deterministic_and_does_not_depend_on_the_integer_type():
    lengths = np.random.default_rng(0).integers(0, 300, 5000)
    for again in (lengths, lengths.astype(np.uint16)):
        found, expected = pack_documents(again, 256), pack_documents(lengths, 256)
        for name in ("segment_document", "segment_start", "segment_length", "row_offsets"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert found.segment_document.dtype == found.segment_start.dtype == found.row_offsets.dtype == np.int64
    assert found.segment_length.dtype == np.int32


def test_typical_document_lengths_fill_the_rows():
    lengths = np.exp(np.random.default_rng(0).normal(6.3, 1.3, 20_000)).astype(np.int64) + 1
    packs = pack_documents(lengths, 2048)
    assert packs.efficiency > 0.999
    assert packs.cut_documents == (lengths > 2049).sum()


def test_rows_longer_than_16_bits():
    packs = pack_documents(np.array([70_000, 131_073, 61_074]), 2**17)
    assert packs.num_rows == 2
    assert packs.efficiency == 1.0
