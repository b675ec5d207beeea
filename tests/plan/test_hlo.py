"""The text of a program is read as it runs: what calls what, how often, and what it costs."""

import pytest

from jaxinfra.plan.hlo import NO_ESTIMATE, HloModule, array_bytes

COST = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'


def loop(*, condition: str = "", body: str = "", carried: str = "%zero, %x, %limit", inside: str = "") -> HloModule:
    """A program of one loop, whose parts are in the forms that compilers print."""
    condition = condition or "%n = s32[] constant(12)\n  ROOT %less = pred[] compare(%i.1, %n), direction=LT"
    body = body or "%next = s32[] add(%i, %one)"
    return HloModule(f"""\
HloModule jit_step, is_scheduled=true, num_partitions=4

%condition (c: (s32[], f32[8], s32[])) -> pred[] {{
  %c = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}, /*index=2*/s32[]{{:T(128)}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  %limit.1 = s32[]{{:T(128)}} get-tuple-element(%c), index=2
  {condition}
}}

%body (b: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %b = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  %x.1 = f32[8] get-tuple-element(%b), index=1
  %limit.2 = s32[] get-tuple-element(%b), index=2
  %one = s32[] constant(1), metadata={{op_name="jit(step)/add (of one)"}}
  {body}
  {inside}
  ROOT %after = (s32[], f32[8], s32[]) tuple(%next, %x.1, %limit.2)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %three = s32[] constant(3)
  %limit = s32[] constant(20)
  %copied = s32[] copy(%three)
  %before = (s32[], f32[8], s32[]) tuple({carried})
  ROOT %while = (s32[], f32[8], s32[]) while(%before), condition=%condition, body=%body
}}
""")


def trip_count(module: HloModule) -> int | None:
    entry = module.computations[module.entry]
    return module.trip_count(entry, entry.instructions[entry.root])


@pytest.mark.parametrize(
    ("made", "runs"),
    [
        (loop(), 12),
        (loop(carried="%copied, %x, %limit"), 9),
        (loop(body="%two = s32[] constant(2)\n  %next = s32[] add(%i, %two)"), 6),
        (loop(carried="%three, %x, %limit", body="%two = s32[] constant(2)\n  %next = s32[] add(%two, %i)"), 5),
        (loop(condition="ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT"), 20),
        (loop(condition="ROOT %more = pred[] compare(%i.1, %limit.1), direction=GT"), None),
        (loop(carried="%x, %x, %limit"), None),
        (loop(body="%next = s32[] multiply(%i, %one)"), None),
        (loop(body="%down = s32[] constant(-1)\n  %next = s32[] add(%i, %down)"), None),
        (loop(carried="%limit, %x, %limit"), 0),
    ],
)
def test_trips_follow_from_condition_first_value_and_step(made: HloModule, runs: int | None) -> None:
    assert trip_count(made) == runs
    assert made.unknown_loops() == (["while"] if runs is None else [])
    body = [call for call in made.calls() if call.computation.name == "body"]
    assert [call.runs for call in body] == [1 if runs is None else runs]


def test_a_limit_that_changes_is_not_taken_for_a_constant() -> None:
    text = loop(condition="ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT")
    assert trip_count(text) == 20
    body = text.computations["body"]
    changed = body.instructions["limit.2"]
    body.instructions["limit.2"] = body.instructions["next"]
    assert trip_count(text) is None, changed


def test_a_count_that_the_compiler_wrote_down_counts() -> None:
    text = """\
HloModule jit_step
%other (p: f32[]) -> pred[] {
  ROOT %p = f32[] parameter(0)
}
ENTRY %main (x: f32[]) -> f32[] {
  ROOT %while = f32[] while(%x), condition=%other, body=%other, backend_config={"known_trip_count":{"n":"7"}}
}
"""
    assert trip_count(HloModule(text)) == 7


def test_cycles_are_multiplied_by_trips_and_of_a_choice_the_longest_counts() -> None:
    """Inside a fusion nothing counts: its own estimate is for all of it."""
    module = HloModule(f"""\
HloModule jit_step
%fused (p: f32[8]) -> f32[8] {{
  ROOT %add = f32[8] add(%p, %p), {COST.format(1000000)}
}}

%cheap (p: f32[8]) -> f32[8] {{
  ROOT %negate = f32[8] negate(%p), {COST.format(7)}
}}

%dear (p: f32[8]) -> f32[8] {{
  ROOT %fusion = f32[8] fusion(%p), kind=kLoop, calls=%fused, {COST.format(500)}
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %x = f32[8] get-tuple-element(%b), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one), {COST.format(1)}
  %y = f32[8] conditional(%which, %x, %x), branch_computations={{%cheap, %dear}}
  %unknown = f32[8] copy(%y), {COST.format(NO_ESTIMATE)}
  ROOT %after = (s32[], f32[8]) tuple(%next, %unknown)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %zero = s32[] constant(0)
  %x.1 = f32[8] parameter(0)
  %before = (s32[], f32[8]) tuple(%zero, %x.1)
  %while = (s32[], f32[8]) while(%before), condition=%condition, body=%body
  ROOT %out = f32[8] copy(%x.1), {COST.format(10)}
}}
""")
    assert module.cycles() == 10 + 3 * (1 + 500)
    times = {call.computation.name: call.runs for call in module.calls()}
    assert times == {"main": 1, "condition": 3, "body": 3, "cheap": 3, "dear": 3, "fused": 3}


def test_line_breaks_in_the_attributes_of_a_kernel_end_no_instruction() -> None:
    text = """\
HloModule jit_step
ENTRY %main (x: f32[8]) -> f32[8] {
  %kernel.3 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"metadata":"{\\"block_q\\": 512
%false (p: f32[]) -> f32[] {
  %all-reduce = f32[1] all-reduce(%x), replica_groups={}
}\\"}"}}
  ROOT %out = f32[8] copy(%kernel.3)
}
"""
    module = HloModule(text)
    assert list(module.computations) == ["main"]
    assert list(module.computations["main"].instructions) == ["kernel.3", "out"]
    assert module.computations["main"].instructions["kernel.3"].string("custom_call_target") == "tpu_custom_call"


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("bf16[2,256,192]{1,0,2:T(8,128)(2,1)S(1)}", (2 * 2 * 256 * 192,)),
        ("(f32[]{:T(128)}, /*index=1*/s4[6]{0}, f8e4m3fn[3]{0}, pred[2]{0}, token[])", (4, 3, 3, 2, 0)),
        ("c64[2]{0}", (16,)),
    ],
)
def test_bytes_of_arrays(shape: str, sizes: tuple[int, ...]) -> None:
    assert array_bytes(shape) == sizes


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        HloModule("module @jit_step {\n}\n")
