import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.data.packing import pack
from jaxinfra.data.sequences import packed_batch, split_inputs_targets, window_count
from jaxinfra.ops.attention import See, reference, splash_interpreted

EOT = 0


def naive(window, eot_id):
    """Segments, positions and weights of one window, position by position."""
    segment, position, rows = 1, 0, []
    for t, token in enumerate(window[:-1]):
        if t and window[t - 1] == eot_id:
            segment, position = segment + 1, 0
        rows.append((segment, position, 0.0 if token == eot_id else 1.0))
        position += 1
    return np.array(rows).T


def test_documents_of_a_window_are_kept_apart():
    window = np.array([[5, 6, EOT, 7, EOT, 8, 9, 4]], np.uint16)
    batch = split_inputs_targets(window, eot_id=EOT, mask_documents=True)
    assert batch["inputs"].tolist() == [[5, 6, EOT, 7, EOT, 8, 9]]
    assert batch["targets"].tolist() == [[6, EOT, 7, EOT, 8, 9, 4]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 3, 3]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["weights"].tolist() == [[1, 1, 0, 1, 0, 1, 1]]  # the end is learnt, what follows it is not


def test_any_window_equals_the_loop_over_positions():
    window_BW = np.random.default_rng(0).integers(0, 4, (50, 21)).astype(np.uint32)
    batch = split_inputs_targets(window_BW, eot_id=EOT, mask_documents=True)
    assert {name: array.dtype for name, array in batch.items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "segments": np.int32,
        "positions": np.int32,
        "weights": np.float32,
    }
    for windows in (window_BW, [[EOT] * 5] * 2, [[1] * 5] * 2, [[1, 1, 1, EOT, 1]], [[1] * 4 + [EOT]]):
        batch = split_inputs_targets(np.array(windows), eot_id=EOT, mask_documents=True)
        for row, window in enumerate(np.array(windows)):
            found = [batch[name][row] for name in ("segments", "positions", "weights")]
            np.testing.assert_array_equal(found, naive(window.tolist(), EOT))


def test_without_masks_there_are_only_inputs_and_targets():
    batch = split_inputs_targets(np.zeros((2, 5), np.uint16), eot_id=EOT, mask_documents=False)
    assert set(batch) == {"inputs", "targets"}


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_windows_share_one_token_and_never_run_over_the_end(tokens, windows):
    assert window_count(tokens, 4) == windows
    assert windows * 4 + 1 <= max(tokens, 1)


def test_a_target_counts_only_if_it_is_learned():
    window = np.array([[5, 6, EOT, 7, 8]], np.uint16)
    mask = np.array([[1, 0, 1, 1, 1]], np.uint8)
    batch = split_inputs_targets(window, eot_id=EOT, mask_documents=True, mask_BW=mask)
    assert batch["weights"].tolist() == [[0, 1, 0, 1]]  # the first of a document follows the end of another
    plain = split_inputs_targets(window, eot_id=EOT, mask_documents=False, mask_BW=mask)
    assert set(plain) == {"inputs", "targets", "weights"}
    assert plain["weights"].tolist() == [[0, 1, 1, 1]]
    assert plain["weights"].dtype == np.float32


def test_packed_rows_are_documents_side_by_side_and_padding():
    batch = packed_batch(
        np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.uint16), np.array([2, 1, 3]), np.array([2, 1]), seq_len=4
    )
    assert batch["inputs"].tolist() == [[1, 2, 4, 0], [6, 7, 8, 0]]
    assert batch["targets"].tolist() == [[2, 3, 5, 0], [7, 8, 9, 0]]
    assert batch["segments"].tolist() == [[1, 1, 2, 0], [1, 1, 1, 0]]
    assert batch["positions"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize("seed", range(10))
def test_any_packed_batch_equals_the_loop_over_pieces(seed):
    rng, seq_len = np.random.default_rng(seed), int(3 + 7 * seed)
    documents = [rng.integers(0, 2**17, n).astype(np.uint32) for n in rng.integers(1, 40, 50)]
    masks = [rng.integers(0, 2, len(document)) for document in documents]
    packs = pack(np.array([len(document) for document in documents]), seq_len)
    chosen = rng.integers(0, packs.rows, 6)
    pieces = [np.arange(packs.row_offsets[row], packs.row_offsets[row + 1]) for row in chosen]
    parts = [(packs.piece_document[p], packs.piece_skip[p], packs.piece_length[p]) for p in np.concatenate(pieces)]
    expected = {name: np.zeros((6, seq_len)) for name in ("inputs", "targets", "segments", "positions", "weights")}
    for row, own in enumerate(pieces):
        at = 0
        for number, p in enumerate(own, start=1):
            document, skip, length = packs.piece_document[p], packs.piece_skip[p], int(packs.piece_length[p])
            place, here = (row, slice(at, at + length)), slice(skip, skip + length)
            after = slice(skip + 1, skip + length + 1)
            expected["inputs"][place], expected["targets"][place] = (
                documents[document][here],
                documents[document][after],
            )
            expected["segments"][place], expected["positions"][place] = number, np.arange(length)
            expected["weights"][place] = masks[document][after]
            at += length
        expected["positions"][row, at:] = np.arange(seq_len - at)
    batch = packed_batch(
        np.concatenate([documents[d][skip : skip + n + 1] for d, skip, n in parts]),
        np.array([n for _, _, n in parts]),
        np.array([len(own) for own in pieces]),
        seq_len=seq_len,
        mask_N=np.concatenate([masks[d][skip : skip + n + 1] for d, skip, n in parts]),
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(batch[name], array)
        assert batch[name].dtype == (np.float32 if name == "weights" else np.int32)


@pytest.mark.parametrize("kernel", [reference, splash_interpreted])
def test_padding_does_not_reach_the_documents(kernel):
    """Padding is a document of its own to attention: whatever it holds, the others attend to themselves."""
    rng = np.random.default_rng(0)
    batch = packed_batch(np.arange(102, dtype=np.uint16), np.array([40, 60]), np.array([2]), seq_len=128)
    ids, real_T = jnp.asarray(batch["segments"]), batch["segments"][0] > 0
    q, k, v, noise = rng.normal(size=(4, 1, 128, 2, 128)).astype(np.float32)
    other = np.where(real_T[None, :, None, None], 0, noise)

    def attended(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.asarray(kernel(jnp.asarray(q), jnp.asarray(keys), jnp.asarray(values), See(), segments=(ids, ids)))[0]

    plain, moved = attended(k, v), attended(k + other, v + other)
    assert np.isfinite(plain).all()
    np.testing.assert_array_equal(plain[real_T], moved[real_T])
    assert not np.array_equal(plain[~real_T], moved[~real_T])
