"""The time of operations from their FLOPs and bytes, where no compiler estimates cycles."""

import numpy as np
import pytest

from jaxinfra.machine.chips import CHIPS
from jaxinfra.plan.collectives import CollectiveFinder
from jaxinfra.plan.hlo import HloModule
from jaxinfra.plan.roofline import Roofline
from jaxinfra.plan.step_time import Attention, Rates, StepTimer

H100 = CHIPS["h100"]
INPUTS = ("%x = bf16[4096,8192] parameter(0)", "%w = bf16[8192,1024] parameter(1)", "%i = s32[] parameter(2)")
FLOPS = 2 * 4096 * 8192 * 1024
BYTES = 2 * (4096 * 8192 + 8192 * 1024 + 4096 * 1024)


def module(*lines: str, before: str = "") -> HloModule:
    body = "".join(f"  {line}\n" for line in (*INPUTS, *lines))
    return HloModule(
        f"HloModule jit_step, num_partitions=16\n{before}\nENTRY %main (x: bf16[8]) -> bf16[8] {{\n{body}}}\n"
    )


def operation(text: str, before: str = "") -> tuple[float, float, float]:
    found = module(text, before=before)
    computation = found.computations[found.entry]
    (name,) = {*computation.instructions} - {"x", "w", "i"}
    roofline, instruction = Roofline(found.computations, H100), computation.instructions[name]
    return (
        roofline.flops(computation, instruction),
        roofline.moved_bytes(computation, instruction),
        roofline.seconds(computation, instruction),
    )


@pytest.mark.parametrize(
    "text",
    [
        "%y = bf16[4096,1024] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        '%y = bf16[4096,1024] custom-call(%x, %w), custom_call_target="__cublas$gemm"',
    ],
    ids=["dot", "library"],
)
def test_a_matmul_takes_its_flops(text: str) -> None:
    flops, n_bytes, seconds = operation(text)
    assert (flops, n_bytes) == (FLOPS, BYTES)
    assert FLOPS / H100.peak_flops < seconds < 2 * FLOPS / H100.peak_flops


def test_a_matmul_in_a_fusion() -> None:
    inner = "%y = bf16[4096,1024] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    before = (
        "%product (a: bf16[8], b: bf16[8]) -> bf16[8] {\n  %a = bf16[4096,8192] parameter(0)\n"
        f"  %b = bf16[8192,1024] parameter(1)\n  ROOT {inner}\n}}\n"
    )
    flops, n_bytes, _ = operation("%f = bf16[4096,1024] fusion(%x, %w), kind=kCustom, calls=%product", before)
    assert (flops, n_bytes) == (FLOPS, BYTES)


def test_what_computes_little_takes_its_bytes() -> None:
    flops, n_bytes, seconds = operation("%y = bf16[4096,8192] add(%x, %x)")
    assert flops == 0 and n_bytes == 3 * 2 * 4096 * 8192
    assert n_bytes / 3352e9 < seconds < 2 * n_bytes / 3352e9


def test_of_an_array_that_is_sliced_the_slice_is_read() -> None:
    before = (
        "%slice (a: bf16[8]) -> bf16[8] {\n  %a = bf16[4096,8192] parameter(0)\n"
        "  ROOT %s = bf16[1,8192] dynamic-slice(%a), dynamic_slice_sizes={1,8192}\n}\n"
    )
    _, n_bytes, _ = operation("%f = bf16[1,8192] fusion(%x), kind=kLoop, calls=%slice", before)
    assert n_bytes == 2 * 2 * 8192


def test_a_loop_that_stacks_its_outputs_writes_a_slice_of_each() -> None:
    before = (
        "%stack (a: bf16[8], i: s32[]) -> (bf16[8], bf16[8]) {\n  %a = bf16[4096,8192] parameter(0)\n"
        "  %i = s32[] parameter(1)\n  %s = bf16[1,8192] dynamic-slice(%a, %i), dynamic_slice_sizes={1,8192}\n"
        "  %u = bf16[4096,8192] dynamic-update-slice(%a, %s, %i)\n  ROOT %t = (bf16[4096,8192]) tuple(%u)\n}\n"
    )
    _, n_bytes, _ = operation("%f = (bf16[4096,8192]) fusion(%x, %i), kind=kLoop, calls=%stack", before)
    assert n_bytes == 2 * 2 * 8192 + 4


def test_narrow_numbers_have_a_higher_peak() -> None:
    quantized = {"%x": "%x8 = f8e4m3fn[4096,8192] parameter(0)", "%w": "%w8 = f8e4m3fn[8192,1024] parameter(1)"}
    found = module(
        *quantized.values(), "%y = bf16[4096,1024] dot(%x8, %w8), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    )
    computation = found.computations[found.entry]
    seconds = Roofline(found.computations, H100).seconds(computation, computation.instructions["y"])
    assert seconds < FLOPS / H100.peak_flops


def test_parameters_take_no_time() -> None:
    assert operation("%y = bf16[4096,8192] bitcast(%x)")[2] == 0.0


@pytest.mark.parametrize(
    ("groups", "seconds"),
    [("[2,8]<=[16]", 7 / 8 / 450), ("[1,16]<=[16]", max(15 / 16 / 450, 1 / 2 / (8 * 50)))],
)
def test_gpus_of_a_host_are_faster_than_hosts(groups: str, seconds: float) -> None:
    """A gather of one GB: inside of hosts of eight, and over two of them."""
    found = module(f"%all = f32[250000000] all-gather(%x), replica_groups={groups}, dimensions={{0}}")
    finder = CollectiveFinder(found, {"fsdp": 16}, [0] * 8 + [1] * 8)
    coords = np.array([[0]] * 8 + [[1]] * 8)
    spent = StepTimer(found, finder, H100, coords, (False,), Rates(links=1.0), None).run()
    assert sum(spent.waits.values()) == pytest.approx(
        max(seconds, 15 / 16 / 450 if "16]" in groups[:6] else 0), rel=1e-6
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("all-to-all(%x), replica_groups=[1,16]<=[16], dimensions={0}", 0.5 / 2 / 50),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,8}}", 0.5 / 50),
    ],
    ids=["all-to-all", "permute"],
)
def test_what_every_gpu_sends_by_itself_crosses_hosts_alone(text: str, seconds: float) -> None:
    """Half a GB of each GPU, over its own link to the network."""
    found = module(f"%y = f32[125000000] {text}")
    finder = CollectiveFinder(found, {"fsdp": 16}, [0] * 8 + [1] * 8)
    coords = np.array([[0]] * 8 + [[1]] * 8)
    spent = StepTimer(found, finder, H100, coords, (False,), Rates(links=1.0), None).run()
    assert sum(spent.waits.values()) == pytest.approx(seconds, rel=1e-6)


def test_cudnn_attention_takes_its_flops() -> None:
    calls = [
        f'%{name} = bf16[8] custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax{kind}"'
        for name, kind in (("one", ""), ("two", "Backward"))
    ]
    found = module(*calls)
    attention = Attention(matmul_flops=1e12, peak_flops=H100.peak_flops)
    timer = StepTimer(
        found, CollectiveFinder(found, {"fsdp": 16}, None), H100, np.zeros((16, 1)), (False,), Rates(), attention
    )
    assert timer.run().work["attention"] == pytest.approx(7 * 1e12 / (0.5 * H100.peak_flops))
