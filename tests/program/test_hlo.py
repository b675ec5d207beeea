"""The reader of compiled text reads every form that XLA prints."""

import pytest

from tests.program.hlo import Collective, collectives

MESH = {"replica": 2, "fsdp": 2, "tensor": 2}
TEXT = """\
HloModule jit_step, entry_computation_layout={{(f32[8]{{0}})->f32[8]{{0}}}}

%sum (a: f32[], b: f32[]) -> f32[] {{
  ROOT %add = f32[] add(%a, %b)
}}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %gather = f32[2,8]{{1,0:T(8,128)}} all-gather(%x), {groups}, dimensions={{0}}
  ROOT %tuple = (s32[], f32[8]) tuple(%i, %x)
}}

%inner_condition (p: (s32[], f32[8])) -> pred[] {{
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%left (p: f32[8]) -> f32[8] {{
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
    ],
)
def test_collectives_are_found_with_their_axes_and_loops(groups: str, axes: tuple[str, ...]) -> None:
    assert collectives(TEXT.format(groups=groups), MESH) == [
        Collective(kind="all-gather", axes=axes, loops=1, arrays=(64,)),
        Collective(kind="collective-permute", axes=("tensor",), loops=0, arrays=(16,)),
        Collective(kind="all-reduce", axes=(), loops=0, arrays=(4,)),
        Collective(kind="all-reduce", axes=("replica",), loops=0, arrays=(4, 48)),
    ]


@pytest.mark.parametrize(
    ("groups", "refusal"),
    [
        ("replica_groups={{0,1},{2,6}}", "groups that cross different mesh axes"),
        ("replica_groups=new(8)", "not known here"),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", "a part of a mesh axis"),
    ],
)
def test_what_is_not_understood_is_refused(groups: str, refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        collectives(TEXT.format(groups=groups), MESH)
