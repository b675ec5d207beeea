import importlib.util
import math
import os
from dataclasses import replace
from typing import Any

import pytest

from jaxinfra import packages
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.machine.chips import CHIPS
from jaxinfra.machine.peak_flops import PEAK_FLOPS
from jaxinfra.packages import install_command
from jaxinfra.plan.compile_errors import explain, suggest_fix
from jaxinfra.plan.slice_sizes import SLICES
from jaxinfra.plan.topology import Topology, parse_topology, set_up_compiler, slice_ids, topology_devices
from jaxinfra.run import Run, TrainConfig
from tests.decoders import decoder
from tests.refusals import names, raises

GPUS = [f"{chip.name}:1x8" for chip in CHIPS.values() if chip.platform == "cuda"]


@pytest.mark.parametrize(
    ("text", "chip", "shape", "slices", "num_devices"),
    [
        ("v5p:4x4x4", "v5p", (4, 4, 4), 1, 64),
        ("2xv5e:2x4", "v5e", (2, 4), 2, 16),
        ("v4:2x2x1", "v4", (2, 2, 1), 1, 8),
        ("v6e:16x16", "v6e", (16, 16), 1, 256),
        ("h100:2x8", "h100", (2, 8), 1, 16),
    ],
)
def test_topology_is_parsed_and_formatted(
    text: str, chip: str, shape: tuple[int, ...], slices: int, num_devices: int
) -> None:
    found = parse_topology(text)
    assert found == Topology(chip=CHIPS[chip], shape=shape, slices=slices)
    assert (str(found), found.num_devices) == (text, num_devices)


# From the pages on v5e, v5p and v6e of Google Cloud's TPU documentation; for v4 and the last two of v5p from MaxText's
# accelerator_to_spec_map.py.
CLOUD = {
    "v5p": {
        **{8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"},
        **{2048: "8x8x16", 4096: "8x16x16", 8192: "16x16x16", 12288: "16x16x24", 384: "4x4x12", 6144: "12x16x16"},
    },
    "v4": {8: "2x2x1", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 384: "4x4x12", 1536: "8x8x12", 4096: "8x16x16"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5litepod": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
}


@pytest.mark.parametrize(("chip", "shapes"), CLOUD.items())
def test_names_of_the_cloud_are_its_default_shapes(chip: str, shapes: dict[int, str]) -> None:
    name = {"v5litepod": "v5e"}.get(chip, chip)
    for size, shape in shapes.items():
        assert str(parse_topology(f"{chip}-{size}")) == f"{name}:{shape}"
        assert str(parse_topology(f"2x{chip}-{size}")) == f"2x{name}:{shape}"
    per_chip = 2 if chip in ("v4", "v5p") else 1
    for size, shape in SLICES[name].items():
        sizes = tuple(map(int, shape.split("x")))
        assert list(sizes) == sorted(sizes) or shape == "2x2x1"
        assert per_chip * math.prod(sizes) == size and parse_topology(f"{chip}-{size}").shape == sizes


def test_a_gpu_alone_is_one_host_of_eight() -> None:
    assert {str(parse_topology(chip)) for chip in ("h100", "h200")} == {"h100:1x8", "h200:1x8"}


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("v5p-100", "v5p-64 v5p-128"),
        ("v6e-60", "v6e-32 v6e-64"),
        ("2xv5litepod-3", "2xv5litepod-1 2xv5litepod-4"),
        ("v5p-4", "v5p-8"),
        ("v4-8192", "v4-4096"),
    ],
)
def test_a_size_that_the_cloud_does_not_have_names_the_nearest(text: str, nearest: str) -> None:
    with raises(ConfigError, f"--on {text}: use --on {nearest}"):
        parse_topology(text)
    for name in nearest.split():
        assert parse_topology(name)


