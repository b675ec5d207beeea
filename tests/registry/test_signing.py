"""Signed exports, and the record of what was trained, promoted and exported."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from jaxinfra.errors import ConfigError, DataError
from jaxinfra.registry import signing
from jaxinfra.storage import audit
from tests.refusals import names, raises, refused
from tests.servers.fixtures import Server
from tests.tiny_run import Tiny, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return new_keys(tmp_path_factory.mktemp("keys"))


def new_keys(folder: Path) -> tuple[str, str]:
    """A private and a public key, made by the commands that messages name."""
    private, public = folder / "key.pem", folder / "key.pub"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(make, check=True)
    subprocess.run(
        ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)], check=True, capture_output=True
    )
    return str(private), str(public)


def flipped(folder: Path) -> Iterator[Path]:
    """Yields each file of a folder while one bit in it is another one."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        yield path
        path.write_bytes(content)


def test_every_byte_of_an_export_is_signed(tiny: Tiny, keys: tuple[str, str], tmp_path: Path) -> None:
    private, public = keys
    out, record = tmp_path / "out", f"track.audit={tmp_path}/audit"
    assert tiny.launch("train.steps=2", "train.eval_every=2", "name=tiny", record).code == 0
    run = str(tiny.directory())
    assert tiny.launch("train.steps=2", "train.eval_every=2", "name=tiny", record).code == 0  # has nothing to do
    assert [entry.action for entry in audit.read_entries(f"{tmp_path}/audit")] == ["trained"]
    (tmp_path / "audit" / "00000001.json").unlink()
    (tiny.directory() / "summary.json").unlink()  # as after a kill before both were written
    assert tiny.launch("train.steps=2", "train.eval_every=2", "name=tiny", record).code == 0
    refused(launch("hub", "export", run, str(out), "--sign", public), "--sign", public, "openssl")
    refused(launch("hub", "export", run, "s3://bucket/out", "--sign", private), "--sign folder")
    assert not out.exists()
    assert launch("hub", "export", run, str(out), "--sign", private).code == 0
    shown = launch("model", "verify", str(out), "--key", public)
    assert shown.code == 0 and f"{run}@2" in shown.out, shown
    assert launch("hub", "check", f"hf:{out}", "--key", public).code == 0
    lineage, bill = (json.loads((out / name).read_text()) for name in (signing.LINEAGE, signing.SBOM))
    manifest = json.loads((tiny.directory() / "run.json").read_text())
    assert lineage["run"]["data_versions"] == manifest["data_versions"]
    assert lineage["model"]["checkpoint"] and {"jax", "flax", "optax"} <= {each["name"] for each in bill["components"]}

    names_of = [path.name for path in flipped(out) if not _is_refused(out, public)]
    assert names_of == []
    assert {path.name for path in out.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "export.json",
        signing.SIGNATURE,
    }
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    refused(launch("hub", "check", f"hf:{out}", "--key", public), "config.json Signature", code=DataError.exit_code)
    (out / "config.json").write_text(config)
    (out / "more.txt").write_text("x")
    refused(launch("model", "verify", str(out), "--key", public), str(out), "more.txt", code=DataError.exit_code)
    (out / "more.txt").unlink()
    _, other = new_keys(tmp_path)
    refused(launch("model", "verify", str(out), "--key", other), str(out), code=DataError.exit_code)
    refused(launch("hub", "check", f"hf:{out}", "--key", private), "--key", private)
    rsa = tmp_path / "rsa.pem", tmp_path / "rsa.pub"
    for words in (("genrsa", "-out", rsa[0], "2048"), ("rsa", "-in", rsa[0], "-pubout", "-out", rsa[1])):
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    refused(launch("model", "verify", str(out), "--key", str(rsa[1])), f"--key {rsa[1]} elliptic openssl")
    refused(
        launch("hub", "export", run, str(tmp_path / "x"), "--sign", str(rsa[0])), f"--sign {rsa[0]} elliptic openssl"
    )
    refused(launch("model", "verify", str(tmp_path), "--key", public), str(tmp_path), "model.sig --key")

    with raises(DataError, f"{out} changed while read"), signing.reading_verified(f"hf:{out}", public, option=""):
        out.rename(tmp_path / "away")  # another one is read in its place
        (tmp_path / "away").rename(out)

    tuned = ("train.steps=1", "train.eval_every=none", f"init=hf:{out}", f"checkpoint.init_key={public}")
    assert tiny.launch(*tuned, "name=tuned").code == 0
    for init in ("none", run):  # no key is left aside without a word
        words = f"init={init}", f"checkpoint.init_key={public}", "name=other"
        refused(tiny.launch(*words), "checkpoint.init_key init=hf:DIR", code=81)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1] + b"\1")
    refused(tiny.launch(*tuned, "name=other"), str(out), "model.safetensors", code=DataError.exit_code)

    refused(launch("model", "card", f"{run}@1"), f"{run}@1 use {run}")
    written = launch("model", "card", run, "--license", "apache-2.0", "--output", str(tmp_path / "README.md"))
    assert written.code == 0 and "--data-licenses" in written.out, written
    card = ModelCard.load(tmp_path / "README.md")  # as the Hub parses it
    data: Any = card.data
    assert (data.license, data.model_name, data.library_name) == ("apache-2.0", "tiny", "transformers")
    (loss, *_) = [each for each in data.eval_results if each.metric_type == "loss"]
    assert loss.dataset_type in lineage["run"]["data_versions"] and f"{loss.metric_value:.4f}"[:4] in card.text
    for said in ("FLOPs: ", "energy: not measured", "licenses of the data: not stated", manifest["fingerprint"]):
        assert said in card.text, said

    listed = launch("model", "audit", f"{tmp_path}/audit")
    assert listed.code == 0 and [line.split()[3] for line in listed.out.splitlines() if "@" in line] == [
        "trained",
        "exported",
    ]


