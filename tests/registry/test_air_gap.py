"""From a folder of packages to a served run on a machine without a network: no process asks for another address."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.test_docs import environment
from tests.interop.torch_python import TORCH_PYTHON, needs_torch

ENGINE = TORCH_PYTHON.with_name("transformers")
LIFE = """
set -euo pipefail
ip link set lo up
make install EXTRAS=mlflow,sign WHEELHOUSE=wheelhouse
export PATH=$PWD/.venv/bin:$PATH
python -c 'import jaxinfra, sys; assert sys.prefix == sys.argv[1], sys.prefix' "$PWD/.venv"
python -m launch new mytext --name story
python -m launch data prepare configs/story.py
python -m launch configs/story.py train.steps=2 model.hidden_size=96 optim.schedule.warmup_steps=1 data.seq_len=64
env MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "$SERVER" -m mlflow server --port 5000 \\
    --workers 1 --backend-store-uri sqlite:///runs.db >server.log 2>&1 &
until curl --silent --fail http://127.0.0.1:5000/health; do sleep 0.2; kill -0 $!; done
python -m launch evaluate runs/story
python -m launch model promote runs/story --to models:/story --if "eval/loss < 100" --registry http://127.0.0.1:5000
python -m launch model serve runs/story --port 8000 --engine "$ENGINE" >engine.log &
until grep '^curl' engine.log; do sleep 0.2; kill -0 $!; done
eval "$(grep '^curl' engine.log)" >answer.json
kill %2
wait %2
if curl --silent http://127.0.0.1:8000/health; then echo "the engine has not ended"; exit 1; fi
kill %1
"""
"""The commands of docs/platform.md and docs/start.md; `kill -0` ends the script if the server or the engine does."""
ADDRESS = re.compile(r'(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)"')


@needs_torch
@pytest.mark.slow(90)
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="root makes a network namespace")
def test_nothing_asks_for_the_network(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    prose = (ROOT / "docs/data.md").read_text()
    (tmp_path / "mytext").mkdir()
    for number in range(6):
        (tmp_path / f"mytext/{number}.txt").write_text(prose)
    env = environment() | {"HOME": str(tmp_path), "SERVER": sys.executable, "ENGINE": str(ENGINE)}
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "--seccomp-bpf", "--trace=connect,sendto,sendmsg,sendmmsg", f"--output={trace}"]
    for command in (
        ["make", "wheelhouse", "EXTRAS=mlflow,sign"],
        [*strace, "unshare", "--net", "--pid", "--fork", "--kill-child", "bash", "-c", LIFE],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
    asked = {*ADDRESS.findall(trace.read_text())}
    assert json.loads((tmp_path / "answer.json").read_text())["choices"][0]["text"]
    assert "127.0.0.1" in asked, "strace has seen the questions to the registry and to the engine"
    assert asked <= {"127.0.0.1", "::1"}