@pytest.mark.parametrize(
    ("text", "use"),
    [
        *((text, "v5p:4x4x4") for text in ("v5p", "v5p:4,4", "v9:2x2", "v5p:4x4", "v5e:2x999999")),
        ("v5e:2x4x1", "v5e:2x4"),
        ("v5e:0x4", "v5e:2x4"),
        ("0xv5e:2x4", "v5e:2x4"),
        ("h100:8", "h100:1x8"),
        ("2xh100:1x8", "h100:2x8"),
        ("2xh100", "h100:2x8"),
        ("v5p:64x64x64", "v5p:16x20x28"),
        ("v6e:32x8", "v6e:16x16"),
        ("v6e:7x9", "v6e:4x8 or v6e:8x8"),
        ("v5e:2x8", "v5e:4x4 or v5e:4x8"),
        ("2xv5e:1x3", "2xv5e:2x2 or 2xv5e:1x1"),
    ],
)
def test_error_suggests_a_valid_topology(text: str, use: str) -> None:
    with raises(ConfigError, f"--on {text}: use --on {use}"):
        parse_topology(text)
    for each in use.split(" or "):
        assert str(parse_topology(each)) == each


def test_a_slice_may_be_turned() -> None:
    assert parse_topology("v6e:16x8").shape == (16, 8)


def test_the_compiler_refuses_a_shape_with_two_of_its_size() -> None:
    topology = parse_topology("v5p:3x5x7")
    set_up_compiler(topology)
    with raises(ConfigError, "--on v5p:3x5x7: use --on v5p:4x4x4 or v5p:4x4x8"):
        topology_devices(topology)


@pytest.mark.parametrize("text", ["999xv5e:16x16", "h100:9999x8"])
def test_too_many_devices_are_an_error(text: str) -> None:
    with raises(ConfigError, f"--on {text}: 65,536"):
        parse_topology(text)


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
def test_wrap(text: str, rings: tuple[bool, bool, bool]) -> None:
    assert parse_topology(text).wrap == rings


@pytest.mark.parametrize(("text", "package"), [("v5e:2x4", "libtpu"), ("h100:1x8", "jax-cuda13-plugin")])
def test_missing_compiler_is_named(text: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_plugins(name: str) -> Any:
        return None if name in ("libtpu", "jax_plugins") else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_plugins)
    with raises(ConfigError, f"--on {text}: {package}, pip install 'jaxinfra[compile]'"):
        set_up_compiler(parse_topology(text))


