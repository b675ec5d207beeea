"""Models in a registry, on a real MLflow server: gates, races, kills, and the way back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from jaxinfra.errors import ConfigError, RunInUseError, StorageError
from jaxinfra.registry.gate import parse_policy, shortfalls
from jaxinfra.registry.promotion import promote, roll_back
from jaxinfra.registry.versions import Registry, Version
from tests.conftest import ROOT
from tests.refusals import names, raises, refused
from tests.servers.mlflow import mlflow_server
from tests.tiny_run import Tiny, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

pytestmark = pytest.mark.skipif(find_spec("mlflow") is None, reason="pip install mlflow-skinny")

VERSION = Version(source="/runs/story@5", checkpoint="c1", data="d", metrics={"eval/loss": 2.0})
BETTER = replace(VERSION, source="/runs/better@5", checkpoint="c2", metrics={"eval/loss": 1.5})
RULES = parse_policy("eval/loss < champion")
PROMOTE = """\
import sys
from jaxinfra.errors import ConfigError
from jaxinfra.registry.gate import parse_policy
from jaxinfra.registry.promotion import promote
from jaxinfra.registry.versions import Registry, Version

uri, target, lease, name, loss = sys.argv[1:]
version = Version(source=f"/runs/{name}@5", checkpoint=name, data="d", metrics={"eval/loss": float(loss)})
try:
    print(promote(Registry(uri, target), version, parse_policy("eval/loss < champion"), lease).number)
except ConfigError as error:
    sys.exit(str(error))
"""
"""Promotes a version that was evaluated elsewhere, in a process of its own."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as uri:
        yield uri


@pytest.fixture
def registry(server: str, tmp_path: Path) -> Registry:
    return Registry(server, f"models:/{tmp_path.name}")


def start(registry: Registry, lease: Path, name: str, loss: float, fail: str = "") -> subprocess.Popen[str]:
    words = [registry.uri, registry.target, str(lease), name, str(loss)]
    env = {**os.environ, "JAXINFRA_FAIL": fail} if fail else None
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", PROMOTE, *words], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True
    )


def test_rules() -> None:
    rules = parse_policy("eval/loss < champion * 0.9 and arc/acc >= 0.5 and eval/loss <= 3")
    good = {"eval/loss": 1.7, "arc/acc": 0.5}
    assert shortfalls(rules, good, {"eval/loss": 2.0}) == [] == shortfalls(rules, good, None)
    (lacks,) = shortfalls(rules, good | {"eval/loss": 1.8}, {"eval/loss": 2.0})
    names(lacks, "eval/loss 1.8 < 1.8")
    assert len(shortfalls(rules, {"eval/loss": float("nan"), "arc/acc": float("nan")}, {"eval/loss": 2.0})) == 3
    assert len(shortfalls(RULES, {"eval/loss": float("nan")}, None)) == 1  # nothing would ever be better
    with raises(ConfigError, "--if eval/los eval/loss"):
        shortfalls(parse_policy("eval/los < 2"), good, None)
    with raises(ConfigError, "--if champion arc/acc eval/loss"):
        shortfalls(parse_policy("arc/acc > champion"), good, {"eval/loss": 2.0})
    for text in (
        "",
        "eval/loss",
        "eval/loss < ",
        "eval/loss == 2",
        "2 < eval/loss",
        "eval/loss < champion / 2",
        "a < 1 or b < 1",
    ):
        with raises(ConfigError, f"--if {text}"):
            parse_policy(text)


def test_an_alias_moves_to_what_is_better_and_back(registry: Registry, tmp_path: Path) -> None:
    assert promote(registry, VERSION, RULES, str(tmp_path)).number == "1"
    with raises(ConfigError, "eval/loss 2.5 < 2 version 1 /runs/story@5"):
        promote(registry, replace(VERSION, checkpoint="c3", metrics={"eval/loss": 2.5}), RULES, str(tmp_path))
    with raises(ConfigError, "version 1 data other"):
        promote(registry, replace(BETTER, data="other"), RULES, str(tmp_path))
    assert [each.number for each in registry.versions()] == ["1"]
    found = promote(registry, BETTER, RULES, str(tmp_path))
    assert (found.number, found.replaced) == ("2", "1") and registry.champion() == found
    with raises(ConfigError, f"{registry.target} version 2 not 1 model show"):
        roll_back(registry, leaving="1")
    for _ in range(2):  # the second call, as after one that was killed, goes back no further
        before, left = roll_back(registry, leaving="2")
        assert registry.champion() == before and (before.number, left.number) == ("1", "2")
    with raises(ConfigError, registry.model, "version 1 nothing before"):
        roll_back(registry)
    assert promote(registry, BETTER, RULES, str(tmp_path)).number == "2"  # the version that is there


def test_the_champion_must_hold_the_numbers_too(registry: Registry, tmp_path: Path) -> None:
    promote(registry, VERSION, RULES, str(tmp_path))
    with raises(ConfigError, "/runs/story@5 eval/loss 2 0.1 version 1"):
        promote(registry, VERSION, parse_policy("eval/loss < 0.1"), str(tmp_path))
    assert promote(registry, VERSION, parse_policy("eval/loss < champion and eval/loss < 3"), "").number == "1"


def test_each_alias_has_its_own_way_back(registry: Registry, tmp_path: Path) -> None:
    for each in (VERSION, BETTER):
        promote(registry, each, RULES, str(tmp_path))
    candidate = Registry(registry.uri, f"models:/{registry.model}@candidate")
    assert promote(candidate, BETTER, RULES, str(tmp_path)).number == "2"
    with raises(ConfigError, candidate.target, "version 2 nothing before"):
        roll_back(candidate)
    assert roll_back(registry)[0].number == "1"


