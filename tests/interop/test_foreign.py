"""Folders by strangers: what they may leave out or say twice, and how they hang, crash or fool nobody."""

import errno
import gc
import itertools
import json
import os
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import aiohttp.client
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.http import HTTPFileSystem
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.hf_file_system import HfFileSystemFile
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfra.cli.hub import export
from jaxinfra.cli.main import parse_command_line
from jaxinfra.hub.published_model import open_published, param_shapes
from jaxinfra.inference.trained_params import TrainedParams, load_params
from jaxinfra.interop import folder as folders
from jaxinfra.interop import safetensors, writing
from jaxinfra.interop.folder import open_folder
from jaxinfra.interop.safetensors import Weights
from jaxinfra.parallel.spec import leaves_by_name
from tests.interop.conftest import content, read_tensors, write_tensors
from tests.refusals import names, refused
from tests.servers.hub import REPOSITORY, HubServer
from tests.tiny_run import Ended, launch

VOCAB = 16
KEYS = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with tied embeddings and a tokenizer whose token 0 is `<end>`, others `w1` to `w15`."""
    out = tmp_path / "model"
    out.mkdir()
    write_config(out)
    model, rng = open_published(str(out)), np.random.default_rng(0)
    bindings = model.family.bindings(model.config, param_shapes(model.config))
    write_tensors(out, {name: rng.normal(size=each.shape).astype("f4") for each in bindings for name in each.names})
    write_tokenizer(out, "<end>")
    return out


def write_config(folder: Path, **keys: Any) -> None:
    found = {name: value for name, value in (KEYS | keys).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(found))


def write_tokenizer(folder: Path, end: str) -> None:
    words = [end, *(f"w{index}" for index in range(1, VOCAB))]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(end, special=True)])
    (folder / "tokenizer.json").write_text(backend.to_str())


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


# Servers


@contextmanager
def serving(folder: Path, errors: Iterator[int | None]) -> Iterator[HubServer]:
    """Serves a folder over HTTP, and as a repository of the Hub, after these errors."""
    HTTPFileSystem.clear_instance_cache()
    HfFileSystem.clear_instance_cache()
    with HubServer(folder).running() as server, pytest.MonkeyPatch.context() as patch:
        server.errors = errors
        patch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setenv("JAXINFRA_STORAGE_RETRY_S", "2")
        yield server


@pytest.fixture(params=["plain", "hub"])
def source(request: pytest.FixtureRequest) -> Callable[[HubServer], str]:
    return lambda server: f"hf:{server.url}/plain" if request.param == "plain" else f"hf:{REPOSITORY}"


def test_busy_server_is_asked_again(folder: Path, source: Callable[[HubServer], str]) -> None:
    with serving(folder, iter([503, 503, 429, 500])) as server:
        ended = launch("hub", "check", source(server))
        assert ended.code == 0 and not list(server.errors), ended


def test_a_connection_that_another_thread_has_closed_is_opened_again(folder: Path) -> None:
    """The Hub's client closes those of all threads."""
    closed = iter([OSError(errno.EBADF, os.strerror(errno.EBADF))])
    with serving(folder, iter(())), pytest.MonkeyPatch.context() as patch:
        fetch = HfFileSystemFile._fetch_range

        def fetch_second(*words: Any) -> bytes:
            for error in closed:
                raise error
            return fetch(*words)

        patch.setattr(HfFileSystemFile, "_fetch_range", fetch_second)
        assert launch("hub", "check", f"hf:{REPOSITORY}").code == 0 and not list(closed)


def test_server_that_stays_busy(folder: Path, source: Callable[[HubServer], str]) -> None:
    with serving(folder, itertools.repeat(503)) as server:
        os.environ["JAXINFRA_STORAGE_RETRY_S"] = "0.2"
        refused(launch("hub", "check", source(server)), "503", code=82)


