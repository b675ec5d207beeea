"""Filter rules and deduplication."""

import itertools
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from datasketch import MinHash, MinHashLSH

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.dedup import Dedup, Signer, find_duplicates
from jaxinfra.prepare.documents.filters import Filters
from jaxinfra.prepare.documents.shingles import ngram_hashes, word_hashes
from tests.refusals import raises

PROSE = (
    "The ship that the captain had waited for came in with the tide, and nobody who stood on the old quay that "
    "evening would have guessed what it carried below its narrow deck.\n"
    "A boy counted the lanterns of the harbor, one after another, until his mother called him to supper; he was "
    "thinking of islands.\n\n"
    "Later, when it rained, two men rowed out without a word between them and were not seen again by any of us.\n"
)

CASES = {
    "min_chars": (6, "short", "enough"),
    "max_chars": (6, "too long", "enough"),
    "min_words": (3, "two words", "three short words"),
    "max_words": (2, "three short words", "two words"),
    "min_mean_word_length": (3.0, "a bc", "abc def"),
    "max_mean_word_length": (3.0, "abcd efg", "abc\n\ndef"),
    "max_digit_fraction": (0.25, "ab12", "abcde 12"),
    "max_punctuation_fraction": (0.25, "a+-_", "abc\u00e9\u6f22 1!?"),
    "max_symbol_to_word_ratio": (0.5, "# a ... b\u2026", "# a b... c"),
    "min_alphabetic_word_fraction": (0.5, "1 2 a", "1 x2 -- \u6f22"),
    "min_stop_words": (2, "The cat, the dog of1", "THE cat of mine"),
    "max_bullet_line_fraction": (0.5, "- a\n * b\n\nc", "- a\nb\n  c\n\u2022 d"),
    "max_ellipsis_line_fraction": (0.5, "a...\nb\u2026\nc", "a...\nb\n\n\n"),
    "max_duplicate_line_fraction": (0.25, "a\n a\nb", "a\nb\n\n\na \nc\n"),
    "max_duplicate_line_char_fraction": (0.25, "abcdef\nabcdef\ngh", "ab\nab\ncdefgh"),
    "max_duplicate_paragraph_fraction": (0.25, "a\nb\n\na\nb\n \nc", "a\n\na\n\nb\n\nc"),
    "max_duplicate_paragraph_char_fraction": (0.25, "abcdef\n\nabcdef\n\ngh", "ab\n\nab\n\ncdefgh"),
    "max_top_ngram_fractions": ((0.5,), "a b a b c", "a b c d e"),
    "max_duplicate_ngram_fractions": ((0.4,), "a b c d e a b c d e f", "a b c d e x b c d e f"),
}


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_refuses_what_breaks_it_and_nothing_else(rule):
    limit, bad, good = CASES[rule]
    filters = replace(Filters(), **{rule: limit})
    assert filters.reason(bad) == rule
    assert filters.reason(good) is None
    assert Filters().reason(bad) is None


def test_every_rule_has_a_case():
    assert CASES.keys() | {"stop_words"} == Filters.__dataclass_fields__.keys()


def test_prose_passes_the_rules_of_gopher_and_what_is_not_prose_does_not():
    gopher = Filters.gopher()
    assert gopher.reason(PROSE) is None
    words = PROSE.split()
    assert gopher.reason(" ".join(words[:49])) == "min_words"
    assert gopher.reason(PROSE * 3) == "max_duplicate_line_fraction"
    assert gopher.reason(" ".join(words * 3)) == "max_duplicate_ngram_fractions"
    assert gopher.reason(PROSE + " very much" * 20) == "max_top_ngram_fractions"
    assert gopher.reason("\n".join(f"- {word} line{number}" for number, word in enumerate(words))) == (
        "max_bullet_line_fraction"
    )
    numbers = " ".join(str(number) for number in range(1000, 1040))
    assert gopher.reason(PROSE + numbers) == "min_alphabetic_word_fraction"


def test_empty_text_breaks_only_the_minimum_rules():
    everything = replace(Filters.gopher(), min_words=None, min_mean_word_length=None, min_stop_words=None)
    everything = replace(everything, min_alphabetic_word_fraction=None)
    assert everything.reason("") is None and everything.reason(" \n\n\t") is None
    assert Filters.gopher().reason("") == "min_words"
    assert everything.reason("word") is None


def _naive_fraction(words, n):
    """Computes the fraction of characters in n-grams that repeat an earlier one, n-gram by n-gram."""
    seen, inside = set(), set()
    for start in range(len(words) - n + 1):
        run = tuple(words[start : start + n])
        if run in seen:
            inside.update(range(start, start + n))
        seen.add(run)
    return sum(len(words[place]) for place in inside) / sum(map(len, words))


@pytest.mark.parametrize("n", [5, 6, 8])
def test_duplicate_ngram_fractions_equal_a_naive_count(n):
    words = (PROSE + PROSE[:200] + " and then " + PROSE[50:120]).split()
    share = _naive_fraction(words, n)
    assert 0.1 < share < 0.6
    below = (*[1.0] * (n - 5), share - 1e-9)
    at = (*[1.0] * (n - 5), share)
    assert Filters(max_duplicate_ngram_fractions=below).reason(" ".join(words)) == "max_duplicate_ngram_fractions"
    assert Filters(max_duplicate_ngram_fractions=at).reason(" ".join(words)) is None


