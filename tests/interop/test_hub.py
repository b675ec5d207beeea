"""Runs become folders in the format of Hugging Face, and folders become runs: commands, bytes, meshes and bad input."""

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from tokenizers import Tokenizer as Backend

from jaxinfra.data.tokenizer import JsonTokenizer
from jaxinfra.errors import PeerLostError
from jaxinfra.families.zoo import shape
from jaxinfra.hub.export import beginning_with, family_of
from jaxinfra.hub.published_model import open_published, param_shapes
from jaxinfra.inference.language_model import open_language_model
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import load_params
from jaxinfra.interop import writing
from jaxinfra.interop.folder import open_folder
from jaxinfra.interop.reading import file_order
from jaxinfra.interop.safetensors import Weights
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import leaves_by_name
from jaxinfra.processes.peers import Peers
from tests.interop.conftest import content, read_tensors, write_tensors
from tests.plugins import extras as extras
from tests.refusals import refused
from tests.servers.fixtures import Server
from tests.servers.hub import REPOSITORY, HubServer
from tests.several import all_ended, ending, several
from tests.tiny_run import Ended, ended, launch, start

PROMPT = "w1 w7 w50"
GREEDY = ("--temperature", "0", "--max-tokens", "20")


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert launch(str(tiny_data / "tiny.py"), f"root={folder}", "name=base", "track.console=off").code == 0
    return folder / "base"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "base"
    ended = launch("hub", "export", str(trained), str(out))
    assert ended.code == 0, ended
    return out


def test_export_is_checked_and_sampled(trained: Path, exported: Path) -> None:
    ended = launch("hub", "check", f"hf:{exported}", "--hashes")
    assert ended.code == 0 and "llama" in ended.out and "each has its place" in ended.out, ended
    assert "304; the tokenizer has 300" in ended.out
    texts = [launch("sample", source, PROMPT, *GREEDY) for source in (str(trained), f"hf:{exported}")]
    assert texts[0].code == 0 and texts[0].out == texts[1].out, texts


@pytest.mark.parametrize(
    "mesh", ["mesh.fsdp=8", "mesh.fsdp=2 mesh.tensor=4", "mesh.replica=2 mesh.fsdp=2 mesh.tensor=2"]
)
def test_export_has_the_same_bytes_from_every_mesh(trained: Path, exported: Path, tmp_path: Path, mesh: str) -> None:
    assert launch("hub", "export", str(trained), str(tmp_path / "out"), *mesh.split()).code == 0
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((exported / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)


def test_run_begins_with_published_weights(tiny_data: Path, trained: Path, exported: Path, tmp_path: Path) -> None:
    """The same parameters give the same first loss as those of the run itself, also on other meshes."""
    losses = []
    for number, (source, mesh) in enumerate(
        [(trained, ()), (f"hf:{exported}", ()), (f"hf:{exported}", ("mesh.stage=2", "mesh.fsdp=4"))]
    ):
        words = (f"root={tmp_path}", f"name=run{number}", f"init={source}", "train.steps=2", "track.console=off")
        ended = launch(str(tiny_data / "tiny.py"), *words, *mesh)
        assert ended.code == 0, ended
        row = json.loads((tmp_path / f"run{number}" / "metrics.jsonl").read_text().splitlines()[0])
        losses.append(row["loss"])
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)
    again = launch(str(tiny_data / "tiny.py"), f"root={tmp_path}", "name=run1", f"init=hf:{exported}", "train.steps=2")
    assert again.code == 0, again


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in Weights(open_folder(str(folder))).tensors.values())


COUNTING = """\
import atexit, os, sys
from pathlib import Path
from jaxinfra.cli.entry import main
from jaxinfra.interop.safetensors import Weights

def counting(weights, *arguments):
    init(weights, *arguments)
    atexit.register(lambda: Path(os.environ["COUNTS"], f"{os.environ['JAX_PROCESS_ID']}-{id(weights)}").write_text(
        str(weights.bytes_read)))

init, Weights.__init__ = Weights.__init__, counting
sys.exit(main())
"""
"""Runs a command that leaves the number of bytes that each process has read of weights."""


def in_two_processes(folder: Path, *words: str) -> tuple[Ended, list[int]]:
    """Runs a command on weights with `--processes 2`; returns how it ended, and the bytes that each process read."""
    folder.mkdir()
    command = [sys.executable, "-c", COUNTING, *words, "--processes", "2", "--devices", "cpu:4"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"COUNTS": str(folder)}
    )
    with ending([child]):
        done = ended(child, timeout_s=600)
    return done, [sum(int(each.read_text()) for each in folder.glob(f"{rank}-*")) for rank in range(2)]


