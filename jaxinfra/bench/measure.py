"""One measurement in a process of its own: jaxinfra and the bare step, or jaxinfra on two meshes, in turns.

The number of emulated CPU devices is fixed when JAX starts, so each case is a child of the command:
`python -m jaxinfra.bench.measure REQUEST`, REQUEST in JSON, prints one line of JSON. Both sides live in the same
process and step alternately: what else the machine does hits both alike, and only their ratio is trusted.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax

from jaxinfra.bench import CONFIG, bare
from jaxinfra.bench.children import Times
from jaxinfra.bench.parity import batch_of, program_of, put
from jaxinfra.config import load, validate
from jaxinfra.errors import ConfigError
from jaxinfra.optim.optimizers import AdamW
from jaxinfra.program import Program
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


class Side:
    """A train step, what it carries from one call to the next, and the batch of every call."""

    def __init__(self, step: Any, carried: list[Any], batch: Any, context: Callable[[], Any] = nullcontext):
        self.step, self.carried, self.batch, self.context = step, carried, batch, context
        self.values: Any = None

    def call(self) -> None:
        """Dispatches one step."""
        *self.carried, self.values = self.step(*self.carried, self.batch)

    def wait(self) -> None:
        """Waits until all of it is done."""
        jax.block_until_ready((self.carried, self.values))


def framework(program: Program) -> Side:
    """Returns the train step of a program on random tokens, none of them masked."""
    tokens = batch_of(program.run)
    shapes = {name: program.batch[name] for name in ("inputs", "targets")}
    with program.on_mesh:
        state = program.init(jax.random.key(program.run.seed))
    batch = put({name: tokens[name] for name in shapes}, shapes)
    return Side(program.train_step, [state], batch, lambda: program.on_mesh)


def by_hand(run: Run, naive: bool = False) -> Side:
    """Returns the bare step of the same model, whose mesh is in its shardings."""
    step, *carried, batch = bare.build(sizes_of(run, naive), len(jax.devices()))
    return Side(step, carried, batch)


def turns(sides: dict[str, Side], pairs: int, *, to_the_end: bool = True) -> Times:
    """Times so many turns of each side, the sides alternating; the devices are idle when a turn begins.

    With `to_the_end` the time is that of a whole step, else that of the call alone that dispatches it.
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
    """Times whole steps of jaxinfra and of the bare step."""
    return turns({"jaxinfra": framework(program_of(run)), "bare": by_hand(run)}, pairs)


def meshes(run: Run, plain: Run, pairs: int) -> Times:
    """Times whole steps of jaxinfra on two meshes, or on one under two schedules."""
    return turns({"mesh": framework(program_of(run)), "plain": framework(program_of(plain))}, pairs)


def alone(run: Run, pairs: int) -> Times:
    """Times whole steps of jaxinfra, then of the bare step, each with the machine to itself."""
    times_s = turns({"jaxinfra": framework(program_of(run))}, pairs)
    return times_s | turns({"bare": by_hand(run)}, pairs)


def layouts(run: Run, pairs: int) -> Times:
    """Times whole bare steps without and with the layouts of products that XLA runs fast."""
    return turns({"naive": by_hand(run, naive=True), "bare": by_hand(run)}, pairs)


def dispatch(run: Run, pairs: int) -> Times:
    """Times the host's work on a step: of its call alone, on both sides, and of a turn of the training loop."""
    program = program_of(run)
    ours = framework(program)
    times_s = turns({"jaxinfra": ours, "bare": by_hand(run)}, 20 * pairs, to_the_end=False)
    return times_s | {"loop": [loop_host_s(program, ours) for _ in range(pairs)]}


class _Waiting(Reporter):
    """A reporter that takes the time for which the loop waits for the devices."""

    waited_s = 0.0

    def finished(self, step: int, values: Any) -> None:
        start_s = time.perf_counter()
        jax.block_until_ready(values)
        self.waited_s += time.perf_counter() - start_s
        super().finished(step, values)


def loop_host_s(program: Program, side: Side, steps: int = 50) -> float:
    """Returns seconds a step of the training loop, with nothing due, less those in which it waits for the devices."""
    hooks = Hooks(
        log=lambda step, metrics: None,
        due=lambda step: False,
        waited_s=lambda: 0.0,
        evaluate=lambda state: {},
        save=lambda done, state, values: None,
        stop=lambda: None,
    )
    assert program.run.train.steps > steps, "the last step is evaluated"
    batches = [(step, side.batch) for step in range(steps)]
    reporter = _Waiting(hooks, Work(modality="token", units=1, flops=1.0, peak=1.0))
    side.wait()
    with program.on_mesh:
        start_s = time.perf_counter()
        side.carried = [fit(program, side.carried[0], 0, batches, hooks, reporter).state]
        spent_s = time.perf_counter() - start_s
    return (spent_s - reporter.waited_s) / steps


KINDS: dict[str, Callable[[Run, int], Any]] = {
    "step": step,
    "alone": alone,
    "layouts": layouts,
    "dispatch": dispatch,
    "sizes": lambda run, pairs: dataclasses.asdict(sizes_of(run)),
}


def answer(*, kind: str, config: str, overrides: Sequence[str], pairs: int, plain: Sequence[str] | None = None) -> Any:
    """Measures what is asked for: a key of `KINDS`, or "meshes", whose other side has the overrides `plain`."""
    run = _run(config, overrides)
    return KINDS[kind](run, pairs) if plain is None else meshes(run, _run(config, plain), pairs)


def _run(config: str, overrides: Sequence[str]) -> Run:
    run = resolved(load(config, overrides, root=Run).run, len(jax.devices()))
    validate(run)
    return run


def main() -> int:
    """Answers the request on the command line; what it refuses is the last line of its errors."""
    try:
        print(json.dumps(answer(**json.loads(sys.argv[1]))))
        return 0
    except ConfigError as refused:
        print(refused, file=sys.stderr)
        return refused.exit_code


if __name__ == "__main__":
    sys.exit(main())
