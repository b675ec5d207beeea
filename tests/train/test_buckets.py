"""A run whose directory is in a bucket: it trains, stops, goes on, and is looked at without a shared disk."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from jaxinfra.errors import Preempted
from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.track.runs import local_files
from tests.refusals import names, refused
from tests.servers.fixtures import Server
from tests.several import all_ended, several
from tests.tiny_run import Tiny, ended, launch
from tests.train.until import until


def losses(url: str) -> dict[int, str]:
    """Loss of every logged step, to the last bit."""
    with local_files(url) as folder:
        rows = read_metrics(folder / "metrics.jsonl")
    return {int(row["step"]): row["loss"].hex() for row in rows if "loss" in row}


def root_of(server: Server) -> str:
    return server.new_url().removesuffix("/store")


def test_it_is_the_run_of_a_disk(server: Server, tiny: Tiny, tmp_path: Path) -> None:
    assert tiny.launch("track.console=off").code == 0
    root = root_of(server)
    server.faults.unavailable = 0.05
    done = tiny.launch(f"root={root}", "track.tensorboard=true")
    server.faults.clear()
    assert done.code == 0, done.err
    assert losses(f"{root}/tiny") == tiny.losses()
    assert f"{root}/tiny/report.html" in done.out and f"saving {root}/tiny/checkpoints/5" in done.out
    objects = ObjectStore(f"{root}/tiny").list_names()
    assert {"run.json", "metrics.jsonl", "summary.json", "report.html"} <= {*objects}
    assert any(name.startswith("tensorboard/") for name in objects)
    ObjectStore(f"{root}/tiny").delete_below("lease")  # as in a copy that was made without it
    again = tiny.launch(f"root={root}")
    assert again.code == 0 and "nothing to do" in again.out
    # What one does next.
    listed = launch("runs", root)
    assert listed.code == 0 and f"{root}/tiny" in "".join(listed.out.split()) and "finished" in listed.out, listed
    assert launch("report", f"{root}/tiny").code == 0
    page = tmp_path / "page.html"
    assert launch("report", f"{root}/tiny", "--output", str(page)).code == 0
    assert ">finished<" in page.read_text()
    sampled = [launch("sample", run, "w1 w2", "--max-tokens", "5") for run in (f"{root}/tiny", str(tiny.directory()))]
    assert sampled[0] == sampled[1] and sampled[0].code == 0, sampled
    assert launch("diff", f"{root}/tiny", str(tiny.directory())).out.splitlines()[0].startswith("root")
    replay = launch(f"{root}/tiny/run.json", f"root={tmp_path}/replay", "track.console=off")
    assert replay.code == 0, replay
    assert (tmp_path / "replay/tiny/summary.json").exists()
    assert tiny.launch(f"init={root}/tiny@10", f"root={root}", "name=next", "track.console=off").code == 0
    with local_files(f"{root}/next") as folder:
        assert json.loads((folder / "run.json").read_text())["init"]["run"] == f"{root}/tiny"


SLOW_STEPS = """
@dataclass(frozen=True, kw_only=True)
class SlowSteps(TrackerConfig):
    def make_tracker(self, run_dir):
        return Waits()


class Waits(Tracker):
    def finish_step(self, step):
        time.sleep(0.04)


def config() -> Run:
"""
IMPORTS = "import time\nfrom dataclasses import dataclass\n\nfrom jaxinfra import Tracker, TrackerConfig\n"


def slow_steps(tiny: Tiny) -> str:
    """A config whose steps take 0.04 s more."""
    text = tiny.config.read_text().replace("def config() -> Run:\n", SLOW_STEPS)
    tiny.config.write_text(IMPORTS + text.replace('console="plain"', 'console="plain", trackers=(SlowSteps(),)'))
    return str(tiny.config)


@pytest.mark.slow(25)
def test_processes_without_a_shared_disk(s3: Server, tiny: Tiny) -> None:
    """One process and two restore each other's checkpoints; losses are those of one process."""
    root, mesh = root_of(s3), ("mesh.fsdp=4", "train.steps=150", "checkpoint.save_every=5", "train.eval_every=150")
    config, url, counts = slow_steps(tiny), f"{root}/several", (1, 2, 1)
    for number, count in enumerate(counts):
        is_last, run = number == len(counts) - 1, (config, *mesh, f"root={root}", "name=several")
        saved = newest_step(url)
        with several(*run, "track.tensorboard=false", count=count, devices=4 // count) as children:
            if not is_last:
                wait_for_saves(url, saved // 5 + 1, children)
                children[-1].send_signal(signal.SIGTERM)
            ends = all_ended(children)
        assert [each.code for each in ends] == [0 if is_last else Preempted.exit_code] * count, ends
    one = ended(tiny.start(*mesh, "name=one", "track.console=off", devices=4))
    assert one.code == 0, one
    ours = {step: float.fromhex(loss) for step, loss in losses(f"{root}/several").items()}
    theirs = {step: float.fromhex(loss) for step, loss in tiny.losses("one").items()}
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[step] - theirs[step]) < 1e-6 * theirs[step] for step in ours)


def newest_step(url: str) -> int:
    index = ObjectStore(f"{url}/checkpoints").read_or_none("index.json")
    return 0 if index is None else max((int(step) for step in json.loads(index)["steps"]), default=0)


def wait_for_saves(url: str, count: int, children: list[subprocess.Popen]) -> None:
    until(lambda: newest_step(url) >= 5 * count, *children)


def test_two_starts_of_one_run(server: Server, tiny: Tiny) -> None:
    root = root_of(server)
    run = (f"root={root}", "name=long", "train.steps=100000")
    with several(str(tiny.config), *run, count=1) as children:
        wait_for_saves(f"{root}/long", 1, children)
        refused(tiny.launch(*run), f"{root}/long process name=ANOTHER", code=84)
        children[0].send_signal(signal.SIGTERM)
        (stopped,) = all_ended(children)
    assert stopped.code == Preempted.exit_code
    names(stopped.err.splitlines()[-1], f"{root}/long: stopped by SIGTERM")


def test_a_bucket_that_may_not_be_written(s3: Server, tiny: Tiny) -> None:
    root = root_of(s3)
    process = tiny.start(f"root={root}", env={"AWS_SECRET_ACCESS_KEY": "wrong"})  # credentials are read once a process
    refused(ended(process), f"{root}/tiny", code=82)


def test_other_urls_are_refused(tiny: Tiny) -> None:
    refused(tiny.launch("root=ftp://host/runs"), "root=ftp://host/runs s3://BUCKET/PREFIX root=runs")
    refused(tiny.launch("root=gs://"), "root=gs:// gs://BUCKET/PREFIX root=runs")