def test_two_processes_read_their_share_and_write_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    done, counts = in_two_processes(tmp_path / "counts", "hub", "export", f"hf:{exported}", str(tmp_path / "out"))
    assert done.code == 0 and content(tmp_path / "out") == content(exported), done
    assert max(counts) <= 0.55 * tensor_bytes(exported), counts


@pytest.mark.slow(15)
def test_two_processes_sample_published_weights(exported: Path, tmp_path: Path) -> None:
    """As one process does; each reads half of the weights. tests/tasks scores them in two processes."""
    sample = ("sample", f"hf:{exported}", PROMPT, *GREEDY)
    done, counts = in_two_processes(tmp_path / "counts", *sample)
    assert (done.code, done.out) == (0, launch(*sample).out), done
    assert max(counts) <= 0.55 * tensor_bytes(exported), counts


def test_killed_export_goes_on(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_published(f"hf:{exported}")
    program = sampling_program(open_language_model(f"hf:{exported}").run, jax.devices())
    params = load_params(f"hf:{exported}", program, Peers()).params
    leaves = leaves_by_name(params)
    bindings = model.bindings({path: leaf.shape for path, leaf in leaves.items()}, model.weights())
    out = tmp_path / "out"

    def write() -> dict[str, Any]:
        with program.on_mesh:
            others = {"config.json": (exported / "config.json").read_bytes()}
            return writing.write_model(str(out), leaves, bindings, others, source={}, max_file_bytes=20_000)

    finish = writing._Writer.finish

    def fail_at_third(self: Any, folder: Path, file: writing.PlannedFile) -> None:
        if "00003" in file.name:
            raise KeyboardInterrupt
        finish(self, folder, file)

    monkeypatch.setattr(writing._Writer, "finish", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert not (out / "config.json").exists()
    (path,) = out.glob("model-00001-*.safetensors")
    first = path.stat().st_mtime_ns
    monkeypatch.setattr(writing._Writer, "finish", finish)
    receipt = write()
    assert len(receipt["files"]) > 3 and path.stat().st_mtime_ns == first
    assert content(out) == content(exported)
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".safetensors") == [
        "config.json",
        "export.json",
        "model.safetensors.index.json",
    ]


@pytest.mark.slow(25)
def test_export_of_two_processes_goes_on_after_a_kill(exported: Path, tmp_path: Path) -> None:
    words = ("hub", "export", f"hf:{exported}", str(tmp_path / "out"), "--max-shard-size", "20KB")
    with several(*words, env={"JAXINFRA_FAIL": "export:1:2:kill"}) as children:
        assert [each.code for each in all_ended(children)] == [PeerLostError.exit_code, -9]
    assert not [*(tmp_path / "out").glob("*.json")]
    refused(launch("hub", "check", str(tmp_path / "out")), f"{tmp_path / 'out'} export", code=78)
    with several(*words) as children:
        assert [each.code for each in all_ended(children)] == [0, 0]
    assert content(tmp_path / "out") == content(exported)


def test_disk_that_is_full_in_the_middle(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("hub", "export", f"hf:{exported}", str(tmp_path / "out"))
    monkeypatch.setenv("JAXINFRA_FAIL", "export:0:0:enospc")
    refused(launch(*words), f"{tmp_path / 'out'} space", code=82)
    refused(launch("hub", "check", str(tmp_path / "out")), f"{tmp_path / 'out'} export", code=78)
    monkeypatch.delenv("JAXINFRA_FAIL")
    assert launch(*words).code == 0
    assert content(tmp_path / "out") == content(exported)


# Bad input


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def edit_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | keys).items() if v != "absent"}))


def rewrite(folder: Path, change: Any) -> None:
    """Rewrites the tensors, `{name: array}`, as `change` leaves them."""
    arrays = read_tensors(folder)
    change(arrays)
    write_tensors(folder, arrays)


