"""`python -m launch model serve RUN`: exports a run, and starts an engine on it that answers as OpenAI's API does."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from jaxinfra.cli.hub import export
from jaxinfra.cli.main import parse_command_line
from jaxinfra.errors import ConfigError, DataError, JaxinfraError
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.sampling import SamplingParams
from jaxinfra.interop.folder import PREFIX, is_published
from jaxinfra.processes.signal_router import STOPPING, routed

_COMPARED_TOKENS = 20
_POLL_S, _END_S, _ANSWER_S = 0.5, 30.0, 600.0


class EngineError(JaxinfraError):
    """The engine has ended, or does not answer."""


def run(options: argparse.Namespace) -> None:
    """Serves until Ctrl-C or SIGTERM, after the engine has continued a text as `sample` does."""
    engine = shutil.which(options.engine)
    if engine is None:
        fix = 'pip install torch "transformers[serving]", or --engine PATH of a transformers program'
        raise ConfigError(f"--engine {options.engine}: no such program; {fix}")
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
        found = _asked(address, folder, options.prompt)
        if found != expected:
            at = len(os.path.commonprefix([found, expected]))
            what = f"the engine continues {options.prompt!r} with {found!r}, sample with {expected!r}"
            fix = (
                f"they part after {at} characters; where bfloat16 makes two tokens equally likely, add --dtype float32"
            )
            raise DataError(f"{folder}: {what}; {fix}")
        print(f"{address}/v1: {_COMPARED_TOKENS} tokens as sample writes them; Ctrl-C ends it. Ask with:", flush=True)
        body = json.dumps({"model": folder, "prompt": options.prompt, "max_tokens": _COMPARED_TOKENS})
        print(f"curl {address}/v1/completions -H 'Content-Type: application/json' -d '{body}'", flush=True)
        while not stop.wait(_POLL_S):
            _require_alive(process)


def _folder(options: argparse.Namespace, stack: contextlib.ExitStack) -> str:
    """Returns the folder that is served: published weights, or an export, which is temporary without --out."""
    if is_published(options.run_dir):
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
    """Starts a program in a session of its own, so that Ctrl-C does not reach it before us; ends all of it at last."""
    offline = {"HF_HUB_OFFLINE": "1", **os.environ}  # it serves a folder: no question to the Hub
    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, env=offline)
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
    waited_s = 0.0
    while not stop.wait(_POLL_S):
        _require_alive(process)
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError as error:
            waited_s += _POLL_S
            if waited_s > options.timeout:
                raise EngineError(f"{address}: no answer after {waited_s:.0f} s ({error}); use --timeout") from None


def _require_alive(process: subprocess.Popen[bytes]) -> None:
    if (code := process.poll()) is not None:
        raise EngineError(f"the engine has ended with code {code}; its own message is above")


def _asked(address: str, model: str, prompt: str) -> str:
    """Returns the engine's greedy continuation."""
    body = {"model": model, "prompt": prompt, "max_tokens": _COMPARED_TOKENS, "temperature": 0.0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return json.load(answer)["choices"][0]["text"]
    except (OSError, ValueError, LookupError) as error:
        raise EngineError(f"{address}/v1/completions: no answer of a completion ({error})") from None
