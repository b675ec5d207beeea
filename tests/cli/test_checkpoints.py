"""`checkpoints RUN`: lists, verifies, compares, prunes and copies what a run has saved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxinfra.checkpoint.inventory import stored_checkpoints, verify_step
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.checkpoint.manifest import Manifest
from jaxinfra.errors import CheckpointError, RunInUseError
from jaxinfra.storage.lease import hold
from jaxinfra.storage.objects import ObjectStore
from tests.cli.test_resume import flip_newest
from tests.refusals import refused
from tests.servers.fixtures import Server
from tests.tiny_run import STEPS, Ended, Tiny, contents, launch

DAMAGED = CheckpointError.exit_code
IN_USE = RunInUseError.exit_code


@pytest.fixture(scope="session")
def all_steps(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has kept steps 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("steps")
    config = folder / "tiny.py"
    config.write_text((tiny_data / "tiny.py").read_text().replace(str(tiny_data / "runs"), str(folder / "runs")))
    assert launch(str(config), "checkpoint.keep_last=9", "track.console=off").code == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def directory(all_steps: Path, tiny: Tiny) -> Path:
    """A copy of that run, where the tiny config trains."""
    shutil.copytree(all_steps, tiny.directory())
    return tiny.directory()


def checkpoints(run: object, *words: str) -> Ended:
    return launch("checkpoints", str(run), *words)


def steps(run: object) -> list[int]:
    return stored_checkpoints(str(run)).steps()


def test_lists_every_checkpoint_with_its_health(directory: Path, tmp_path: Path) -> None:
    folder, out = directory / "checkpoints", tmp_path / "out.json"
    flip_newest(directory)
    shown = checkpoints(directory, "--json", str(out))
    assert shown.code == 0 and "damaged" not in shown.out and "verify" in shown.out.splitlines()[-1], shown
    (folder / "5" / "manifest.json").unlink()
    largest = max((folder / "10").glob("params/**/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    (folder / "8.damaged").mkdir()
    (folder / "15.orbax-checkpoint-tmp").mkdir()
    shown = checkpoints(directory, "--json", str(out))
    assert shown.code == 0 and "8.damaged" in shown.out and "interrupted save" in shown.out, shown
    assert "step 5: damaged: manifest.json is missing" in shown.out and largest.name in shown.out
    with hold(directory):
        assert "a save in progress" in checkpoints(directory).out
    listed = json.loads(out.read_text())
    five, ten, twelve = listed["steps"]
    assert five["problems"] == ["manifest.json is missing"] and largest.name in ten["problems"][0]
    assert twelve["problems"] == [] and twelve["metrics"]["loss"] > 0 and twelve["num_bytes"] > 100_000
    assert {each["name"]: each["kind"] for each in listed["leftovers"]} == {
        "8.damaged": "damaged",
        "15.orbax-checkpoint-tmp": "incomplete",
    }
    refused(checkpoints(directory.parent), f"{directory.parent} run.json")


def test_verify_names_every_damaged_file(directory: Path) -> None:
    assert checkpoints(directory, "verify").code == 0
    for part in ("params", "opt_state"):
        flip_newest(directory, part)
    (directory / "checkpoints" / "5" / "step" / "manifest.ocdbt").unlink()
    before = contents(directory)
    found = checkpoints(directory, "verify")
    line = refused(found, "step 12 step 5 step/manifest.ocdbt", code=DAMAGED)
    assert "step 10" not in line and "step 10: intact" in found.out
    assert "  params/" in found.out and "  opt_state/" in found.out
    assert contents(directory) == before
    assert checkpoints(directory, "verify", "10").code == 0
    refused(checkpoints(directory, "verify", "11"), "11 5, 10, 12", code=DAMAGED)


def test_a_step_that_the_run_deletes_meanwhile_is_not_damaged(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, folder = stored_checkpoints(str(directory)), directory / "checkpoints" / "5"
    read_manifest = stored.manifest

    def read_and_delete(step: int) -> Manifest:
        manifest = read_manifest(step)
        shutil.rmtree(folder, ignore_errors=True)
        return manifest

    monkeypatch.setattr(stored, "manifest", read_and_delete)
    found = verify_step(stored, 5)
    assert not folder.exists() and found.is_gone and not found.problems
    assert not verify_step(stored, 10).is_gone


def test_diff_of_steps_and_of_runs(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert checkpoints(directory, "diff", "10", f"{directory}@10").code == 0
    assert checkpoints(directory, "diff", "5", "12", "--all", "--json", str(out)).code == 0
    found = {each["name"]: each for each in json.loads(out.read_text())["different"]}
    assert found["step"]["largest"] == STEPS - 5
    assert found["params.embedding"]["norm"] > found["params.embedding"]["largest"] > 0
    other = {"step": jnp.asarray(5, jnp.int32), "params": {"embedding": jnp.zeros((8, 32), jnp.bfloat16)}}
    with CheckpointManager(tmp_path / "other" / "checkpoints") as manager:
        manager.save(5, other, {"config": {"model": {"num_layers": 3}}}, force=True)
    shown = checkpoints(directory, "diff", "5", f"{tmp_path}/other@5").out
    assert "config.model.num_layers: 2 -> 3" in shown and "params.embedding: float32[304,32] -> bfloat16[8,32]" in shown
    assert "params.unembedding: float32[32,304] -> missing" in shown and "1 equal to the last bit" in shown, shown
    flip_newest(directory)
    refused(checkpoints(directory, "diff", "5", "12"), "12 damaged: params/", code=DAMAGED)
    refused(checkpoints(directory, "diff", "5"), "diff A B")


def test_prune_never_counts_a_damaged_step(directory: Path) -> None:
    folder = directory / "checkpoints"
    (folder / "8.damaged").mkdir()
    (folder / "15.orbax-checkpoint-tmp").mkdir()
    flip_newest(directory)
    before = contents(directory)
    assert "step 5" in checkpoints(directory, "prune", "--dry-run", "--keep-last", "1").out
    assert contents(directory) == before
    with hold(directory):
        refused(checkpoints(directory, "prune"), str(directory), code=IN_USE)
    pruned = checkpoints(directory, "prune", "--keep-last", "1")
    assert pruned.code == 0 and "leaving step 12, which is damaged: params/" in pruned.out, pruned
    assert steps(directory) == [10, 12] and (folder / "8.damaged").exists()
    assert not (folder / "15.orbax-checkpoint-tmp").exists()
    assert checkpoints(directory, "prune", "--damaged").code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["10", "12"]


@pytest.mark.slow(15)
def test_a_copy_is_a_run(directory: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Evaluated, taken as `init`, and resumed to the same losses."""
    flip_newest(directory)
    whole, copy = tiny.losses(), tiny.directory("copy")
    copied = checkpoints(directory, "copy-to", str(copy))
    assert copied.code == 0 and steps(copy) == [10], copied
    assert "step 10" in launch("evaluate", str(copy)).out
    assert tiny.launch("name=new", f"init={copy}", "train.steps=1", "track.console=off").code == 0
    resumed = tiny.launch("name=copy")
    assert resumed.code == 0 and "at step 10 of 12" in resumed.out, resumed
    assert tiny.losses("copy") == {step: loss for step, loss in whole.items() if step > 10}
    refused(checkpoints(directory, "copy-to", str(copy)), f"{copy}/checkpoints/10 --step")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(checkpoints(directory, "copy-to", str(tmp_path / "full")), "full not empty")
    refused(checkpoints(directory, "copy-to", str(tmp_path / "new"), "--step", "12"), "12 damaged", code=DAMAGED)
    assert not (tmp_path / "new").exists()


