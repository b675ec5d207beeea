"""The time of an operation from its FLOPs and bytes, for chips whose compiler estimates no cycles, such as GPUs.

An operation takes the longer of two times: its FLOPs over a part of the peak, and its bytes over a part of the memory's
bandwidth. The parts are usual ones, not fitted: bounds that follow from them are wide (`LOWER`, `UPPER`).
"""

import math
import re
from collections.abc import Mapping

from jaxinfra.plan.chips import Chip
from jaxinfra.plan.hlo import Computation, Instruction, array_dims

LOWER, UPPER = 0.7, 1.5
"""Bounds of a time from a roofline, as multiples of it."""

_PEAK_PART, _MEMORY_PART = 0.65, 0.8
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
        flops = self.flops(computation, instruction)
        n_bytes = self.moved_bytes(computation, instruction)
        compute_s = flops / (_PEAK_PART * self._chip.peak_flops)
        memory_s = n_bytes / (_MEMORY_PART * (self._chip.hbm_bytes_per_s or math.inf))
        return max(compute_s, memory_s) + _LAUNCH_S

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
            return sum(read) + sum(instruction.array_bytes)
        read_bytes = 0.0
        for number, name in enumerate(instruction.operands):
            inner = fused.parameter(number)
            users = fused.users.get(inner, []) if inner is not None else []
            if users and all(user.opcode in ("dynamic-slice", "gather") for user in users):
                read_bytes += sum(sum(user.array_bytes) for user in users)
            elif not (users and all(user.opcode == "dynamic-update-slice" for user in users)):
                read_bytes += sum(computation.instructions[name].array_bytes)
        root = fused.instructions.get(fused.root)
        if root is not None and root.opcode == "dynamic-update-slice":
            return read_bytes + sum(fused.instructions[root.operands[1]].array_bytes)
        return read_bytes + sum(instruction.array_bytes)


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
