"""Following a stream stores every record once, whenever the process is killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.store.versions import list_versions
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, refused
from tests.servers.kafka import send
from tests.stores import documents, recipe_file
from tests.tiny_run import launch

COMMAND = [sys.executable, "-m", "launch", "data", "prepare"]
DOCUMENTS = [{"text": f"{number} " + "é x" * (number % 40)} for number in range(400)]
LINES = "".join(json.dumps(document) + "\n" for document in DOCUMENTS).encode()


@pytest.fixture
def recipe(tmp_path):
    """Returns a function that writes a recipe file."""
    return lambda source="Stdin()", more="", store=tmp_path / "store": recipe_file(tmp_path, store, source, more)


def run(*arguments, stdin=LINES, code=0):
    done = subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, timeout=600)
    assert done.returncode == code, done
    return done.stdout.decode() + done.stderr.decode()


def assert_each_once(place):
    assert sorted(documents(place)) == sorted(document["text"] for document in DOCUMENTS)


def test_standard_input_becomes_a_store_and_continues(recipe, tmp_path):
    path = recipe()
    assert f"sealed: {tmp_path}/store/" in run(path, "--follow")
    assert_each_once(tmp_path / "store")
    assert "was there: " in run(path, "--follow")
    (version,) = list_versions(ObjectStore(tmp_path / "store"))
    shutil.rmtree(tmp_path / "store" / version.fingerprint)
    assert "sealed" in run(path, "--follow"), "what was taken away is made again"
    assert [each.fingerprint for each in list_versions(ObjectStore(tmp_path / "store"))] == [version.fingerprint]
    assert "error: stdin: " in run(path, "--follow", stdin=LINES[1:], code=78)
    assert "sealed" in run(path, "--follow", stdin=LINES + b'{"text": "one more"}\n')
    assert len(list_versions(ObjectStore(tmp_path / "store"))) == 2
    assert sorted(documents(tmp_path / "store")) == sorted([*(each["text"] for each in DOCUMENTS), "one more"])


def test_a_damaged_or_missing_part_is_an_error(recipe, tmp_path):
    path = recipe()
    run(path, "--follow")
    first, second = sorted((tmp_path / "store").glob(".stream/*/0*.npz"))[:2]
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    assert f"error: {first}: is damaged" in run(path, "--follow", stdin=LINES + b'{"text": "more"}', code=78)
    first.unlink()
    names(run(path, "--follow", code=78).strip(), f"error: {first}: missing delete {first.parent}")
    assert second.exists()


def test_seal_every_makes_versions_while_following(recipe, tmp_path):
    out = run(recipe(), "--follow", "--seal-every", "4000")
    assert out.count("sealed: ") == len(list_versions(ObjectStore(tmp_path / "store"))) > 2
    assert_each_once(tmp_path / "store")


def test_a_version_waits_until_neither_split_is_empty(recipe, tmp_path):
    little = b'{"text": "alone"}\n'
    with started(recipe(), "--seal-every", "1", stdin=subprocess.PIPE) as child:
        child.stdin.write(little)
        child.stdin.flush()
        while not parts_in(tmp_path / "store"):
            time.sleep(0.05)
        child.stdin.write(LINES)
        child.stdin.close()
        out = child.stdout.read().decode()
    assert child.returncode == 0, out
    assert out.count("sealed: ") == len(list_versions(ObjectStore(tmp_path / "store"))) > 2
    assert sorted(documents(tmp_path / "store")) == sorted(["alone", *(document["text"] for document in DOCUMENTS)])
    refused = run(recipe(store=tmp_path / "other"), "--follow", "--seal-every", "1", stdin=little, code=81)
    assert "puts none of 1 records in the validation split" in refused


def test_bad_records_of_a_stream_fail_or_are_skipped(recipe, tmp_path):
    lines = LINES + b"{broken\n"
    assert "stdin:401: not JSON" in run(recipe(), "--follow", stdin=lines, code=78)
    run(recipe(more="on_bad='skip'"), "--follow", stdin=lines)
    assert_each_once(tmp_path / "store")
    assert TokenStore.open(tmp_path / "store").manifest.counts.skipped == 1


def test_wrong_uses_of_follow_are_refused(recipe, monkeypatch):
    kafka, files = "source=kafka", ("source=jsonl", "source.root=x")
    for named, *arguments in (
        ("source=stdin: --follow",),
        ("--seal-every 5: --follow", "--seal-every", "5"),
        ("--workers 2:", "--follow", "--workers", "2"),
        ("--engine ray:", "--follow", "--engine", "ray"),
        ("--until-idle 0.0: above 0", "--follow", "--until-idle", "0"),
        ("tokenizer use", "--follow", "tokenizer=train_bpe"),
        ("bootstrap_servers= HOST:PORT", "--follow", kafka, "source.topic=t"),
        ("topic= use", "--follow", kafka),
        ("source=Jsonl: --follow", "--follow", *files),
    ):
        refused(launch("data", "prepare", recipe(), *arguments), named)
    with open("/dev/null") as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        refused(launch("data", "prepare", recipe(), "--follow"), "store= empty: 0 records")
    monkeypatch.setattr("sys.stdin", None)
    refused(launch("data", "prepare", recipe(), "--follow"), "stdin:", code=82)


def started(path, *arguments, **options):
    return subprocess.Popen(
        [*COMMAND, path, "--follow", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def parts_in(place: Path) -> int:
    return len(list(place.glob(".stream/*/0*.npz")))


def signalled(number, store, path, content):
    """Sends a signal to a command that has committed a part, and returns what it prints."""
    with started(path, stdin=subprocess.PIPE) as child:
        child.stdin.write(content)
        child.stdin.flush()
        while not parts_in(store):
            time.sleep(0.05)
        child.send_signal(number)
        out = child.stdout.read().decode()
        child.stdin.close()
    assert child.returncode == 75 and f"{number.name}: all that has arrived is kept" in out and "error:" not in out
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_seals_a_version_and_asks_to_start_again(recipe, tmp_path, number):
    path = recipe()
    assert "sealed: " in signalled(number, tmp_path / "store", path, LINES)
    found = documents(tmp_path / "store")
    assert 0 < len(found) == len(set(found)) and set(found) <= {document["text"] for document in DOCUMENTS}
    run(path, "--follow")
    assert_each_once(tmp_path / "store")


def test_a_signal_before_there_is_enough_to_seal_does_not_blame_the_recipe(recipe, tmp_path):
    little = json.dumps({"text": "alone " * 200}).encode() + b"\n"
    assert "no version" in signalled(signal.SIGTERM, tmp_path / "store", recipe(), little)
    assert parts_in(tmp_path / "store") == 1


@pytest.mark.slow
def test_every_line_is_stored_once_whenever_the_process_is_killed(recipe, tmp_path):
    rng = random.Random(0)
    path, store, kills = recipe(), tmp_path / "store", 0
    while kills < 8:
        with started(path, stdin=subprocess.PIPE) as child:
            begun, wanted = parts_in(store), rng.randrange(5)
            for start in range(0, len(LINES), 997):
                child.stdin.write(LINES[start : start + 997])
                child.stdin.flush()
                time.sleep(0.01)
                if parts_in(store) > begun + wanted:
                    break
            child.kill()
            kills += 1
        assert child.returncode == -signal.SIGKILL
        if kills > 1:
            assert parts_in(store) > 0
    run(path, "--follow")
    assert_each_once(store)


@pytest.mark.slow
def test_every_message_is_stored_once_whenever_the_process_is_killed(recipe, tmp_path, kafka_servers, topic):
    rng = random.Random(1)
    path, store = recipe(f"Kafka(bootstrap_servers={kafka_servers!r}, topic={topic!r})"), tmp_path / "store"
    quarter = len(DOCUMENTS) // 4
    for turn in range(8):
        if turn < 4:
            send(kafka_servers, topic, DOCUMENTS[turn * quarter : (turn + 1) * quarter])
        begun = parts_in(store)
        with started(path, "--seal-every", "2000") as child:
            deadline = time.monotonic() + 20
            while parts_in(store) <= begun + rng.randrange(3) and time.monotonic() < deadline and turn < 5:
                time.sleep(0.02)
            time.sleep(rng.random() * 0.2)
            child.kill()
        assert child.returncode == -signal.SIGKILL
    assert parts_in(store) > 4
    out = run(path, "--follow", "--until-idle", "2")
    assert "sealed" in out or "was there" in out
    assert_each_once(store)


def test_a_topic_is_followed_until_it_is_idle(recipe, tmp_path, kafka_servers, topic):
    send(kafka_servers, topic, [*DOCUMENTS, b"{broken"])
    source = f"Kafka(bootstrap_servers={kafka_servers!r}, topic={topic!r})"
    run(recipe(source, "on_bad='skip'"), "--follow", "--until-idle", "1")
    assert_each_once(tmp_path / "store")
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert (manifest.counts.records, manifest.counts.skipped) == (len(DOCUMENTS) + 1, 1)


def test_a_stream_is_sealed_into_a_bucket(recipe, s3, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = s3.new_url()
    run(recipe(store=url), "--follow")
    assert_each_once(url)
    assert "was there: " in run(recipe(store=url), "--follow")
