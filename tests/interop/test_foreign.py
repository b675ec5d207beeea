"""Folders by strangers: what they may leave out or say twice, and how they crash or fool nobody."""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import jax.numpy as jnp
import pytest

from jaxinfra.cli.hub import export
from jaxinfra.cli.main import parse_command_line
from jaxinfra.hub.published_model import open_published
from jaxinfra.inference.trained_params import TrainedParams, load_params
from jaxinfra.interop import safetensors, writing
from jaxinfra.interop.folder import open_folder
from jaxinfra.interop.safetensors import Weights
from jaxinfra.parallel.spec import leaves_by_name
from tests.interop.conftest import content, read_tensors, write_tensors
from tests.interop.tiny_llama import EMBEDDING, HEAD, VOCAB, tiny_llama, write_config, write_tokenizer
from tests.refusals import names, refused
from tests.tiny_run import Ended, launch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


def check(folder: Path) -> Ended:
    return launch("hub", "check", f"hf:{folder}")


# Embeddings that are tied to a head of its own


def test_head_beside_its_embedding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = read_tensors(folder)
    for head in (arrays[EMBEDDING], arrays[EMBEDDING].astype("f8")):
        write_tensors(folder, arrays | {HEAD: head})
        assert check(folder).code == 0
    other = arrays[EMBEDDING].copy()
    other[-1, -1] += 1
    for head in (other, arrays[EMBEDDING][:-1]):
        write_tensors(folder, arrays | {HEAD: head})
        refused(check(folder), f"{EMBEDDING} {HEAD} tie_word_embeddings")
    write_tensors(folder, arrays | {HEAD: other})
    refused(launch("sample", f"hf:{folder}", "w1", "--max-tokens", "1"), f"{EMBEDDING} {HEAD} tie_word_embeddings")
    write_config(folder, tie_word_embeddings=False)
    assert check(folder).code == 0
    # Each of three processes reads its blocks of rows, 4 of 16.
    monkeypatch.setattr(safetensors, "_COMPARED_ROWS", 4)
    read, found = [], []
    for part in range(3):
        weights = Weights(open_folder(str(folder)))
        found.append(weights.equal(EMBEDDING, HEAD, part, 3))
        read.append(weights.bytes_read)
    assert found == [False, True, True] and read == [2 * rows * 16 * 4 for rows in (8, 4, 4)]


# Tokens that end a text


@pytest.mark.parametrize(
    ("config", "generation", "ends", "document"),
    [
        (3, None, (3,), "w3"),
        ([3, 5], None, (3, 5), "w3"),
        (None, 3, (3,), "w3"),
        (None, [5, 3], (5, 3), "w5"),
        (3, [5, 3], (5, 3), "w3"),
        (3, "absent", (), "w3"),  # as transformers: the file counts if there is one
    ],
)
def test_tokens_that_end_a_text(folder: Path, config: Any, generation: Any, ends: Any, document: str) -> None:
    write_config(folder, eos_token_id=config)
    if generation is not None:
        keys = {} if generation == "absent" else {"eos_token_id": generation}
        (folder / "generation_config.json").write_text(json.dumps(keys))
    model = open_published(f"hf:{folder}")
    assert model.end_ids() == ends and model.tokenizer().end_of_document == document


def test_each_of_a_list_ends_a_text(folder: Path) -> None:
    words = ("sample", f"hf:{folder}", "", "--temperature", "9", "--max-tokens", "9")
    text = re.findall(r"w\d+", launch(*words).out)
    end = next(word for word in text if word != text[0])
    write_config(folder, eos_token_id=[0, int(end[1:])])
    assert re.findall(r"w\d+", launch(*words).out) == text[: text.index(end)]
    write_config(folder, eos_token_id=0)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}))
    assert re.findall(r"w\d+", launch(*words).out) == text[: text.index(end)]


def test_no_token_ends_a_text(folder: Path) -> None:
    for value in (None, []):
        write_config(folder, eos_token_id=value)
        ended = check(folder)
        assert ended.code == 0 and "eos_token_id" in ended.out, ended
    refused(launch("sample", f"hf:{folder}", "w1"), "config.json eos_token_id", code=78)