def test_server_that_wants_a_login(folder: Path, source: Callable[[HubServer], str]) -> None:
    with serving(folder, itertools.repeat(401)) as server:
        refused(launch("hub", "check", source(server)), "401 HF_TOKEN", code=81)


def test_server_that_forbids_what_is_missing(folder: Path) -> None:
    with serving(folder, iter(())) as server:
        server.missing = 403
        ended = launch("hub", "check", f"hf:{server.url}/plain")
        assert ended.code == 0, ended
        refused(launch("hub", "check", f"hf:{server.url}/another"), "403", code=81)


def test_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/plain"
        refused(launch("hub", "check", f"hf:{url}"), url, code=82)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", url.removesuffix("/plain"))
            patch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.2")
            HfFileSystem.clear_instance_cache()
            refused(launch("hub", "check", "hf:out/none"), "hf:out/none no folder out/none here", code=82)


def test_a_mistyped_folder_is_no_repository_of_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(launch("hub", "check", "hf:model/nope"), "hf:model/nope: no such folder model hf:hf://model/nope", code=81)
    refused(launch("sample", "hf:model/nope", "A"), "hf:model/nope: no such folder", code=81)
    for name in ("out/a--b", "out/a..b", "out/-a", "out/nope/x", "out/a b", "../x", "nope"):
        refused(launch("hub", "check", name), f"{name}: no such folder ORG/NAME", code=81)
    (tmp_path / "lab").mkdir()
    with serving(folder, iter(())):
        refused(launch("hub", "check", REPOSITORY), f"hf:hf://{REPOSITORY}", code=81)
        assert launch("hub", "check", f"hf:hf://{REPOSITORY}").code == 0


def test_a_redirect_to_another_host_has_no_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of what the Hub's interface lists, nor of files; servers that are not the Hub get none at all."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HubServer(folder).running() as other, serving(folder, iter(())) as server:
        server.moved_to = other.url.replace("127.0.0.1", "localhost")
        ended = launch("hub", "check", f"hf:{REPOSITORY}")
        assert ended.code == 0 and other.read_bytes > 0, ended
        assert "Bearer hf_secret" in server.authorizations and {*other.authorizations} == {None}
        server.moved_to, server.authorizations = None, []
        assert launch("hub", "check", f"hf:{server.url}/plain").code == 0
        assert {*server.authorizations} == {None}


def test_a_slow_answer_that_goes_on_is_read(
    folder: Path, source: Callable[[HubServer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, and a range of it: the time without a byte is bounded, and not that of the answer."""
    (folder / "slow").write_bytes(content := bytes(range(250)) * 48)
    monkeypatch.setattr(folders, "_ANSWER_S", 0.8)
    monkeypatch.setattr(folders, "_PIECE_BYTES", 2000)
    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=1))
    with serving(folder, iter(())) as server:
        opened, out = open_folder(source(server)), np.zeros(len(content), np.uint8)
        assert opened.exists("slow")  # and whose repository it is
        server.bytes_per_s = 10_000
        assert opened.read_or_none("slow") == content
        opened.read_into("slow", 0, out)
        assert out.tobytes() == content


@pytest.mark.parametrize("how", ["silent", "trickle", "flood"])
def test_answer_that_never_ends(
    folder: Path, source: Callable[[HubServer], str], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a config, which is read as a whole, and of weights, of which a range is."""
    monkeypatch.setattr(folders, "_ANSWER_S", 600 if how == "flood" else 0.5)
    monkeypatch.setattr(folders, "_MAX_BYTES", 1 << 20)
    with serving(folder, iter(())) as server:
        server.endless = {"config.json": how}
        where = source(server).removeprefix("hf:")
        refused(launch("hub", "check", f"hf:{where}"), where, code=78 if how == "flood" else 82)
        if how != "flood":
            server.endless = {"model.safetensors": how}
            refused(launch("hub", "check", f"hf:{where}"), where, code=82)
    # A client that was given up has its connection until the server ends; nobody is left to close it.
    for thread in threading.enumerate():
        if thread.name == "answer":
            thread.join(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


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
