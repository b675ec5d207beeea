"""What is kept of a compilation is read again for the same program alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxinfra.plan.compiled import Executable, Memory
from jaxinfra.plan.topology import parse
from tests.compile_cache import kept


def asked(text: str = "a", order: tuple[int, ...] = (0, 1), compiler: str = "default", on: str = "v5e:1x2") -> Any:
    """The arguments of a compilation."""
    devices = np.array([SimpleNamespace(id=n, process_index=0) for n in order])
    program = SimpleNamespace(
        mesh=SimpleNamespace(devices=devices), run=SimpleNamespace(train=SimpleNamespace(compiler=compiler))
    )
    return SimpleNamespace(as_text=lambda: text), program, parse(on)


def test_a_program_is_compiled_once(tmp_path: Path, monkeypatch: Any) -> None:
    compiled: list[Executable] = []

    def compile_lowered(*_: Any) -> Executable:
        names = ("arguments", "output", "aliased", "temporaries", "temp_size", "code", "host")
        memory = Memory(**{name: number + len(compiled) for number, name in enumerate(names)})
        compiled.append(Executable(text=f"HloModule {len(compiled)}", memory=memory))
        return compiled[-1]

    cached = kept(compile_lowered, tmp_path / "new")
    others = [asked(), asked("b"), asked(order=(1, 0)), asked(compiler="large_blocks"), asked(on="v5e:2x1")]
    assert [cached(*each) for each in others] == compiled
    assert [cached(*each) for each in others] == compiled and len(compiled) == len(others)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--another")
    assert cached(*asked()) == compiled[-1] != compiled[0]
