"""Rewrites the compiler's errors as one line that says what to change.

The TPU compiler's messages are documented at https://openxla.org/xla/errors. Unknown messages keep their first line.
"""

import math
import re
from collections.abc import Sequence

from jaxinfra.plan.topology import INSTALL_COMMAND
from jaxinfra.run import Run

# "the total memory required for HLO temporaries (46.60G) exceeds available HBM (15.75G)",
# "Ran out of memory in memory space hbm. Used 17.34G of 15.75G hbm"
_OUT_OF_MEMORY = (
    re.compile(r"memory required for (?P<what>[\w ]+) \((?P<needed>[\d.]+\w?)\) exceeds .* \((?P<limit>[\d.]+\w?)\)"),
    re.compile(r"Used (?P<needed>[\d.]+\w?) of (?P<limit>[\d.]+\w?) hbm"),
)
_BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
TOO_LARGE = "GiB more than"
"""Words by which `bench llama` recognizes a message of `out_of_memory`."""


def explain(message: str, run: Run, per_device_batch_size: float, held_bytes: float = 0) -> str:
    """Returns one line with the cause of a compiler error and a fix.

    `held_bytes` is what a device holds whatever the size of its microbatch: the state, and the sums of gradients.
    """
    first_line = " ".join(message.strip().split("\n")[0].split())
    if "cuDNN" in message and ("not found" in message or "not detected" in message):
        fix = f"run {INSTALL_COMMAND}, or use model.attention_kernel=xla"
        return f"its attention needs cuDNN, which is not installed; {fix}"
    if "libdevice" in message or "ptxas" in message or "PTX compilation provider" in message:
        return f"the GPU compiler needs ptxas and libdevice of CUDA: {first_line}; run {INSTALL_COMMAND}"
    if "VmemOom" in message or "memory space vmem" in message:
        fix = "use smaller blocks, or model.attention_kernel=xla"
        return f"a kernel exceeds the chip's vector memory: {first_line}; {fix}"
    if "RESOURCE_EXHAUSTED" not in message:
        return f"the compiler failed: {first_line}; --debug prints its whole message"
    for pattern in _OUT_OF_MEMORY:
        if match := pattern.search(message):
            needed, limit = _bytes(match["needed"]), _bytes(match["limit"])
            what = f" for {match['what']}" if "what" in match.groupdict() else ""
            divided = needed - (0 if "temporaries" in what else held_bytes)
            ratio = divided / (limit - held_bytes) if limit > held_bytes else math.inf
            return out_of_memory(needed, limit, suggest_fix(run, per_device_batch_size, ratio), what)
    cause = first_line.removeprefix("RESOURCE_EXHAUSTED: ")
    return f"out of memory: {cause}; {suggest_fix(run, per_device_batch_size, 2)}"


def out_of_memory(needed_bytes: float, limit_bytes: float, fix: str, what: str = "") -> str:
    """Returns the message for a step that needs more than a device's memory; `what` says for what it is needed."""
    needed, limit = needed_bytes / 2**30, limit_bytes / 2**30
    return f"needs {needed:.2f} GiB{what} on each device, {needed - limit:.2f} {TOO_LARGE} its {limit:.2f} GiB; {fix}"


def suggest_fix(run: Run, per_device_batch_size: float, ratio: float) -> str:
    """Suggests overrides that make temporaries about `ratio` times smaller: more remat, more microbatches."""
    fixes = [] if getattr(run.model, "remat", "full") == "full" else ["model.remat=full"]
    microbatch_size = int(per_device_batch_size) // run.train.accumulate
    # The smallest divisor of the microbatch that is enough: 12 / 2.5 -> 3 parts of 4.
    divisors = (n for n in range(2, microbatch_size + 1) if n >= ratio and microbatch_size % n == 0)
    if parts := next(divisors, None):
        fixes.append(f"train.accumulate={run.train.accumulate * parts}")
    return f"use {', '.join([*fixes, 'or more devices'])}" if fixes else "use more devices"


def _bytes(text: str) -> float:
    """Parses `46.60G`, or a number of bytes without a unit."""
    unit = text[-1]
    return float(text[:-1]) * _BYTES[unit] if unit in _BYTES else float(text.removesuffix("B"))


def join_objections(messages: Sequence[str]) -> str:
    """Returns one line with every cause, and the first fix of each as one list of overrides."""
    if len(messages) == 1:
        return messages[0]
    with_overrides = [message.rpartition("; use ") for message in messages if "; use " in message]
    others = [message for message in messages if "; use " not in message]
    causes = [cause for cause, _, _ in with_overrides]
    fixes = " ".join(fix.partition(",")[0] for _, _, fix in with_overrides)
    return "; ".join([*causes, *([f"use {fixes}"] if fixes else []), *others])