def _is_refused(out: Path, public: str) -> bool:
    try:
        signing.verify(str(out), public, option="--key")
    except DataError:
        return True
    return False


def test_a_broken_chain_is_found(tmp_path: Path) -> None:
    where = str(tmp_path / "audit")
    with raises(ConfigError, where, "entries track.audit"):
        audit.verify(where)
    writers = [
        threading.Thread(target=lambda: [audit.append(where, "trained", "run") for _ in range(5)]) for _ in range(4)
    ]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert [entry.number for entry in audit.verify(where)] == [*range(1, 21)]
    kept = shutil.copytree(where, tmp_path / "kept")
    for number in (1, 7, 19):
        path = Path(where, f"{number:08d}.json")
        path.write_text(path.read_text().replace('"run"', '"ran"'))
        with raises(DataError, where, f"{number + 1:08d}.json changed"):
            audit.verify(where)
        path.unlink()
        with raises(DataError, where, f"{number:08d}.json missing"):
            audit.verify(where)
        shutil.copy(kept / path.name, path)
    assert len(audit.verify(where)) == 20
    for damage in ("{", "[" * 100_000):
        Path(where, "00000020.json").write_text(damage)
        with raises(DataError, where, "00000020.json damaged"):
            audit.append(where, "trained", "run")
    assert names(launch("model", "audit", where).err.strip(), "00000020.json")


def test_the_record_keeps_odd_names(tmp_path: Path) -> None:
    where, subjects = str(tmp_path / "audit"), ["runs/[/x] [bold]", "runs/\udcff", "runs/\u00e9"]
    for subject in subjects:
        audit.append(where, "trained", subject)
    assert [entry.subject for entry in audit.verify(where)] == subjects
    Path(where, "00000002.json").unlink()
    Path(where, "00000003.json").unlink()  # a terminal cannot print it
    assert subjects[0] in launch("model", "audit", where).out


def test_equal_entries_in_a_bucket_are_two(s3: Server) -> None:
    where = s3.new_url()
    writers = [threading.Thread(target=audit.append, args=(where, "trained", "run")) for _ in range(6)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert len(audit.verify(where)) == 6
