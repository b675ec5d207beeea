"""The command line of runs elsewhere: what is refused before anybody is asked, and what a dry run shows."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.cli.main import parse_command_line
from jaxinfra.cli.places.arguments import place_options
from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.processes.peer_connection import free_port
from tests.refusals import names, raises, refused
from tests.tiny_run import Ended, Tiny, launch

ON_CLOUD = ("--place", "tpu-vm", "--create", "v6e-8", "--zone", "us-east5-b", "--project", "p")
ON_K8S = ("--place", "k8s", "--accelerator", "cpu:2", "--image", "registry/x")
ON_RAY = ("--place", "ray", "--accelerator", "cpu:2")
IN_BUCKET = ("root=gs://bucket/runs", "data.store=gs://bucket/stores/text")


@pytest.fixture
def project(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The tiny run in a git checkout of its own, which is where the user is, with no key and no cloud."""
    folder = tiny.config.parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "home"))
    for name in ("JAXINFRA_GOOGLE_ENDPOINT", "KUBECONFIG", "KUBERNETES_SERVICE_HOST", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return tiny


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--hosts", "a"), "--hosts --place"),
        (("--dry-run",), "--dry-run --place"),
        (("--place", "ssh"), "--place ssh --hosts"),
        (("--place", "ssh", "--hosts", "a", "--spot"), "--spot ssh"),
        (("--place", "ssh", "--hosts", "a,a"), "--hosts a twice"),
        (("--place", "ssh", "--hosts", "a", "--processes", "2"), "--processes 2"),
        (("--place", "ssh", "--hosts", "a", "root=runs"), "root=runs root=/shared/runs"),
        (("--place", "ssh", "--hosts", "a", "data.store=s/t"), "data.store=s/t data prepare"),
        (("--place", "ssh", "--hosts", "a", "--env", "X"), "--env X NAME=VALUE"),
        (("--place", "ssh", "--hosts", "a", "--secret", "NOT_SET"), "--secret NOT_SET export"),
        (("--place", "ssh", "--hosts", "a", "--committed"), "--committed"),
        (("--place", "ssh", "--hosts", "a,-oProxyCommand=x"), "--hosts -oProxyCommand=x"),
        (("--place", "slurm"), "--place slurm --nodes 4"),
        (("--place", "slurm", "--nodes", "2", "--hosts", "a,b"), "--hosts a,b --hosts a"),
        (("--place", "slurm", "--nodes", "2", "--max-hours", "2"), "--max-hours 2.0 slurm"),
        (("--place", "slurm", "--nodes", "2", "--sbatch", "gpus=8"), "--sbatch gpus=8 --sbatch=--partition=NAME"),
        (("--place", "slurm", "--nodes", "2", "--sbatch=--time=5"), "--sbatch --time=5 --sbatch=--time=12:00:00"),
        (("--place", "slurm", "--nodes", "4", "--elastic", "2..8"), "2..8: --elastic 2..4, --nodes 8"),
        (("--place", "slurm", "--nodes", "4", "--elastic", "2..3"), "2..3: --elastic 2..4, --nodes 3"),
        (("--place", "ssh", "--hosts", "a,b", "--elastic", "3..4"), "3..4: --elastic 2..2, 4 --hosts"),
        (("--place", "slurm", "--nodes", "2", "root=runs"), "root=runs root=/"),
        (("--place", "ssh", "--hosts", "a", "--nodes", "2"), "--nodes 2 ssh"),
        (("--place", "tpu-vm", "--create", "v6e-8"), "--place tpu-vm --zone"),
        (("--place", "k8s"), "--place k8s --accelerator v5p:4x4x4"),
        (("--place", "k8s", "--accelerator", "cpu:2"), "--place k8s --image launch/Dockerfile"),
        ((*ON_K8S, "--hosts", "a"), "--hosts a k8s"),
        ((*ON_K8S, "--priority", "high"), "--priority high --queue"),
        ((*ON_K8S, "--volume", "/shared"), "--volume /shared shared:/shared"),
        ((*ON_K8S, "--node-selector", "pool"), "--node-selector pool LABEL=VALUE"),
        ((*ON_K8S, "--namespace", "a/b"), "--namespace a/b training"),
        ((*ON_K8S, *IN_BUCKET, "--secret", "TOKEN=x", "--dry-run"), "--secret TOKEN: export TOKEN=..."),
        ((*ON_K8S, *IN_BUCKET, "--secret", "", "--dry-run"), "--secret : --secret HF_TOKEN"),
        ((*ON_K8S, *IN_BUCKET, "--secret", "A", "--env", "A=x"), "--secret A: --env"),
        ((*ON_K8S, *IN_BUCKET, "--accelerator", "cpu:99999999", "--dry-run"), "cpu:99999999: 65,536"),
        ((*ON_K8S, "--elastic", "1..2"), "--elastic 1..2"),
        ((*ON_K8S, "root=/shared/runs"), "root=/shared/runs gs://BUCKET"),
        ((*ON_K8S, *IN_BUCKET), "--place k8s no cluster --context KUBECONFIG"),
        (("--place", "ray"), "--place ray --accelerator v5p:4x4x4"),
        ((*ON_RAY, "root=runs"), "root=runs root=/"),
        ((*ON_RAY, *IN_BUCKET), "--place ray --address http://HEAD:8265 RAY_ADDRESS"),
        ((*ON_RAY, *IN_BUCKET, "--address", "ray://head:10001"), "--address ray://head:10001 http://HEAD:8265"),
        ((*ON_RAY, *IN_BUCKET, "--image", "x"), "--image x ray"),
        ((*ON_RAY, *IN_BUCKET, "--elastic", "1..2"), "--elastic 1..2 ray"),
        ((*ON_RAY, *IN_BUCKET, "--accelerator", "v5p:3x3x3"), "--accelerator v5p:3x3x3"),
        (("--place", "k8s", "--address", "http://head:8265"), "--address http://head:8265 k8s"),
        (("--place", "ssh", "--hosts", "a", "--kind", "job"), "--kind job ssh"),
        (("--place", "tpu-vm", "--zone", "us-east5-b"), "--place tpu-vm --name --create"),
        (("--place", "tpu-vm", "--name", "x", "--zone", "us-east5-b", "--spot"), "--spot --create"),
        (ON_CLOUD, "root= gs://BUCKET/runs"),
        ((*ON_CLOUD, "root=gs://bucket/runs"), "data.store= data prepare gs://BUCKET"),
        ((*ON_CLOUD, *IN_BUCKET, "--create", "v6e-9"), "v6e-9 v6e-8"),
        ((*ON_CLOUD, *IN_BUCKET, "--create", "tpu7x:2x2x1"), "tpu7x --place gce"),
        ((*ON_CLOUD, *IN_BUCKET, "--max-hours", "-1"), "--max-hours -1"),
        ((*ON_CLOUD, *IN_BUCKET, "train.global_batch=3"), "train.global_batch=3 mesh.fsdp=8"),
    ],
)
def test_refuses_in_one_line(project: Tiny, words: tuple[str, ...], named: str) -> None:
    refused(project.launch(*words), named)
    assert not project.runs.exists()


