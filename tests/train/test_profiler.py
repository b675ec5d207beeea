"""Profiles: a trace for xprof, and a text that names operations with their source lines."""

import re
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxinfra.machine.config import ProfileConfig
from jaxinfra.machine.operations import operation_times, parse_program
from jaxinfra.train import profiler as profiler_module
from jaxinfra.train.profiler import TEXT_FILE, Profiler
from tests.refusals import mend, refused
from tests.tiny_run import Tiny, ended
from tests.train.until import until


def profiled(folder: Path) -> str:
    """The text of the profile in a folder, after a check that the trace is beside it."""
    (xplane,) = folder.rglob("*.xplane.pb")
    assert xplane.stat().st_size > 1000
    return (folder / TEXT_FILE).read_text()


def test_a_profile_names_operations_and_source_lines(tiny: Tiny) -> None:
    """And changes no loss."""
    run = tiny.launch("name=with", "profile.at=4", "profile.steps=2")
    assert run.code == 0, run.err
    (folder,) = (tiny.directory("with") / "profile").iterdir()
    text = profiled(folder)
    assert folder.name == "4" and text.startswith("profile of steps 5 to 6: ")
    assert text in run.out  # whole lines, however long
    rows = [line.split() for line in text.splitlines() if re.match(r" *\d+\.\d\d  +\d+\.\d%", line)]
    milliseconds = [float(row[0]) for row in rows]
    assert len(rows) == 10 and milliseconds == sorted(milliseconds, reverse=True)
    found = re.findall(r"jaxinfra/(models/\w+\.py):(\d+)", text)
    assert found, text
    for file, line in found:  # a line that calls something
        source = (Path(profiler_module.__file__).parents[1] / file).read_text().splitlines()[int(line) - 1]
        assert "(" in source, source
    assert tiny.launch("name=without", "track.console=off").code == 0
    assert tiny.losses("with") == tiny.losses("without")
    assert not (tiny.directory("without") / "profile").exists()


def test_operations_of_a_cpu_are_read_though_libtpu_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It adds an empty plane of a device to every trace."""
    event = SimpleNamespace(stats=[("hlo_op", "dot.1"), ("hlo_module", "jit_step")], duration_ns=5.0, name="")
    cpu = SimpleNamespace(name="/host:CPU", lines=[SimpleNamespace(name="thread", events=[event])])
    planes = [SimpleNamespace(name="/device:CUSTOM:Megascale Trace", lines=[]), cpu]
    data = SimpleNamespace(from_file=lambda file: SimpleNamespace(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", data)
    (found,) = operation_times(tmp_path / "x.xplane.pb")
    assert (found.names, found.calls) == (("dot.1",), 1)


@pytest.mark.parametrize("overrides", [("profile.at=10",), ("profile.at=1", "profile.steps=12"), ("profile.at=99",)])
def test_a_profile_beyond_the_last_step(tiny: Tiny, overrides: tuple[str, ...]) -> None:
    line = refused(tiny.launch(*overrides), "profile.at profile.steps train.steps=12")
    mend(tiny, overrides, line)


@pytest.mark.parametrize("override", ["profile.at=0", "profile.at=-1", "profile.steps=0"])
def test_numbers_out_of_range(tiny: Tiny, override: str) -> None:
    mend(tiny, (override,), refused(tiny.launch(override), override))


def run_steps(made: Profiler, first: int, last: int) -> list[str]:
    """Texts of the profiles during steps of a toy program, as the training loop makes them."""
    step, state, texts = jax.jit(lambda x: x * 2), jax.numpy.ones(8), []
    for completed in range(first, last):
        made.begin_step(completed, state)
        state = step(state)
        if made.ends_after(completed + 1):
            texts.append(made.finish(completed + 1, state))
    texts.append(made.finish(last, state))
    return [text.partition(":")[0] for text in texts if text is not None]


def test_the_first_step_of_a_process_is_left_out(tmp_path: Path) -> None:
    """It compiles: a run that resumes where its profile begins starts it a step later."""
    assert run_steps(Profiler(ProfileConfig(at=7, steps=2), tmp_path), 7, 12) == ["profile of steps 9 to 10"]
    assert run_steps(Profiler(ProfileConfig(at=7, steps=2), tmp_path), 8, 12) == []


def test_the_last_step_ends_a_profile(tmp_path: Path) -> None:
    assert run_steps(Profiler(ProfileConfig(at=3, steps=9), tmp_path), 0, 5) == ["profile of steps 4 to 5"]


def test_only_a_profile_waits_for_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, wait = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda state: waits.append(state) or wait(state))
    assert run_steps(Profiler(ProfileConfig(), tmp_path), 0, 9) == [] and waits == []
    assert len(run_steps(Profiler(ProfileConfig(at=2), tmp_path), 0, 9)) == 1 and len(waits) == 2


@pytest.mark.slow(15)
def test_a_signal_to_a_process(tiny: Tiny) -> None:
    """SIGUSR2 profiles a run that has not asked for it; the run goes on, and another profile can follow."""
    long = ("train.steps=100000", "train.eval_every=none", "checkpoint.save_every=100000", "track.log_every=50")
    process = tiny.start("name=tiny", *long)
    metrics, folder = tiny.directory() / "metrics.jsonl", tiny.directory() / "profile"
    until(lambda: metrics.exists() and metrics.read_text().count("\n"), process)
    for count in (1, 2):
        process.send_signal(signal.SIGUSR2)
        until(lambda count=count: len(list(folder.glob(f"*/{TEXT_FILE}"))) == count, process)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 75, stopped
    for each in folder.iterdir():
        text, step = profiled(each), int(each.name)
        assert text in stopped.out and text.startswith(f"profile of steps {step + 1} to {step + 3}: ")
        assert re.search(r"jaxinfra/models/\w+\.py:\d+", text), text


def test_a_request_during_a_profile_changes_nothing(tmp_path: Path) -> None:
    with Profiler(ProfileConfig(steps=2), tmp_path) as made:
        made.request()
        made.begin_step(0, None)
        made.begin_step(1, jax.numpy.ones(3))
        made.request()
        assert made.finish(3, jax.numpy.ones(3)) is not None
        made.begin_step(3, None)
        assert made.finish(4, None) is None  # no other profile has begun


def test_a_profile_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on, and a later profile may succeed."""
    folder = tmp_path / "profile"
    folder.write_text("a file in the way")
    with Profiler(ProfileConfig(at=2, steps=1), folder) as made:
        assert run_steps(made, 0, 5) == []
        assert f"{folder}: profile failed" in caplog.text
        folder.unlink()
        made.request()
        assert run_steps(made, 5, 9) == ["profile of steps 6 to 6"]


