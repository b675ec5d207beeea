"""The overrides with which a run trains on fewer hosts: what it can be divided among, and in how many microbatches."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfra.cli.main import parse_command_line
from jaxinfra.config import load, validate
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.processes.discovery import find_processes
from jaxinfra.run import Run, TrainConfig, with_mesh_size
from jaxinfra.run.elastic import elastic_overrides
from tests.faults.config import config
from tests.refusals import names, refused
from tests.tiny_run import Tiny


def run(mesh: MeshConfig, *, batch: int = 24, accumulate: int = 1, canonical: int | None = None) -> Run:
    train = TrainConfig(steps=10, global_batch=batch, accumulate=accumulate, canonical=canonical)
    return replace(config(), mesh=mesh, train=train)


REPLICAS = MeshConfig(replica=-1, fsdp=1)
CASES: Mapping[str, tuple[Run, int, Mapping[int, Sequence[str]]]] = {
    "no more rows at once than on all hosts": (
        run(REPLICAS),
        1,
        {
            4: [],
            3: ["mesh.replica=3", "train.accumulate=2"],
            2: ["mesh.replica=2", "train.accumulate=2"],
            1: ["mesh.replica=1", "train.accumulate=4"],
        },
    ),
    "a batch of 8 cannot be divided among 3": (
        run(REPLICAS, batch=8),
        1,
        {4: [], 2: ["mesh.replica=2", "train.accumulate=2"], 1: ["mesh.replica=1", "train.accumulate=4"]},
    ),
    "a hidden size of 64 cannot be divided among 6": (
        run(MeshConfig(), batch=48),
        2,
        {4: [], 2: ["mesh.fsdp=4", "train.accumulate=2"], 1: ["mesh.fsdp=2", "train.accumulate=4"]},
    ),
    "the two devices of a host share heads": (
        run(MeshConfig(replica=4, fsdp=1, tensor=2), accumulate=6),
        2,
        {
            4: [],
            3: ["mesh.replica=3", "train.accumulate=8"],
            2: ["mesh.replica=2", "train.accumulate=12"],
            1: ["mesh.replica=1", "train.accumulate=24"],
        },
    ),
    "virtual shards take the place of microbatches": (
        run(REPLICAS, batch=8, canonical=8),
        1,
        {4: [], 2: ["mesh.replica=2"], 1: ["mesh.replica=1"]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fewer_hosts(name: str) -> None:
    given, devices, expected = CASES[name]
    assert elastic_overrides(given, 1, 4, devices) == expected
    for hosts, overrides in expected.items():
        fields = dict(word.split("=") for word in overrides)
        axes = {field.removeprefix("mesh."): int(size) for field, size in fields.items() if field.startswith("mesh.")}
        accumulate = int(fields.get("train.accumulate", given.train.accumulate))
        train = replace(given.train, accumulate=accumulate)
        validate(with_mesh_size(replace(given, mesh=replace(given.mesh, **axes), train=train), hosts * devices))
    assert [*elastic_overrides(given, 3, 4, devices)] == [hosts for hosts in expected if hosts >= 3]


ELASTIC = ("--elastic", "2..4")
AMONG = ("--coordinator", "127.0.0.1:1", "--process-id", "0", "--of", "3")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--elastic", "4", "--supervise"), "--elastic 4 fewest most --elastic 2..4"),
        (("--elastic", "3..2", "--supervise"), "--elastic 3..2 fewest most"),
        (("--elastic", "0..2", "--supervise"), "--elastic 0..2"),
        (ELASTIC, "--elastic 2..4 supervisor add --supervise"),
        ((*ELASTIC, "--supervise"), "--elastic 2..4 one process 4 hosts --of 4"),
        ((*ELASTIC, "--supervise", "--processes", "4"), "--elastic 2..4 leave out --processes"),
        ((*ELASTIC, "--supervise", *AMONG), "--elastic 2..4 3 processes were started 4 hosts"),
    ],
)
def test_bad_bounds_are_refused(tiny: Tiny, words: Sequence[str], named: str) -> None:
    refused(tiny.launch(*words), named)


def test_the_command_of_the_page_is_right(repo_root: Path) -> None:
    """It is run for real in row 47 of the fault matrix, with another config."""
    (loop,) = re.findall(r"```bash\n(for .*?)```", (repo_root / "docs/survive.md").read_text(), re.DOTALL)
    (command,) = re.findall(r"python -m launch (.*?) &", loop.replace("\\\n", " ").replace("$i", "3"))
    options = parse_command_line(shlex.split(command))
    found = find_processes({}, coordinator=options.coordinator, process_id=options.process_id, of=options.of)
    assert found is not None and (found.index, found.count) == (3, 4) == (3, options.elastic[1])
    run = load(repo_root / options.config, options.overrides, root=Run).run
    least, most = options.elastic
    assert {4, 2, 1} <= {*elastic_overrides(run, least, most, 1)}


def test_a_mesh_without_a_data_axis_does_not_shrink() -> None:
    for mesh, words in (
        (MeshConfig(fsdp=1, tensor=4), "--elastic no axis mesh.replica=-1"),
        (MeshConfig(replica=2, fsdp=1), "mesh.replica=2 needs 2 devices found 4"),
    ):
        with pytest.raises(ConfigError) as refused:
            elastic_overrides(run(mesh), 1, 4, 1)
        names(str(refused.value), words)
