"""Writes the forward pass of a language model as StableHLO, which JAX runs without jaxinfra.

`model.stablehlo` holds the function `(params, tokens) -> logits` for one device, in the format of `jax.export`, which
JAX reads for at least six months after it was written. `params.safetensors` holds its parameters by path.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxinfra.errors import ConfigError
from jaxinfra.inference.language_model import open_language_model
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import TrainedParams, load_params
from jaxinfra.interop.safetensors import header_of
from jaxinfra.packages import require_optional
from jaxinfra.parallel.spec import leaves_by_name, nested
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import storage_errors

FUNCTION, PARAMS = "model.stablehlo", "params.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")


def export_function(source: str, folder: Path, *, batch: int, length: int, platforms: tuple[str, ...]) -> TrainedParams:
    """Writes the function and the parameters of a run or of published weights into a new folder.

    The function takes parameters by path and tokens int32 `[batch, length]`, and returns logits float32
    `[batch, length, vocabulary]`. A shorter text is padded at its end, where no earlier token looks. The matrices of an
    adapter are among the parameters. Raises ConfigError if the folder has files, StorageError if it cannot be written.
    """
    require_optional("flatbuffers", needed_by="model stablehlo", install="jaxinfra[stablehlo]")
    with storage_errors(folder):
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: has files already; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
    model = open_language_model(source)
    program = sampling_program(model.run, all_devices()[:1])
    loaded = load_params(source, program, current_peers())

    def forward(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        output, _ = program.loss.model(nested(params)).forward({"inputs": tokens})
        return output.materialize()

    params = leaves_by_name(loaded.params)
    with program.on_mesh:
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        exported = export.export(jax.jit(forward), platforms=platforms)(params, tokens)
    with storage_errors(folder):
        _write_params(folder / PARAMS, params)
        write_bytes_atomic(folder / FUNCTION, bytes(exported.serialize()))
    return loaded


def _write_params(path: Path, params: Mapping[str, jax.Array]) -> None:
    header, _ = header_of((name, np.dtype(leaf.dtype), leaf.shape) for name, leaf in params.items())
    with path.open("wb") as file:
        file.write(header)
        for leaf in params.values():  # one on the host at a time
            file.write(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