def test_a_copy_that_is_interrupted_lists_no_step(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    copy = tmp_path / "copy"
    monkeypatch.setattr("jaxinfra.checkpoint.copying.move_folder", killed)
    assert checkpoints(directory, "copy-to", str(copy)).code == 130
    monkeypatch.undo()
    assert steps(copy) == [] and checkpoints(directory, "copy-to", str(copy)).code == 0
    assert steps(copy) == [STEPS] and not [*(copy / "checkpoints").glob("*tmp*")]


def test_in_a_bucket(directory: Path, tiny: Tiny, gcs: Server, tmp_path: Path) -> None:
    """To a bucket and back are the same bits; every action works there."""
    url = gcs.new_url()
    for step in ("5", "10", "12"):
        copied = checkpoints(directory, "copy-to", url, "--step", step)
        assert copied.code == 0, copied
    assert steps(url) == [5, 10, 12] and checkpoints(url, "verify").code == 0
    back, out = tmp_path / "back", tmp_path / "out.json"
    assert checkpoints(url, "copy-to", str(back), "--step", "10").code == 0
    for run in (url, back):
        assert checkpoints(directory, "diff", "10", f"{run}@10", "--json", str(out)).code == 0
        found = json.loads(out.read_text())
        assert found["leaves"] == found["equal"] > 10
    shutil.copytree(back, tiny.directory("back"))
    assert "at step 10 of 12" in tiny.launch("name=back").out
    assert "step 12" in launch("evaluate", url).out
    store = ObjectStore(f"{url}/checkpoints")
    folder = json.loads(store.read("index.json"))["steps"]["12"]["folder"]
    name = f"{folder}/params.embedding/c/0/0"
    store.write(name, store.read(name)[::-1])
    refused(checkpoints(url, "verify"), "step 12 params.embedding/c/0/0", code=DAMAGED)
    store.write("15.1.1/params.w/c/0", b"?")
    assert "15.1.1" in checkpoints(url).out
    assert checkpoints(url, "prune", "--keep-last", "1").code == 0
    assert steps(url) == [10, 12]
    assert {name.partition(".")[0] for name in store.list_names()} == {"10", "12", "index"}


def test_nothing_on_a_disk_needs_jax(directory: Path, tmp_path: Path, repo_root: Path) -> None:
    actions = [[], ["verify"], ["diff", "5", "12"], ["prune", "--dry-run"], ["copy-to", "copy"]]
    code = "import sys\nfrom jaxinfra.cli.main import main\n"
    code += f"for action in {actions}: assert main(['checkpoints', {str(directory)!r}, *action]) == 0\n"
    code += "assert 'jax' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_options_belong_to_their_action(directory: Path) -> None:
    refused(checkpoints(directory, "verify", "--dry-run"), "--dry-run prune")
    refused(checkpoints(directory, "--step", "5"), "--step copy-to")
    refused(checkpoints(directory, "verify", "last"), "last 5, 10, 12")
