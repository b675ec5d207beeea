"""Listing and reading of files, and sources of text files and lines."""

import gzip
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import fsspec
import pytest

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.prepare.sources import text
from jaxinfra.prepare.sources.text import Jsonl, TextFiles, TextLines, zstd
from jaxinfra.storage.files import list_files, list_folders, open_file
from tests.prepare.sources.reading import assert_shards_do_not_matter, bad, found, read_all, shards_of
from tests.refusals import raises

NAMES = ["a.py", "b.txt", "one/a.py", "one/two/a.py", "one/two/b.py", "one-two/.hidden.py", "z [1]/c.py"]


@pytest.fixture(params=["local", "file://", "memory://"])
def root(request, tmp_path):
    """The root of the same files in a folder and in a bucket."""
    if request.param == "memory://":
        root = "memory://bucket/text"
        fs = fsspec.filesystem("memory")
        for name in NAMES:
            fs.pipe(f"/bucket/text/{name}", name.encode())
        fs.pipe("/bucket/other/a.py", b"other")
        yield root
        fs.rm("/bucket", recursive=True)
    else:
        for name in NAMES:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        yield str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


def contents(root, name):
    with open_file(root, name) as file:
        return file.read()


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("**/*", NAMES),
        ("**/*.py", [name for name in NAMES if name != "b.txt"]),
        ("*.py", ["a.py"]),
        ("*/*.py", ["one-two/.hidden.py", "one/a.py", "z [1]/c.py"]),
        ("one/**/*.py", ["one/a.py", "one/two/a.py", "one/two/b.py"]),
        ("one/two/[!a].py", ["one/two/b.py"]),
        ("o*/two/?.py", ["one/two/a.py", "one/two/b.py"]),
        ("one/a.py", ["one/a.py"]),
        ("**/two/**/b.*", ["one/two/b.py"]),
    ],
)
def test_patterns_mean_the_same_in_folders_and_stores(root, pattern, names):
    assert [file.name for file in list_files(root, pattern)] == sorted(names)


def test_files_are_opened_by_name_and_can_seek(root):
    for file in list_files(root, "**/*"):
        with open_file(root, file.name) as stream:
            assert stream.read().decode() == file.name
            assert stream.seek(1) == 1
            assert stream.read().decode() == file.name[1:]
        assert file.size_bytes == len(file.name)
    assert list_folders(root) == ["one", "one-two", "z [1]"]


def test_missing_files_folders_and_matches_have_different_errors(root):
    with raises(ConfigError, "pattern=*.md: "):
        list_files(root, "*.md")
    with raises(ConfigError, "no"):
        list_files(root, "no/*.py")
    with raises(ConfigError, "root= /nowhere: "):
        list_files(f"{root}/nowhere", "*")
    with raises(StorageError, "gone.py: No such file"):
        contents(root, "gone.py")


