import numpy as np
import pytest

from jaxinfra.data.windows import split_inputs_targets, window_count

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
    for row, window in enumerate(window_BW):
        found = [batch[name][row] for name in ("segments", "positions", "weights")]
        np.testing.assert_array_equal(found, naive(window.tolist(), EOT))


def test_without_masks_there_are_only_inputs_and_targets():
    batch = split_inputs_targets(np.zeros((2, 5), np.uint16), eot_id=EOT, mask_documents=False)
    assert set(batch) == {"inputs", "targets"}


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_windows_share_one_token_and_never_run_over_the_end(tokens, windows):
    assert window_count(tokens, 4) == windows
    assert windows * 4 + 1 <= max(tokens, 1)
