import itertools
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from datasketch import MinHash, MinHashLSH

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.dedup import Dedup, Signer, duplicates
from jaxinfra.prepare.documents.shingles import run_codes, word_codes

NEAR = Dedup(near=True)


def words(rng, count):
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def changed(rng, text, share):
    """The text with about this share of its words replaced, in one place, so that few runs are lost."""
    count = int(len(text) * share)
    start = rng.randrange(len(text) - count + 1)
    return [*text[:start], *words(rng, count), *text[start + count :]]


def signed(dedup, texts):
    sign = Signer(dedup)
    exact, near = zip(*map(sign, texts), strict=True)
    return np.stack(exact), np.stack(near) if dedup.near else None


def found(dedup, texts):
    return np.flatnonzero(duplicates(dedup, *signed(dedup, texts))).tolist()


def test_the_first_of_equal_texts_stays():
    assert found(Dedup(), ["a", "b", "a", "", "b", "a ", "", "A"]) == [2, 4, 6]
    assert found(Dedup(), ["a"]) == [] and found(NEAR, ["a"]) == []
    nothing = duplicates(Dedup(), np.empty((0, 2), np.uint64), None)
    assert nothing.shape == (0,)
    assert duplicates(NEAR, np.empty((0, 2), np.uint64), np.empty((0, 128), np.uint32)).shape == (0,)


def test_an_exact_signature_is_the_hash_of_the_text():
    high, low = Signer(Dedup()).exact("naïve 漢字")
    assert (int(high) << 64) + int(low) == xxhash.xxh3_128_intdigest("naïve 漢字".encode())


def test_planted_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(0)
    originals = [words(rng, 400) for _ in range(60)]
    near = [changed(rng, original, 0.05) for original in originals[:20]]
    far = [changed(rng, original, 0.5) for original in originals[20:40]]
    texts = [" ".join(text) for text in (*originals, *near, *far)]
    assert found(NEAR, texts) == list(range(60, 80))
    assert found(Dedup(), texts) == []
    backwards = found(NEAR, texts[::-1])
    assert backwards == [len(texts) - 1 - number for number in range(19, -1, -1)]


def test_case_spacing_and_punctuation_do_not_count_and_word_order_does():
    text = " ".join(words(random.Random(1), 60))
    others = [text.upper(), text.replace(" ", ",\n "), " ".join(reversed(text.split()))]
    assert found(NEAR, [text, *others]) == [1, 2]


def test_texts_without_spaces_are_compared_by_their_letters():
    rng = random.Random(2)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(300))
    assert found(NEAR, [text, text[:295] + "漢字漢字漢", text[::-1]]) == [1]


def test_texts_without_words_are_near_to_themselves_alone():
    assert found(NEAR, ["!!!", "???", "", "!!!", "a", "a b", "a."]) == [3, 6]


def test_what_is_found_is_what_the_library_finds():
    rng = random.Random(3)
    dedup = Dedup(near=True, threshold=0.7)
    texts = [words(rng, rng.randrange(1, 200)) for _ in range(30)]
    texts += [changed(rng, rng.choice(texts), rng.random() * 0.3) for _ in range(120)]
    exact, near = signed(dedup, [" ".join(text) for text in texts])
    lsh = MinHashLSH(dedup.threshold, dedup.permutations, weights=(0.05, 0.95))
    expected = []
    for number, values in enumerate(near):
        sketch = MinHash(hashvalues=values, scheme="affine32")
        candidates = lsh.query(sketch)
        expected.append(any(np.mean(near[other] == values) >= dedup.threshold for other in candidates))
        lsh.insert(number, sketch)
    assert 20 < sum(expected) < 120
    assert duplicates(dedup, exact, near).tolist() == expected


def test_signatures_estimate_the_share_of_runs():
    rng = random.Random(4)
    sign = Signer(Dedup(near=True, permutations=1024))
    text = words(rng, 3000)  # more runs than are hashed together
    for share in (0.0, 0.1, 0.5):
        other = changed(rng, text, share)
        runs = [{tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (text, other)]
        actual = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        estimate = np.mean(sign.near(" ".join(text)) == sign.near(" ".join(other)))
        assert abs(actual - estimate) < 0.05


def test_signatures_do_not_depend_on_threads():
    rng = random.Random(5)
    texts = [" ".join(words(rng, 50)) for _ in range(40)]
    sign = Signer(NEAR)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(sign, texts))
    exact, near = signed(NEAR, texts)
    assert (np.stack([pair[0] for pair in together]) == exact).all()
    assert (np.stack([pair[1] for pair in together]) == near).all()
    assert (exact.dtype, near.dtype, near.shape) == (np.uint64, np.uint32, (40, 128))


def test_runs_of_words_are_equal_where_the_words_are():
    words = list("abcabdabc")
    codes = word_codes(words)
    for n in range(1, 6):
        runs = run_codes(codes, n)
        assert len(runs) == 10 - n
        spelt = [words[start : start + n] for start in range(10 - n)]
        for i, j in itertools.combinations(range(10 - n), 2):
            assert (runs[i] == runs[j]) == (spelt[i] == spelt[j])
    assert len(run_codes(codes, 10)) == len(run_codes(codes, 12)) == 0


def test_a_missing_datasketch_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    Signer(Dedup())
    with pytest.raises(ConfigError, match=r"needs datasketch .* run pip install 'jaxinfra\[dedup\]'"):
        Signer(NEAR)


@pytest.mark.parametrize(
    ("dedup", "message"),
    [
        (Dedup(threshold=0.0), "threshold=0.0: .*; use threshold=0.8"),
        (Dedup(permutations=1), "permutations=1: .*; use permutations=128"),
        (Dedup(ngram=0), "ngram=0: .*; use ngram=5"),
    ],
)
def test_descriptions_say_what_is_wrong_with_them(dedup, message):
    with pytest.raises(ConfigError, match=message):
        validate(dedup)
