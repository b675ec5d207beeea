"""Stores in buckets are the same bytes as in folders, through faults, and say in one line what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.store.versions import listed
from jaxinfra.errors import DataError, StorageError
from jaxinfra.prepare.prepare import prepare
from jaxinfra.storage.objects import Storage
from tests.prepare.test_prepare import bytes_recipe, contents, lines
from tests.tiny_run import launch, refused
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return lines(tmp_path_factory.mktemp("lines") / "source", 300)


@pytest.fixture(scope="module")
def local(source, tmp_path_factory):
    """The same store in a folder."""
    return prepare(bytes_recipe(source, tmp_path_factory.mktemp("store") / "store"), workers=1)


@pytest.fixture
def recipe(server, source, tmp_path):
    return bytes_recipe(source, server.new_url(), work=str(tmp_path / "work"))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.2")


def objects(place: str) -> tuple[dict[str, bytes], dict[str, object]]:
    """As `contents` of a folder."""
    storage = Storage(place)
    found = {name: storage.read(name) for name in storage.names()}
    manifest = json.loads(found.pop("manifest.json"))
    return found, {name: value for name, value in manifest.items() if name not in ("created", "digest", "recipe")}


def assert_same(made, local):
    assert objects(made.path) == contents(Path(local.path))
    here, there = TokenStore.open(local.path), TokenStore.open(made.path)
    for split in ("train", "heldout"):
        tokens = here.manifest.splits[split].tokens
        starts = np.random.default_rng(0).integers(0, tokens - 100, 50)
        np.testing.assert_array_equal(here.read(split, starts, 100), there.read(split, starts, 100))


def test_a_store_in_a_bucket_is_the_same_bytes(recipe, local):
    made = prepare(recipe, workers=1)
    assert made.path.startswith(recipe.store) and made.new
    assert made.manifest.fingerprint == local.manifest.fingerprint
    assert_same(made, local)
    assert not prepare(recipe, workers=1).new
    ended = launch("data", "verify", recipe.store)
    assert ended.code == 0 and "every hash fits" in ended.out, ended


def test_a_server_that_goes_down_leaves_no_version_and_the_next_call_goes_on(server, recipe, local, impatient):
    def stop(progress):
        server.faults.down = progress.stage == "publish"

    with pytest.raises(StorageError, match=rf"^{recipe.store}/"):
        prepare(recipe, workers=1, tell=stop)
    server.faults.clear()
    assert listed(Storage(recipe.store)) == [] == Storage(recipe.store).names()
    stages = []
    made = prepare(recipe, workers=1, tell=lambda progress: stages.append((progress.stage, progress.tokens)))
    assert all(tokens == 0 for _, tokens in stages)  # none was made again
    assert_same(made, local)


def test_a_server_that_goes_down_while_it_is_read_is_one_line(server, recipe, impatient):
    store = TokenStore.open(prepare(recipe, workers=1).path)
    server.faults.down = True
    with pytest.raises(StorageError, match="/train/tokens: .*ABORTED"):
        store.read("train", [0], 100)
    ended = launch("data", "verify", recipe.store)
    refused(ended, rf"{recipe.store}/versions\.json: .*ABORTED.*", code=82)


@pytest.mark.parametrize(
    ("damage", "cause"), [(lambda b: b[:-3], "fewer than .* bytes|bytes, not"), (lambda b: b + b"x", "bytes, not")]
)
def test_an_object_of_another_length_is_found_when_the_store_is_opened(server, recipe, damage, cause):
    made = prepare(recipe, workers=1)
    shard = f"{made.path}/train/tokens/c/0"
    server.put(shard, damage(server.get(shard)))
    with pytest.raises(DataError, match=rf"^{shard}: .*({cause})"):
        TokenStore.open(recipe.store)


def test_a_flipped_bit_is_found_when_it_is_read_and_named_by_verify(server, recipe):
    made = prepare(recipe, workers=1)
    shard = f"{made.path}/train/tokens/c/0"
    content = bytearray(server.get(shard))
    content[1000] ^= 4
    server.put(shard, bytes(content))
    with pytest.raises(DataError, match="train/tokens: "):
        TokenStore.open(recipe.store).read("train", [0], 5000)
    ended = launch("data", "verify", recipe.store)
    assert ended.code == 78 and "train/tokens block 0" in ended.err, ended


RECIPE = """
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.jsonl import Jsonl
from jaxinfra.prepare.tokenizers import Bytes
def config():
    return Corpus(store={store!r}, source=Jsonl(root={root!r}), tokenizer=Bytes(),
                  validation=ByKey(fraction=0.1), work={work!r})
