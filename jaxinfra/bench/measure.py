"""One measurement in a process of its own: jaxinfra and the bare step, or jaxinfra on two meshes, in turns.

The number of emulated CPU devices is fixed when JAX starts, so each case is a child of the command:
`python -m jaxinfra.bench.measure REQUEST`, REQUEST in JSON, prints one line of JSON. Both sides live in the same
process and step alternately: what else the machine does hits both alike, and only their ratio is trusted.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np

from jaxinfra.bench import CONFIG, bare
from jaxinfra.bench.children import Request, Times
from jaxinfra.config import load, validate
from jaxinfra.errors import ConfigError
from jaxinfra.optim.optimizers import AdamW
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.program import Program, TrainState
from jaxinfra.run import Run, of_text, resolved
from jaxinfra.train.loop import Hooks, Reporter, Work, fit

WARM_UPS = 3
"""Steps of each side before its times count: compilation, first touch of memory, allocator."""


def sizes_of(run: Run, naive: bool = False) -> bare.Sizes:
    """The bare step of the same model, batch and optimiser."""
    (model, data), adamw = of_text(run), run.optim.optimizer
    if model.rope is None or model.groups != model.heads or model.latent is not None or not isinstance(adamw, AdamW):
        raise ConfigError(f"{run.name}: the bare step has rotary, ungrouped attention and AdamW; use {CONFIG}")
    return bare.Sizes(
        vocab=model.vocab_size,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        mlp=model.mlp_dim,
        length=data.seq_len,
        batch=run.train.global_batch,
        eps=model.norm_eps,
        theta=model.rope.theta,
        peak_lr=run.optim.peak_lr,
        weight_decay=adamw.weight_decay,
        compute=run.precision.compute,
        naive=naive,
    )


class Framework:
    """The train step of a `Program`, with a state and a batch to call it on."""

    def __init__(self, run: Run):
        self.program = Program(run, make_mesh(run.mesh, jax.devices()))
        self.batch = self._batch(run)
        self.values: Any = None
        with self.context():
            self.state: TrainState = self.program.init(jax.random.key(run.seed))

    def _batch(self, run: Run) -> dict[str, jax.Array]:
        model, data = of_text(run)
        shape = (run.train.global_batch, data.seq_len + 1)
        tokens_BW = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
        arrays = {"inputs": tokens_BW[:, :-1], "targets": tokens_BW[:, 1:]}
        return {name: jax.device_put(array, self.program.batch[name].sharding) for name, array in arrays.items()}

    def context(self) -> AbstractContextManager[Any]:
        """What the training loop runs in."""
        return self.program.on_mesh

    def call(self) -> None:
        """Dispatches one step."""
        self.state, self.values = self.program.train_step(self.state, self.batch)

    def wait(self) -> None:
        """Waits until all of it is done."""
        jax.block_until_ready((self.state, self.values))


class Bare:
    """The hand-written step, likewise."""

    def __init__(self, sizes: bare.Sizes):
        self.step, self.params, self.state, self.batch = bare.build(sizes, len(jax.devices()))
        self.values: Any = None

    def context(self) -> AbstractContextManager[Any]:
        """Nothing: its mesh is in its shardings."""
        return nullcontext()

    def call(self) -> None:
        """Dispatches one step."""
        self.params, self.state, self.values = self.step(self.params, self.state, self.batch)

    def wait(self) -> None:
        """Waits until all of it is done."""
        jax.block_until_ready((self.params, self.state, self.values))


def turns(sides: dict[str, Framework | Bare], pairs: int, *, to_the_end: bool = True) -> Times:
    """Times the sides in turns; the devices are idle when a turn begins.

    Args:
        sides: by name.
        pairs: timed turns of each.
        to_the_end: time a whole step; else only the call that dispatches it.
    """
    times_s: Times = {name: [] for name in sides}
    for turn in range(WARM_UPS + pairs):
        for name, side in sides.items():
            with side.context():
                start_s = time.perf_counter()
                side.call()
                called_s = time.perf_counter()
                side.wait()
                end_s = time.perf_counter() if to_the_end else called_s
            if turn >= WARM_UPS:
                times_s[name].append(end_s - start_s)
    return times_s


def step(run: Run, pairs: int) -> Times:
    """Whole steps of jaxinfra and of the bare step."""
    return turns({"jaxinfra": Framework(run), "bare": Bare(sizes_of(run))}, pairs)


def meshes(run: Run, plain: Run, pairs: int) -> Times:
    """Whole steps of jaxinfra on two meshes, or on one under two schedules."""
    return turns({"mesh": Framework(run), "plain": Framework(plain)}, pairs)


def alone(run: Run, pairs: int) -> Times:
    """Whole steps of jaxinfra, then of the bare step, each with the machine to itself."""
    times_s = turns({"jaxinfra": Framework(run)}, pairs)
    return times_s | turns({"bare": Bare(sizes_of(run))}, pairs)


def layouts(run: Run, pairs: int) -> Times:
    """Whole bare steps without and with the layouts of products that XLA runs fast."""
    return turns({"naive": Bare(sizes_of(run, naive=True)), "bare": Bare(sizes_of(run))}, pairs)


def dispatch(run: Run, pairs: int) -> Times:
    """Host time of a step: of its call alone, on both sides, and of a turn of the training loop."""
    framework = Framework(run)
    times_s = turns({"jaxinfra": framework, "bare": Bare(sizes_of(run))}, 20 * pairs, to_the_end=False)
    return times_s | {"loop": [loop_host_s(framework) for _ in range(pairs)]}


class _Same:
    """The same placed batch for so many steps."""

    def __init__(self, batch: dict[str, jax.Array], steps: int):
        self.data_wait_s = 0.0
        self._items = iter([(step, batch) for step in range(steps)])

    def __iter__(self) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        return self

    def __next__(self) -> tuple[int, dict[str, jax.Array]]:
        return next(self._items)


class _Waiting(Reporter):
    """A reporter that takes the time for which the loop waits for the devices."""

    waited_s = 0.0

    def finished(self, step: int, values: Any) -> None:
        start_s = time.perf_counter()
        jax.block_until_ready(values)
        self.waited_s += time.perf_counter() - start_s
        super().finished(step, values)


class _NoLog:
    def log(self, step: int, metrics: Any) -> None: ...


def loop_host_s(framework: Framework, steps: int = 50) -> float:
    """Seconds a step of the training loop, with nothing due, less those in which it waits for the devices."""
    hooks = Hooks(
        log=_NoLog(),
        due=lambda step: False,
        evaluate=lambda state: {},
        save=lambda done, state, values: None,
        stop=lambda: None,
    )
    assert framework.program.run.train.steps > steps, "the last step is evaluated"
    batches = _Same(framework.batch, steps)
    reporter = _Waiting(hooks, batches, Work(unit="token", units=1, flops=1.0, peak=1.0))
    framework.wait()
    with framework.context():
        start_s = time.perf_counter()
        framework.state = fit(framework.program, framework.state, 0, batches, hooks, reporter).state
        spent_s = time.perf_counter() - start_s
    return (spent_s - reporter.waited_s) / steps


def sizes(run: Run, pairs: int) -> dict[str, Any]:
    """Nothing measured: the sizes of the bare step."""
    return dataclasses.asdict(sizes_of(run))


KINDS: dict[str, Callable[[Run, int], Any]] = {
    "step": step,
    "alone": alone,
    "layouts": layouts,
    "dispatch": dispatch,
    "sizes": sizes,
}


def main() -> int:
    """Answers the request on the command line; what it refuses is the last line of its errors."""
    request = Request(**json.loads(sys.argv[1]))
    try:
        run = _run(request.config, request.overrides)
        if request.plain is not None:
            found = meshes(run, _run(request.config, request.plain), request.pairs)
        else:
            found = KINDS[request.kind](run, request.pairs)
    except ConfigError as refused:
        print(refused, file=sys.stderr)
        return refused.exit_code
    print(json.dumps(found))
    return 0


def _run(config: str, overrides: Sequence[str]) -> Run:
    run = resolved(load(config, overrides, root=Run).run, len(jax.devices()))
    validate(run)
    return run


if __name__ == "__main__":
    sys.exit(main())
