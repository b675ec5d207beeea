"""Secrets in the words of a command line, in a config and in the environment are in nothing that a run leaves."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfra.cli import processes
from jaxinfra.config import Loaded, apply, diff, dump, record
from jaxinfra.config.schema import MISMATCH, match, walk
from jaxinfra.machine.stacks import StackFiles
from jaxinfra.run import Run
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, problem, refused
from tests.servers.fixtures import Server
from tests.tiny_run import Tiny, contents, ended, start

SECRET = "sEcReT"
URLS = (
    f"http://user:{SECRET}@host",
    f"postgresql+x://user:{SECRET}@host/db",
    f"https://user:pass/{SECRET}@host",
    f"https://{SECRET}@host/x",
    f"https://host/x?api_key={SECRET}",
    f"https://host/x?a=1&X-Amz-Security-Token={SECRET}#y",
)
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MY_CLIENT_SECRET",
    "WANDB_API_KEY",
)


def text_fields(run: Run) -> Iterator[tuple[str, bool]]:
    """Every field that takes any text, and whether it takes a tuple of texts."""
    for path, annotation, _ in walk(Run, run):
        if match(annotation, "any text") is not MISMATCH:
            yield path, False
        elif match(annotation, ("any text",)) is not MISMATCH:
            yield path, True


def test_no_field_takes_a_url_with_credentials(tiny: Tiny) -> None:
    run = tiny.loaded()
    fields = [*text_fields(run)]
    assert {("track.mlflow.uri", False), ("root", False), ("track.wandb.tags", True)} <= {*fields}
    for number, (path, is_tuple) in enumerate(fields):
        url = URLS[number % len(URLS)]
        line = problem(apply(run, [f"{path}={(url,) if is_tuple else url!r}"]), f"{path}= *** credentials")
        assert SECRET not in line


@pytest.mark.parametrize("field", ["name", "root", "track.mlflow.uri"])
def test_processes_are_refused_before_anything_is_written(
    field: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a folder has the name of such a field."""
    monkeypatch.setattr(processes, "launch", None)
    monkeypatch.chdir(tiny.config.parent)
    before = contents(tiny.config.parent)
    line = refused(tiny.launch(f"{field}={URLS[0]}", "--processes", "2"), f"{field}=http://***@host credentials")
    assert SECRET not in line and contents(tiny.config.parent) == before


def test_a_secret_of_the_environment_is_a_name_in_records(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume and `diff` take the two for the same, since the record of a run has only the name."""
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}-token")
    run, recorded = tiny.loaded(f"track.wandb.tags=('{SECRET}-token',)"), tiny.loaded("track.wandb.tags=('$HF_TOKEN',)")
    loaded = Loaded(run=run, source="python", origins={})
    written = record(loaded, command=["x", URLS[0]], versions={}, git={}, devices=[])
    assert written["config"]["track"]["wandb"]["tags"] == ["$HF_TOKEN"]
    assert SECRET not in json.dumps(written) + dump(run)
    assert diff(recorded, run) == [] != diff(recorded, tiny.loaded("track.wandb.tags=('other',)"))


def test_stacks(tmp_path: Path) -> None:
    StackFiles(str(tmp_path), 0).write(f"error: no answer from {URLS[0]}")
    assert "http://***@host" in b"".join(contents(tmp_path / "stacks").values()).decode()


TELLS = """
@dataclass(frozen=True, kw_only=True)
class Service(TrackerConfig):
    key: str

    def make_tracker(self, run_dir):
        return Refused(self.key)


class Refused(Tracker):
    def __init__(self, key):
        self.key = key

    def log(self, step, metrics):
        raise RuntimeError(f"401 for {self.key} of {os.environ['URL']}")


def config() -> Run:
"""


@pytest.mark.slow(15)
def test_a_run_leaves_no_secret(s3: Server, tiny: Tiny, tmp_path: Path) -> None:
    """A tracker of the user repeats its key in an error; the run is in a bucket, and supervised."""
    text = tiny.config.read_text().replace("def config() -> Run:\n", TELLS)
    text = text.replace('console="plain"', 'console="plain", trackers=(Service(key=os.environ["WANDB_API_KEY"]),)')
    head = "import os\nfrom dataclasses import dataclass\nfrom jaxinfra import Tracker, TrackerConfig\n"
    tiny.config.write_text(head + text)
    planted = {name: f"{SECRET}-{name.lower()}" for name in VARIABLES if not name.startswith("AWS")}
    (tmp_path / "tmp").mkdir()
    url, env = s3.new_url(), planted | {"URL": URLS[0], "TMPDIR": str(tmp_path / "tmp")}
    words = (f"root={url}", "name=new", "train.steps=2", "--supervise", "--devices", "cpu:1")
    done = ended(start(str(tiny.config), *words, env=env), timeout_s=600)
    assert done.code == 0, done
    names(done.err.partition("RuntimeError: ")[2].partition("\n")[0], "401 $WANDB_API_KEY http://***@host")
    left = {name: s3.get(f"{url}/{name}") for name in ObjectStore(url).list_names()}
    wanted = {"run.json", "report.html", "attempts.jsonl", "metrics.jsonl", "rank-0.log"}
    assert wanted <= {name.rpartition("/")[2] for name in left}
    assert all(b"$WANDB_API_KEY" in content for name, content in left.items() if name.endswith("run.json"))
    left |= contents(tmp_path) | {"out": done.out.encode(), "err": done.err.encode()}
    for secret in (SECRET, s3.secret):
        assert [name for name, content in left.items() if secret.encode() in name.encode() + content] == []
