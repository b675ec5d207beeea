"""Models of servers: how they are slow, busy, closed or without an end, and what is said then."""

import errno
import gc
import itertools
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp.client
import numpy as np
import pytest
from fsspec.implementations.http import HTTPFileSystem
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.hf_file_system import HfFileSystemFile

from jaxinfra.interop import folder as folders
from jaxinfra.interop.folder import open_folder
from tests.interop.tiny_llama import tiny_llama
from tests.refusals import refused
from tests.servers.hub import REPOSITORY, HubServer
from tests.tiny_run import launch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


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