"""


@pytest.fixture
def written(tmp_path, source):
    def write(store):
        path = tmp_path / "recipe.py"
        path.write_text(RECIPE.format(store=store, root=str(source), work=str(tmp_path / "work")))
        return str(path)

    return write


def test_wrong_credentials_are_one_line_and_stand_nowhere(s3, written, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sEcReT-wrong")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sEcReT-token")
    url = s3.new_url()
    for command in (["prepare", written(url)], ["verify", url], ["show", url]):
        ended = launch("data", *command)
        refused(ended, rf"{url}/versions\.json: .*PERMISSION_DENIED.*", code=82)
        assert "sEcReT" not in ended.out + ended.err
    assert all(b"sEcReT" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_right_credentials_stand_nowhere(s3, written, tmp_path):
    url = s3.new_url()
    ended = launch("data", "prepare", written(url), "--workers", "1")
    assert ended.code == 0, ended
    assert s3.secret not in ended.out + ended.err
    place = Storage(url)
    assert all(s3.secret.encode() not in place.read(name) for name in place.names())


def test_credentials_in_the_url_of_a_store_are_refused_and_not_shown(written, tmp_path):
    for url in ("s3://AKIA:sEcReT@bucket/store", "s3://bucket/store?X-Amz-Signature=sEcReT"):
        for command in (["prepare", written(url)], ["verify", url], ["show", url]):
            ended = launch("data", *command)
            refused(ended, r".*s3://\S*bucket/store\S*: .*credentials.*")
            assert "sEcReT" not in ended.out + ended.err


@pytest.mark.slow
def test_a_run_reads_a_bucket_as_it_reads_a_folder(server, tiny, tmp_path):
    assert tiny.launch().code == 0
    expected = tiny.losses()
    store = Storage(server.new_url())
    local = Path(tiny.loaded().data.store)
    store.upload(local, last=["versions.json"])
    server.faults.unavailable = 0.2
    assert tiny.launch(f"data.store={store.url}", "name=elsewhere").code == 0
    assert tiny.losses("elsewhere") == expected
    assert server.faults.fired > 0
    record = b"".join(path.read_bytes() for path in tiny.directory("elsewhere").rglob("*") if path.is_file())
    assert server.secret.encode() not in record and store.url.encode() in record


@pytest.mark.slow
def test_a_server_that_goes_down_ends_a_run_and_its_next_start_goes_on(s3, tiny, impatient, monkeypatch):
    few = "data.prefetch_bytes=5000"
    assert tiny.launch(few).code == 0
    expected = tiny.losses()
    store = Storage(s3.new_url())
    store.upload(Path(tiny.loaded().data.store), last=["versions.json"])
    monkeypatch.setattr("jaxinfra.data.store.arrays.CACHE_BYTES", 0)  # every batch is asked for
    reads = []

    def look(request):
        reads.extend([request] * ("/train/tokens/c/0" in request))
        s3.faults.down = len(reads) > 9

    s3.faults.after = look
    arguments = (f"data.store={store.url}", "name=elsewhere", few)
    refused(tiny.launch(*arguments), rf"{store.url}/\S+: .*ABORTED.*", code=82)
    done = tiny.losses("elsewhere")
    assert 0 < len(done) < len(expected)
    s3.faults.clear()
    assert tiny.launch(*arguments).code == 0
    assert tiny.losses("elsewhere") | done == expected
