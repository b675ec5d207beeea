"""The script of docs/run-on.md under a real Ray on this machine: two workers of Ray Train are one run."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxinfra.errors import PeerLostError
from jaxinfra.processes import ray_train
from tests.conftest import ROOT
from tests.refusals import raises
from tests.tiny_run import Tiny, summary
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

pytest.importorskip("ray")

LOCAL = """
import json, sys, traceback
import ray

ray.init(
    num_cpus=2, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1",
    object_store_memory=200 * 2**20, log_to_driver=False,
)
for name, script in json.load(sys.stdin).items():
    sys.argv[4:] = [f"name={name}"]
    print(f"begin {name}")
    try:
        exec(compile(script, name, "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc(file=sys.stdout)
    print(f"end {name}", flush=True)
"""
"""Runs scripts one after another in one Ray, whose start takes longer than they do."""
FAIL = """
import jaxinfra.train.trainer
def train(config):
    with jaxinfra.join() as peers:
        trainer = jaxinfra.Trainer(jaxinfra.load(config["path"], config["overrides"]))
        if peers.index == 1:
            raise ValueError("a mistake")
        return trainer.train()
"""


def documented() -> str:
    (script,) = re.findall(r"```python\n(import sys\n.*?JaxTrainer.*?)```", (ROOT / "docs/run-on.md").read_text(), re.S)
    return script


def run(folder: Path, tiny: Tiny, scripts: Mapping[str, str]) -> dict[str, str]:
    """Returns what each script has printed; their runs have their names."""
    env = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
        "HOME": str(folder),  # for Ray's results
    }
    words = [sys.executable, "-c", LOCAL, str(tiny.config), "train.steps=3", "optim.schedule.warmup_steps=1"]
    done = subprocess.run(
        words, input=json.dumps(scripts), capture_output=True, text=True, cwd=folder, env=env, check=False, timeout=900
    )
    assert done.returncode == 0, done
    return {name: done.stdout.partition(f"begin {name}\n")[2].partition(f"end {name}\n")[0] for name in scripts}


def test_the_wait_for_other_workers_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "JOIN_S", 0.2)
    monkeypatch.setattr(ray_train, "context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.2")
    monkeypatch.setattr("ray.train.collective.broadcast_from_rank_zero", lambda value: time.sleep(2))
    with raises(PeerLostError, "worker 1 join()"):
        ray_train.address({})


@pytest.mark.slow(40)
def test_workers_train_and_an_error_of_one_reaches_the_driver(tmp_path: Path, tiny: Tiny) -> None:
    """With GPUs, here only in name, JaxTrainer connects the devices before it calls the function.

    Without, the function does: `tests/launchers/test_ray.py` trains so.
    """
    script = documented()
    assert script.count("num_workers=2") == 1
    function = script[script.index("def train(") : script.index("trainer = ")]
    scripts = {
        "gpus": script.replace("num_workers=2", "num_workers=2, use_gpu=True"),
        "wrong": script.replace(function, FAIL + "\n"),
    }
    printed = run(tmp_path, tiny, scripts)
    record = json.loads((tiny.directory("gpus") / "run.json").read_text())
    assert (record["devices"]["processes"], record["devices"]["count"]) == (2, 4)
    assert summary(tiny.directory("gpus"))["steps"] == 3
    assert "'steps': 3" in printed["gpus"], printed
    assert "a mistake" in printed["wrong"], printed
