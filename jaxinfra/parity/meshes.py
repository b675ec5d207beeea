"""Compares loss and gradients of small models on every mesh with one device.

It tries every split of the devices over the six mesh axes, each with two orders of the devices. A mesh only changes the
order in which float32 sums are computed, so results may differ by rounding, at most by `TOLERANCE`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinfra.config import load, validate
from jaxinfra.errors import ConfigError
from jaxinfra.inference.language_model import require_text
from jaxinfra.parallel.mesh import Device, make_mesh, permute_devices
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.parity.workers import WorkerError, worker_pool
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run

TOLERANCE = 2e-5
"""Largest difference of an array, relative to its largest value."""
ROUNDING = 1e-6
"""A gradient counts as zero, except for rounding, if it is below this part of the largest of all gradients."""
MICROBATCHES = 4
"""Microbatches per step on a mesh; one device computes the whole batch at once."""

type PyTree = Any
type Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshDifference:
    """Relative differences of one mesh from one device."""

    config: str
    mesh: str
    loss: float
    gradient: float  # the largest difference of all gradients
    parameter: str  # the parameter with this difference
    permuted: float  # the largest difference, of loss and gradients, with the devices in another order

    @property
    def worst(self) -> float:
        """The largest difference; NaN if any is NaN."""
        return max((self.loss, self.gradient, self.permuted), key=_nan_is_largest)


def all_meshes(num_devices: int) -> list[MeshConfig]:
    """Returns every split of the devices over the six mesh axes: 56 for eight devices."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    splits = (sizes for sizes in itertools.product(divisors, repeat=len(AXES)) if math.prod(sizes) == num_devices)
    return [MeshConfig(**dict(zip(AXES, sizes, strict=True))) for sizes in splits]


def chosen_meshes(meshes: Sequence[MeshConfig], overrides: Sequence[str]) -> list[MeshConfig]:
    """Returns the meshes with the sizes that overrides such as `mesh.stage=2` name."""
    words = (word.removeprefix("mesh.").split("=") for word in overrides if word.startswith("mesh."))
    sizes = {axis: size for axis, size in words if size != "-1"}
    return [mesh for mesh in meshes if all(size == str(getattr(mesh, axis)) for axis, size in sizes.items())]


def _cases(
    configs: Sequence[str], overrides: Sequence[str], num_devices: int
) -> list[tuple[str, tuple[str, ...], MeshConfig]]:
    """Returns each config with each mesh; ConfigError if one does not fit, or if the overrides choose no mesh."""
    meshes = chosen_meshes(all_meshes(num_devices), overrides)
    if not meshes:
        words = " ".join(word for word in overrides if word.startswith("mesh."))
        raise ConfigError(f"{words}: no mesh of {num_devices} devices has these sizes; leave one of them out")
    cases = [(config, tuple(overrides), mesh) for config in configs for mesh in meshes]
    for case in cases:
        load_on_mesh(*case)
    return cases


def load_text_run(config: str, overrides: Sequence[str]) -> Run:
    """Loads a config of a language model, with all precision set to float32."""
    run = dataclasses.replace(load(config, overrides, root=Run).run, precision=Precision(compute="float32"))
    require_text(run)
    return run


