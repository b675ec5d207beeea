"""How long a run takes is said before it: from the peak of the CPU, then from the run before."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxinfra.machine import peak_flops
from tests.refusals import names
from tests.tiny_run import Tiny


def test_the_time_of_a_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(peak_flops, "measure_flops", lambda device, dtype: 1e6)
    before = tiny.launch("mesh.fsdp=8", command="show").out
    assert peak_flops.kept_cpu_peak(jnp.dtype("float32")) == 1e6
    names(line(before), "time 12 steps of estimated 30% of the peak")
    trained = tiny.launch().out
    assert line(trained).split()[:3] == line(before).split()[:3]
    after = tiny.launch("mesh.fsdp=8", command="show", config=tiny.directory()).out
    names(line(after), "time 12 steps of as in the last run of this shape")
    assert line(after).split()[2] in ("s", "min")


def line(printed: str) -> str:
    """Returns the row of the time."""
    return next(line for line in printed.splitlines() if line.split()[:1] == ["time"])
