"""Keeps programs that were compiled ahead of time: their text and memory.

JAX's own cache can write programs for unattached devices but not read them. An entry is found by a hash of the lowered
program, so a program that has changed is compiled again.
"""

import gzip
import hashlib
import json
import os
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfra.machine.compile_cache import user_folder
from jaxinfra.plan import aot
from jaxinfra.plan.aot import CompiledProgram, Compiler, Memory
from jaxinfra.run.compiler_options import OPTION_SETS

_COMPILERS = (*("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm"),)
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OLD_S = 30 * 24 * 3600.0  # entries that were not read for so long are deleted


def users_compiler() -> Compiler:
    """Returns the compiler with a cache in the user's cache folder, beside that of programs which run here."""
    return cached(aot.compile_lowered, user_folder().with_name("planned"))


def cached(compiler: Compiler, folder: Path) -> Compiler:
    """Wraps a compiler, so that its results are kept in a folder."""

    def found(lowered: Any, program: Any, topology: Any) -> CompiledProgram:
        path = folder / f"{key(lowered, program, topology)}.json.gz"
        if path.exists():
            stored = json.loads(gzip.decompress(path.read_bytes()))
            path.touch()
            return CompiledProgram(text=stored["text"], memory=Memory(**stored["memory"]))
        compiled = compiler(lowered, program, topology)
        folder.mkdir(parents=True, exist_ok=True)
        _delete_old(folder)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(gzip.compress(json.dumps(asdict(compiled)).encode(), compresslevel=3))
        part.replace(path)
        return compiled

    return found


def _delete_old(folder: Path) -> None:
    for path in folder.iterdir():
        if time.time() - path.stat().st_mtime > _OLD_S:
            path.unlink(missing_ok=True)


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