# What is exported again


def exported(folder: Path, out: Path, *options: str) -> dict[str, bytes]:
    ended = launch("hub", "export", f"hf:{folder}", str(out), *options)
    assert ended.code == 0, ended
    return content(out)


@pytest.mark.parametrize(("matrices", "norms"), [("float16", "float16"), ("bfloat16", "float32")])
def test_export_keeps_the_dtypes_of_a_folder(
    folder: Path, tmp_path: Path, matrices: str, norms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And loads no parameter in a longer one."""
    arrays = read_tensors(folder)
    kept = {name: array.astype(jnp.dtype(matrices if array.ndim > 1 else norms)) for name, array in arrays.items()}
    write_tensors(folder, kept)
    loaded = list[TrainedParams]()
    monkeypatch.setattr(export, "load_params", lambda *words: loaded.append(load_params(*words)) or loaded[-1])
    assert exported(folder, tmp_path / "out") == content(folder)
    params = leaves_by_name(loaded[0].params)
    assert {("norm" in path, str(leaf.dtype)) for path, leaf in params.items()} == {(False, matrices), (True, norms)}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == matrices
    exported(folder, tmp_path / "asked", "--dtype", "float32")
    found = read_tensors(tmp_path / "asked")
    assert all(array.dtype == "float32" and (array == kept[name].astype("f4")).all() for name, array in found.items())


def test_shards_are_those_of_transformers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the disk was full at the third file nothing looks complete; the same command goes on."""
    out, words = tmp_path / "out", ("--max-shard-size", "2KB")
    monkeypatch.setenv("JAXINFRA_FAIL", "export:0:2:enospc")
    refused(launch("hub", "export", f"hf:{folder}", str(out), *words), str(out), code=82)
    refused(check(out), f"{out} export", code=78)
    assert not [path.name for path in out.iterdir() if path.suffix == ".json" or "-00003-of-" in path.name]
    monkeypatch.delenv("JAXINFRA_FAIL")
    assert exported(folder, out, *words) == content(folder)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names, arrays = sorted(path.name for path in out.glob("*.safetensors")), read_tensors(out)
    assert names == [f"model-{number:05}-of-{len(names):05}.safetensors" for number in range(1, len(names) + 1)]
    assert {*index["weight_map"]} == {*arrays} and sorted({*index["weight_map"].values()}) == names
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    for name in names:
        sizes = [arrays[tensor].nbytes for tensor, file in index["weight_map"].items() if file == name]
        assert sum(sizes) <= 2000 or len(sizes) == 1
    (out / names[1]).unlink()
    refused(check(out), f"{names[1]} download", code=78)


def test_an_export_that_was_killed_before_it_had_a_plan_is_begun_again(folder: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").joinpath(".unfinished").mkdir(parents=True)
    (out / ".unfinished/lock").touch()
    assert exported(folder, out) == content(folder) and not (out / ".unfinished").exists()


@pytest.mark.parametrize("size", ["5XB", "0GB", "GB"])
def test_sizes_of_shards_that_are_none(folder: Path, tmp_path: Path, size: str) -> None:
    ended = launch("hub", "export", f"hf:{folder}", str(tmp_path / "out"), "--max-shard-size", size)
    refused(ended, f"--max-shard-size {size} 5GB")


def test_sizes_are_those_of_transformers() -> None:
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "2GiB": 2**31, "1.5kb": 1500, "20": 20, "1 TB": 10**12}
    for text, size in sizes.items():
        words = ["hub", "export", "runs/x", "out", "--max-shard-size", text]
        assert parse_command_line(words).max_shard_size == size
    assert parse_command_line(["hub", "export", "runs/x", "out"]).max_shard_size == writing.MAX_FILE_BYTES


def test_destination_is_refused_before_weights_are_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "load_params", lambda *arguments: pytest.fail("has loaded the weights"))
    file = tmp_path / "file"
    file.write_text("mine")
    for out, named, code in (
        (file, f"{file} new folder", 81),
        (file / "x", f"{file} new folder", 81),
        (folder, f"{folder} config.json new folder", 81),
        (Path("/proc/x"), "/proc/x name a folder", 82),
    ):
        refused(launch("hub", "export", f"hf:{folder}", str(out)), named, code=code)
    assert file.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


