"""Where compiled programs are kept, so that the second start of a run does not compile again.

Importing this module imports nothing heavy: JAX reads the variables of `cache_environment` when it is imported.
"""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 4 * 2**30
"""Size of the cache; the programs that were not used for longest are deleted."""

_XLA_CACHES = "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"
_MIN_COMPILE_S = 0.2  # faster programs are not kept; JAX's own default of 1 s leaves out most of a small run


def user_folder() -> Path:
    """Returns the folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jaxinfra", "compiled")


def cache_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables to add for JAX, so that it keeps programs in `user_folder` if it has no other folder."""
    # XLA keeps what it has tuned on a GPU beside the programs, but without a hash or the version of XLA.
    variables = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(_MIN_COMPILE_S), _XLA_CACHES: "none"}
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(user_folder())
        variables["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(MAX_BYTES)
    return {name: value for name, value in variables.items() if name not in environment}


@contextmanager
def compile_cache(folder: str | None, *, exact_lines: bool = False) -> Iterator[None]:
    """Keeps the programs that are compiled within this context in a folder, with a hash of each.

    Raises StorageError if the folder is given but not writable, ConfigError if its URL is not that of a bucket.

    Args:
        folder: "auto" is the folder that JAX is configured with, or else `user_folder`; None keeps nothing.
        exact_lines: takes a program from the cache only if its source lines are those of today, as profiles show them.
    """
    import jax

    from jaxinfra.machine.checked_programs import use_cache
    from jaxinfra.storage.checks import make_writable
    from jaxinfra.storage.connection import normalize_url
    from jaxinfra.storage.location import is_remote

    options: dict[str, object] = {"jax_compilation_cache_include_metadata_in_key": True} if exact_lines else {}
    if _XLA_CACHES not in os.environ:
        options["jax_persistent_cache_enable_xla_caches"] = "none"
    if folder is None:
        options["jax_enable_compilation_cache"] = False
    elif folder != "auto" or jax.config.jax_compilation_cache_dir is None:
        if folder == "auto":
            folder = str(user_folder())
        else:
            folder = normalize_url(folder)
            if not is_remote(folder):  # of a bucket, JAX warns at each program that it cannot write
                make_writable(folder)
        options |= {
            "jax_compilation_cache_dir": folder,
            "jax_compilation_cache_max_size": MAX_BYTES,
            "jax_persistent_cache_min_compile_time_secs": _MIN_COMPILE_S,
        }
    before, cache_before = {name: getattr(jax.config, name) for name in options}, use_cache()
    try:
        _update(options)
        with _same_key_in_all_processes():
            yield
    finally:
        _update(before)
        use_cache(cache_before)


@contextmanager
def _same_key_in_all_processes() -> Iterator[None]:
    """Lets all processes with CPU devices find the programs that process 0 has compiled; only process 0 keeps them.

    JAX's key of a program contains the fingerprint of the devices' topology, which on CPUs differs by process. Here it
    contains the kinds of the devices and the features of the CPU instead.
    """
    import jax
    from jax._src import cache_key  # no public function decides the key

    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        yield
        return

    def hash_devices(hash_obj: Any, devices: "np.ndarray") -> None:
        kinds = [device.device_kind for device in devices.flat]
        hash_obj.update(repr((kinds, jax.process_count(), cpu_features())).encode())

    before, cache_key._hash_accelerator_config = cache_key._hash_accelerator_config, hash_devices
    try:
        yield
    finally:
        cache_key._hash_accelerator_config = before


def cpu_features() -> str:
    """Returns the instruction sets of this CPU, as Linux names them, or else its name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _update(options: Mapping[str, object]) -> None:
    import jax

    for name, value in options.items():
        jax.config.update(name, value)
