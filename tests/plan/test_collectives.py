import pytest

from jaxinfra.plan.collectives import ALL_REDUCE_SLICE, Collective, find_collectives
from jaxinfra.plan.hlo import HloModule

MESH = {"replica": 2, "fsdp": 2, "tensor": 2}
TEXT = """\
HloModule jit_step, entry_computation_layout={{(f32[8]{{0}})->f32[8]{{0}}}}

%sum (a: f32[], b: f32[]) -> f32[] {{
  ROOT %add = f32[] add(%a, %b)
}}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p.2 = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p.2), index=0
  %x = f32[8] get-tuple-element(%p.2), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %gather = f32[2,8]{{1,0:T(8,128)}} all-gather(%x), {groups}, dimensions={{0}}
  ROOT %tuple = (s32[], f32[8]) tuple(%next, %x)
}}

%inner_condition (p: (s32[], f32[8])) -> pred[] {{
  %p.1 = (s32[], f32[8]) parameter(0)
  %n = s32[] constant(5)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}}

%left (p: f32[8]) -> f32[8] {{
  %p.3 = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8]) tuple(%zero, %p.3)
  %loop = (s32[], f32[8]) while(%t), condition=%inner_condition, body=%inner
}}

%right (p: f32[8]) -> f32[8] {{
  %permute = bf16[8]{{0}} collective-permute(%p), source_target_pairs={{{{0,1}},{{1,0}}}}
}}

%unused (p: f32[8]) -> f32[8] {{
  %gather.1 = f32[8]{{0}} all-gather(%x), replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}, dimensions={{0}}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %choice = f32[8]{{0}} conditional(%which, %p, %p), branch_computations={{%left, %right}}
  %nothing = f32[] all-reduce(%y), replica_groups={{{{0}},{{1}},{{2}},{{3}},{{4}},{{5}},{{6}},{{7}}}}, to_apply=%sum
  ROOT %all = (f32[], /*index=1*/f32[3,4]{{1,0}}) all-reduce(%y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
}}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("replica", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[2,4]<=[2,4]T(0,1)", ("fsdp", "tensor")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("replica",)),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", ("fsdp",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=mesh['replica'=2,'fsdp'=2,'tensor'=2] {'replica','tensor'}", ("replica", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("replica", "fsdp")),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}", ("replica", "fsdp")),
        ("replica_groups={}", ("replica", "fsdp", "tensor")),
    ],
)
def test_axes_and_loops_in_every_form_of_groups(groups: str, axes: tuple[str, ...]) -> None:
    assert find_collectives(HloModule(TEXT.format(groups=groups)), MESH) == [
        collective("all-reduce", (), 4),
        collective("all-reduce", ("replica",), 4, 48),
        collective("all-gather", axes, 64, loops=1, runs=5),
    ]


def test_conditional_counts_the_branch_that_moves_most() -> None:
    """The left branch gathers 5 x 64 bytes; the right branch permutes 16 bytes, then 4096."""
    text = TEXT.format(groups="replica_groups=[4,2]<=[8]")
    kinds = [found.kind for found in find_collectives(HloModule(text), MESH)]
    assert kinds == ["all-reduce", "all-reduce", "all-gather"]
    more = text.replace("%permute = bf16[8]{0}", "%permute = bf16[2048]{0}")
    kinds = [found.kind for found in find_collectives(HloModule(more), MESH)]
    assert kinds == ["all-reduce", "all-reduce", "collective-permute"]


def test_unknown_form_of_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"new\(8\)"):
        find_collectives(HloModule(TEXT.format(groups="replica_groups=new(8)")), MESH)


def collective(kind: str, axes: tuple[str, ...], *array_bytes: int, loops: int = 0, runs: int = 1, link: str = "local"):
    return Collective(kind=kind, axes=axes, link=link, loops=loops, runs=runs, array_bytes=array_bytes)


def entry_module(*lines: str, before: str = "", partitions: int = 8) -> HloModule:
    body = "".join(f"  {line}\n" for line in lines)
    return HloModule(
        f"HloModule jit_step, num_partitions={partitions}\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}}}\n"
    )


REDUCE = "all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%sum"
SLICE = "dynamic-slice(%{}, %i), dynamic_slice_sizes={{4}}"
FUSED_SLICE = """
%cut (param_0: f32[], param_1: f32[8]) -> f32[4] {
  %param_1 = f32[8]{0} parameter(1)
  %bitcast = f32[8]{0} bitcast(%param_1)
  ROOT %slice = f32[4]{0} dynamic-slice(%bitcast, %i), dynamic_slice_sizes={4}
}
"""


def over_tensor(kind: str, *array_bytes: int) -> list[Collective]:
    return [collective(kind, ("tensor",), *array_bytes)]


def collectives_of(*lines: str, before: str = "") -> list[Collective]:
    return find_collectives(entry_module(*lines, before=before), MESH)


def test_all_reduce_that_is_only_sliced() -> None:
    all_reduce, part = f"%sum.1 = f32[8] {REDUCE}", f"%part = f32[4] {SLICE.format('sum.1')}"
    assert collectives_of(all_reduce, f"ROOT {part}") == over_tensor(ALL_REDUCE_SLICE, 32)
    assert collectives_of(all_reduce, part, "ROOT %used = f32[8] negate(%sum.1)") == over_tensor("all-reduce", 32)
    fusion = "ROOT %part = f32[4] fusion(%y, %copy), kind=kLoop, calls=%cut"
    fused = collectives_of(all_reduce, "%copy = f32[8] copy(%sum.1)", fusion, before=FUSED_SLICE)
    assert fused == over_tensor(ALL_REDUCE_SLICE, 32)


def test_each_array_of_a_combined_all_reduce_has_its_kind() -> None:
    combined = collectives_of(
        "%sum.1 = (f32[8], f32[2]) all-reduce(%p, %q), replica_groups=[4,2]<=[8], to_apply=%sum",
        "%first = f32[8] get-tuple-element(%sum.1), index=0",
        "%second = f32[2] get-tuple-element(%sum.1), index=1",
        f"%part = f32[4] {SLICE.format('first')}",
        "ROOT %out = (f32[4], f32[2]) tuple(%part, %second)",
    )
    assert combined == over_tensor("all-reduce", 8) + over_tensor(ALL_REDUCE_SLICE, 32)


def test_all_reduce_fused_with_its_slice_is_a_reduce_scatter() -> None:
    fused = f"""
