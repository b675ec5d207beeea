"""Every config can be built and lowered on a machine that has none of its devices."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program
from jaxinfra.program.loss import ModelLoss
from tests.parity.cases import DOCUMENTS

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.py"))


@functools.cache
def in_a_process(what: str, platforms: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.program.lower_configs", what, *CONFIGS],
        env=os.environ | {"JAX_PLATFORMS": platforms, "JAX_NUM_CPU_DEVICES": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("config", CONFIGS)
def test_building_and_tracing_need_no_backend(config: str) -> None:
    """With a platform that does not exist, JAX fails as soon as anything asks it for a device."""
    assert in_a_process("trace", "nowhere")[config] == {"backend": None}


@pytest.mark.parametrize("config", CONFIGS)
def test_lowering_makes_no_array_and_needs_no_more_than_one_device(config: str) -> None:
    """JAX starts its default back end before it lowers, whatever it lowers for; nothing is put on it."""
    found = in_a_process("lower", "cpu")[config]
    assert found["devices"] == 1
    assert found["arrays"] == 0
    assert found["partitions"] == {"cpu": True, "tpu": True}
    assert not found["kernels"]["cpu"]


def test_the_model_is_traced_once_however_many_microbatches_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is Python's part of the time until the first step, and more than half of it for some models."""
    traced = []
    forward = ModelLoss.__call__
    monkeypatch.setattr(ModelLoss, "__call__", lambda self, *args, **kw: traced.append(1) or forward(self, *args, **kw))
    run = replace(DOCUMENTS, mesh=MeshConfig(fsdp=2), train=replace(DOCUMENTS.train, accumulate=4))
    Program(run, abstract_mesh(run.mesh), "tpu").lower()
    assert len(traced) == 1
