"""Parity of meshes: loss and every gradient of small models on every mesh, against one device.

Every way to spread the devices over the six mesh axes, each in two orders of the devices. What a mesh computes is
the same sums in another order; in float32 they may differ by rounding, and by no more than `BOUND`.
"""

import dataclasses
import itertools
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfra.config import load, validate
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.parallel.mesh import make_mesh, permute_devices
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, of_text

BOUND = 2e-5
"""Largest difference of an array, as a part of its largest value."""
ROUNDING = 1e-6
"""An array whose largest value is a smaller part of that of all gradients is zero but for rounding."""
MICROBATCHES = 4
"""Microbatches of a step on a mesh; one device takes the whole batch."""

type Arrays = Mapping[str, np.ndarray]


class WorkerError(JaxinfraError):
    """A process that compared meshes died."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One mesh: differences from one device, relative.

    Attributes:
        config: which model.
        mesh: the sizes of the axes above 1.
        loss: of the loss.
        gradient: of the gradient that differs most.
        leaf: the parameter of that gradient.
        permuted: the larger of both with the devices in another order.
    """

    config: str
    mesh: str
    loss: float
    gradient: float
    leaf: str
    permuted: float

    @property
    def worst(self) -> float:
        """The largest of its differences; NaN if any is."""
        return max((self.loss, self.gradient, self.permuted), key=_badness)


def meshes(devices: int) -> list[MeshConfig]:
    """Every way to spread so many devices over the six axes; one device for all comes first."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    spread = (found for found in itertools.product(sizes, repeat=len(AXES)) if math.prod(found) == devices)
    return [MeshConfig(**dict(zip(AXES, found, strict=True))) for found in spread]


def loaded(config: str, overrides: Sequence[str]) -> Run:
    """The run of a config, which must be of a model of text, in float32 throughout."""
    run = dataclasses.replace(load(config, overrides, root=Run).run, precision=Precision(compute="float32"))
    of_text(run)
    return run


def on(run: Run, mesh: MeshConfig, microbatches: int) -> Run:
    """The run on a mesh; a ConfigError where it does not fit."""
    run = dataclasses.replace(run, mesh=mesh, train=dataclasses.replace(run.train, accumulate=microbatches))
    validate(run)
    return run


def batch_of(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens `[global_batch, seq_len]`; with document masks two documents a row, and some weights of zero."""
    draw, (model, data) = np.random.default_rng(seed), of_text(run)
    rows, length = run.train.global_batch, data.seq_len
    words = draw.integers(0, model.vocab_size, (rows, length + 1), dtype=np.int32)
    batch = {"inputs": words[:, :-1], "targets": words[:, 1:]}
    if data.mask_documents:
        cut, place = draw.integers(1, length, (rows, 1)), np.arange(length)
        batch["segments"] = (place >= cut).astype(np.int32)
        batch["positions"] = np.where(place >= cut, place - cut, place).astype(np.int32)
        batch["weights"] = (draw.random((rows, length)) > 0.2).astype(np.float32)
    return batch


def program_of(run: Run, order: Sequence[int] | None = None) -> Program:
    """The program of a run on the first devices here, in their own order or in another."""
    mesh = make_mesh(run.mesh, jax.devices()[: math.prod(run.mesh.sizes)])
    return Program(run, mesh if order is None else permute_devices(mesh, order))