%all-reduce-scatter (input: f32[8]) -> f32[4] {{
  %input = f32[8] parameter(0)
  %sum.1 = f32[8] all-reduce(%input), replica_groups=[4,2]<=[8], to_apply=%sum
  ROOT %part = f32[4] {SLICE.format("sum.1")}
}}
"""
    fusion = "ROOT %out = f32[4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter"
    assert collectives_of(fusion, before=fused) == over_tensor("reduce-scatter", 32)


def test_reduce_scatter_counts_its_input() -> None:
    line = "ROOT %part = f32[4] reduce-scatter(%p), replica_groups=[4,2]<=[8], to_apply=%sum, dimensions={0}"
    assert collectives_of(line) == over_tensor("reduce-scatter", 32)


@pytest.mark.parametrize(
    ("kind", "start", "operands", "done", "array_bytes"),
    [
        ("all-gather", "(f32[8], f32[16])", "%p", "f32[16]", (64,)),
        ("all-gather", "((f32[8], f32[2]), (f32[16], f32[4]))", "%p, %q", "(f32[16], f32[4])", (64, 16)),
        ("reduce-scatter", "((f32[8], f32[4]), (f32[4], f32[2]))", "%p, %q", "(f32[4], f32[2])", (32, 16)),
        ("all-reduce", "f32[8]", "%p", "f32[8]", (32,)),
        ("all-reduce", "((f32[8]), f32[8])", "%p", "f32[8]", (32,)),
        ("collective-permute", "(f32[8], f32[8], u32[], u32[])", "%p", "f32[8]", (32,)),
    ],
)
def test_start_and_done_count_once(
    kind: str, start: str, operands: str, done: str, array_bytes: tuple[int, ...]
) -> None:
    groups = "source_target_pairs={{0,1},{1,0}}" if kind == "collective-permute" else "replica_groups=[4,2]<=[8]"
    lines = (f"%s = {start} {kind}-start({operands}), {groups}", f"ROOT %d = {done} {kind}-done(%s)")
    assert collectives_of(*lines) == over_tensor(kind, *array_bytes)


@pytest.mark.parametrize("sent", [8, 2])
def test_ragged_all_to_all_counts_the_smaller_buffer(sent: int) -> None:
    """Its first two operands are the input and output buffers, the others are offsets and sizes."""
    operands = "%x, %output, %a, %b, %c, %d"
    shapes = f"f32[{sent}], f32[4], s32[2], s32[2], s32[2], s32[2]"
    sync = (f"ROOT %r = f32[4] ragged-all-to-all({operands}), replica_groups=[4,2]<=[8]",)
    start_and_done = (
        f"%s = (({shapes}), f32[4], u32[], u32[]) ragged-all-to-all-start({operands}), replica_groups=[4,2]<=[8]",
        "ROOT %r = f32[4] ragged-all-to-all-done(%s)",
    )
    for lines in (sync, start_and_done):
        found = collectives_of(f"%x = f32[{sent}] negate(%p)", *lines)
        assert found == over_tensor("ragged-all-to-all", 4 * min(sent, 4))


def test_async_computation_counts_once() -> None:
    computation = """