def test_the_top_of_a_file_system_can_be_a_root(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    below = f"{tmp_path}/*.txt".removeprefix("/")
    assert [file.name for file in list_files("/", below)] == [f"{tmp_path}/a.txt".removeprefix("/")]
    fs = fsspec.filesystem("memory")
    fs.pipe("/top.txt", b"top")
    assert [file.name for file in list_files("memory://", "*.txt")] == ["top.txt"]
    assert contents("memory://", "top.txt") == b"top"
    fs.rm("/top.txt")


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with raises(ConfigError, f"root={tmp_path}/a.txt: file"):
        list_files(str(tmp_path / "a.txt"), "**/*")


def test_a_replaced_file_has_another_stamp(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    (tmp_path / "link.txt").symlink_to(path)
    first = list_files(str(tmp_path), "*.txt")
    assert first == list_files(str(tmp_path), "*.txt")
    os.utime(path, (1, 1))
    second = list_files(str(tmp_path), "*.txt")
    path.write_text("three")
    os.utime(path, (1, 1))
    third = list_files(str(tmp_path), "*.txt")
    for index in (0, 1):  # the file and the link to it
        assert len({first[index].stamp, second[index].stamp, third[index].stamp}) == 3


def test_links_to_folders_and_broken_links_are_ignored(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "nothing.txt").symlink_to(tmp_path / "gone")
    assert [file.name for file in list_files(str(tmp_path), "**/*")] == ["real/a.txt"]


@pytest.fixture
def as_nobody():
    """Drops the rights of root, who may read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_folder_that_cannot_be_listed_is_an_error(as_nobody):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "a.txt").write_text("a")
        (root / "closed" / "deep").mkdir(parents=True)
        (root / "closed.txt").write_text("c")
        (root / "closed.txt").chmod(0)
        (root / "closed").chmod(0)
        try:
            with raises(StorageError, "/closed: Permission denied"):
                list_files(folder, "**/*.txt")
            assert [file.name for file in list_files(folder, "*.txt")] == ["a.txt", "closed.txt"]
            with raises(StorageError, "/closed.txt: Permission denied"):
                contents(folder, "closed.txt")
        finally:
            (root / "closed").chmod(0o700)


@pytest.mark.parametrize("root", ["nothing://bucket", "adl://bucket/x"])
def test_an_unknown_url_scheme_is_refused(root):
    with raises(ConfigError, f"root={root}: {root.partition('://')[0]}://"):
        list_files(root, "*")


def test_a_missing_package_is_named_and_credentials_are_not(monkeypatch):
    def url_to_fs(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)
    with raises(ConfigError, "root=s3://bucket/x: pip install 'jaxinfra[s3]'"):
        list_files("s3://bucket/x", "*")
    with raises(ConfigError, "root=s3://***@bucket/x: credentials environment") as error:
        list_files("s3://key:secret@bucket/x?token=secret", "*")
    assert "secret" not in str(error.value)


def test_text_files_are_documents_keyed_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo é\n".encode())
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"c")
    (tmp_path / "empty.txt").write_bytes(b"")
    source = TextFiles(root=str(tmp_path), pattern="**/*.txt", min_bytes=2)
    assert [shard.name for shard in shards_of(source)] == ["a.txt", "b.txt"]
    assert bad(source) == ["b.txt: not UTF-8 at byte 3"]
    (each,) = assert_shards_do_not_matter(TextFiles(root=str(tmp_path), pattern="a*"), [1, 5])
    assert (each.key, each.location, each.fields) == ("a.txt", "a.txt", {"text": "one\r\ntwo é\n"})
    with raises(ConfigError, "min_bytes=100: 4"):
        shards_of(TextFiles(root=str(tmp_path), pattern="*", min_bytes=100))


def test_stdlib_is_the_running_standard_library():
    names = [shard.name for shard in shards_of(TextFiles(root="stdlib", pattern="**/*.py"))]
    root = Path(sysconfig.get_path("stdlib"))
    own = {"site-packages", "dist-packages", "__pycache__"}
    found = (path.relative_to(root) for path in root.rglob("*.py") if path.stat().st_size)
    assert names == sorted(path.as_posix() for path in found if not own & set(path.parts))


def texts(source, shard_bytes=1 << 60):
    return [each.fields["text"] for each in found(source, shard_bytes)]


@pytest.fixture
def ragged(tmp_path):
    """A folder of lines of every length, some empty, with both line ends, the last one without."""
    rng = random.Random(0)
    rows = ["x" * rng.choice([0, 1, 2, 7, 90]) + "é漢" * rng.randrange(3) for _ in range(40)]
    for name, ends in (("a.txt", ["\n"]), ("b/c.txt", ["\r\n", "\n"])):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        body = "".join(row + rng.choice(ends) for row in rows).removesuffix("\n").removesuffix("\r") + "last"
        path.write_bytes(body.encode())
    return tmp_path


def test_every_line_is_read_once_wherever_files_are_split(ragged):
    records = assert_shards_do_not_matter(TextLines(root=str(ragged)), [1, 2, 3, 10, 100, 1000], most=1000)
    rows = [row for name in ("a.txt", "b/c.txt") for row in (ragged / name).read_bytes().decode().split("\n")]
    assert [each.fields["text"] for each in records] == [row.removesuffix("\r") for row in rows if row.strip("\r")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_have_the_same_records_and_are_not_split(ragged, tmp_path_factory, suffix):
    plain = (ragged / "a.txt").read_bytes()
    root = tmp_path_factory.mktemp("compressed")
    pack = gzip.compress if suffix == ".gz" else zstd.compress
    # Two members, as `cat a.gz b.gz` gives.
    (root / f"a.txt{suffix}").write_bytes(pack(plain[:500]) + pack(plain[500:]))
    source = TextLines(root=str(root))
    assert len(shards_of(source, 10)) == 1
    assert texts(source) == texts(TextLines(root=str(ragged), pattern="a.txt"))
    keys = [each.key.partition("@")[2] for each in found(source)]
    assert keys == [each.key.partition("@")[2] for each in found(TextLines(root=str(ragged), pattern="a.txt"))]


@pytest.mark.parametrize("damage", ["cut", "flip"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_an_error(tmp_path, suffix, damage):
    body = b"".join(b"%d\n" % number for number in range(100_000))
    if suffix == ".gz":
        packed = bytearray(gzip.compress(body))
    else:
        packed = bytearray(zstd.compress(body, options={zstd.CompressionParameter.checksum_flag: 1}))
    if damage == "cut":
        del packed[-10:]
    else:
        packed[len(packed) // 2] ^= 16
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    with raises(DataError, f"a.txt{suffix}: damaged"):
        read_all(TextLines(root=str(tmp_path)))


def test_a_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ufefftwo\n".encode())
    assert texts(TextLines(root=str(tmp_path))) == ["one", "\ufefftwo"]
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "one"}\n'.encode())
    assert texts(Jsonl(root=str(tmp_path))) == ["one"]


def test_a_line_too_long_is_bad_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_RECORD_BYTES", 1 << 20)
    rows = [b"a", b"b" * (1 << 20), b"c" * ((5 << 20) + 3), b"d"]
    (tmp_path / "a.txt").write_bytes(b"\n".join(rows))
    for shard_bytes in (10_000, 1 << 20, 1 << 30):
        assert bad(TextLines(root=str(tmp_path)), shard_bytes) == ["a.txt:3: longer than 1 MiB"]
        read = [len(each.fields["text"]) for each in read_all(TextLines(root=str(tmp_path))) if hasattr(each, "key")]
        assert read == [1, 1 << 20, 1]


BAD_LINES = {
    b"{": "not JSON: Expecting property name enclosed in double quotes at column 2",
    b'{"a": 1} x': "not JSON: Extra data at column 10",
    b"[1]": "is an array, expected an object",
    b'"a"': "is a string, expected an object",
    b"null": "is null, expected an object",
    b"3.5": "is a number, expected an object",
    b'{"a": "caf\xe9"}': "not UTF-8 at byte 10",
    b'{"a": ' + b"1" * 5000 + b"}": "has a number of more than 4300 digits",
    b"[" * 200_000: "is nested too deeply",
    rb'{"a": ["\ud83d"]}': "has an unpaired surrogate (\\ud800 to \\udfff)",
}


def test_bad_lines_are_named_by_number_wherever_files_are_split(tmp_path):
    rows = []
    for line in BAD_LINES:
        rows += [b'{"text": "fine"}', b"", line]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(rows))
    expected = [f"a.jsonl:{3 * index + 3}: {cause}" for index, cause in enumerate(BAD_LINES.values())]
    for shard_bytes in (1000, 1 << 30):
        assert bad(Jsonl(root=str(tmp_path)), shard_bytes) == expected
        assert len(read_all(Jsonl(root=str(tmp_path)), shard_bytes)) == 2 * len(BAD_LINES)


def test_all_of_json_is_read(tmp_path):
    lines = [
        r'{"text": "\ud83d\ude00 \u00e9", "n": 123456789012345678901234567890, "deep": {"a": [null, true]}}',
        '{"nan": NaN, "inf": -Infinity}',
        '  {"text": "漢"}  ',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    records = [each.fields for each in assert_shards_do_not_matter(Jsonl(root=str(tmp_path)), [1, 50])]
    assert records[0] == json.loads(lines[0])
    assert records[0]["text"] == "😀 é"
    assert str(records[1]) == "{'nan': nan, 'inf': -inf}"
    assert records[2] == {"text": "漢"}


def test_locations_and_keys_of_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    assert [each.location for each in found(Jsonl(root=str(tmp_path)))] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert [each.location for each in found(Jsonl(root=str(tmp_path)), 10)][-1] == "a.jsonl at byte 19"
    assert [each.key for each in found(Jsonl(root=str(tmp_path)), 10)] == ["a.jsonl@0", "a.jsonl@10", "a.jsonl@19"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of some kilobytes with 200 MB of text is the worst case for a decompressor."""
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    with zstd.open(tmp_path / "a.jsonl.zst", "wb") as file:
        for _ in range(20_000):
            file.write(line)
    code = """if True:
        import resource, sys
        from jaxinfra.prepare.sources.any_source import Jsonl
        source = Jsonl(root=sys.argv[1])
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(1 for shard in source.list_shards(1 << 20) for found in source.read(shard))
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
        heavy = {"jax", "pyarrow", "datasets", "PIL", "array_record", "s3fs"} & set(sys.modules)
        print(count, grown_kb, *heavy)
    """
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, grown_kb, *heavy = result.stdout.split()
    assert int(count) == 20_000
    assert int(grown_kb) < 150_000
    assert not heavy  # what a source does not need is not imported
