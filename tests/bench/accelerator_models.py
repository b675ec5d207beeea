"""`bench accelerator --only models`: whole train steps of three models on all devices, from random tokens."""

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxinfra import AdamW, Constant, MeshConfig, OptimConfig, Precision, Run, TokenData, TrainConfig
from jaxinfra.config import apply, validate
from jaxinfra.families.zoo import shape
from jaxinfra.inference.language_model import require_text
from jaxinfra.machine.peak_flops import peak_flops
from jaxinfra.models.flops import flops_per_token, matmul_params
from jaxinfra.models.remat import Remat
from jaxinfra.parallel.mesh import Device
from jaxinfra.processes.devices import device_memory
from jaxinfra.processes.peers import current_peers
from jaxinfra.program import TrainState
from jaxinfra.user_code import is_out_of_memory
from tests.bench.accelerator_timing import Case, NotMeasuredError, Part, Setting
from tests.bench.measure import jaxinfra_step
from tests.bench.table import Columns, TableRow

COLUMNS: Columns = {
    "params_m": ("million parameters", "{:,.0f}"),
    "batch": ("sequences x tokens", ""),
    "remat": ("remat", ""),
    "step_ms": ("step", "{:.1f} ms"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak": ("peak FLOP/s", ""),
    "peak_gib": ("peak memory", "{:.1f} GiB"),
    "first_s": ("first step", "{:.0f} s"),
}
SHAPES = ("gpt2", "gpt2-medium", "qwen3-0.6b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen3-14b")
SMALL_SHAPES = ("tiny", "small")
BYTES_PER_PARAMETER = 16  # float32 parameters, gradients and two moments
FRACTION = 0.7  # of the memory, for these; the rest is for activations
TOKENS_PER_DEVICE = 8192
REMATS: tuple[Remat, ...] = ("dots", "full")  # the first that fits


def chosen_shapes(memory_bytes: float) -> list[str]:
    """Returns the smallest model and the two largest that one device can train."""
    fitting = [name for name in SHAPES if BYTES_PER_PARAMETER * matmul_params(shape(name)) <= FRACTION * memory_bytes]
    return list(dict.fromkeys([SHAPES[0], *fitting[-2:]]))


def make_run(setting: Setting, name: str, remat: Remat) -> Run:
    """Returns a run of a model, fully sharded over all devices."""
    model, devices = shape(name), len(jax.devices())
    seq_len = 64 if setting.is_small else min(model.learned_positions or 2048, 2048)
    rows = 2 if setting.is_small else TOKENS_PER_DEVICE // seq_len
    run = Run(
        name=name,
        model=replace(model, remat=remat),
        data=TokenData(store="none", seq_len=seq_len, mask_documents=False),
        precision=Precision(compute="float32" if setting.is_small else "bfloat16"),
        mesh=MeshConfig(fsdp=devices),
        optim=OptimConfig(optimizer=AdamW(weight_decay=0.1), schedule=Constant(), peak_lr=1e-4),
        train=TrainConfig(steps=100, global_batch=rows * devices),
    )
    run = apply(run, setting.overrides)
    validate(run)
    return run


def model_row(setting: Setting, name: str) -> TableRow:
    """Times whole steps of a model, with less saved for the backward pass if memory is too small."""
    for remat in REMATS:
        gc.collect()  # the arrays of what has found no memory
        try:
            return _time_model(setting, make_run(setting, name, remat))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
    raise NotMeasuredError(f"it needs more memory than there is, also with remat={REMATS[-1]}")


def _time_model(setting: Setting, run: Run) -> TableRow:
    start_s = time.perf_counter()
    timed = jaxinfra_step(run)

    def step() -> object:
        *timed.state, timed.output = timed.step(*timed.state, timed.batch)
        return timed.state, timed.output

    with timed.context():
        jax.block_until_ready(step())
        first_s = time.perf_counter() - start_s
        step_s = setting.seconds(step)
    model, data = require_text(run)
    tokens, devices = run.train.global_batch * data.seq_len, len(jax.devices())
    local: list[Device] = list(jax.local_devices())
    peak, source = peak_flops(local[0], jnp.dtype(run.precision.compute), len(local))
    peak = float(current_peers().broadcast(peak))  # that of a CPU is measured
    (state,) = timed.state
    assert isinstance(state, TrainState)
    memory = device_memory().get("device_peak_bytes")  # since the process began: models come smallest first
    return {
        "params_m": sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6,
        "batch": f"{run.train.global_batch} x {data.seq_len}",
        "remat": str(model.remat),
        "step_ms": 1e3 * step_s,
        "tokens_per_s": tokens / step_s,
        "mfu": flops_per_token(model, data.seq_len) * tokens / step_s / (peak * devices),
        "peak": f"{peak:.3g}, {source}",
        "peak_gib": memory and memory / 2**30,
        "first_s": first_s,
    }


def cases(setting: Setting) -> Iterator[Case]:
    """Yields the models, the smallest first."""
    memory = device_memory({"limit": "bytes_limit"}).get("limit", 16e9)  # of the smallest TPU, if not reported
    names = SMALL_SHAPES if setting.is_small else chosen_shapes(float(current_peers().broadcast(memory)))
    for name in names:
        yield Case(name, partial(model_row, setting, name))


PART = Part(COLUMNS, 220, cases)