@pytest.mark.parametrize(
    ("words", "use"),
    [
        ("--partition=gpu", "--sbatch=--partition=gpu"),
        ("--partition gpu", "--sbatch=--partition=gpu"),
        ("--exclusive --qos=high", "--sbatch=--exclusive"),
        ("-p gpu", "--sbatch=-pgpu"),
        ("--sbatch --partition=gpu", "--sbatch=--partition=gpu"),
        ("--sbatch --partition gpu", "--sbatch=--partition=gpu"),
        ("--sbatch -t 60 --sbatch=--exclusive", "--sbatch=-t60"),
        ("--sbtch=--time=12:00:00", "--nodes 2 --sbatch"),
        ("--sbatch=--gpus-per-node=h100:8", "use train.global_batch=16"),
        ("--lr=1", "no dashes: optim.peak_lr=1"),
        ("--seed=1", "no dashes: seed=1"),
    ],
)
def test_an_option_that_sbatch_does_not_get(project: Tiny, words: str, use: str) -> None:
    line = refused(project.launch("--place", "slurm", "--nodes", "2", *words.split()))
    assert line.endswith(f" {use}")


@pytest.mark.parametrize("given", ["--time {}", "--time={}", "-t {}", "-t{}"])
def test_a_time_limit_leaves_time_to_train(given: str) -> None:
    """In all forms of Slurm; 0 is no limit, and what is no form of Slurm is left to sbatch."""

    def start(time: str) -> PlaceOptions:
        words = ("x.py", "--place", "slurm", "--nodes", "2", f"--sbatch={given.format(time)}")
        return place_options(parse_command_line(words))

    for short in ("5", "10", "9:59", "10:00", "0:10:00", "0-0:9", "0-00:10:00", "00:00:01"):
        with raises(ConfigError, f"--sbatch {given.format(short)}: --sbatch=--time=12:00:00"):
            start(short)
    for long in ("11", "10:01", "1:00:00", "0:10:01", "1-0", "0-1", "0-0:11", "0-00:10:01", "0", "UNLIMITED", "x"):
        assert start(long).sbatch


def test_commands_for_runs_elsewhere_need_one(project: Tiny) -> None:
    for command in ("logs", "stop", "resume"):
        refused(launch("runs", command, "runs/tiny"), "runs/tiny never --place")


def dry(project: Tiny, *words: str) -> Ended:
    """A dry run: it succeeds, and changes nothing."""
    before = sorted(project.config.parent.rglob("*"))
    ended = project.launch(*words, "--dry-run")
    assert ended.code == 0, ended
    assert sorted(project.config.parent.rglob("*")) == before
    return ended


