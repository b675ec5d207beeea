"""The time of an operation from its FLOPs and bytes, for chips whose compiler estimates no cycles, such as GPUs.

An operation takes the longer of two times: its FLOPs over a part of the peak, and its bytes over a part of the memory's
bandwidth. The parts are usual ones, not fitted: bounds that follow from them are wide (`LOWER`, `UPPER`).
"""

import math
import re
from collections.abc import Mapping
from functools import partial

from jaxinfra.machine.chips import Chip
from jaxinfra.plan.hlo import Computation, Instruction, array_dims

LOWER, UPPER = 0.7, 1.5
"""Bounds of a time from a roofline, as multiples of it."""

_PEAK_PART, _MEMORY_PART = 0.65, 0.8
_SLICES = ("dynamic-slice", "gather")
_LAUNCH_S = 3e-6  # of a kernel
_GEMM = re.compile(r"__cublas\$|__triton_gemm|__cudnn\$conv")
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")
)


class Roofline:
    """The operations of one program on one kind of chip."""

    def __init__(self, computations: Mapping[str, Computation], chip: Chip) -> None:
        self._computations, self._chip = computations, chip

    def seconds(self, computation: Computation, instruction: Instruction) -> float:
        """Returns the time of an operation of a computation; 0 for one that runs nothing."""
        if instruction.opcode in _FREE:
            return 0.0
        n_bytes = self.moved_bytes(computation, instruction)
        compute_s = self.flops(computation, instruction) / (_PEAK_PART * self._peak(computation, instruction))
        memory_s = n_bytes / (_MEMORY_PART * (self._chip.hbm_bytes_per_s or math.inf))
        return max(compute_s, memory_s) + _LAUNCH_S

    def _peak(self, computation: Computation, instruction: Instruction) -> float:
        """Returns the peak for the narrowest dtype that an operation multiplies."""
        inputs = " ".join(computation.instructions[name].shape for name in instruction.operands[:2])
        dtype = "fp8" if "f8e" in inputs else "int8" if re.search(r"\bs8\[", inputs) else "bf16"
        return self._chip.peaks.get(dtype, self._chip.peak_flops)

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """Returns the FLOPs of the matmuls in an operation."""
        if instruction.opcode == "dot":
            return _dot_flops(computation, instruction)
        target = instruction.quoted("custom_call_target") or ""
        if instruction.opcode == "custom-call" and _GEMM.search(target):
            return _gemm_flops(computation, instruction)
        return sum(
            self.flops(inner, each)
            for name in instruction.called_computations
            if instruction.opcode == "fusion" and (inner := self._computations.get(name)) is not None
            for each in inner.instructions.values()
        )

    def moved_bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Returns the bytes that an operation reads and writes; of an array that it slices, those of the slice."""
        names = instruction.callees.get("calls", ()) if instruction.opcode == "fusion" else ()
        fused = self._computations.get(names[0]) if names else None
        if fused is None:
            read = [sum(computation.instructions[name].array_bytes) for name in instruction.operands]
            return sum(read) + instruction.array_bytes[0]  # the others of a library are its scratch memory
        read_bytes = 0.0
        for number, name in enumerate(instruction.operands):
            inner = fused.parameter(number)
            users = fused.users.get(inner, []) if inner is not None else []
            sliced = [user for user in users if user.opcode in _SLICES and user.operands[0] == inner]
            updated = [user for user in users if user.opcode == "dynamic-update-slice" and user.operands[0] == inner]
            if users and len(sliced) + len(updated) == len(users):
                read_bytes += sum(sum(user.array_bytes) for user in sliced)
            else:
                read_bytes += sum(computation.instructions[name].array_bytes)
        root = fused.instructions[fused.root]
        outputs = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return read_bytes + sum(map(partial(_written_bytes, fused), outputs))


def _written_bytes(fused: Computation, output: Instruction) -> int:
    """Returns the bytes of an output of a fusion; of an array that is updated, those of the update."""
    output = fused.source(output.name)
    updates = output.opcode == "dynamic-update-slice"
    return sum((fused.instructions[output.operands[1]] if updates else output).array_bytes)


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    left = array_dims(computation.instructions[instruction.operands[0]].shape)[0]
    contracted = [left[int(dim)] for dim in match[1].split(",") if dim] if match else []
    return 2.0 * math.prod(array_dims(instruction.shape)[0]) * math.prod(contracted)


def _gemm_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a call of a library: `[B, M, K] x [B, K, N]`, with K from the three sizes."""
    arrays = [array_dims(computation.instructions[name].shape) for name in instruction.operands[:2]]
    if len(arrays) < 2 or not all(arrays):
        return 0.0
    left, right, out = arrays[0][0], arrays[1][0], array_dims(instruction.shape)[0]
    batch = left[0] if len(left) == len(right) == len(out) == 3 else 1
    contracted = math.sqrt(math.prod(left) * math.prod(right) / (math.prod(out) * batch))
    return 2.0 * math.prod(out) * contracted
