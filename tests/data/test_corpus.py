import os
import sysconfig

import pytest

from jaxinfra.config import validate
from jaxinfra.data import corpus as corpora
from jaxinfra.data.corpus import Corpus, scan
from jaxinfra.errors import ConfigError, StorageError


def between(left: str, right: str) -> float:
    """A held-out fraction that puts the two files into different splits."""
    return (corpora.draw(left) + corpora.draw(right)) / 2


def test_files_are_sorted_and_split_by_name_alone(text_root, tmp_path):
    few = scan(Corpus(root=str(text_root), pattern="part[01]/*.py", heldout_fraction=0.3))
    all_ = scan(Corpus(root=str(text_root), heldout_fraction=0.3))
    for split in ("train", "heldout"):
        assert list(all_.files[split]) == sorted(all_.files[split])
        assert set(few.files[split]) < set(all_.files[split])  # more files move none to the other split
    assert len(all_.files["train"]) + len(all_.files["heldout"]) == 40
    assert 0.1 < len(all_.files["heldout"]) / 40 < 0.5


def test_the_share_held_out_is_the_one_asked_for():
    draws = [corpora.draw(f"folder/{number}.py") for number in range(20_000)]
    assert sum(draw < 0.05 for draw in draws) / 20_000 == pytest.approx(0.05, abs=0.005)


def test_files_that_are_not_utf8_are_listed_and_left_out(tmp_path):
    (tmp_path / "a.py").write_text("fine = 1\n")
    (tmp_path / "b.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "c.py").write_text("x")
    (tmp_path / "d.py").write_text("fine = 2\n")
    source = scan(Corpus(root=str(tmp_path), heldout_fraction=between("a.py", "d.py"), min_bytes=2))
    names = source.files["train"] + source.files["heldout"]
    assert sorted(names) == ["a.py", "d.py"]
    assert source.not_utf8 == ("b.py",)
    assert sorted(source.texts(names)) == ["fine = 1\n", "fine = 2\n"]


def test_the_fingerprint_follows_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "c.py").write_text("c = 1\n")
    (tmp_path / "d.py").write_text("d = 1\n")
    recipe = Corpus(root=str(tmp_path), heldout_fraction=between("c.py", "d.py"))
    first = scan(recipe).fingerprint
    assert scan(recipe).fingerprint == first
    (tmp_path / "a.py").write_text("a = 2\n")
    second = scan(recipe).fingerprint
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, scan(recipe).fingerprint}) == 3


def test_stdlib_is_the_running_python_without_installed_packages():
    source = scan(Corpus())
    assert str(source.root) == sysconfig.get_path("stdlib")
    names = source.files["train"] + source.files["heldout"]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name]
    assert source.total_bytes > 5_000_000


def test_each_wrong_place_is_one_line_with_the_fix(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    missing, file = tmp_path / "none", tmp_path / "a.txt"
    for recipe, words in [
        (Corpus(root=str(missing)), ["data.corpus.root", str(missing), "no such folder"]),
        (Corpus(root=str(file)), ["data.corpus.root", "is a file", "data.corpus.pattern"]),
        (Corpus(root=str(tmp_path)), ["data.corpus.pattern=**/*.py", "no UTF-8 file", str(tmp_path)]),
        (Corpus(root=str(tmp_path), pattern="no/such/*.py"), ["data.corpus.pattern=no/such/*.py"]),
    ]:
        with pytest.raises(ConfigError) as caught:
            scan(recipe)
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words), caught.value


def test_an_empty_split_says_which_fraction_fills_it(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    for fraction, empty in [(0.001, "heldout"), (0.999, "train")]:
        recipe = Corpus(root=str(tmp_path), heldout_fraction=fraction)
        with pytest.raises(ConfigError, match="use at") as caught:
            scan(recipe)
        words = str(caught.value).replace(",", " ").split()
        advice = float(words[words.index("use") + 3 if "least" in words else words.index("most") + 1])
        assert scan(Corpus(root=str(tmp_path), heldout_fraction=advice)).files[empty]


def test_one_file_cannot_be_split(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    for fraction in (0.001, 0.999):
        with pytest.raises(ConfigError, match=r"data\.corpus\.pattern=\*\*/\*\.py: matches one file"):
            scan(Corpus(root=str(tmp_path), heldout_fraction=fraction))


def test_what_may_not_be_read_is_a_storage_error(tmp_path, monkeypatch):
    """Permissions do not bind the superuser, so the refusal is played."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("x = 1\n")
    recipe = Corpus(root=str(tmp_path))
    real_scandir, real_read = os.scandir, corpora.Path.read_bytes

    def refuse_folder(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real_scandir(path)

    def refuse_file(path):
        if path.name == "a.py":
            raise PermissionError(13, "Permission denied", str(path))
        return real_read(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse_folder)
        with pytest.raises(StorageError, match=r"sub: permission denied"):
            scan(recipe)
    monkeypatch.setattr(corpora.Path, "read_bytes", refuse_file)
    with pytest.raises(StorageError, match=r"a\.py: permission denied"):
        scan(recipe)


@pytest.mark.parametrize(
    "wrong",
    [
        {"root": ""},
        {"pattern": ""},
        {"pattern": "/etc/*"},
        {"heldout_fraction": 1.0},
        {"heldout_fraction": 0.0},
        {"heldout_fraction": -0.1},
        {"vocab_size": 256},
        {"min_bytes": -1},
        {"end_of_document": ""},
    ],
)
def test_a_wrong_field_is_named(wrong):
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}="):
        validate(Corpus(**wrong))
    validate(Corpus())