@pytest.mark.parametrize(("before", "after"), [("1", "3"), ("0", "0")], ids=["default of JAX", "asked for"])
def test_passes_of_the_compiler_do_not_warn(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", before)
    set_up_compiler(parse_topology("h100"))
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == after


def test_a_clone_that_is_not_installed_installs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_command("jaxinfra[compile]") == "pip install 'jaxinfra[compile]'"
    monkeypatch.setattr(packages, "distributions", lambda **_: iter(()))
    assert install_command("jaxinfra[compile]") == "pip install -e '.[compile]'"
    assert install_command("pyspark[connect]") == "pip install 'pyspark[connect]'"


def test_chips_agree_with_peak_flops() -> None:
    """The clocks that follow from the number of matrix units are plausible."""
    for chip in CHIPS.values():
        kind = max((kind for kind in PEAK_FLOPS if chip.device_kind.startswith(kind)), key=len)
        whole = 2 if chip.name == "v4" else 1  # of TPU7x `PEAK_FLOPS` already has half a chip
        assert chip.peak_flops * whole == PEAK_FLOPS[kind]
        assert (chip.clock_hz is None) == (chip.platform == "cuda")
        if chip.clock_hz is not None:
            assert 1e9 < chip.clock_hz < 2.5e9


@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:1x1", "v5p:4x4x4", "v6e:16x16", "tpu7x:2x2x1", *GPUS])
def test_compiler_knows_every_chip(text: str) -> None:
    topology = parse_topology(text)
    set_up_compiler(topology)
    found = topology_devices(topology)
    assert len(found) == topology.num_devices
    assert all(device.device_kind.startswith(topology.chip.device_kind) for device in found)
    assert set(slice_ids(topology, found)) == {0}


@pytest.mark.parametrize(("text", "sizes"), [("3xv5e:2x4", [8, 8, 8]), ("h100:2x4", [4, 4])])
def test_slice_ids(text: str, sizes: list[int]) -> None:
    topology = parse_topology(text)
    set_up_compiler(topology)
    placed = slice_ids(topology, topology_devices(topology))
    assert [placed.count(domain) for domain in sorted(set(placed))] == sizes


RUN = Run(
    name="test",
    model=decoder(vocab_size=64, num_layers=2, hidden_size=32, num_heads=4, mlp_dim=64),
    data=TokenData(store="none", seq_len=16),
    train=TrainConfig(global_batch=96),
)
OOM = "RESOURCE_EXHAUSTED: "


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (
            OOM + "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(46.60G) exceeds available HBM (15.75G). HLO module: jit__train_step.\nSee https://openxla.org/xla/errors",
            "46.60 GiB temporaries 15.75 30.85 use model.remat=full, train.accumulate=3,",
        ),
        (
            OOM + "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.50T of 32.00G hbm. "
            "Exceeded hbm capacity by 17.34G.",
            "1536.00 GiB 32.00 1504.00 use model.remat=full, or more devices",
        ),
        (
            OOM + "TPU TensorCore Hbm usage: 34.82G, SparseCore Hbm usage 174.10G, exceeding available bytes: 95.74G",
            "34.82G, 95.74G; use model.remat=full, train.accumulate=2,",
        ),
        (
            OOM + "E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem",
            "vector CompileTimeScopedVmemOom: use model.attention_kernel=xla",
        ),
        ("cuDNN not found.", "cuDNN pip install 'jaxinfra[compile]', model.attention_kernel=xla"),
        ("INTERNAL: libdevice not found at ./libdevice.10.bc", "ptxas libdevice 'jaxinfra[compile]'"),
        ("INTERNAL: Mosaic failed\n  more", "Mosaic failed; --debug"),
    ],
    ids=["temporaries", "total", "unknown form", "vector memory", "cudnn", "cuda", "anything"],
)
def test_compiler_error_becomes_one_line_with_a_fix(message: str, named: str) -> None:
    names(explain(message, RUN, 12), named)


@pytest.mark.parametrize(
    ("held_gib", "fix"),
    [(2, "use model.remat=full, train.accumulate=2,"), (15, "use model.remat=full, or more devices")],
)
def test_microbatches_are_suggested_only_where_what_is_held_leaves_room(held_gib: int, fix: str) -> None:
    message = OOM + "Ran out of memory in memory space hbm. Used 28.00G of 15.75G hbm."
    names(explain(message, RUN, 12, held_gib * 2**30), fix)


@pytest.mark.parametrize(
    ("remat", "accumulate", "rows", "times", "fix"),
    [
        ("none", 1, 12, 1.1, "use model.remat=full, train.accumulate=2, or more devices"),
        ("full", 2, 12, 2.5, "use train.accumulate=6, or more devices"),
        ("full", 1, 10, 2.5, "use train.accumulate=5, or more devices"),
        ("full", 1, 3, 9.0, "use more devices"),
        ("dots", 4, 4, 2.0, "use model.remat=full, or more devices"),
        ("full", 1, 1, 2.0, "use more devices"),
        ("full", 1, 0.5, 2.0, "use more devices"),
    ],
)
def test_suggested_fix_is_not_yet_in_the_config(
    remat: str, accumulate: int, rows: float, times: float, fix: str
) -> None:
    run = replace(RUN, model=replace(RUN.model, remat=remat), train=TrainConfig(global_batch=96, accumulate=accumulate))
    assert suggest_fix(run, rows, times) == fix
