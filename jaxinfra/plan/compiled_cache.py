"""Keeps programs that were compiled ahead of time: their text and memory.

JAX's own cache can write programs for unattached devices but not read them. An entry is found by a hash of the lowered
program, so a program that has changed is compiled again.
"""

import gzip
import hashlib
import json
import logging
import os
import time
import zlib
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfra.machine.compile_cache import user_folder
from jaxinfra.plan import aot
from jaxinfra.plan.aot import CompiledProgram, Compiler, Memory
from jaxinfra.run.compiler_options import OPTION_SETS
from jaxinfra.storage.atomic import write_bytes_atomic

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_FORMAT = 1  # of the entries
_OLD_S = 30 * 24 * 3600.0  # entries that were not read for so long are deleted

_log = logging.getLogger(__name__)


def users_compiler() -> Compiler:
    """Returns the compiler with a cache in the user's cache folder, beside that of programs which run here."""
    return cached(aot.compile_lowered, user_folder().with_name("planned"))


def cached(compiler: Compiler, folder: Path) -> Compiler:
    """Wraps a compiler, so that its results are kept in a folder."""

    def found(lowered: Any, program: Any, topology: Any) -> CompiledProgram:
        library = os.environ.get("TPU_LIBRARY_PATH", "")  # another libtpu than the installed one
        name = hashlib.sha256(f"{key(lowered, program, topology)} {library} {_FORMAT}".encode()).hexdigest()
        path = folder / f"{name}.json.gz"
        if (kept := _read(path)) is not None:
            return kept
        compiled = compiler(lowered, program, topology)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _delete_old(folder)
            content = gzip.compress(json.dumps(asdict(compiled)).encode(), compresslevel=3)
            write_bytes_atomic(path, content)
        except OSError as error:
            _log.warning("%s: %s; what was compiled is not kept", folder, error.strerror)
        return compiled

    return found


def _read(path: Path) -> CompiledProgram | None:
    """Returns an entry; None if there is none, or it is damaged."""
    try:
        stored = json.loads(gzip.decompress(path.read_bytes()))
        program = CompiledProgram(text=stored["text"], memory=Memory(**stored["memory"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error):
        return None
    with suppress(OSError):  # a folder that is only read
        path.touch()
    return program


def _delete_old(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process has written or deleted it
            if time.time() - path.stat().st_mtime > _OLD_S:
                path.unlink()


def key(lowered: Any, program: Any, topology: Any) -> str:
    """Returns a hash of the program, the order of its devices, the options, and the versions of the compilers."""
    devices = np.asarray(program.mesh.devices).flat
    parts = [
        lowered.as_text(),
        str(topology),
        [(device.id, device.process_index) for device in devices],
        OPTION_SETS[program.run.train.compiler],
        # Compilers of accelerators do not read the flags of CPUs.
        {name: [flag for flag in os.environ.get(name, "").split() if "_cpu_" not in flag] for name in _FLAGS},
        {name: _version(name) for name in _COMPILERS},
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
