"""What a compiler says when it refuses a step, in one line that says what to do.

Texts of the TPU compiler: https://openxla.org/xla/errors. What is not known here is passed on as it is.
"""

import math
import re

from jaxinfra.plan.topology import INSTALL
from jaxinfra.run import Run

_NEEDED_AND_THERE = (
    re.compile(r"memory required for (?P<what>[\w ]+) \((?P<needed>[\d.]+\w?)\) exceeds .* \((?P<there>[\d.]+\w?)\)"),
    re.compile(r"Used (?P<needed>[\d.]+\w?) of (?P<there>[\d.]+\w?) hbm"),
)
_BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def explained(message: str, run: Run, rows: float) -> str:
    """One line from the error of a compiler; `rows` are those of the batch, of one device in one step."""
    first = " ".join(message.strip().split("\n")[0].split())
    if "cuDNN not found" in message:
        return "its attention needs cuDNN; use model.attention=xla, or pip install nvidia-cudnn-cu13"
    if "libdevice" in message or "ptxas" in message or "PTX compilation provider" in message:
        return f"its compiler needs ptxas and libdevice of CUDA: {first}; use {INSTALL}"
    if "VmemOom" in message or "memory space vmem" in message:
        return f"a kernel does not fit the chip's vector memory: {first}; use smaller blocks, or model.attention=xla"
    if "RESOURCE_EXHAUSTED" not in message:
        return f"the compiler refuses it: {first}; --debug shows all it says"
    found = next((match for pattern in _NEEDED_AND_THERE if (match := pattern.search(message))), None)
    if found is None:
        return f"does not fit: {first.removeprefix('RESOURCE_EXHAUSTED: ')}; {smaller(run, rows, 2)}"
    needed, there = _bytes(found["needed"]), _bytes(found["there"])
    of_what = f" of {found['what']}" if "what" in found.re.groupindex else ""
    return too_big(needed, there, smaller(run, rows, needed / there), of_what)


def too_big(needed_bytes: float, there_bytes: float, fix: str, of_what: str = "") -> str:
    """By how much something does not fit a device, and what to do."""
    needed, there = needed_bytes / 2**30, there_bytes / 2**30
    return f"needs {needed:.2f} GiB{of_what} a device, which has {there:.2f}: {needed - there:.2f} GiB too much; {fix}"


def smaller(run: Run, rows: float, times: float) -> str:
    """What makes temporaries so many times smaller: more recomputed, fewer sequences at once, or more devices.

    A microbatch is cut into at least as many parts, if it can be; `rows` are those of one device in a whole step.
    """
    fixes = [] if run.model.remat == "full" else ["model.remat=full"]
    at_once = int(rows) // run.train.accumulate
    parts = next((n for n in range(max(2, math.ceil(times)), at_once) if at_once % n == 0), at_once)
    if parts > 1:
        fixes.append(f"train.accumulate={run.train.accumulate * parts}")
    return f"use {', '.join([*fixes, 'or more devices'])}" if fixes else "use more devices"


def _bytes(text: str) -> float:
    """Of `46.60G`; a number alone is one of bytes."""
    unit = text[-1]
    return float(text[:-1]) * _BYTES[unit] if unit in _BYTES else float(text.removesuffix("B"))
