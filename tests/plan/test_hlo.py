import pytest

from jaxinfra.plan.hlo import NO_ESTIMATE, HloModule, array_bytes

COST = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'


def loop(*, condition: str = "", body: str = "", carried: str = "%zero, %x, %limit", inside: str = "") -> HloModule:
    """Returns a program with one loop."""
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

%fused (unused: s32[], p: s32[]) -> s32[] {{
  %unused = s32[] parameter(0)
  %p = s32[] parameter(1)
  %three.1 = s32[] constant(3)
  ROOT %sum = s32[] add(%three.1, %p)
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
    ("module", "expected"),
    [
        (loop(), 12),
        (loop(carried="%copied, %x, %limit"), 9),
        (loop(body="%two = s32[] constant(2)\n  %next = s32[] add(%i, %two)"), 6),
        (loop(carried="%three, %x, %limit", body="%two = s32[] constant(2)\n  %next = s32[] add(%two, %i)"), 5),
        (loop(condition="ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT"), 20),
        (loop(condition="ROOT %more = pred[] compare(%i.1, %limit.1), direction=GT"), None),
        (loop(carried="%x, %x, %limit"), None),
        (loop(body="%next = s32[] multiply(%i, %one)"), None),
        (loop(body="%next = s32[] add(%x.1, %one)"), None),  # of another value than the counter
        (loop(body="%next = s32[] add(%i, %limit.2)"), 1),  # of 20, which the loop carries unchanged
        (loop(body="%next = s32[] fusion(%limit.2, %i), kind=kLoop, calls=%fused"), 4),
        (loop(body="%next = s32[] fusion(%i, %limit.2), kind=kLoop, calls=%fused"), None),
        (loop(body="%down = s32[] constant(-1)\n  %next = s32[] add(%i, %down)"), None),
        (loop(carried="%limit, %x, %limit"), 0),
    ],
)
def test_trip_count_follows_from_condition_first_value_and_increment(module: HloModule, expected: int | None) -> None:
    assert trip_count(module) == expected
    assert module.unknown_loops() == (["while"] if expected is None else [])
    body = [call for call in module.calls() if call.computation.name == "body"]
    assert [call.runs for call in body] == [1 if expected is None else expected]


def test_changing_limit_is_no_constant() -> None:
    text = loop(condition="ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT")
    assert trip_count(text) == 20
    body = text.computations["body"]
    changed = body.instructions["limit.2"]
    body.instructions["limit.2"] = body.instructions["next"]
    assert trip_count(text) is None, changed


def test_known_trip_count_of_the_compiler() -> None:
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


def test_cycles_of_loops_and_conditionals() -> None:
    """The estimate of a fusion includes its computation."""
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


def test_line_breaks_in_quoted_attributes() -> None:
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
    assert module.computations["main"].instructions["kernel.3"].quoted("custom_call_target") == "tpu_custom_call"


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("bf16[2,256,192]{1,0,2:T(8,128)(2,1)S(1)}", (2 * 2 * 256 * 192,)),
        ("(f32[]{:T(128)}, /*index=1*/s4[6]{0}, f8e4m3fn[3]{0}, pred[2]{0}, token[])", (4, 3, 3, 2, 0)),
        ("c64[2]{0}", (16,)),
    ],
)
def test_array_bytes(shape: str, sizes: tuple[int, ...]) -> None:
    assert array_bytes(shape) == sizes


def test_text_without_entry_is_an_error() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        HloModule("module @jit_step {\n}\n")
