import math
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from jaxinfra.cli.markdown import insert_table
from jaxinfra.cli.parity import is_too_large, markdown_table
from jaxinfra.parity import PARITY_CONFIGS as CONFIGS
from jaxinfra.parity.meshes import TOLERANCE, MeshDifference, all_meshes, relative_differences
from jaxinfra.parity.processes import COUNTS, layout_meshes
from tests.refusals import names, refused
from tests.tiny_run import ended, is_running, launch, start

BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"

DENSE = CONFIGS[0]


def difference(**changes: object) -> MeshDifference:
    values = {"loss": 0.0, "gradient": 1e-6, "parameter": "x", "permuted": 2e-6}
    return MeshDifference(**{"config": "a", "mesh": "stage=2 fsdp=4", **values, **changes})


def test_all_meshes_of_eight_devices() -> None:
    found = all_meshes(8)
    assert len(found) == len({mesh.sizes for mesh in found}) == math.comb(3 + 5, 5) == 56
    assert {math.prod(mesh.sizes) for mesh in found} == {8}


def test_nan_is_the_worst_difference() -> None:
    assert difference(gradient=1e-4).worst == 1e-4
    assert not difference(loss=math.nan).worst <= TOLERANCE
    far = relative_differences({"g": np.array([1.0, 2.0])}, {"g": np.array([1.0, 4.0])})
    assert far == {"g": 0.5}
    assert math.isnan(relative_differences({"g": np.array([math.nan])}, {"g": np.array([1.0])})["g"])


def test_zero_gradient_may_differ_by_rounding() -> None:
    """No output depends on the key bias; rounding makes its gradient about 1e-8 of the others."""
    wanted = {"g": np.array([1.0]), "bias": np.array([3e-8])}
    assert relative_differences({"g": np.array([1.0]), "bias": np.array([-2e-8])}, wanted)["bias"] <= TOLERANCE
    assert relative_differences({"g": np.array([1.0]), "bias": np.array([2e-6])}, wanted)["bias"] > TOLERANCE
    small = {"g": np.array([1.0]), "x": np.array([1e-5])}
    assert relative_differences({"g": np.array([1.0]), "x": np.array([1.1e-5])}, small)["x"] == pytest.approx(0.1)


def test_table_has_a_row_per_mesh() -> None:
    lines = markdown_table([difference(), difference(config="b", loss=3e-7), difference(mesh="tensor=8")]).splitlines()
    assert lines[2:] == [
        "| stage=2 fsdp=4 | 0.0e+00 | 1.0e-06 | 2.0e-06 | 3.0e-07 | 1.0e-06 | 2.0e-06 |",
        "| tensor=8 | 0.0e+00 | 1.0e-06 | 2.0e-06 |  |  |  |",
    ]


def test_table_replaces_the_old_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    page.write_text(insert_table(page, "parity", "| newer |"))
    assert insert_table(page, "parity", "| new |") == f"before\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"


def test_published_table_is_complete_and_within_tolerance(repo_root: Path) -> None:
    page = (repo_root / "docs" / "parallelism.md").read_text()
    lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert lines[0] == markdown_table([difference(config=Path(config).stem) for config in CONFIGS]).splitlines()[0]
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    layouts = {row[0]: row[1:] for row in cells if " x " in row[0]}
    assert len({mesh for mesh, *_ in cells}) == len(cells) == len(all_meshes(8)) + len(layouts)
    assert len(layouts) == len(COUNTS) * len(layout_meshes(8))
    for loss_dense, grads_dense, _, loss_moe, grads_moe, _ in layouts.values():
        assert {loss_dense, grads_dense, loss_moe, grads_moe} == {"0.0e+00"}, "equal bit for bit"
    assert all(len(found) == 3 * len(CONFIGS) and max(map(float, found)) <= TOLERANCE for _, *found in cells)


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [
        (("--jobs", "0"), "--jobs 0: 1", 81),
        (("--write", "{tmp}/none/page.md"), "{tmp}/none", 82),
        (("--write", "{tmp}/page.md"), "{tmp}/page.md No such file", 82),
        (("--write", "{tmp}/bare.md"), "{tmp}/bare.md put", 81),
        (("configs/none.py",), "configs/none.py", 81),
        (("configs/vit_digits.py",), "vit-digits: images;", 81),
        ((DENSE, "model.layer=3"), "model.layer model.layers", 81),
        ((DENSE, "mesh.stage=3", "--jobs", "1", "--devices", "cpu:2"), "mesh.stage=3 2 devices", 81),
    ],
    ids=str,
)
def test_wrong_arguments_are_rejected(
    words: tuple[str, ...], named: str, code: int, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    (tmp_path / "bare.md").write_text("nothing")
    refused(launch("parity", *(word.format(tmp=tmp_path) for word in words)), named.format(tmp=tmp_path), code=code)
    assert (tmp_path / "bare.md").read_text() == "nothing"


def test_model_that_does_not_fit_is_rejected_before_computing() -> None:
    done = ended(start("parity", DENSE, "model.layers.mixer.num_heads=6", "--devices", "cpu:4", "--jobs", "1"))
    refused(done, f"{DENSE} heads =4")
    assert done.out == ""


def test_dead_worker_ends_the_command() -> None:
    done = ended(start("parity", DENSE, "--devices", "cpu:1", "--jobs", "1", env={"XLA_FLAGS": "--nonsense"}))
    assert done.code == 1 and done.out == ""
    names(done.err.splitlines()[-1], "error: --jobs 1")


def test_workers_exit_with_the_command(tmp_path: Path) -> None:
    """A killed command cannot end its workers; they notice."""
    command = start("parity", DENSE, "--devices", "cpu:1", "--jobs", "1", env={"XDG_CACHE_HOME": str(tmp_path)})
    try:
        while not (workers := psutil.Process(command.pid).children(recursive=True)):
            assert command.poll() is None
            time.sleep(0.1)
    finally:
        command.send_signal(signal.SIGKILL)
        ended(command)
    deadline_s = time.monotonic() + 600
    while alive := [worker.pid for worker in workers if is_running(worker.pid)]:
        assert time.monotonic() < deadline_s, alive
        time.sleep(0.02)


@pytest.mark.slow(40)
def test_two_devices_agree_with_one_device(repo_root: Path) -> None:
    changes = ("model.layers.mixer.qkv_bias=true", "model.num_layers=2")
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    words = ("parity", DENSE, *changes, "mesh.fsdp=2", "--devices", "cpu:2", "--jobs", "1")
    done = ended(start(*words, env=quick), timeout_s=1500)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 2
    assert "2 rows, 2 meshes, 0 beyond 2e-05" in done.err
    (layout,) = (line for line in done.out.splitlines() if ", 2 x 1 " in line)
    assert "loss 0.0e+00  gradients 0.0e+00 " in layout, done.out


def test_other_numbers_of_processes_are_other_results() -> None:
    """A difference between processes is too large where one between meshes is not."""
    assert not is_too_large(difference(gradient=1e-5))
    assert is_too_large(difference(mesh="fsdp=8, 2 x 4", gradient=1e-5))
    assert not is_too_large(difference(mesh="fsdp=8, 2 x 4", gradient=0.0, permuted=1e-5))
