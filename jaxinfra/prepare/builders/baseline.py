"""Baselines on the validation text, which a trained model has to beat.

`xz_bits_per_byte` compresses the validation text alone. `ngram_bits_per_byte` trains a token n-gram model with
Witten-Bell interpolation. It is exact, without hashing or pruning, and a proper distribution over the vocabulary after
every history. All tokens are held in memory, so their number is limited.
"""

import lzma
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from jaxinfra.data.store.layout import OFFSETS
from jaxinfra.data.store.store import TokenStore
from jaxinfra.prepare.documents.shingles import ngram_hashes

ORDER = 5
TRAIN_LIMIT_TOKENS = 12 * 1024 * 1024
"""The n-gram model is trained on at most this many tokens, evenly spaced ranges of a longer text: 1.5 GB of memory."""
VALIDATION_LIMIT_TOKENS = 4 * 1024 * 1024
"""Both baselines are measured on the first whole documents with at most this many tokens."""
REPEATED_BYTES = 100
"""Text that is as long and stands in both splits is taken for a copy: about two lines."""


class NGram:
    """Interpolated n-gram model of token ids.

    With counts c, a history h, and h' the history without its oldest token, Witten and Bell (1991, method C) in the
    interpolated form of Chen and Goodman (1998, section 2.6):

        P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h)),    T(h) = number of different w seen after h

    and P(w | h) = P(w | h') for a history that was never seen. The unigram is interpolated with 1 / vocab_size.
    """

    def __init__(self, tokens: np.ndarray, *, vocab_size: int, order: int = ORDER):
        """Counts the n-grams of tokens[N], of each length up to `order`.

        An n-gram has the code `number of its history * vocab_size + last token`, and its number is the rank of its
        code. The numbers of one length are the histories of the next, so different n-grams have different codes. For
        the tokens 2 0 2 0 and vocab_size 3, the unigrams are 0 and 2 (numbers 0 and 1), and the bigrams "0 2" and "2 0"
        have the codes 0 * 3 + 2 and 1 * 3 + 0.
        """
        self.vocab_size = vocab_size
        # Per length: sorted codes, int64[ngrams]; c(h w) of each, int32; c(h) and T(h) of each history, int32. The last
        # two end with a 0 for the history -1, which was never seen.
        self._levels: list[tuple[np.ndarray, ...]] = []
        last = tokens.astype(np.int64)
        history = np.zeros(len(last), np.int64)
        num_histories = 1  # the empty one
        for _ in range(min(order, len(last))):
            codes, number, counts = np.unique(history * vocab_size + last, return_inverse=True, return_counts=True)
            history_of_code = codes // vocab_size
            totals = np.bincount(history_of_code, weights=counts, minlength=num_histories + 1)
            types = np.bincount(history_of_code, minlength=num_histories + 1)
            self._levels.append((codes, *(each.astype(np.int32) for each in (counts, totals, types))))
            last, history, num_histories = last[1:], number[:-1], len(codes)

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Returns P(token | up to order - 1 tokens before it) for each of tokens[N]: float64[N]."""
        last = tokens.astype(np.int64)
        probability = np.full(len(last), 1 / self.vocab_size)
        history = np.zeros(len(last), np.int64)  # number of the history in the level above, -1 if never seen
        for start, (codes, counts, totals, types) in enumerate(self._levels):
            code = history * self.vocab_size + last[start:]  # negative, so not found, after an unseen history
            rank = np.minimum(np.searchsorted(codes, code), len(codes) - 1)
            seen = codes[rank] == code
            count, total, num_types = np.where(seen, counts[rank], 0), totals[history], types[history]
            lower_order = probability[start:]
            mixed = (count + num_types * lower_order) / np.maximum(total + num_types, 1)
            probability[start:] = np.where(total > 0, mixed, lower_order)
            history = np.where(seen, rank, -1)[:-1]
        return probability


def ngram_bits_per_byte(
    train: np.ndarray, validation: np.ndarray, *, validation_bytes: int, vocab_size: int, eot_id: int
) -> float:
    """Returns the bits of all validation tokens, document ends included, per byte of validation text.

    Histories continue across document ends. Both texts begin after a document end.
    """
    eot = np.full(1, eot_id, train.dtype)
    model = NGram(np.concatenate([eot, train]), vocab_size=vocab_size)
    without_first = model.probabilities(np.concatenate([eot, validation]))[1:]
    return float(-np.log2(without_first).sum()) / validation_bytes


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Returns the bits per byte of all texts, UTF-8, in one .xz stream (LZMA2, preset 6, CRC-64)."""
    content = "".join(texts).encode()
    return 8 * len(lzma.compress(content, preset=6)) / len(content)


def repeated_share(train: np.ndarray, validation: np.ndarray, run: int) -> float:
    """Returns the share of the tokens validation[N] in runs of at least `run` tokens that train[M] has too."""
    starts, known = (ngram_hashes(tokens.astype(np.uint64), run) for tokens in (validation, train))
    if not len(starts):
        return 0.0
    is_known = np.isin(starts, known).astype(np.int64)
    return float(np.mean(np.convolve(is_known, np.ones(run, np.int64)) > 0))


def measure_baselines(store: TokenStore) -> tuple[dict[str, dict[str, float]], float]:
    """Returns bits per byte, and the share of the validation text that is in the training text too.

    They are those of the first validation documents within the limit, at least one; {} and 0 if all are empty. The text
    is what the tokens decode to.
    """
    info, offsets = store.manifest.tokenizer_info, store.read_all("validation", OFFSETS)
    documents = max(1, int(np.searchsorted(offsets, VALIDATION_LIMIT_TOKENS, side="right")) - 1)
    validation = store.read("validation", [0], int(offsets[documents]))[0]
    ends = offsets[: documents + 1]
    texts = [store.tokenizer.decode(validation[a : b - 1].tolist()) for a, b in pairwise(ends.tolist())]
    validation_bytes = sum(len(text.encode()) for text in texts)
    if not validation_bytes:
        return {}, 0.0
    train = store.sample_tokens("train", TRAIN_LIMIT_TOKENS)
    sizes = {"validation_bytes": validation_bytes, "vocab_size": info.vocab_size, "eot_id": info.eot_id}
    ngram = ngram_bits_per_byte(train, validation, **sizes)
    run = max(1, round(REPEATED_BYTES * len(validation) / validation_bytes))
    baselines = {"bits_per_byte": {"xz -6": xz_bits_per_byte(texts), "token 5-gram": ngram}}
    return baselines, repeated_share(train, validation, run)
