"""Tests what `model serve` refuses; test_air_gap.py starts a real engine."""

import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from jaxinfra.errors import DataError
from tests.refusals import names, refused
from tests.servers.guard import free_ports
from tests.tiny_run import ended, is_running, launch, start
from tests.tiny_run import tiny_data as tiny_data

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


@pytest.mark.slow(10)
def test_an_engine_that_fails_or_writes_other_text_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    words = (f"root={tmp_path}", "name=random", "train.steps=1", "track.console=off", "seed=3")
    assert launch(str(tiny_data / "tiny.py"), *words).code == 0
    run, kept = str(tmp_path / "random"), tmp_path / "kept"
    refused(
        launch("model", "serve", run, "--engine", "no-such-engine"), "--engine no-such-engine transformers[serving]"
    )
    assert launch("hub", "export", run, str(kept)).code == 0

    fake = tmp_path / "fake"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    other = launch("model", "serve", f"hf:{kept}", "--engine", str(fake), "--port", str(free_ports(1)[0]))
    names(refused(other, str(kept), code=DataError.exit_code), "something else sample")
    dead = launch("model", "serve", f"hf:{kept}", "--engine", "false", "--port", str(free_ports(1)[0]))
    assert dead.code == 1 and "ended with code 1" in dead.err
    refused(
        launch("model", "serve", f"hf:{kept}", "--engine", str(fake), "--merge", "--dtype", "float32"),
        f"--merge --dtype hf:{kept} run",
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(launch("model", "serve", f"hf:{kept}", "--engine", str(fake), "--port", port), f"--port {port} in use")

    asked, wait = tmp_path / "asked", "    def do_POST(self):\n"
    waits = f"{wait}        import os, time; open({str(asked)!r}, 'w').write(str(os.getpid())); time.sleep(600)\n"
    fake.write_text(fake.read_text().replace(wait, waits))
    words = ("--engine", str(fake), "--port", str(free_ports(1)[0]), "--devices", "cpu:1")
    away = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    for number, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        process = start("model", "serve", f"hf:{kept}", *words, env=away)
        while not (asked.exists() and asked.read_text()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        assert ended(process, timeout_s=120).code == code
        engine = int(asked.read_text())
        while is_running(engine):  # the kernel kills it after its parent
            assert number == signal.SIGKILL
            time.sleep(0.1)
        asked.unlink()
