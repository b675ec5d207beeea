"""The command that compares meshes: which meshes, what is too far, and where the table goes."""

import math
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from jaxinfra.bench import PARITY_CONFIGS as CONFIGS
from jaxinfra.bench.parity import BOUND, Row, differences, meshes
from jaxinfra.cli.parity import BEGIN, END, insert_table, markdown_table
from tests.refusals import names, refused
from tests.tiny_run import ended, launch, start

DENSE = CONFIGS[0]


def row(**changes: object) -> Row:
    values = {"config": "a", "mesh": "stage=2 fsdp=4", "loss": 0.0, "gradient": 1e-6, "leaf": "x", "permuted": 2e-6}
    return Row(**{**values, **changes})


def test_eight_devices_make_every_mesh_over_six_axes() -> None:
    found = meshes(8)
    assert len(found) == len({mesh.sizes for mesh in found}) == math.comb(3 + 5, 5) == 56
    assert {math.prod(mesh.sizes) for mesh in found} == {8}


def test_what_is_no_number_is_the_worst() -> None:
    assert row(gradient=1e-4).worst == 1e-4
    assert not row(loss=math.nan).worst <= BOUND
    far = differences({"g": np.array([1.0, 2.0])}, {"g": np.array([1.0, 4.0])})
    assert far == {"g": 0.5}
    assert math.isnan(differences({"g": np.array([math.nan])}, {"g": np.array([1.0])})["g"])


def test_a_gradient_that_is_nothing_but_rounding_is_held_to_rounding() -> None:
    """Nothing depends on the bias of keys; its gradient is a few times 1e-8 of the others, here or there."""
    wanted = {"g": np.array([1.0]), "bias": np.array([3e-8])}
    assert differences({"g": np.array([1.0]), "bias": np.array([-2e-8])}, wanted)["bias"] <= BOUND
    assert differences({"g": np.array([1.0]), "bias": np.array([2e-6])}, wanted)["bias"] > BOUND
    small = {"g": np.array([1.0]), "x": np.array([1e-5])}
    assert differences({"g": np.array([1.0]), "x": np.array([1.1e-5])}, small)["x"] == pytest.approx(0.1)


def test_the_table_has_a_line_for_each_mesh() -> None:
    lines = markdown_table([row(), row(config="b", loss=3e-7), row(mesh="tensor=8")]).splitlines()
    assert lines[2:] == [
        "| stage=2 fsdp=4 | 0.0e+00 | 1.0e-06 | 2.0e-06 | 3.0e-07 | 1.0e-06 | 2.0e-06 |",
        "| tensor=8 | 0.0e+00 | 1.0e-06 | 2.0e-06 |  |  |  |",
    ]


def test_the_table_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    page.write_text(insert_table(page, "| newer |"))
    assert insert_table(page, "| new |") == f"before\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"


def test_the_published_table_is_whole_and_within_the_bound(repo_root: Path) -> None:
    page = (repo_root / "docs" / "parallelism.md").read_text()
    lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert lines[0] == markdown_table([row(config=Path(config).stem) for config in CONFIGS]).splitlines()[0]
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert len({mesh for mesh, *_ in cells}) == len(meshes(8)) == len(cells)
    assert all(len(found) == 3 * len(CONFIGS) and max(map(float, found)) <= BOUND for _, *found in cells)


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [
        (("--jobs", "0"), "--jobs 0: 1", 81),
        (("--write", "{tmp}/none/page.md"), "{tmp}/none", 82),
        (("--write", "{tmp}/page.md"), "{tmp}/page.md No such file", 82),
        (("--write", "{tmp}/bare.md"), "{tmp}/bare.md put", 81),
        (("configs/none.py",), "configs/none.py", 81),
        (("configs/vit_digits.py",), "vit-digits: images,", 81),
        ((DENSE, "model.layer=3"), "model.layer model.layers", 81),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_at_once(
    words: tuple[str, ...], named: str, code: int, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    (tmp_path / "bare.md").write_text("nothing")
    refused(launch("parity", *(word.format(tmp=tmp_path) for word in words)), named.format(tmp=tmp_path), code=code)
    assert (tmp_path / "bare.md").read_text() == "nothing"


def test_a_model_that_does_not_fit_is_refused_before_anything_is_computed() -> None:
    done = ended(start("parity", DENSE, "model.heads=6", "--devices", "cpu:4", "--jobs", "1"))
    refused(done, f"{DENSE} heads =4")
    assert done.out == ""


def test_a_process_that_dies_ends_the_command() -> None:
    done = ended(start("parity", DENSE, "--devices", "cpu:1", "--jobs", "1", env={"XLA_FLAGS": "--nonsense"}))
    assert done.code == 1 and done.out == ""
    names(done.err.splitlines()[-1], "error: --jobs 1")


def test_processes_leave_with_the_command(tmp_path: Path) -> None:
    """Killed, it cannot take them along: they see that it is gone."""
    command = start("parity", DENSE, "--devices", "cpu:1", "--jobs", "1", env={"XDG_CACHE_HOME": str(tmp_path)})
    try:
        while not (workers := psutil.Process(command.pid).children(recursive=True)):
            assert command.poll() is None
            time.sleep(0.1)
    finally:
        command.send_signal(signal.SIGKILL)
        ended(command)
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.slow(60)
def test_two_devices_agree_with_one(repo_root: Path) -> None:
    changes = ("model.qkv_bias=true", "model.layers=2")
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = ended(start("parity", DENSE, *changes, "--devices", "cpu:2", "--jobs", "1", env=quick), timeout_s=1500)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 6
    assert "6 rows, 6 meshes, 0 beyond 2e-05" in done.err
