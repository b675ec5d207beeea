"""A cache in `.cache/compiled` for programs that are compiled ahead of time.

JAX's own cache can write programs for unattached devices but not read them. This one keeps only HLO and memory.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / ".cache" / "compiled"
COMPILERS = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda13-pjrt",
    "jax-cuda13-plugin",
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


@pytest.fixture
def compile_cache(all_optimizations: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads programs from the cache, if they were compiled before."""
    from jaxinfra.plan import aot

    monkeypatch.setattr(aot, "compile_lowered", cached(aot.compile_lowered, FOLDER))


def cached(compile_lowered: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Wraps `compile_lowered`, so that its results are cached in a folder."""
    from jaxinfra.plan.aot import CompiledProgram, Memory

    def found(lowered: Any, program: Any, topology: Any) -> CompiledProgram:
        path = folder / f"{key(lowered, program, topology)}.json.gz"
        if path.exists():
            stored = json.loads(gzip.decompress(path.read_bytes()))
            return CompiledProgram(text=stored["text"], memory=Memory(**stored["memory"]))
        executable = compile_lowered(lowered, program, topology)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(gzip.compress(json.dumps(asdict(executable)).encode(), compresslevel=3))
        part.replace(path)
        return executable

    return found


def key(lowered: Any, program: Any, topology: Any) -> str:
    """A hash of the program, the order of its devices, the options, and the versions of the compilers."""
    from jaxinfra.run.compiler_options import OPTION_SETS

    devices = np.asarray(program.mesh.devices).flat
    parts = [
        lowered.as_text(),
        str(topology),
        [(device.id, device.process_index) for device in devices],
        OPTION_SETS[program.run.train.compiler],
        # Compilers of accelerators do not read the flags of CPUs.
        {name: [flag for flag in os.environ.get(name, "").split() if "_cpu_" not in flag] for name in FLAGS},
        {name: _version(name) for name in COMPILERS},
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
