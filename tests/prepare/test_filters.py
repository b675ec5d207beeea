from collections import Counter
from dataclasses import replace

import pytest

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.filters import Filters

PROSE = (
    "The ship that the captain had waited for came in with the tide, and nobody who stood on the old quay that "
    "evening would have guessed what it carried below its narrow deck.\n"
    "A boy counted the lanterns of the harbour, one after another, until his mother called him to supper; he was "
    "thinking of islands.\n\n"
    "Later, when it rained, two men rowed out without a word between them and were not seen again by any of us.\n"
)

CASES = {
    "min_chars": (6, "short", "enough"),
    "max_chars": (6, "too long", "enough"),
    "min_words": (3, "two words", "three short words"),
    "max_words": (2, "three short words", "two words"),
    "min_mean_word_chars": (3.0, "a bc", "abc def"),
    "max_mean_word_chars": (3.0, "abcd efg", "abc\n\ndef"),
    "max_digit_share": (0.25, "ab12", "abcde 12"),
    "max_symbol_share": (0.25, "a+-_", "abc\u00e9\u6f22 1!?"),
    "max_marks_per_word": (0.5, "# a ... b\u2026", "# a b... c"),
    "min_alphabetic_word_share": (0.5, "1 2 a", "1 x2 -- \u6f22"),
    "min_stop_words": (2, "The cat, the dog of1", "THE cat of mine"),
    "max_bullet_line_share": (0.5, "- a\n * b\n\nc", "- a\nb\n  c\n\u2022 d"),
    "max_ellipsis_line_share": (0.5, "a...\nb\u2026\nc", "a...\nb\n\n\n"),
    "max_duplicate_line_share": (0.25, "a\n a\nb", "a\nb\n\n\na \nc\n"),
    "max_duplicate_line_char_share": (0.25, "abcdef\nabcdef\ngh", "ab\nab\ncdefgh"),
    "max_duplicate_paragraph_share": (0.25, "a\nb\n\na\nb\n \nc", "a\n\na\n\nb\n\nc"),
    "max_duplicate_paragraph_char_share": (0.25, "abcdef\n\nabcdef\n\ngh", "ab\n\nab\n\ncdefgh"),
    "max_top_run_shares": ((0.5,), "a b a b c", "a b c d e"),
    "max_duplicate_run_shares": ((0.4,), "a b c d e a b c d e f", "a b c d e x b c d e f"),
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
    assert gopher.reason(PROSE * 3) == "max_duplicate_line_share"
    assert gopher.reason(" ".join(words * 3)) == "max_duplicate_run_shares"
    assert gopher.reason(PROSE + " very much" * 20) == "max_top_run_shares"
    assert gopher.reason("\n".join(f"- {word} line{number}" for number, word in enumerate(words))) == (
        "max_bullet_line_share"
    )
    numbers = " ".join(str(number) for number in range(1000, 1040))
    assert gopher.reason(PROSE + numbers) == "min_alphabetic_word_share"


def test_nothing_breaks_no_rule_but_those_of_length():
    everything = replace(Filters.gopher(), min_words=None, min_mean_word_chars=None, min_stop_words=None)
    everything = replace(everything, min_alphabetic_word_share=None)
    assert everything.reason("") is None and everything.reason(" \n\n\t") is None
    assert Filters.gopher().reason("") == "min_words"
    assert everything.reason("word") is None


def _spelt_out(words, n):
    """Characters in runs that repeat an earlier one, among all: as the rule is written, run by run."""
    seen, inside = set(), set()
    for start in range(len(words) - n + 1):
        run = tuple(words[start : start + n])
        if run in seen:
            inside.update(range(start, start + n))
        seen.add(run)
    return sum(len(words[place]) for place in inside) / sum(map(len, words))


@pytest.mark.parametrize("n", [5, 6, 8])
def test_shares_of_runs_are_those_of_a_count_by_hand(n):
    words = (PROSE + PROSE[:200] + " and then " + PROSE[50:120]).split()
    share = _spelt_out(words, n)
    assert 0.1 < share < 0.6
    below = (*[1.0] * (n - 5), share - 1e-9)
    at = (*[1.0] * (n - 5), share)
    assert Filters(max_duplicate_run_shares=below).reason(" ".join(words)) == "max_duplicate_run_shares"
    assert Filters(max_duplicate_run_shares=at).reason(" ".join(words)) is None


def test_the_share_of_the_top_run_is_that_of_a_count_by_hand():
    words = (PROSE + " the old quay" * 4).split()
    count = Counter(tuple(words[start : start + 3]) for start in range(len(words) - 2))
    (top, times), *_ = count.most_common(1)
    share = times * sum(map(len, top)) / sum(map(len, words))
    assert top == ("the", "old", "quay") and times == 5
    assert Filters(max_top_run_shares=(1.0, share - 1e-9)).reason(" ".join(words)) == "max_top_run_shares"
    assert Filters(max_top_run_shares=(1.0, share)).reason(" ".join(words)) is None


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (Filters(max_digit_share=1.5), "max_digit_share=1.5: .*; use max_digit_share=none"),
        (Filters(min_chars=-1), "min_chars=-1: .*; use min_chars=none"),
        (Filters(max_top_run_shares=(0.2, 2.0)), r"max_top_run_shares=.*: .*; use max_top_run_shares=\(\)"),
        (Filters(min_words=9, max_words=8), "min_words=9, max_words=8: no text passes both"),
        (Filters(min_stop_words=3, stop_words=("a", "b")), "min_stop_words=3, stop_words=.*: there are 2 stop words"),
    ],
)
def test_filters_say_what_is_wrong_with_them(filters, message):
    with pytest.raises(ConfigError, match=message):
        validate(filters)
    validate(Filters.gopher())