def test_damaged_files(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for bad in (whole[:-5], whole + b"x", whole[:100], b"", b"\xff" * 8 + whole[8:]):
        path.write_bytes(bad)
        refused(launch("hub", "check", str(copy)), "model.safetensors download", code=78)
    path.write_bytes(whole.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1))
    refused(launch("hub", "check", str(copy)), "model.safetensors", code=78)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert launch("hub", "check", str(copy)).code == 0
    refused(launch("hub", "check", str(copy), "--hashes"), "model.safetensors", code=78)
    path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"x")
    refused(launch("hub", "check", str(copy)), "pytorch_model.bin pickle", code=78)


def test_an_index_names_no_file_outside_of_the_folder(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy.parent / "model.safetensors")
    for name in ("../model.safetensors", str(copy.parent / "model.safetensors"), "..safetensors/../model.safetensors"):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(launch("hub", "check", str(copy)), "model.safetensors.index.json", code=78)


def test_other_tensors_than_the_model_has(copy: Path) -> None:
    rewrite(copy, lambda arrays: arrays.update({"model.norms.weight": arrays.pop("model.norm.weight")}))
    refused(launch("hub", "check", str(copy)), "model.norm.weight model.norms.weight", code=81)
    rewrite(copy, lambda arrays: arrays.update({"model.norm.weight": arrays["model.norms.weight"]}))
    refused(launch("hub", "check", str(copy)), "model.norms.weight model.norm.weight", code=81)
    rewrite(copy, lambda arrays: arrays.update({"lm_head.weight": arrays.pop("model.norms.weight")[:2]}))
    refused(launch("hub", "check", str(copy)), "lm_head.weight 304x32", code=81)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "lama"}, "lama llama"),
        ({"hidden_act": "relu"}, "hidden_act relu silu"),
        ({"attn_logit_cap": 3.0}, "attn_logit_cap 3.0"),
        ({"hidden_size": "wide"}, "hidden_size wide"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 10000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers from 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings at least 1"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers each of 2"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval=0 at least 1"),
    ],
)
def test_keys_that_are_not_understood(copy: Path, keys: dict[str, Any], named: str) -> None:
    edit_config(copy, **keys)
    refused(launch("hub", "check", str(copy)), f"config.json {named}", code=81)


def test_a_family_of_another_package(extras: Path, copy: Path) -> None:
    edit_config(copy, model_type="acme")
    ended = launch("hub", "check", str(copy))
    assert ended.code == 0 and "acme (AcmeForCausalLM)" in ended.out and "each has its place" in ended.out, ended


def test_other_model_or_vocabulary_than_the_run(copy: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = (f"root={tmp_path}", f"init=hf:{copy}", "name=x")
    refused(launch(str(tiny_data / "tiny.py"), *words, "model.norm.eps=1e-6"), "model.norm.eps published", code=81)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other = sorted(vocab)[40:42]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(launch(str(tiny_data / "tiny.py"), *words), f"{copy} tokenizer", code=81)


def test_export_overwrites_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("mine")
    refused(launch("hub", "export", str(trained), str(tmp_path)), f"{tmp_path} a.txt", code=81)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(launch("hub", "export", str(trained), str(tmp_path / "new")), "free", code=82)
    assert not list((tmp_path / "new").glob("*.safetensors"))


def test_model_that_no_family_can_say(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = (f"root={tmp_path}", "name=odd", "train.steps=1", "track.console=off", "model.residual_multiplier=0.3")
    assert launch(str(tiny_data / "tiny.py"), *words, "model.scale_embeddings=true").code == 0
    refused(launch("hub", "export", str(tmp_path / "odd"), str(tmp_path / "out")), "model.", code=81)


def test_run_goes_on_without_its_folder(tiny_data: Path, copy: Path, tmp_path: Path) -> None:
    words = (str(tiny_data / "tiny.py"), f"root={tmp_path}", "name=on", f"init=hf:{copy}", "track.console=off")
    assert launch(*words, "train.steps=5", "checkpoint.save_every=5").code == 0
    copy.rename(tmp_path / "moved")
    ended = launch(*words, "train.steps=5", "checkpoint.save_every=5")
    assert ended.code == 0, ended
    assert launch("evaluate", str(tmp_path / "on")).code == 0


def test_one_export_at_a_time_and_killed_before_its_end(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".unfinished").mkdir(parents=True)
    with (out / ".unfinished/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(launch("hub", "export", f"hf:{exported}", str(out)), f"{out} another", code=81)
    assert launch("hub", "export", f"hf:{exported}", str(out)).code == 0
    assert not (out / ".unfinished").exists()
    receipt = json.loads((out / "export.json").read_text())
    for name in ("model.safetensors", "../escaped"):
        (out / "export.json").write_text(json.dumps(receipt | {"files": {name: {"bytes": 1, "sha256": ""}}}))
        refused(launch("hub", "check", str(out), "--hashes"), f"{out}", code=78)


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"rope_theta": 10**400}, 81),
        ({"eos_token_id": 2**70}, 78),
        ({"eos_token_id": 1.5}, 78),
    ],
)
def test_values_that_no_model_has(copy: Path, keys: dict[str, Any], code: int) -> None:
    edit_config(copy, **keys)
    refused(launch("hub", "check", str(copy)), "config.json", code=code)


