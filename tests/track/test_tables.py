"""Tables at any width: names and numbers are whole, less important columns are left out, only explanations wrap."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from jaxinfra.track.console import fitted_table, headline_table, print_table, statistics_table, summary_table

STATISTICS = {
    "devices": (1, "one device"),
    "parameters": (3_700_000, "count"),
    "tokens a step": (512_000, "global batch 8, 64,000 tokens each"),
    "steps": (400, ""),
    "FLOPs": (8.22e11, "of the whole run"),
    "state a device": ("0.049 GiB", "parameters, gradients and optimizer state; activations come on top"),
}
HEADERS = ("run", "step", "empty", "differs in", "age")
ROWS = [
    ["runs/quickstart-bb539a", "12/400", "", "peak_lr=0.003 train.steps=60", "12 min"],
    ["runs/[bold]story", "100,000/100,000", "", "", "3 s"],
]


def printed(table: Table, width: int, *, terminal: bool = True) -> list[str]:
    """The lines of a table, without the spaces at their ends."""
    console = Console(file=(out := io.StringIO()), width=width, force_terminal=terminal, color_system=None)
    print_table(console, table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def fitted(width: int, *, terminal: bool = True) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    return printed(
        fitted_table(console, HEADERS, ROWS, texts=("run", "differs in"), wrapped="differs in"),
        width,
        terminal=terminal,
    )


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_headline_keeps_names_and_numbers(width: int) -> None:
    lines = printed(headline_table(STATISTICS), width)
    starts = [" ".join(line.split()[:5]) for line in lines]
    for name, value in (("devices", "1"), ("parameters", "3.70 M"), ("tokens a step", "512 k"), ("FLOPs", "822 B")):
        assert any(start.startswith(f"{name} {value}") for start in starts), lines
    text = " ".join(" ".join(lines).split())
    assert "…" not in text and max(map(len, lines)) <= width
    for note in ("gradients", "optimizer", "activations come", "on top"):
        assert note in text
    assert (len(lines) == len(STATISTICS)) is (width == 200), "explanations wrap"


@pytest.mark.parametrize("make", [headline_table, statistics_table])
def test_what_does_not_fit_makes_longer_lines(make) -> None:
    """The terminal breaks them; nothing is lost."""
    lines = printed(make(STATISTICS), 20)
    assert "…" not in "".join(lines) and any("tokens a step" in line and "512" in line for line in lines)


def test_a_summary_keeps_paths() -> None:
    path = f"/scratch/{'x' * 90}/runs/story/checkpoints/400"
    assert any(line.endswith(path) for line in printed(summary_table({"checkpoint": path}), 60))


@pytest.mark.parametrize(
    ("width", "headers"),
    [
        (200, "run step differs in age"),
        (80, "run step differs in age"),
        (62, "run step differs in"),
        (60, "run step age"),
    ],
)
def test_the_last_columns_are_left_out_first(width: int, headers: str) -> None:
    """One that is too wide does not take a narrow one with it."""
    lines = fitted(width)
    assert " ".join(lines[1].split()) == headers and max(map(len, lines)) <= width
    rows = "\n".join(lines)
    assert "runs/quickstart-bb539a" in rows and "runs/[bold]story" in rows and "100,000/100,000" in rows
    left_out = [name for name in ("differs in", "age") if name not in headers]
    assert all(name in " ".join(lines[-2:]) for name in left_out)
    assert ("a wider terminal" in rows) is bool(left_out)


def test_words_wrap_before_a_column_is_left_out() -> None:
    lines = [line.split() for line in fitted(80)]
    assert "peak_lr=0.003" in lines[3] and lines[4] == ["train.steps=60"]


def test_a_long_path_does_not_push_a_column_out() -> None:
    headers, row = ("run", "differs in", "age"), ["runs/a", "store=" + "x" * 100, "3 s"]
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    lines = printed(fitted_table(console, headers, [row], texts=headers[:2], wrapped="differs in"), 80)
    assert lines[1].split() == ["run", "differs", "in", "age"] and "".join(lines).count("x") == 100, lines
    assert max(map(len, lines)) <= 80


def test_the_first_column_is_always_there_and_whole() -> None:
    assert any(line.strip() == "runs/quickstart-bb539a" for line in fitted(12))


def test_a_pipe_gets_all_columns_and_one_line_for_a_row() -> None:
    lines = fitted(20, terminal=False)
    assert lines[3].split() == ["runs/quickstart-bb539a", "12/400", "peak_lr=0.003", "train.steps=60", "12", "min"]
    assert lines[4].split() == ["runs/[bold]story", "100,000/100,000", "3", "s"]
