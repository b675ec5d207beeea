import gzip
import json
import random
import subprocess
import sys

import pytest
import zstandard

from jaxinfra.errors import DataError
from jaxinfra.prepare.sources import lines
from jaxinfra.prepare.sources.jsonl import Jsonl
from jaxinfra.prepare.sources.text_lines import TextLines
from tests.prepare.sources.reading import assert_cuts_do_not_matter, bad, found, pieces_of, read_all


def texts(source, split_bytes=1 << 60):
    return [each.record["text"] for each in found(source, split_bytes)]


@pytest.fixture
def ragged(tmp_path):
    """Lines of every length, some empty, ends of both kinds, the last without an end."""
    rng = random.Random(0)
    rows = ["x" * rng.choice([0, 1, 2, 7, 90]) + "é漢" * rng.randrange(3) for _ in range(40)]
    for name, ends in (("a.txt", ["\n"]), ("b/c.txt", ["\r\n", "\n"])):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        body = "".join(row + rng.choice(ends) for row in rows).removesuffix("\n").removesuffix("\r") + "last"
        path.write_bytes(body.encode())
    return tmp_path


def test_every_line_is_read_once_wherever_files_are_cut(ragged):
    splits = [1, 2, 3, 10, 100, 1000]
    assert_cuts_do_not_matter(TextLines(root=str(ragged)), splits, most=1000)


def test_lines_are_what_python_reads(ragged):
    expected = [
        row.removesuffix("\r")
        for name in ("a.txt", "b/c.txt")
        for row in (ragged / name).read_bytes().decode().split("\n")
        if row.removesuffix("\r")
    ]
    assert texts(TextLines(root=str(ragged)), 200) == expected


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_have_the_same_records_and_are_not_cut(ragged, tmp_path_factory, suffix):
    plain = (ragged / "a.txt").read_bytes()
    root = tmp_path_factory.mktemp("compressed")
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    # Two members, as `cat a.gz b.gz` gives.
    (root / f"a.txt{suffix}").write_bytes(pack(plain[:500]) + pack(plain[500:]))
    source = TextLines(root=str(root))
    assert len(pieces_of(source, 10)) == 1
    assert texts(source) == texts(TextLines(root=str(ragged), pattern="a.txt"))
    keys = [each.key.partition("@")[2] for each in found(source)]
    assert keys == [each.key.partition("@")[2] for each in found(TextLines(root=str(ragged), pattern="a.txt"))]


@pytest.mark.parametrize("damage", ["cut", "flip"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_named_and_never_read_as_a_shorter_one(tmp_path, suffix, damage):
    body = b"".join(b"%d\n" % number for number in range(100_000))
    if suffix == ".gz":
        packed = bytearray(gzip.compress(body))
    else:
        packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(body))
    if damage == "cut":
        del packed[-10:]
    else:
        packed[len(packed) // 2] ^= 16
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    with pytest.raises(DataError, match=rf"a\.txt\{suffix}: is damaged"):
        read_all(TextLines(root=str(tmp_path)))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ufefftwo\n".encode())
    assert texts(TextLines(root=str(tmp_path))) == ["one", "\ufefftwo"]
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "one"}\n'.encode())
    assert texts(Jsonl(root=str(tmp_path))) == ["one"]


def test_a_line_too_long_is_bad_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", 1 << 20)
    rows = [b"a", b"b" * (1 << 20), b"c" * ((5 << 20) + 3), b"d"]
    (tmp_path / "a.txt").write_bytes(b"\n".join(rows))
    for split_bytes in (10_000, 1 << 20, 1 << 30):
        assert bad(TextLines(root=str(tmp_path)), split_bytes) == ["a.txt:3: longer than 1 MiB"]
        read = [len(each.record["text"]) for each in read_all(TextLines(root=str(tmp_path))) if hasattr(each, "key")]
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
    rb'{"a": ["\ud83d"]}': "spells half a character (an unpaired \\ud800 to \\udfff)",
}


def test_bad_lines_are_named_by_number_and_cause_wherever_files_are_cut(tmp_path):
    rows = []
    for line in BAD_LINES:
        rows += [b'{"text": "fine"}', b"", line]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(rows))
    expected = [f"a.jsonl:{3 * index + 3}: {cause}" for index, cause in enumerate(BAD_LINES.values())]
    for split_bytes in (1000, 1 << 30):
        assert bad(Jsonl(root=str(tmp_path)), split_bytes) == expected
        assert len(read_all(Jsonl(root=str(tmp_path)), split_bytes)) == 2 * len(BAD_LINES)


def test_what_json_can_spell_is_read(tmp_path):
    lines = [
        r'{"text": "\ud83d\ude00 \u00e9", "n": 123456789012345678901234567890, "deep": {"a": [null, true]}}',
        '{"nan": NaN, "inf": -Infinity}',
        '  {"text": "漢"}  ',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    records = [each.record for each in assert_cuts_do_not_matter(Jsonl(root=str(tmp_path)), [1, 50])]
    assert records[0] == json.loads(lines[0])
    assert records[0]["text"] == "😀 é"
    assert str(records[1]) == "{'nan': nan, 'inf': -inf}"
    assert records[2] == {"text": "漢"}


def test_where_a_record_is_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    assert [each.where for each in found(Jsonl(root=str(tmp_path)))] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert [each.where for each in found(Jsonl(root=str(tmp_path)), 10)][-1] == "a.jsonl at byte 19"
    assert [each.key for each in found(Jsonl(root=str(tmp_path)), 10)] == ["a.jsonl@0", "a.jsonl@10", "a.jsonl@19"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """200 MB of text in a file of some kilobytes: the worst a decompressor is given."""
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    with zstandard.open(tmp_path / "a.jsonl.zst", "wb") as file:
        for _ in range(20_000):
            file.write(line)
    code = """if True:
        import resource, sys
        from jaxinfra.prepare.sources.any_source import Jsonl
        source = Jsonl(root=sys.argv[1])
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(1 for piece in source.pieces(1 << 20) for found in source.read(piece))
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
        heavy = {"jax", "pyarrow", "datasets", "PIL", "array_record", "s3fs"} & set(sys.modules)
        print(count, grown_kb, *heavy)
    """
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, grown_kb, *heavy = result.stdout.split()
    assert int(count) == 20_000
    assert int(grown_kb) < 150_000
    assert not heavy  # what a source does not need is not imported
