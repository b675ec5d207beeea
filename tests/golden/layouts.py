"""Layouts of small runs with the memory that the compiler lays out for them, in `compile/layouts.json`.

`python tests/golden/write.py layouts [CASE...]` writes it.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from jaxinfra.config import apply
from jaxinfra.errors import ConfigError
from jaxinfra.plan.aot import compile_step
from jaxinfra.plan.search import layouts
from jaxinfra.plan.topology import Topology, parse_topology
from jaxinfra.run import Run, TrainConfig
from tests.golden.compiled import DENSE, FOLDER, MOE, write_json

LAYOUTS = FOLDER / "layouts.json"
_LONG = replace(DENSE, data=replace(DENSE.data, seq_len=4096), train=TrainConfig(global_batch=16))
CASES: dict[str, tuple[Run, Topology]] = {
    "dense": (_LONG, parse_topology("v5e:2x4")),
    "experts": (MOE, parse_topology("v5e:2x4")),
    "slices": (DENSE, parse_topology("2xv5e:2x4")),
}
_EACH = 14  # of a case


def write(names: Sequence[str]) -> None:
    """Compiles layouts from the whole order of each case, or of some, and records their memory."""
    names = names or [*CASES]
    rows = json.loads(LAYOUTS.read_text(encoding="utf-8")) if LAYOUTS.exists() else []
    rows = [row for row in rows if row["case"] not in names]
    for name in names:
        run, topology = CASES[name]
        found = layouts(run, topology)
        for sketch in found[:: max(1, len(found) // _EACH)][:_EACH]:
            overrides = list(sketch.layout.overrides)
            try:
                memory = compile_step(apply(run, overrides), topology).memory
            except ConfigError as error:
                print(f"{name}: {sketch.layout}: {error}")
                continue
            rows.append({"case": name, "overrides": overrides, "bytes": memory.total})
    write_json(LAYOUTS, rows)
