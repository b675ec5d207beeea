"""The command that compares meshes: which meshes, what is too far, and where the table goes."""

import math
from pathlib import Path

import pytest
from tiny_run import ended, start

from jaxinfra.errors import ConfigError
from launch.parity import BEGIN, BOUND, END, Row, differences, meshes, table, write


def row(**changes: object) -> Row:
    values = {"config": "a", "mesh": "stage=2 fsdp=4", "loss": 0.0, "gradient": 1e-6, "leaf": "x", "permuted": 2e-6}
    return Row(**{**values, **changes})


def test_eight_devices_make_every_mesh_over_six_axes() -> None:
    found = meshes(8)
    assert len(found) == len({mesh.sizes for mesh in found}) == math.comb(3 + 5, 5) == 56
    assert {math.prod(mesh.sizes) for mesh in found} == {8}


def test_what_is_no_number_is_the_worst() -> None:
    import numpy as np

    assert row(gradient=1e-4).worst == 1e-4
    assert not row(loss=math.nan).worst <= BOUND
    far = differences({"g": np.array([1.0, 2.0])}, {"g": np.array([1.0, 4.0])})
    assert far == {"g": 0.5}
    assert math.isnan(differences({"g": np.array([math.nan])}, {"g": np.array([1.0])})["g"])


def test_the_table_has_a_line_for_each_mesh() -> None:
    lines = table([row(), row(config="b", loss=3e-7), row(mesh="tensor=8")]).splitlines()
    assert lines[2:] == [
        "| stage=2 fsdp=4 | 0.0e+00 | 1.0e-06 | 2.0e-06 | 3.0e-07 | 1.0e-06 | 2.0e-06 |",
        "| tensor=8 | 0.0e+00 | 1.0e-06 | 2.0e-06 |  |  |  |",
    ]


def test_the_table_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, "| new |")
    write(page, "| new |")
    assert page.read_text() == f"before\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="no place for the table"):
        write(page, "| new |")


@pytest.mark.slow
def test_two_devices_agree_with_one(repo_root: Path) -> None:
    done = ended(start("parity", "configs/parity_dense.py", "--devices", "cpu:2", "--jobs", "1"), timeout_s=600)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 6
    assert "6 rows, 6 meshes, 0 beyond 2e-05" in done.err