def random_batch(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random tokens `[global_batch, seq_len]`.

    With document masks each row has two documents, and a fifth of the weights are zero.
    """
    rng = np.random.default_rng(seed)
    model, data = require_text(run)
    batch_size, seq_len = run.train.global_batch, data.seq_len
    tokens = rng.integers(0, model.vocab_size, (batch_size, seq_len + 1), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    if data.mask_documents:
        second_start, positions = rng.integers(1, seq_len, (batch_size, 1)), np.arange(seq_len)
        in_second = positions >= second_start  # [batch_size, seq_len]
        batch["segments"] = in_second.astype(np.int32)
        batch["positions"] = np.where(in_second, positions - second_start, positions).astype(np.int32)
        batch["weights"] = (rng.random((batch_size, seq_len)) > 0.2).astype(np.float32)
    return batch


def make_program(
    run: Run, order: Sequence[int] | None = None, devices: Callable[[], Sequence[Device]] = jax.devices
) -> Program:
    """Builds the program of a run on the first devices; `order`, such as [1, 0, 3, 2], permutes them."""
    mesh = make_mesh(run.mesh, devices()[: math.prod(run.mesh.sizes)])
    return Program(run, mesh if order is None else permute_devices(mesh, order))


def put_like(values: PyTree, specs: PyTree) -> PyTree:
    """Puts host arrays on devices with the shardings of a tree of `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda value, spec: jax.device_put(value, spec.sharding), values, specs)


def loss_and_gradients(
    program: Program, batch: Mapping[str, np.ndarray], params: PyTree | None = None, step: int = 0
) -> Arrays:
    """Computes every sum of the loss, as `sum.NAME`, and every gradient, as `grad.PATH`; `step` selects dropout masks.

    `params` are host arrays; None initializes them from the run's seed. If the mesh spans several processes, each of
    them must call it and gets the whole arrays.
    """
    with program.on_mesh, jax.default_matmul_precision("highest"):
        if params is None:
            params = program.init(jax.random.key(program.run.seed)).params
        else:
            params = put_like(params, program.params)
        # Only a validation batch has the weights of samples.
        specs = program.batch if batch.keys() == program.batch.keys() else program.validation_batch
        batch_on_devices = program.with_dropout_bits(put_like(dict(batch), specs), step)
        grads, sums, stats = program.gradients(params, batch_on_devices)
    found = {"sum": {**sums, **stats}, "grad": grads}
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(found)):
        found = multihost_utils.process_allgather(found, tiled=True)
    leaves = jax.tree.leaves_with_path(found)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def relative_differences(actual: Arrays, expected: Arrays) -> dict[str, float]:
    """Returns the largest difference of each array relative to its largest expected value; NaN if a value is NaN.

    Some gradients are zero except for rounding: no attention weight depends on the key bias, for example. Their
    differences are scaled so that `ROUNDING` of the largest gradient becomes `TOLERANCE`.
    """
    assert actual.keys() == expected.keys()
    largest = {name: float(np.abs(array).max()) for name, array in expected.items()}
    zero = ROUNDING * max((size for name, size in largest.items() if not name.startswith("sum.")), default=0.0)
    differences = {}
    for name, size in largest.items():
        scale = size if size > zero else (zero / TOLERANCE or 1.0)  # 1 if all expected arrays are zero
        differences[name] = float(np.abs(actual[name] - expected[name]).max()) / scale
    return differences


def compare_in_processes(
    configs: Sequence[str], overrides: Sequence[str], num_workers: int
) -> Iterator[MeshDifference]:
    """Compares every mesh of this machine's devices in worker processes; yields the differences as they are computed.

    Raises ConfigError before the first if a config does not fit one of the meshes.
    """
    pool = worker_pool(num_workers, env={})
    try:
        cases = _cases(configs, overrides, pool.submit(_num_devices).result())
        for task in as_completed([pool.submit(compare_mesh, *case) for case in cases]):
            yield task.result()
    except BrokenProcessPool:
        raise WorkerError(
            "a parity worker died: see its last message above; without one, memory was probably too small: use --jobs 1"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compare_joined(configs: Sequence[str], overrides: Sequence[str]) -> Iterator[MeshDifference]:
    """Compares every mesh of the devices of all processes, which make the same calls; errors as above."""
    for case in _cases(configs, overrides, _num_devices()):
        yield compare_mesh(*case)


def _num_devices() -> int:
    return len(jax.devices())


def compare_mesh(config: str, overrides: tuple[str, ...], mesh: MeshConfig) -> MeshDifference:
    """Compares loss and gradients on a mesh, with the devices in two orders, with those on one device."""
    run, expected = load_on_mesh(config, overrides, mesh), _one_device_result(config, overrides)
    differences = relative_differences(batch_gradients(run), expected)
    permutation = np.random.default_rng(1).permutation(math.prod(mesh.sizes)).tolist()
    permuted = relative_differences(batch_gradients(run, permutation), expected)
    return mesh_difference(config, mesh_name(mesh), differences, permuted)


def mesh_difference(
    config: str, mesh: str, differences: Mapping[str, float], permuted: Mapping[str, float]
) -> MeshDifference:
    """Returns the largest of the differences of the arrays."""
    worst = max(differences.keys() - {"sum.loss"}, key=lambda name: _nan_is_largest(differences[name]))
    return MeshDifference(
        config=Path(config).stem,
        mesh=mesh,
        loss=differences["sum.loss"],
        gradient=differences[worst],
        parameter=worst.removeprefix("grad."),
        permuted=max(permuted.values(), key=_nan_is_largest),
    )


@functools.cache
def _one_device_result(config: str, overrides: tuple[str, ...]) -> Arrays:
    run = load_on_mesh(config, overrides, MeshConfig(fsdp=1), microbatches=1)
    return batch_gradients(run, devices=jax.local_devices)


def batch_gradients(
    run: Run, order: Sequence[int] | None = None, devices: Callable[[], Sequence[Device]] = jax.devices
) -> Arrays:
    """Returns `sum.loss` and every `grad.PATH` of a random batch; arguments as in `make_program`."""
    arrays = loss_and_gradients(make_program(run, order, devices), random_batch(run))
    return {name: array for name, array in arrays.items() if name == "sum.loss" or name.startswith("grad.")}


def load_on_mesh(config: str, overrides: Sequence[str], mesh: MeshConfig, microbatches: int = MICROBATCHES) -> Run:
    """Loads a config for a mesh; ConfigError if it does not fit."""
    run = load_text_run(config, overrides)
    run = dataclasses.replace(run, mesh=mesh, train=dataclasses.replace(run.train, accumulate=microbatches))
    try:
        validate(run)
    except ConfigError as error:
        raise ConfigError(f"{config} on {mesh_name(mesh)}, one of the meshes that parity compares: {error}") from error
    return run


def mesh_name(mesh: MeshConfig) -> str:
    """Returns the axes above 1, such as "stage=2 fsdp=4"."""
    return " ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1) or "one device"


def _nan_is_largest(difference: float) -> tuple[bool, float]:
    return math.isnan(difference), difference  # a key for `max`: a NaN compares as neither larger nor smaller
