"""An engine that serves a run: a real one, which is compared with `sample` and ends with the command."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from jaxinfra.errors import DataError
from tests.conftest import ROOT
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.refusals import names, refused
from tests.servers.guard import free_ports
from tests.tiny_run import ended, is_running, launch
from tests.tiny_run import tiny_data as tiny_data

ENGINE = str(Path(TORCH_PYTHON).with_name("transformers"))
FAKE = """#!{python}
import sys, json
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def answer(self, content):
        self.send_response(200); self.end_headers(); self.wfile.write(content)
    def do_GET(self): self.answer(b"{{}}")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(json.dumps({{"choices": [{{"text": " something else"}}]}}).encode())
    def log_message(self, *words): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
"""An engine that answers with another text."""


@needs_torch
@pytest.mark.slow(40)
def test_an_engine_serves_a_run(tiny_data: Path, tmp_path: Path) -> None:
    words = (f"root={tmp_path}", "name=random", "train.steps=1", "track.console=off", "seed=3")
    assert launch(str(tiny_data / "tiny.py"), *words).code == 0
    run, (port,), kept = str(tmp_path / "random"), free_ports(1), tmp_path / "kept"
    start = ["model", "serve", run, "--prompt", "w1 w7 w50", "--port", str(port)]
    refused(launch(*start, "--engine", "no-such-engine"), "--engine no-such-engine transformers[serving]")

    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *start, "--engine", ENGINE, "--out", str(kept), "--devices", "cpu:1"],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("curl"):
            break
    else:
        pytest.fail(process.communicate()[1])
    body = json.loads(line.partition("-d '")[2].rpartition("'")[0]) | {"temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text = json.load(urllib.request.urlopen(request, timeout=600))["choices"][0]["text"]
    greedy = ("--temperature", "0", "--max-tokens", "20")
    assert launch("sample", run, "w1 w7 w50", *greedy).out == f"w1 w7 w50{text}\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    assert ended(process).code == 0
    assert children and not any(is_running(int(child)) for child in children)

    fake = tmp_path / "fake"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    other = launch("model", "serve", f"hf:{kept}", "--engine", str(fake), "--port", str(free_ports(1)[0]))
    names(refused(other, str(kept), code=DataError.exit_code), "something else sample")
    dead = launch("model", "serve", f"hf:{kept}", "--engine", "false", "--port", str(free_ports(1)[0]))
    assert dead.code == 1 and "ended with code 1" in dead.err