def test_an_error_ends_the_trace(tmp_path: Path) -> None:
    """Else the next run in this process could not begin one."""
    with pytest.raises(ZeroDivisionError), Profiler(ProfileConfig(at=1), tmp_path) as made:
        made.begin_step(0, None)
        made.begin_step(1, None)
        raise ZeroDivisionError
    with jax.profiler.trace(str(tmp_path / "another")):
        pass


@pytest.mark.parametrize("no_parent", [0, 1])
def test_source_lines_of_a_program(no_parent: int) -> None:
    """In both ways to write the parent of a frame; installed packages and building blocks are passed over."""
    package = Path(profiler_module.__file__).parents[1]
    text = f"""HloModule jit_step, is_scheduled=true

FileNames
1 "{package}/models/attention.py"
2 "{package}/ops/dot.py"
3 "/x/site-packages/optax/_src/base.py"

FunctionNames
1 "f"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=94 end_line=94 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=1 line=5 end_line=5 column=1 end_column=2}}
3 {{file_name_id=3 function_name_id=1 line=6 end_line=6 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id={no_parent}}}
2 {{file_location_id=2 parent_frame_id={1 + no_parent}}}
3 {{file_location_id=3 parent_frame_id={2 + no_parent}}}

ENTRY %main (a: f32[8]) -> (f32[8], s32[]) {{
  %a = f32[8]{{0}} parameter(0)
  %dot.1 = f32[8]{{0}} fusion(%a), metadata={{op_name="jit(step)/transpose(jvp())/dot_general" stack_frame_id=3}}
  %copy.7 = f32[8]{{0:T(256)}} copy(%dot.1)
  ROOT %t = (f32[8]{{0}}, s32[]) tuple(%copy.7, %copy.7)
}}
"""
    found = {name: (each.opcode, each.kind, each.source) for name, each in parse_program(text).items()}
    assert found["dot.1"] == ("fusion", "dot_general, backward", "jaxinfra/models/attention.py:94")
    assert found["copy.7"] == ("copy", "copy", "")
    assert found["t"][0] == "tuple"