def test_the_top_ngram_fraction_equals_a_naive_count():
    words = (PROSE + " the old quay" * 4).split()
    count = Counter(tuple(words[start : start + 3]) for start in range(len(words) - 2))
    (top, times), *_ = count.most_common(1)
    share = times * sum(map(len, top)) / sum(map(len, words))
    assert top == ("the", "old", "quay") and times == 5
    assert Filters(max_top_ngram_fractions=(1.0, share - 1e-9)).reason(" ".join(words)) == "max_top_ngram_fractions"
    assert Filters(max_top_ngram_fractions=(1.0, share)).reason(" ".join(words)) is None


NEAR = Dedup(near=True)


def random_words(rng, count):
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def changed(rng, text, share):
    """Replaces about this fraction of the words in one place, so that few n-grams change."""
    count = int(len(text) * share)
    start = rng.randrange(len(text) - count + 1)
    return [*text[:start], *random_words(rng, count), *text[start + count :]]


def signed(dedup, texts):
    sign = Signer(dedup)
    exact, near = zip(*map(sign, texts), strict=True)
    return np.stack(exact), np.stack(near) if dedup.near else None


def found(dedup, texts):
    return np.flatnonzero(find_duplicates(dedup, *signed(dedup, texts))).tolist()


def test_the_first_of_equal_texts_is_kept():
    assert found(Dedup(), ["a", "b", "a", "", "b", "a ", "", "A"]) == [2, 4, 6]
    assert found(Dedup(), ["a"]) == [] and found(NEAR, ["a"]) == []
    nothing = find_duplicates(Dedup(), np.empty((0, 2), np.uint64), None)
    assert nothing.shape == (0,)
    assert find_duplicates(NEAR, np.empty((0, 2), np.uint64), np.empty((0, 128), np.uint32)).shape == (0,)


def test_an_exact_signature_is_the_hash_of_the_text():
    high, low = Signer(Dedup())("naïve 漢字")[0]
    assert (int(high) << 64) + int(low) == xxhash.xxh3_128_intdigest("naïve 漢字".encode())


def test_planted_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(0)
    originals = [random_words(rng, 400) for _ in range(60)]
    near = [changed(rng, original, 0.05) for original in originals[:20]]
    far = [changed(rng, original, 0.5) for original in originals[20:40]]
    texts = [" ".join(text) for text in (*originals, *near, *far)]
    assert found(NEAR, texts) == list(range(60, 80))
    assert found(Dedup(), texts) == []
    backwards = found(NEAR, texts[::-1])
    assert backwards == [len(texts) - 1 - number for number in range(19, -1, -1)]


def test_near_duplicates_ignore_case_spacing_and_punctuation_but_not_word_order():
    text = " ".join(random_words(random.Random(1), 60))
    others = [text.upper(), text.replace(" ", ",\n "), " ".join(reversed(text.split()))]
    assert found(NEAR, [text, *others]) == [1, 2]


def test_texts_without_spaces_are_compared_by_character():
    rng = random.Random(2)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(300))
    assert found(NEAR, [text, text[:295] + "漢字漢字漢", text[::-1]]) == [1]


def test_texts_without_words_are_near_to_equal_texts_only():
    assert found(NEAR, ["!!!", "???", "", "!!!", "a", "a b", "a."]) == [3, 6]


def test_near_duplicates_are_those_that_datasketch_finds():
    rng = random.Random(3)
    dedup = Dedup(near=True, threshold=0.7)
    texts = [random_words(rng, rng.randrange(1, 200)) for _ in range(30)]
    texts += [changed(rng, rng.choice(texts), rng.random() * 0.3) for _ in range(120)]
    exact, near = signed(dedup, [" ".join(text) for text in texts])
    lsh = MinHashLSH(dedup.threshold, dedup.num_permutations, weights=(0.05, 0.95))
    expected = []
    for number, values in enumerate(near):
        sketch = MinHash(hashvalues=values, scheme="affine32")
        candidates = lsh.query(sketch)
        expected.append(any(np.mean(near[other] == values) >= dedup.threshold for other in candidates))
        lsh.insert(number, sketch)
    assert 20 < sum(expected) < 120
    assert find_duplicates(dedup, exact, near).tolist() == expected


def test_signatures_do_not_depend_on_threads():
    rng = random.Random(5)
    texts = [" ".join(random_words(rng, 50)) for _ in range(40)]
    sign = Signer(NEAR)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(sign, texts))
    exact, near = signed(NEAR, texts)
    assert (np.stack([pair[0] for pair in together]) == exact).all()
    assert (np.stack([pair[1] for pair in together]) == near).all()
    assert (exact.dtype, near.dtype, near.shape) == (np.uint64, np.uint32, (40, 128))


def test_ngram_hashes_are_equal_where_the_words_are():
    words = list("abcabdabc")
    codes = word_hashes(words)
    for n in range(1, 6):
        runs = ngram_hashes(codes, n)
        assert len(runs) == 10 - n
        expected = [words[start : start + n] for start in range(10 - n)]
        for i, j in itertools.combinations(range(10 - n), 2):
            assert (runs[i] == runs[j]) == (expected[i] == expected[j])
    assert len(ngram_hashes(codes, 10)) == len(ngram_hashes(codes, 12)) == 0


def test_a_missing_datasketch_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    Signer(Dedup())
    with raises(ConfigError, "pip install 'jaxinfra[dedup]'"):
        Signer(NEAR)