def test_what_was_deleted_or_changed_by_hand_moves_nothing(registry: Registry, tmp_path: Path) -> None:
    for each in (VERSION, BETTER):
        promote(registry, each, RULES, str(tmp_path))
    client = registry._client
    client.delete_model_version(registry.model, "1")
    with raises(ConfigError, registry.uri, "version=1 not found nothing was moved"):
        roll_back(registry)
    for tag in ("{", "[1]", '{"eval/loss": "low"}', '{"eval/loss": null}'):
        client.set_model_version_tag(registry.model, "2", "jaxinfra_metrics", tag)
        with raises(ConfigError, registry.model, "version 2 jaxinfra_metrics delete"):
            promote(registry, replace(BETTER, checkpoint="c4", metrics={"eval/loss": 1.0}), RULES, str(tmp_path))
    client.delete_model_version_tag(registry.model, "2", "jaxinfra_metrics")
    champion = registry.champion()
    assert champion is not None and champion.number == "2"
    for name in ("o'brien", "two\nlines"):
        with pytest.raises(ConfigError):
            Registry(registry.uri, f"models:/{name}")


def test_the_loser_of_a_race_names_the_winner(registry: Registry, tmp_path: Path) -> None:
    """The first one has the lease and sleeps before it moves the alias; the second one waits, and is asked again."""
    promote(registry, VERSION, RULES, str(tmp_path))
    first = start(registry, tmp_path, "first", 1.0, "promote:0:2:sleep=3")
    while len(registry.versions()) < 2:
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = start(registry, tmp_path, "second", 1.5)
    assert (*first.communicate(), first.returncode) == ("2\n", "", 0)
    _, said = second.communicate()
    assert second.returncode == 1
    names(said.splitlines()[-1], "/runs/second@5 1.5 < 1 version 2 /runs/first@5")
    champion = registry.champion()
    assert champion is not None and champion.checkpoint == "first" and len(registry.versions()) == 2


def test_who_has_lost_the_lease_moves_nothing(registry: Registry, tmp_path: Path) -> None:
    promote(registry, VERSION, RULES, str(tmp_path))
    with raises(RunInUseError, "lease deleted"), registry.locked(str(tmp_path)) as held:
        for file in (tmp_path / "lease").iterdir():
            file.unlink()
        registry.move(registry.register(BETTER), VERSION, held)
    champion = registry.champion()
    assert champion is not None and champion.number == "1"


@pytest.mark.parametrize("point", [1, 2, 3])
def test_a_kill_leaves_what_the_next_one_completes(registry: Registry, tmp_path: Path, point: int) -> None:
    promote(registry, VERSION, RULES, str(tmp_path))
    killed = start(registry, tmp_path, "next", 1.0, f"promote:0:{point}:kill")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    champion = registry.champion()
    assert champion is not None and champion.number == ("2" if point == 3 else "1")
    again = replace(BETTER, source="/runs/next@5", checkpoint="next", metrics={"eval/loss": 1.0})
    assert promote(registry, again, RULES, str(tmp_path)).number == "2"
    champion = registry.champion()
    assert champion is not None and (champion.number, champion.replaced, len(registry.versions())) == ("2", "1", 2)


def test_a_run_is_promoted_by_its_evaluation(tiny: Tiny, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, steps in (("short", 2), ("long", 12)):
        assert tiny.launch(f"name={name}", f"train.steps={steps}", "train.eval_every=none").code == 0
    short, long, to = str(tiny.runs / "short"), str(tiny.runs / "long"), ("--to", "models:/words")
    rule = ("--if", "eval/loss < champion")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    refused(launch("model", "promote", short, *to, *rule), "models:/words --registry")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    refused(launch("model", "promote", short, "--to", "words", *rule), "--to words models:/NAME")
    refused(launch("model", "promote", short, *to, "--if", "eval/acc > 0.5"), "--if eval/acc eval/loss")
    refused(launch("model", "promote", short, *to, "--if", "eval/loss < 0.1"), "short@2 eval/loss 0.1")
    refused(launch("model", "show", "models:/words"), "models:/words no such model")
    refused(launch("model", "show", "models:/words", "--registry", "http://["), "http://[ http://HOST:5000")
    away = launch("model", "promote", short, *to, *rule, "--registry", "http://127.0.0.1:9")
    refused(away, "http://127.0.0.1:9 does not answer nothing was moved", code=StorageError.exit_code)

    first = launch("model", "promote", short, *to, *rule)
    assert first.code == 0 and "models:/words@champion: version 1" in first.out, first
    second = launch("model", "promote", long, *to, *rule)
    assert second.code == 0 and "model rollback models:/words@champion --from 2" in second.out, second
    worse = launch("model", "promote", f"{long}@10", *to, *rule)
    refused(worse, "long@10 eval/loss version 2 long@12")
    fewer = launch("model", "promote", long, *to, *rule, "train.eval_samples=1")
    refused(fewer, "version 2 data")
    shown = launch("model", "show", "models:/words")
    assert shown.code == 0 and [line.split()[:2] for line in shown.out.splitlines() if "@" in line] == [
        ["2", "<-"],
        ["1", short + "@2"],
    ], shown.out
    back = launch("model", "rollback", "models:/words")
    assert back.code == 0
    names(back.out.removesuffix("\n"), "version 1 short@2 version 2 long@12")
