"""`python -m launch model serve RUN`: exports a run, and starts an engine on it that answers as OpenAI's API does."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from jaxinfra.cli.hub import export
from jaxinfra.cli.main import parse_command_line
from jaxinfra.errors import ConfigError, DataError, JaxinfraError
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.sampling import SamplingParams
from jaxinfra.interop.folder import PREFIX, is_published
from jaxinfra.launchers import tied_process
from jaxinfra.processes.signal_router import STOPPING, routed

_COMPARED_TOKENS = 20
_POLL_S, _END_S, _ANSWER_S = 0.5, 30.0, 600.0
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # the engine is not behind a proxy


class EngineError(JaxinfraError):
    """The engine has ended, or does not answer."""


def run(options: argparse.Namespace) -> None:
    """Serves until Ctrl-C or SIGTERM, after the engine has continued a text as `sample` does."""
    engine = shutil.which(options.engine)
    if engine is None:
        fix = 'pip install torch "transformers[serving]", or --engine PATH of a transformers program'
        raise ConfigError(f"--engine {options.engine}: no such program; {fix}")
    _require_free(options.host, options.port)
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.enter_context(routed(dict.fromkeys(STOPPING, lambda number: stop.set())))
        folder = _folder(options, stack)
        expected = _continued(folder, options.prompt)
        address = f"http://{options.host}:{options.port}"
        command = [engine, "serve", folder, "--host", options.host, "--port", str(options.port)]
        process = stack.enter_context(_started(command))
        _wait_until_ready(process, address, stop, options)
        if stop.is_set():
            return
        try:
            with routed(dict.fromkeys(STOPPING, _interrupt)):
                found = _asked(address, folder, options.prompt)
        except KeyboardInterrupt:
            return
        if found != expected:
            at = len(os.path.commonprefix([found, expected]))
            what = f"the engine continues {options.prompt!r} with {found!r}, sample with {expected!r}"
            fix = (
                f"they part after {at} characters; where bfloat16 makes two tokens equally likely, add --dtype float32"
            )
            raise DataError(f"{folder}: {what}; {fix}")
        print(f"{address}/v1: {_COMPARED_TOKENS} tokens as sample writes them; Ctrl-C ends it. Ask with:", flush=True)
        body = json.dumps({"model": folder, "prompt": options.prompt, "max_tokens": _COMPARED_TOKENS})
        print(f"curl {address}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}", flush=True)
        while not stop.wait(_POLL_S):
            _require_alive(process)


def _require_free(host: str, port: int) -> None:
    """Raises ConfigError if no program can answer there, as another one does: its answers would be taken for ours."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}; name another port") from None


def _interrupt(number: signal.Signals) -> NoReturn:
    raise KeyboardInterrupt  # out of a wait for an answer


def _folder(options: argparse.Namespace, stack: contextlib.ExitStack) -> str:
    """Returns the folder that is served: published weights, or an export, which is temporary without --out."""
    if is_published(options.run_dir):
        given = {"--out": options.out, "--merge": options.merge, "--dtype": options.dtype}
        if unused := [name for name, value in given.items() if value]:
            raise ConfigError(f"{' '.join(unused)}: {options.run_dir} is served as it is; leave it out, or name a run")
        return str(Path(options.run_dir.removeprefix(PREFIX)).resolve())
    folder = options.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxinfra-serve-"))
    words = [options.run_dir, folder, *(["--dtype", options.dtype] if options.dtype else [])]
    words += ["--merge"] if options.merge else []
    exported = parse_command_line(["hub", "export", *words])
    exported.prints = True
    export.run(exported)
    return str(Path(folder).resolve())


def _continued(folder: str, prompt: str) -> str:
    """Returns what `sample` writes after the prompt, greedily."""
    sampler = Sampler.from_run(f"{PREFIX}{folder}")
    greedy = SamplingParams(temperature=0.0)
    (found,) = sampler.completions([sampler.model.encode(prompt)], max_tokens=_COMPARED_TOKENS, sampling=greedy)
    return found.text


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a program in a session of its own, so that Ctrl-C does not reach it before us; ends all of it at last.

    It does not outlive this process, whatever kills that.
    """
    offline = {"HF_HUB_OFFLINE": "1", **os.environ}  # it serves a folder: no question to the Hub
    tied = [sys.executable, "-I", "-S", tied_process.__file__, str(os.getpid())]
    process = subprocess.Popen([*tied, *command], start_new_session=True, stdin=subprocess.DEVNULL, env=offline)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: str, stop: threading.Event, options: argparse.Namespace
) -> None:
    start_s = time.monotonic()
    while not stop.wait(_POLL_S):
        _require_alive(process)
        try:
            with _open(f"{address}/health", timeout=5):
                return
        except OSError as error:
            if time.monotonic() - start_s > options.timeout:
                raise EngineError(f"{address}: no answer after {options.timeout} s ({error}); use --timeout") from None


def _require_alive(process: subprocess.Popen[bytes]) -> None:
    if (code := process.poll()) is not None:
        raise EngineError(f"the engine has ended with code {code}; its own message is above")


def _asked(address: str, model: str, prompt: str) -> str:
    """Returns the engine's greedy continuation."""
    body = {"model": model, "prompt": prompt, "max_tokens": _COMPARED_TOKENS, "temperature": 0.0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with _open(request, timeout=_ANSWER_S) as answer:
            return json.load(answer)["choices"][0]["text"]
    except (OSError, ValueError, LookupError) as error:
        raise EngineError(f"{address}/v1/completions: no answer of a completion ({error})") from None
