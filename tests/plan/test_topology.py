"""What `--on` names is understood or refused with what would do, and its compiler knows it."""

import importlib.util
from typing import Any

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.plan.chips import CHIPS
from jaxinfra.plan.topology import Topology, devices, domains, parse, prepare
from jaxinfra.runtime.peak import CHIP_FLOPS
from tests.refusals import raises

GPUS = [f"{chip.name}:1x8" for chip in CHIPS.values() if chip.platform == "cuda"]


@pytest.mark.parametrize(
    ("text", "chip", "shape", "slices", "count"),
    [
        ("v5p:4x4x4", "v5p", (4, 4, 4), 1, 64),
        ("2xv5e:2x4", "v5e", (2, 4), 2, 16),
        ("v4:2x2x1", "v4", (2, 2, 1), 1, 8),
        ("v6e:16x16", "v6e", (16, 16), 1, 256),
        ("h100:2x8", "h100", (2, 8), 1, 16),
    ],
)
def test_a_topology_is_read_and_written(text: str, chip: str, shape: tuple[int, ...], slices: int, count: int) -> None:
    found = parse(text)
    assert found == Topology(chip=CHIPS[chip], shape=shape, slices=slices)
    assert (str(found), found.count) == (text, count)


@pytest.mark.parametrize(
    ("text", "use"),
    [
        *((text, "v5p:4x4x4") for text in ("v5p", "v5p:4,4", "v9:2x2", "v5p:4x4", "v5e:2x999999")),
        ("v5e:2x4x1", "v5e:2x4"),
        ("v5e:0x4", "v5e:2x4"),
        ("0xv5e:2x4", "v5e:2x4"),
        ("h100:8", "h100:1x8"),
        ("2xh100:1x8", "h100:2x8"),
        ("v5p:64x64x64", "v5p:16x20x28"),
        ("v6e:32x8", "v6e:16x16"),
    ],
)
def test_what_is_no_topology_is_refused(text: str, use: str) -> None:
    """With one that would do."""
    with raises(ConfigError, f"--on {text}: use --on {use}"):
        parse(text)
    assert str(parse(use)) == use


@pytest.mark.parametrize("text", ["999xv5e:16x16", "h100:9999x8"])
def test_there_is_a_largest_number_of_devices(text: str) -> None:
    with raises(ConfigError, f"--on {text}: 65,536"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "rings"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:4x4x8", (True, True, True)),
        ("v4:2x2x4", (False, False, False)),
        ("v5e:4x4", (False, False, False)),
        ("v6e:8x16", (False, True, False)),
        ("v5e:16x16", (True, True, False)),
    ],
)
def test_rings_close_where_the_hardware_has_them(text: str, rings: tuple[bool, bool, bool]) -> None:
    assert parse(text).wrap == rings


@pytest.mark.parametrize(("text", "package"), [("v5e:2x4", "libtpu"), ("h100:1x8", "jax-cuda13-plugin")])
def test_a_compiler_that_is_not_installed_is_named(text: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_plugins(name: str) -> Any:
        return None if name in ("libtpu", "jax_plugins") else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_plugins)
    with raises(ConfigError, f"--on {text}: {package}, '.[compile]'"):
        prepare(parse(text))


def test_the_table_of_chips_agrees_with_the_peaks() -> None:
    """A chip of two devices has half of it in each; clocks are those that matrix units of this kind run at."""
    for chip in CHIPS.values():
        kind = max((kind for kind in CHIP_FLOPS if chip.kind.startswith(kind)), key=len)
        whole = 2 if chip.name == "v4" else 1  # of TPU7x the peak is that of a device already
        assert chip.flops * whole == CHIP_FLOPS[kind]
        assert (chip.clock_hz is None) == (chip.platform == "cuda")
        if chip.clock_hz is not None:
            assert 1e9 < chip.clock_hz < 2.5e9


@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:1x1", "v5p:4x4x4", "v6e:16x16", "tpu7x:2x2x1", *GPUS])
def test_its_compiler_knows_it(text: str) -> None:
    topology = parse(text)
    prepare(topology)
    found = devices(topology)
    assert len(found) == topology.count
    assert all(device.device_kind.startswith(topology.chip.kind) for device in found)
    assert set(domains(topology, found)) == {0}


@pytest.mark.parametrize(("text", "sizes"), [("3xv5e:2x4", [8, 8, 8]), ("h100:2x4", [4, 4])])
def test_slices_and_hosts_are_told_apart(text: str, sizes: list[int]) -> None:
    topology = parse(text)
    prepare(topology)
    placed = domains(topology, devices(topology))
    assert [placed.count(domain) for domain in sorted(set(placed))] == sizes