%wrapped (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  ROOT %all-to-all.1 = f32[8] all-to-all(%x), replica_groups=[4,2]<=[8], dimensions={0}
}
"""
    found = collectives_of(
        "%s = ((f32[8]), f32[8], s32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[8]), f32[8], s32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[8] async-done(%u), calls=%wrapped",
        before=computation,
    )
    assert found == over_tensor("all-to-all", 32)


SEND = (
    "%send = (f32[96,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%g, %token), channel_id=2, "
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
)


def test_send_to_another_slice_crosses_the_network() -> None:
    """The HLO is that of one slice of four devices; with replica=4 two replicas are inside the slice."""
    module = entry_module(
        SEND,
        "%done = token[] send-done(%send), channel_id=2, is_host_transfer=true",
        "%all = f32[8] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%sum",
        "ROOT %one = f32[8] all-reduce(%all), replica_groups={{0,2},{1,3}}, to_apply=%sum",
        partitions=4,
    )
    assert find_collectives(module, MESH | {"fsdp": 2, "tensor": 2}, [0] * 4 + [1] * 4) == [
        collective("all-reduce", ("replica",), 96 * 8 * 128 * 4, link="network"),
        collective("all-reduce", ("fsdp", "tensor"), 32),
        collective("all-reduce", ("fsdp",), 32),
    ]
    assert find_collectives(module, {"replica": 4, "tensor": 2}, [0] * 4 + [1] * 4)[1:] == [
        collective("all-reduce", ("replica", "tensor"), 32),
        collective("all-reduce", ("replica",), 32),
    ]


def test_groups_over_hosts_cross_the_network() -> None:
    module = entry_module(
        "%far = f32[8] all-reduce(%p), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum",
        "ROOT %near = f32[8] all-reduce(%far), replica_groups=[4,2]<=[8], to_apply=%sum",
    )
    found = find_collectives(module, MESH, [0] * 4 + [1] * 4)
    assert [(each.axes, each.link) for each in found] == [(("replica",), "network"), (("tensor",), "local")]