def put(values: Any, like: Any) -> Any:
    """Host arrays on the devices, sharded like `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda value, a: jax.device_put(value, a.sharding), values, like)


def computed(program: Program, batch: Mapping[str, np.ndarray], params: Any = None, step: int = 0) -> Arrays:
    """Computes every sum of the loss, as `sum.NAME`, and every gradient, as `grad.PATH`, at one point.

    Batch and parameters are on the host, or the parameters are the first of the run; dropout masks are those of `step`.
    """
    with program.on_mesh, jax.default_matmul_precision("highest"):
        first = params is None
        placed = program.init(jax.random.key(program.run.seed)).params if first else put(params, program.params)
        expected = program.batch if batch.keys() == program.batch.keys() else program.validation_batch
        grads, sums = program.gradients(placed, program.with_words(put(dict(batch), expected), step))
        leaves = jax.tree.leaves_with_path({"sum": sums, "grad": grads})
        return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def differences(found: Arrays, wanted: Arrays) -> dict[str, float]:
    """Returns the largest difference of each array, relative to its largest value; NaN where a value is NaN.

    Of a gradient that is zero but for rounding (the bias of keys, which no score depends on): as a part of what
    rounding may be, so that `BOUND` is passed where `ROUNDING` of the largest gradient is.
    """
    assert found.keys() == wanted.keys()
    sizes = {name: float(np.abs(one).max()) for name, one in wanted.items()}
    zero = ROUNDING * max((size for name, size in sizes.items() if not name.startswith("sum.")), default=0.0)
    return {
        name: float(np.abs(found[name] - one).max()) / (sizes[name] if sizes[name] > zero else (zero / BOUND or 1.0))
        for name, one in wanted.items()
    }


def rows(configs: Sequence[str], overrides: Sequence[str], part: int, parts: int) -> Iterator[Row]:
    """Compares every `parts`-th mesh, from the `part`-th on; that all fit is checked before the first is computed."""
    devices = len(jax.devices())
    order = np.random.default_rng(1).permutation(devices).tolist()
    chosen = meshes(devices)[part::parts]
    spread = {config: [_fitting(config, overrides, mesh) for mesh in chosen] for config in configs if chosen}
    for config, runs in spread.items():
        wanted = _compared(on(runs[0], MeshConfig(fsdp=1), 1))
        for run in runs:
            plain = differences(_compared(run), wanted)
            loss = plain.pop("sum.loss")
            leaf = max(plain, key=lambda name: _badness(plain[name]))
            shuffled = differences(_compared(run, order), wanted)
            yield Row(
                config=Path(config).stem,
                mesh=_named(run.mesh),
                loss=loss,
                gradient=plain[leaf],
                leaf=leaf.removeprefix("grad."),
                permuted=max(shuffled.values(), key=_badness),
            )


def _compared(run: Run, order: Sequence[int] | None = None) -> Arrays:
    """The loss and every gradient, from the first parameters of the run."""
    found = computed(program_of(run, order), batch_of(run))
    return {name: one for name, one in found.items() if name == "sum.loss" or name.startswith("grad.")}


def _fitting(config: str, overrides: Sequence[str], mesh: MeshConfig) -> Run:
    try:
        return on(loaded(config, overrides), mesh, MICROBATCHES)
    except ConfigError as error:
        raise ConfigError(f"{config} on the mesh {_named(mesh)}, one of those that parity spreads: {error}") from error


def _badness(difference: float) -> tuple[bool, float]:
    return math.isnan(difference), difference


def _named(mesh: MeshConfig) -> str:
    return " ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1) or "one device"


def _worker(out: Connection, *part: Any) -> None:
    """Sends rows, or the error that ended them; leaves when its parent does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    try:
        for row in rows(*part):
            out.send(row)
    except JaxinfraError as error:
        out.send(error)


def shared_out(configs: Sequence[str], overrides: Sequence[str], jobs: int) -> Iterator[Row]:
    """The rows of all meshes, as so many processes come to them; a WorkerError where one of these died."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for number in range(jobs):
        reader, writer = context.Pipe(duplex=False)
        part = (writer, tuple(configs), tuple(overrides), number, jobs)
        workers[reader] = context.Process(target=_worker, args=part, daemon=True)
        workers[reader].start()
        writer.close()  # the worker's is then the only one, and its end is seen here
    while workers:
        for reader in wait(list(workers)):
            assert isinstance(reader, Connection)
            try:
                said = reader.recv()
            except EOFError:
                worker = workers.pop(reader)
                worker.join()
                if worker.exitcode:
                    raise WorkerError(
                        f"a process that compared meshes ended with {worker.exitcode}; the reason is what it said "
                        "last, or a lack of memory: use --jobs 1"
                    ) from None
                continue
            if isinstance(said, JaxinfraError):
                raise said
            yield said
