"""Every config can be built and lowered on a machine that has none of its devices."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
        timeout=300,
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