def test_tokenizer_of_an_export_begins_texts_as_the_run_did(copy: Path) -> None:
    tokenizer = JsonTokenizer.from_bytes((copy / "tokenizer.json").read_bytes(), "<|endoftext|>", "tokenizer.json")
    for wanted in ((), (0,), (7, 0)):
        changed = Backend.from_str(beginning_with(wanted, tokenizer).decode())
        assert changed.encode("").ids == [*wanted]
        assert changed.encode("w1 w7").ids == [*wanted, *tokenizer.encode("w1 w7")]


# Buckets, and who reads what


@pytest.mark.slow(15)
def test_two_processes_write_into_a_bucket_and_read_it(s3: Server, exported: Path) -> None:
    url = s3.new_url()
    with several("hub", "export", f"hf:{exported}", url) as children:
        assert [each.code for each in all_ended(children)] == [0, 0]
    assert s3.get(f"{url}/model.safetensors") == (exported / "model.safetensors").read_bytes()
    ended = launch("hub", "check", f"hf:{url}", "--hashes")
    assert ended.code == 0, ended
    texts = [launch("sample", f"hf:{source}", PROMPT, *GREEDY).out for source in (exported, url)]
    assert texts[0] == texts[1] and PROMPT in texts[0]


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(replica=2, fsdp=4)])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-3-4b", "mixtral-8x7b", "gpt-oss-20b", "phi-4"])
def test_four_hosts_read_a_quarter_each(name: str, mesh: MeshConfig) -> None:
    model, devices = shape(name), jax.devices()
    found, _ = family_of(model)
    shapes = param_shapes(model)
    partitioner = Partitioner(rules=ShardingRules(), mesh=mesh, platform="cpu", compute_dtype=jnp.dtype("float32"))
    specs = leaves_by_name(nnx.to_pure_dict(nnx.split(model.build(partitioner))[1]))
    made = make_mesh(mesh, devices)
    read, total = [0] * 4, 0
    for binding in found.bindings(model, shapes):
        for part in binding.parts[:1] if binding.parts[0].layout.alternates else binding.parts:
            target = NamedSharding(made, partitioner.stored_spec(part.path, specs[part.path]))
            start, stop = part.layout.rows(0, part.layout.cut_size)
            rows = (*binding.lead, stop - start, *part.layout.shape[1:])
            sharding = NamedSharding(made, file_order(target, binding.lead, part.layout).read)
            indices = sharding.devices_indices_map(rows)
            for host in range(4):
                own = {str(indices[device]) for device in devices[2 * host : 2 * host + 2]}
                read[host] += len(own) * math.prod(sharding.shard_shape(rows))
            total += math.prod(rows)
    assert max(read) <= 1.1 * total / 4, [each / total for each in read]


def test_weights_of_the_hub_and_behind_a_url(exported: Path) -> None:
    """In a process of its own: the client of the Hub reads HF_ENDPOINT once."""
    with HubServer(exported).running() as server:
        env = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
        server.errors = iter([None, None, None, 503])
        child = start("sample", f"hf:{REPOSITORY}", PROMPT, *GREEDY, "--devices", "cpu:2", env=env)
        text = ended(child)
        assert text.code == 0 and "503" not in text.err, text
        assert text.out == launch("sample", f"hf:{exported}", PROMPT, *GREEDY).out
        weights = (exported / "model.safetensors").stat().st_size
        assert server.read_bytes < 2 * weights  # not the whole file for each range
        missing = ended(start("hub", "check", "hf:lab/nothing", env=env))
        refused(missing, "lab/nothing HF_TOKEN", code=78)
        plain = launch("hub", "check", f"hf:{server.url}/plain")
        assert plain.code == 0 and "each has its place" in plain.out, plain
    refused(launch("evaluate", f"hf:{exported}"), "--tasks", code=81)
