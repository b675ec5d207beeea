"""The script of docs/run-on.md under a real Ray on this machine: two workers of Ray Train are one run."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxinfra.errors import PeerLostError
from jaxinfra.processes import ray_train
from tests.conftest import ROOT
from tests.refusals import raises
from tests.tiny_run import Ended, Tiny, ended, summary
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

pytest.importorskip("ray")

LOCAL = """
import ray
ray.init(
    num_cpus=2, num_gpus={gpus}, include_dashboard=False, _node_ip_address="127.0.0.1",
    object_store_memory=200 * 2**20, log_to_driver=False,
)
"""
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


def run(folder: Path, tiny: Tiny, script: str, gpus: int, *overrides: str) -> Ended:
    (folder / "ray_run.py").write_text(LOCAL.format(gpus=gpus) + script)
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
    words = [sys.executable, str(folder / "ray_run.py"), str(tiny.config), *overrides]
    pipe = subprocess.PIPE
    return ended(subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=folder, env=env), timeout_s=600)


def test_the_wait_for_other_workers_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "JOIN_S", 0.2)
    monkeypatch.setattr(ray_train, "context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.2")
    monkeypatch.setattr("ray.train.collective.broadcast_from_rank_zero", lambda value: time.sleep(2))
    with raises(PeerLostError, "worker 1 join()"):
        ray_train.address({})


@pytest.mark.slow(40)
@pytest.mark.parametrize("gpus", [0, 2])
def test_workers_train(tmp_path: Path, tiny: Tiny, gpus: int) -> None:
    """With GPUs, here only in name, JaxTrainer connects the devices before it calls the function."""
    script = documented()
    assert script.count("num_workers=2") == 1
    if gpus:
        script = script.replace("num_workers=2", "num_workers=2, use_gpu=True")
    done = run(tmp_path, tiny, script, gpus, "train.steps=3", "optim.schedule.warmup_steps=1")
    assert done.code == 0, done
    record = json.loads((tiny.directory() / "run.json").read_text()) if tiny.directory().exists() else None
    (directory,) = tiny.runs.iterdir()
    record = record or json.loads((directory / "run.json").read_text())
    assert (record["devices"]["processes"], record["devices"]["count"]) == (2, 4)
    assert summary(directory)["steps"] == 3
    assert "'steps': 3" in done.out


@pytest.mark.slow(25)
def test_an_error_of_one_worker_reaches_the_driver(tmp_path: Path, tiny: Tiny) -> None:
    script = documented()
    function = script[script.index("def train(") : script.index("trainer = ")]
    done = run(tmp_path, tiny, script.replace(function, FAIL + "\n"), 0)
    assert done.code == 1 and "a mistake" in done.err, done