# What is no file


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_fifo_in_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with written(folder / name):
        refused(check(folder), f"{name} FIFO", code=78)


@contextmanager
def written(fifo: Path) -> Iterator[None]:
    """Gives nothing to whoever reads a FIFO, so that a program that does so does not hang the test."""
    is_over = Event()

    def write() -> None:
        while not is_over.is_set():
            os.close(os.open(fifo, os.O_WRONLY))  # waits for a reader

    thread = Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        while thread.is_alive():
            os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
            thread.join(0.01)


def test_socket_device_and_folder_in_place_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    monkeypatch.chdir(folder)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
        refused(check(folder), path.name, code=78)
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(check(folder), path.name, code=78)
    path.unlink()
    path.mkdir()
    refused(check(folder), path.name, code=78)


# What is quoted


ESCAPE = "\x1b]0;title\x07\x1b[2J\u202e"
LONG = "x" * 100_000


def quotes(ended: Ended, *named: str, code: int) -> None:
    """Asserts that a command refuses in one short line, without what a terminal acts on."""
    line = refused(ended, *named, code=code)
    assert line.isprintable() and len(line) < 1000, line[:2000]


@pytest.mark.parametrize("odd", [ESCAPE, LONG], ids=["escape", "long"])
def test_pieces_of_files_are_escaped_and_short(folder: Path, odd: str) -> None:
    start = "x" * 50 if odd is LONG else r"\x1b]0;title\x07\x1b[2J\u202e"
    for keys in (
        {"model_type": odd},
        {"hidden_act": odd},
        {"hidden_size": odd},
        {"num_hidden_layers": [odd]},
        {"rope_scaling": {"rope_type": odd, "factor": 2.0}},
        {"quantization_config": {"quant_method": odd}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [odd]}},
        {"layer_types": [odd]},
        {odd: 1},
        {"new": odd},
    ):
        write_config(folder, **keys)
        quotes(check(folder), "config.json", start, code=81)
    write_config(folder)
    arrays = read_tensors(folder)
    write_tensors(folder, arrays | {odd: arrays[EMBEDDING]})
    quotes(check(folder), "model.safetensors", start, code=78)
    index = {"weight_map": dict.fromkeys([*arrays, odd], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tensors(folder, arrays)
    quotes(check(folder), "index.json", start, code=78)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: odd}}))
    quotes(check(folder), "index.json", code=78)
    (folder / "model.safetensors.index.json").unlink()
    entry = {"x": {"dtype": odd, "shape": [1], "data_offsets": [0, 4]}}
    (folder / "model.safetensors").write_bytes(header(json.dumps(entry)) + bytes(4))
    quotes(check(folder), "model.safetensors", start, code=78)
    write_tensors(folder, arrays)
    write_tokenizer(folder, odd)
    ended = check(folder)
    assert ended.code == 0 and "\x1b" not in ended.out and len(ended.out) < 5000
    names(" ".join(ended.out.split()), start[:20])


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


# What is said twice


def test_tensor_that_is_there_twice(folder: Path) -> None:
    arrays, path = read_tensors(folder), folder / "model.safetensors"
    size = arrays[EMBEDDING].nbytes
    twice = ",".join(
        f'"x.norm":{{"dtype":"F32","shape":[{VOCAB},16],"data_offsets":[{start},{start + size}]}}'
        for start in (0, size)
    )
    path.write_bytes(header(f"{{{twice}}}") + bytes(2 * size))
    refused(check(folder), f"{path.name} x.norm twice", code=78)
    rest = {name: array for name, array in arrays.items() if name != EMBEDDING}
    write_tensors(folder, arrays, "a.safetensors")
    write_tensors(folder, {EMBEDDING: arrays[EMBEDDING]}, "b.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(rest, "a.safetensors") | {EMBEDDING: "b.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(index)
    refused(check(folder), f"{EMBEDDING} a.safetensors b.safetensors", code=78)


def test_key_that_is_there_twice(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"vocab_size": 32,', 1))
    refused(check(folder), "config.json vocab_size twice", code=78)
