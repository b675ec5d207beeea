import lzma
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.data.store.layout import OFFSETS
from jaxinfra.data.store.store import TokenStore
from jaxinfra.prepare.builders import baseline
from jaxinfra.prepare.builders.baseline import NGram, ngram_bits_per_byte, xz_bits_per_byte
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.validation import ByKey, hash_to_unit
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import TrainBpe
from tests.stores import bytes_recipe, documents

VOCAB = 6


def draw(count: int, seed: int) -> np.ndarray:
    """Draws tokens with some structure; the last token of the vocabulary never occurs."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([0, 1, 1, 1, 2], count)
    return (np.cumsum(steps) % (VOCAB - 1)).astype(np.uint16)


def naive(train, vocab_size: int, order: int):
    """Computes the same model from the formula, with dictionaries."""
    train = [int(token) for token in train]
    grams = Counter(tuple(train[i : i + n]) for n in range(1, order + 1) for i in range(len(train) - n + 1))

    def probability(history: tuple[int, ...], token: int) -> float:
        shorter = probability(history[1:], token) if history else 1 / vocab_size
        followers = [grams[(*history, w)] for w in range(vocab_size) if grams[(*history, w)]]
        if not followers:
            return shorter
        count = grams[(*history, token)]
        return (count + len(followers) * shorter) / (sum(followers) + len(followers))

    return probability


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 3, 200])
def test_ngram_equals_a_naive_implementation(order, length):
    train, text = draw(length, 0), draw(60, 1)
    text[20] = VOCAB - 1  # never seen in training
    expected = naive(train, VOCAB, order)
    words = [int(token) for token in text]
    wanted = [expected(tuple(words[max(0, i - order + 1) : i]), words[i]) for i in range(len(words))]
    found = NGram(train, vocab_size=VOCAB, order=order).probabilities(text)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_bits_per_byte_include_the_first_validation_token():
    train, validation = draw(500, 0), draw(40, 1)
    model = naive(np.concatenate([[0], train]), VOCAB, 5)
    words = [0, *validation.tolist()]
    bits = sum(-math.log2(model(tuple(words[max(0, i - 4) : i]), words[i])) for i in range(1, len(words)))
    found = ngram_bits_per_byte(train, validation, validation_bytes=100, vocab_size=VOCAB, eot_id=0)
    assert found == pytest.approx(bits / 100)


def test_xz_compresses_the_concatenated_texts():
    texts = ["def f(x):\n    return x\n" * 50, "naïve\n", "class A: pass\n" * 20]
    content = "".join(texts).encode()
    assert xz_bits_per_byte(texts) == 8 * len(lzma.compress(content, preset=6)) / len(content)


def test_baselines_use_the_first_whole_documents(store_path, monkeypatch):
    store = TokenStore.open(store_path)
    offsets = store.read_all("validation", OFFSETS)
    for limit, count in [(offsets[-1], len(offsets) - 1), (offsets[2], 2), (offsets[2] - 1, 1), (1, 1)]:
        monkeypatch.setattr(baseline, "VALIDATION_LIMIT_TOKENS", int(limit))
        texts = documents(store, "validation")[:count]
        found = baseline.measure_baselines(store)[0]["bits_per_byte"]
        assert found["xz -6"] == xz_bits_per_byte(texts)
        assert found["token 5-gram"] == ngram_bits_per_byte(
            store.sample_tokens("train", 10**9),
            store.read("validation", [0], offsets[count])[0],
            validation_bytes=sum(len(text.encode()) for text in texts),
            vocab_size=store.manifest.tokenizer_info.vocab_size,
            eot_id=store.manifest.tokenizer_info.eot_id,
        )


def test_empty_validation_text_has_no_baselines(tmp_path):
    for letter in "abcdefgh":
        (tmp_path / f"{letter}.txt").write_text("" if hash_to_unit(f"{letter}.txt") < 0.5 else "x = 1\n")
    fields = {"tokenizer": TrainBpe(vocab_size=300), "validation": ByKey(fraction=0.5), "baselines": True}
    recipe = bytes_recipe("none", tmp_path / "store", **fields)
    manifest = prepare(replace(recipe, source=TextFiles(root=str(tmp_path), min_bytes=0)), workers=1).manifest
    assert manifest.splits["validation"].tokens == manifest.splits["validation"].documents
    assert manifest.baselines == {}
