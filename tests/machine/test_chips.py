"""The table of chips, and files that change it."""

from pathlib import Path

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.machine.chips import CHIPS, load_chips
from tests.refusals import raises


def test_figures_are_of_a_device() -> None:
    """A chip of TPU7x is two devices, that share what its page states of the chip; links are those of the chip."""
    half, whole = CHIPS["tpu7x"], CHIPS["v5p"]
    assert half.peaks == {"bf16": 2307e12 / 2, "fp8": 4614e12 / 2} and half.hbm_bytes_per_s == 3690e9
    assert half.host_bytes == 960e9 / 8 and whole.host_bytes == 448e9 / 4
    assert half.link_bytes_per_s == whole.link_bytes_per_s == 100e9
    assert whole.watts is None and CHIPS["v4"].watts == 85


def test_a_file_adds_and_changes_rows(tmp_path: Path) -> None:
    file = tmp_path / "chips.toml"
    file.write_text("[v5p]\ndollars = { on_demand = 4.2, spot = 2.1 }\nwatts = 300\n[mine]\n", encoding="utf-8")
    with raises(ConfigError, "--chips", str(file), "mine has no line tflops"):
        load_chips(str(file))
    file.write_text(file.read_text() + 'device_kind = "Mine"\ntflops = { bf16 = 1 }\nhbm_gib = 2\n', encoding="utf-8")
    chips = load_chips(str(file))
    assert chips["v5p"].dollars == {"on_demand": 4.2, "spot": 2.1} and chips["v5p"].watts == 300
    assert chips["v5p"].peaks == CHIPS["v5p"].peaks and not CHIPS["v5p"].dollars
    assert chips["mine"].platform == "cuda" and chips["mine"].hbm_bytes == 2 * 2**30


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("v5p = 3", "v5p expected a row [v5p]"),
        ("[v5p]\nwatt = 3", "v5p no line watt use watts"),
        ("[v5p]\ndollars = { reserved = 1 }", "v5p no price reserved on_demand, committed, spot"),
        ("[v5p]\ndollars = 4.2", "v5p dollars = 4.2 on_demand"),
        ("[v5p]\ndollars = { spot = -1 }", "v5p dollars.spot = -1 above 0"),
        ('[v5p]\nwatts = "220W"', "v5p watts = '220W' above 0"),
        ("[v5q]\nwatts = 220", "v5q no line tflops did you mean [v5"),
        ("[v5p]\nwatts = nan", "v5p watts = nan above 0"),
        ("[v5p]\nmxu = [8]", "v5p mxu = [8] 2 numbers"),
        ("[v5p]\nhost = [0, 4]", "v5p host = [0, 4] above 0"),
        ("[v5p]\nmax_slice = 4", "v5p max_slice = 4 list"),
        ("[v5p]\nrates = { computes = 1.0 }", "v5p rates compute, attention"),
        ("[v5p]\ndevice_kind = 5", "v5p device_kind = 5 text"),
        ("[v5p]\ntflops = 3", "v5p tflops = 3 bf16"),
        ("[v5p", "end of document TOML"),
    ],
)
def test_a_file_that_is_wrong(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "chips.toml"
    file.write_text(text, encoding="utf-8")
    with raises(ConfigError, "--chips", str(file), named):
        load_chips(str(file))
    with raises(ConfigError, "--chips missing.toml No such file"):
        load_chips("missing.toml")
