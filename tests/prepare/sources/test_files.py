import os
import sysconfig
import tempfile
from pathlib import Path

import fsspec
import pytest

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.prepare.sources.text_files import TextFiles
from jaxinfra.prepare.sources.text_lines import TextLines
from jaxinfra.storage.files import list_files, list_names, opened
from tests.prepare.sources.reading import assert_cuts_do_not_matter, bad, found, pieces_of

NAMES = ["a.py", "b.txt", "one/a.py", "one/two/a.py", "one/two/b.py", "one-two/.hidden.py", "z [1]/c.py"]


@pytest.fixture(params=["local", "file://", "memory://"])
def root(request, tmp_path):
    """The same files in a folder and in a store."""
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
    with opened(root, name) as file:
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


def test_files_are_opened_by_their_names_and_sought_in(root):
    for file in list_files(root, "**/*"):
        with opened(root, file.name) as stream:
            assert stream.read().decode() == file.name
            assert stream.seek(1) == 1
            assert stream.read().decode() == file.name[1:]
        assert file.size_bytes == len(file.name)
    assert list_names(root) == ["one", "one-two", "z [1]"]


def test_what_is_missing_is_told_apart(root):
    with pytest.raises(ConfigError, match=r"^pattern=\*\.md: "):
        list_files(root, "*.md")
    with pytest.raises(ConfigError, match=r"^pattern=no/\*\.py: |^root="):
        list_files(root, "no/*.py")
    with pytest.raises(ConfigError, match="^root=.*/nowhere: "):
        list_files(f"{root}/nowhere", "*")
    with pytest.raises(StorageError, match="gone.py: .*No such file"):
        contents(root, "gone.py")


def test_the_top_of_a_file_system_is_a_root(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    below = f"{tmp_path}/*.txt".removeprefix("/")
    assert [file.name for file in list_files("/", below)] == [f"{tmp_path}/a.txt".removeprefix("/")]
    fs = fsspec.filesystem("memory")
    fs.pipe("/top.txt", b"top")
    assert [file.name for file in list_files("memory://", "*.txt")] == ["top.txt"]
    assert contents("memory://", "top.txt") == b"top"
    fs.rm("/top.txt")


def test_a_file_for_a_root_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"^root=.*a\.txt: is a file"):
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


def test_links_to_folders_and_to_nothing_are_no_files(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "nothing.txt").symlink_to(tmp_path / "gone")
    assert [file.name for file in list_files(str(tmp_path), "**/*")] == ["real/a.txt"]


@pytest.fixture
def as_nobody():
    """Root may read everything: become somebody else for a while."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_folder_that_may_not_be_listed_is_an_error(as_nobody):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "a.txt").write_text("a")
        (root / "closed" / "deep").mkdir(parents=True)
        (root / "closed.txt").write_text("c")
        (root / "closed.txt").chmod(0)
        (root / "closed").chmod(0)
        try:
            with pytest.raises(StorageError, match="/closed: .*Permission denied"):
                list_files(folder, "**/*.txt")
            assert [file.name for file in list_files(folder, "*.txt")] == ["a.txt", "closed.txt"]
            with pytest.raises(StorageError, match=r"/closed\.txt: .*Permission denied"):
                contents(folder, "closed.txt")
        finally:
            (root / "closed").chmod(0o700)


@pytest.mark.parametrize(
    "root, message",
    [
        ("nothing://bucket", "nothing:// is not known"),
        ("adl://bucket/x", "nothing installed reads adl://; install what fsspec reads adl:// with"),
    ],
)
def test_a_url_that_nothing_reads_is_refused(root, message):
    with pytest.raises(ConfigError, match=f"^root={root}: {message}"):
        list_files(root, "*")


def test_a_missing_package_is_named_by_the_extra_without_the_credentials(monkeypatch):
    def url_to_fs(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)
    with pytest.raises(ConfigError) as error:
        list_files("s3://key:secret@bucket/x?token=secret", "*")
    assert str(error.value).startswith("root=s3://***@bucket/x: ")
    assert "pip install 'jaxinfra[s3]'" in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [("root", ""), ("pattern", ""), ("pattern", "/x/*"), ("pattern", "../*"), ("pattern", "a**"), ("min_bytes", -1)],
)
def test_wrong_fields_are_named(field, value):
    with pytest.raises(ConfigError, match=f"^{field}="):
        validate(TextFiles(**{field: value}))


def test_text_files_are_documents_with_their_names_for_keys(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo é\n".encode())
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"c")
    (tmp_path / "empty.txt").write_bytes(b"")
    source = TextFiles(root=str(tmp_path), pattern="**/*.txt", min_bytes=2)
    assert [piece.name for piece in pieces_of(source)] == ["a.txt", "b.txt"]
    assert bad(source) == ["b.txt: not UTF-8 at byte 3"]
    (each,) = assert_cuts_do_not_matter(TextFiles(root=str(tmp_path), pattern="a*"), [1, 5])
    assert (each.key, each.where, each.record) == ("a.txt", "a.txt", {"text": "one\r\ntwo é\n"})
    with pytest.raises(ConfigError, match="^min_bytes=100: all 4 "):
        pieces_of(TextFiles(root=str(tmp_path), pattern="*", min_bytes=100))


def test_the_standard_library_is_the_one_that_runs():
    names = [piece.name for piece in pieces_of(TextFiles())]
    root = Path(sysconfig.get_path("stdlib"))
    own = {"site-packages", "dist-packages", "__pycache__"}
    found = (path.relative_to(root) for path in root.rglob("*.py") if path.stat().st_size)
    assert names == sorted(path.as_posix() for path in found if not own & set(path.parts))


def test_a_store_is_read_as_a_folder_is(root):
    folder = assert_cuts_do_not_matter(TextLines(root=root, pattern="**/*"), [1, 3])
    assert [each.record["text"] for each in folder] == sorted(NAMES)
    assert [each.key for each in found(TextLines(root=root, pattern="a.py"))] == ["a.py@0"]
