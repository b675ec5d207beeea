"""`python -m launch parity`: loss and every gradient of small models on every mesh, against one device.

Every way to spread the devices over the six mesh axes, each in two orders of the devices. What a mesh computes is
the same sums in another order; in float32 they may differ by rounding, and by no more than `BOUND`.
"""

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from jaxinfra.parallel.mesh import MeshConfig
    from jaxinfra.run import Run

BOUND = 2e-5
"""Largest difference of an array, as a part of its largest value."""
CONFIGS = ("configs/parity_dense.py", "configs/parity_moe.py")
MICROBATCHES = 4
"""Of a step on a mesh; one device takes the batch whole."""
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
"""What stands around the table on the page that `--write` names."""

type Arrays = Mapping[str, "np.ndarray"]


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
        return max((self.loss, self.gradient, self.permuted), key=lambda d: (math.isnan(d), d))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which models, on how many devices."""
    parser.add_argument("configs", metavar="CONFIG", nargs="*", default=CONFIGS, help=f"models (default {CONFIGS})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that share the meshes")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")


def meshes(devices: int) -> list["MeshConfig"]:
    """Every way to spread so many devices over the six axes; one device for all comes first."""
    from jaxinfra.parallel.mesh import AXES, MeshConfig

    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    spread = (found for found in itertools.product(sizes, repeat=len(AXES)) if math.prod(found) == devices)
    return [MeshConfig(**dict(zip(AXES, found, strict=True))) for found in spread]


def batch_of(run: "Run", seed: int = 0) -> dict[str, "np.ndarray"]:
    """Random words in rows of two documents, some weights of zero."""
    import numpy as np

    from jaxinfra.run import of_text

    draw, (model, data) = np.random.default_rng(seed), of_text(run)
    rows, length = run.train.global_batch, data.seq_len
    words = draw.integers(0, model.vocab_size, (rows, length + 1), dtype=np.int32)
    cut, place = draw.integers(1, length, (rows, 1)), np.arange(length)
    return {
        "inputs": words[:, :-1],
        "targets": words[:, 1:],
        "segments": (place >= cut).astype(np.int32),
        "positions": np.where(place >= cut, place - cut, place).astype(np.int32),
        "weights": (draw.random((rows, length)) > 0.2).astype(np.float32),
    }


def computed(run: "Run", mesh: "MeshConfig", microbatches: int, order: Sequence[int] | None = None) -> Arrays:
    """Sums of the loss and every gradient, by name, from the first parameters of the run.

    Args:
        run: the model.
        mesh: sizes of the axes.
        microbatches: of the step.
        order: of the devices; None for their own.
    """
    import jax
    import numpy as np

    from jaxinfra.config import validate
    from jaxinfra.parallel.mesh import make_mesh, permuted
    from jaxinfra.program import Program

    train = dataclasses.replace(run.train, accumulate=microbatches)
    run = dataclasses.replace(run, mesh=mesh, train=train)
    validate(run)
    devices = make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes)])
    program = Program(run, devices if order is None else permuted(devices, order))
    host = batch_of(run)
    with program.on_mesh, jax.default_matmul_precision("highest"):
        params = program.init(jax.random.key(run.seed)).params
        batch = {name: jax.device_put(host[name], like.sharding) for name, like in program.batch.items()}
        grads, sums = program.gradients(params, batch)
        found = {"loss": sums["loss"], **{jax.tree_util.keystr(p): g for p, g in jax.tree.leaves_with_path(grads)}}
        return {name: np.asarray(array) for name, array in found.items()}


def differences(found: Arrays, wanted: Arrays) -> dict[str, float]:
    """Of each array the largest difference, as a part of its largest value."""
    import numpy as np

    assert found.keys() == wanted.keys()
    return {name: float(np.abs(found[name] - one).max() / np.abs(one).max()) for name, one in wanted.items()}


def rows(config: str, part: int, parts: int) -> Iterator[Row]:
    """Every `parts`-th row of a model's table, from the `part`-th on."""
    import jax
    import numpy as np

    from jaxinfra.config import load
    from jaxinfra.parallel.mesh import MeshConfig
    from jaxinfra.run import Run

    run = load(config, root=Run).run
    devices = len(jax.devices())
    order = np.random.default_rng(1).permutation(devices).tolist()
    wanted = computed(run, MeshConfig(fsdp=1), 1)
    for mesh in meshes(devices)[part::parts]:
        plain = differences(computed(run, mesh, MICROBATCHES), wanted)
        loss = plain.pop("loss")
        leaf = max(plain, key=lambda name: (math.isnan(plain[name]), plain[name]))
        shuffled = differences(computed(run, mesh, MICROBATCHES, order), wanted)
        sizes = " ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1)
        yield Row(
            config=Path(config).stem,
            mesh=sizes,
            loss=loss,
            gradient=plain[leaf],
            leaf=re.sub(r"[\[\]']+", ".", leaf).strip("."),
            permuted=max(shuffled.values(), key=lambda d: (math.isnan(d), d)),
        )


def _worker(config: str, part: int, parts: int, out: Any) -> None:
    """Puts rows, then None or the error that ended it."""
    try:
        for row in rows(config, part, parts):
            out.put(row)
        out.put(None)
    except Exception as error:
        out.put(error)


def table(found: Iterable[Row]) -> str:
    """The rows in Markdown, one line a mesh with all its models."""
    by_mesh: dict[str, list[Row]] = {}
    for row in found:
        by_mesh.setdefault(row.mesh, []).append(row)
    configs = sorted({row.config for rows in by_mesh.values() for row in rows})
    head = ["mesh", *(f"{config}: {what}" for config in configs for what in ("loss", "gradients", "other order"))]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for mesh in sorted(by_mesh):
        of_config = {row.config: row for row in by_mesh[mesh]}
        cells = [mesh]
        for config in configs:
            row = of_config.get(config)
            cells += [f"{d:.1e}" for d in (row.loss, row.gradient, row.permuted)] if row else [""] * 3
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def write(page: Path, text: str) -> None:
    """Puts the table between the marks of a page.

    Raises:
        ConfigError: the page has no marks.
    """
    from jaxinfra.errors import ConfigError

    before, found, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ConfigError(f"{page}: no place for the table; put {BEGIN} and {END} on lines of their own")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints the table as its rows come, and says whether all are within the bound."""
    import multiprocessing

    from jaxinfra.errors import ConfigError

    if options.devices is None:
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    jobs = max(1, options.jobs)
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    found: list[Row] = []
    for config in options.configs:
        workers = [context.Process(target=_worker, args=(config, part, jobs, out), daemon=True) for part in range(jobs)]
        for worker in workers:
            worker.start()
        running = jobs
        while running:
            said = out.get()
            if isinstance(said, Exception):
                raise said
            if said is None:
                running -= 1
                continue
            found.append(said)
            print(
                f"{said.config:14} {said.mesh:32} loss {said.loss:.1e}  gradients {said.gradient:.1e} ({said.leaf})"
                f"  other order {said.permuted:.1e}{'' if said.worst <= BOUND else '  TOO FAR'}",
                flush=True,
            )
        for worker in workers:
            worker.join()
    far = [row for row in found if not row.worst <= BOUND]
    print(f"{len(found)} rows, {len({row.mesh for row in found})} meshes, {len(far)} beyond {BOUND:g}", file=sys.stderr)
    if options.write:
        write(options.write, table(found))
    if far:
        raise ConfigError(
            f"{far[0].config} on {far[0].mesh}: differs by {far[0].worst:.1e}, expected {BOUND:g} or less"
        )
    return 0