def test_dry_run_shows_requests_commands_and_files(
    project: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOKEN", "never-shown")
    (tmp_path / "new.py").write_text("")
    shown = dry(project, *ON_CLOUD, *IN_BUCKET, "--secret", "TOKEN", "--env", "A=b c").out
    assert "POST https://tpu.googleapis.com/v2/projects/p/locations/us-east5-b/queuedResources" in shown
    assert '"acceleratorType": "v6e-8"' in shown and "?? new.py" in shown
    assert all(f" {action} " in shown for action in ("probe", "unpack", "receive", "install", "start"))
    assert "gs://bucket/runs/tiny" in shown and "jax[tpu]" in shown
    assert "TOKEN" in shown and "never-shown" not in shown
    shown = dry(project, "--place", "gce", *ON_CLOUD[2:], *IN_BUCKET).out
    made = [line.split() for line in shown.splitlines() if line.startswith("POST ") and "# makes" in line]
    assert [words[1].rpartition("/")[2] for words in made] == ["instanceTemplates", "instanceGroupManagers"]
    shown = dry(project, "--place", "ssh", "--hosts", "one,ada@two").out
    assert f"one:{project.directory()}" in shown and "ada@two" in shown and "POST" not in shown
    words = ("--nodes", "4", "--elastic", "2..4", "--sbatch=--gpus-per-node=8", "train.global_batch=32")
    shown = dry(project, "--place", "slurm", *words).out
    assert "#SBATCH --nodes=4" in shown and "#SBATCH --gpus-per-node=8" in shown and "BatchMode" not in shown
    assert "--elastic 2..4" in shown and "jax[cuda" in shown and " submit tiny-" in shown
    assert "submit, on this machine, the login node" in shown and "each host" not in shown
    assert "sbatch --parsable @RUN@/job-ATTEMPT.sh" in shown


@pytest.mark.parametrize(
    ("program", "said", "code"),
    [
        ("", "sbatch: not found", 81),
        (
            "echo >&2 'squeue: error: Unable to contact slurm controller'; echo >&2 more; exit 1",
            "Unable controller",
            76,
        ),
        ("exit 1", "squeue: no answer", 76),
    ],
)
def test_asks_slurm_before_anything_is_sent(
    project: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, said: str, code: int
) -> None:
    """On a machine with the programs of Slurm, of which nobody answers, and on one without them."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    used = "awk basename cat df flock git head hostname ls mkdir paste sh sleep timeout touch tr uname wc"
    for name in used.split():
        (bin_folder / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name}"))
    for name in ("sbatch", "squeue", "scancel", "scontrol") if program else ():
        (bin_folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_folder))
    ended = project.launch("--place", "slurm", "--nodes", "2", "--workdir", str(tmp_path / "workdir"))
    line = ended.err.splitlines()[-1]
    assert ended.code == code and line.startswith("error: host this machine: Slurm"), ended
    names(line, said, "login node --hosts USER@LOGIN")
    assert "more" not in line and "sending" not in ended.err
    assert not project.runs.exists() and not [*(tmp_path / "workdir/bundles").iterdir()]


def test_dry_run_shows_the_job_of_ray(project: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks no cluster, and needs no Ray."""
    monkeypatch.setenv("TOKEN", "never-shown")
    monkeypatch.setitem(sys.modules, "ray", None)
    words = (*ON_RAY, *IN_BUCKET, "name=tiny", "--address", "http://head:8265")
    chips = ("--accelerator", "v5p:2x2x4", "train.global_batch=16")
    shown = dry(project, *words, *chips, "--secret", "TOKEN", "--env", "A=b c", "--max-hours", "2").out
    assert "POST http://head:8265/api/jobs/" in shown and "never-shown" not in shown
    job = json.loads(shown[shown.index("{") :])
    entry = shlex.split(job["entrypoint"])
    assert entry[:3] == ["exec", "python", "-m"] and entry[4] == "gs://bucket/runs/tiny"
    assert float(entry[7]) == 7200, entry
    scaling = json.loads(entry[8])
    assert (scaling["num_workers"], scaling["topology"], scaling["accelerator_type"]) == (4, "2x2x4", "TPU-V5P")
    assert job["runtime_env"]["env_vars"]["A"] == "b c" and "--supervise" not in entry
    refused(project.launch(*words), "--place ray pip jaxinfra[ray]")


def test_dry_run_shows_the_hours_of_a_job_of_kubernetes(project: Tiny) -> None:
    shown = dry(project, *ON_K8S, *IN_BUCKET, "--max-hours", "2").out
    assert "activeDeadlineSeconds: 7200" in shown, shown


def test_a_cluster_that_does_not_answer(project: Tiny) -> None:
    address = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    ended = project.launch(*ON_RAY, "--address", address)
    assert ended.code == 82 and not project.runs.exists(), ended
    names(ended.err.splitlines()[-1], f"error: {address}: --address")
