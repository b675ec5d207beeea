"""What a step that is computed again on other devices says of them; row 48 of the fault matrix injects real faults."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.run import with_mesh_size
from jaxinfra.train.replay import Computed, find_wrong
from tests.refusals import raises
from tests.tiny_run import Tiny, launch

SIZES = {"weights": (4,), "shards": (8,), "sums": (4,), "parts": (4,), "state": (3, 4)}
EVERYWHERE = [("state", (leaf, part)) for leaf in range(3) for part in range(4)]


class Device(NamedTuple):
    id: int


def computed(shift: int, wrong: Mapping[Any, int], devices: int = 4) -> Computed:
    """A computation with other devices, of which some parts are wrong."""
    sizes = {stage: (*shape[:-1], shape[-1] * devices // 4) for stage, shape in SIZES.items()}
    digests = {stage: np.arange(np.prod(size), dtype=np.uint32).reshape(size) for stage, size in sizes.items()}
    for (stage, index), more in wrong.items():
        digests[stage][index] += np.uint32(more)
    return Computed([Device((position + shift) % devices) for position in range(devices)], digests)


def suspects(*all_computed: Computed) -> tuple[str, list[int]]:
    found = find_wrong(all_computed)
    assert found is not None
    return found.stage, [device.id for device in found.devices]


@pytest.mark.parametrize(
    ("wrong", "stage", "named"),
    [
        # Device 2 has virtual shards 4 and 5, then 2 and 3, then 0 and 1. Later stages follow from them.
        ([{("shards", 4): 7, ("parts", 0): 1}, {("shards", 2): 9, ("parts", 3): 1}, {("shards", 0): 7}], "shards", [2]),
        ([{}, {("shards", 3): 9, **dict.fromkeys(EVERYWHERE, 3)}, {}], "shards", [2]),
        ([{}, {}, {("shards", 1): 9}], "shards", [2]),
        ([{("sums", 2): 1}, {("sums", 1): 1}, {}], "sums", [2]),
        ([{("state", (1, 2)): 5}, {("state", (1, 1)): 5}, {("state", (2, 0)): 5}], "state", [2]),
        ([{("shards", 4): 1}, {("shards", 0): 1}, {}], "shards", [1, 2]),
        # Each computation has another value: a sender may be the cause, on whichever device it shows.
        ([{("parts", 3): 1}, {("parts", 3): 2}, {("parts", 3): 3}], "parts", [0, 1, 2, 3]),
        ([{("weights", 3): 1}, {}, {}], "weights", [0, 1, 2, 3]),
        ([dict.fromkeys(EVERYWHERE, 3), {}, {}], "state", [0, 1, 2, 3]),
    ],
)
def test_the_device_that_disagrees_is_named(wrong: Sequence[Mapping[Any, int]], stage: str, named: list[int]) -> None:
    assert suspects(*(computed(shift, each) for shift, each in enumerate(wrong))) == (stage, named)


def test_two_devices_are_both_named() -> None:
    assert suspects(computed(0, {}, 2), computed(1, {("shards", 1): 1}, 2)) == ("shards", [0, 1])
    assert find_wrong([computed(0, {}), computed(1, {})]) is None


def test_a_replay_needs_canonical_mode(tiny: Tiny) -> None:
    with raises(ConfigError, "guard.replay_every train.canonical train.canonical=8"):
        validate(tiny.loaded("guard.replay_every=100"))
    run = tiny.loaded("guard.replay_every=100", "train.canonical=8")
    validate(with_mesh_size(run, 2))


def test_a_run_with_replays_is_sampled_and_shown(tiny: Tiny) -> None:
    """Sampling is not in canonical mode, and one device is enough for what does not train."""
    words = ("guard.replay_every=2", "train.canonical=8", "track.sample_prompt=a", "train.steps=4", "name=tiny")
    ended = tiny.launch(*words)
    assert ended.code == 0 and ended.out.count("the same bits on other devices") == 2, ended
    for command in ("show", "sample"):
        assert (ended := launch(command, str(tiny.directory()), *["a"][: command == "sample"])).code == 0, ended
    validate(with_mesh_size(tiny.loaded(*words), 1))
