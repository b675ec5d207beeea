"""`new` writes a recipe and a config for one's own text, which prepare and train without a change."""

import json
import random
import re
from pathlib import Path

import pytest

from jaxinfra.cli.main import main
from jaxinfra.config import load
from jaxinfra.prepare.documents.formats import Chat
from jaxinfra.prepare.recipes.validation import ByKey, LastDocuments
from jaxinfra.prepare.sources.tables import HuggingFace, Parquet
from jaxinfra.prepare.sources.text import Jsonl, TextFiles
from tests.refusals import refused
from tests.tiny_run import launch

WORDS = [f"word{i}" for i in range(200)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prose(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "\n"


def recipe(name: str):
    return load(f"configs/data/{name}.py").run


def test_one_file_prepares_and_trains(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also a book in one file: its end is the validation split."""
    Path("book.txt").write_text(prose(20_000))
    assert main(["new", "book.txt", "--name", "story"]) == 0
    printed = capfd.readouterr().out
    assert "1 .txt file" in printed and "last 5 %" in printed and "on this machine" in printed
    commands = [line.split("launch ", 1)[1].split() for line in printed.splitlines() if line.startswith("  ")]
    prepare, train = commands[0], commands[1]
    line = refused(launch(*prepare, "on_overlap=drop"), "on_overlap=drop recipe")
    assert line.endswith("use data prepare configs/data/story.py on_overlap=drop")
    assert main([*prepare, "--workers", "1"]) == 0
    bare = Path("configs/story.py").read_text().replace('recipe="configs/data/story.py", ', "")
    Path("bare.py").write_text(bare)
    names = ("stores/story", "configs/story.py", "configs/data/story.py", "bare.py")
    shown = {launch("data", "show", each) for each in names}
    assert len(shown) == 1 and shown.pop().code == 0
    sources = (
        "data=Mixture(sources=(MixSource(store='a', recipe='a.py'), MixSource(store='b', recipe='b.py')), seq_len=32)"
    )
    mixed = re.sub(r"data=TokenData.*?(?=,\n)", sources, bare)
    Path("mixed.py").write_text(
        mixed.replace("import TokenData", "import TokenData\nfrom jaxinfra.data.mixture import *")
    )
    refused(launch("data", "show", "mixed.py"), "mixed.py a, b")
    assert "/stores/story/" in launch("data", "verify", "configs/story.py").out
    assert isinstance(recipe("story").validation, LastDocuments)
    assert main([*train, "train.steps=2", "name=story", "train.eval_samples=2"]) == 0
    assert (folder / "runs/story/summary.json").exists()


def test_many_files_are_split_by_document(capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(250):
        Path("notes/deep").mkdir(parents=True, exist_ok=True)
        Path(f"notes/deep/{i}.md").write_text(prose(50, i))
    Path("notes/picture.png").write_bytes(b"\x89PNG")
    assert main(["new", "notes"]) == 0
    assert "250 .md files (without 1 of other kinds)" in capsys.readouterr().out
    made = recipe("notes")
    assert (
        isinstance(made.source, TextFiles) and made.source.pattern == "**/*.md" and isinstance(made.validation, ByKey)
    )


def test_json_lines_of_text_and_of_conversations() -> None:
    rows = [{"id": "x" * 500, "content": prose(40, i)} for i in range(300)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["new", "a.jsonl"]) == 0
    made = recipe("a")
    assert isinstance(made.source, Jsonl) and made.format.field == "content" and isinstance(made.validation, ByKey)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": prose(40)}]
    Path("talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(300)))
    assert main(["new", "talks.jsonl"]) == 0
    assert isinstance(recipe("talks").format, Chat)
    assert main(["data", "prepare", "configs/talks.py", "--workers", "1"]) == 0


def test_parquet_and_a_hugging_face_folder_with_a_validation_split() -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    text = datasets.Dataset.from_dict({"text": [prose(60, i) for i in range(300)]})
    datasets.DatasetDict({"train": text, "validation": text.select(range(20))}).save_to_disk("saved")
    assert main(["new", "saved"]) == 0
    made = recipe("saved")
    assert (made.source.split, made.validation) == ("train", HuggingFace(path="saved", split="validation"))
    assert main(["data", "prepare", "configs/saved.py", "--workers", "1"]) == 0
    text.to_parquet("rows/part.parquet")
    assert main(["new", "rows"]) == 0
    assert isinstance(recipe("rows").source, Parquet)


def test_one_file_that_cannot_be_split_is_refused_before_it_is_tokenized() -> None:
    Path("book.txt").write_text(prose(9000))
    assert main(["new", "book.txt"]) == 0
    refused(launch("data", "prepare", "configs/data/book.py", "validation=by_key"), "book.txt validation=tail")
    refused(
        launch("data", "prepare", "configs/data/book.py", "source=hugging_face", "source.path=org/name"),
        "path=org/name save_to_disk",
    )


def test_what_it_cannot_use_is_refused_and_nothing_written(folder: Path) -> None:
    Path("empty").mkdir()
    Path("binary").mkdir()
    Path("binary/a.bin").write_bytes(bytes(range(256)) * 200)
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"\x89PNG" * 9)
    Path("short.txt").write_text("too short")
    Path("numbers.jsonl").write_text('{"x": 1}\n' * 5000)
    refused(launch("new", "empty"), "empty")
    refused(launch("new", "binary"), "binary/a.bin UTF-8")
    refused(launch("new", "pictures"), "pictures ImageFolders")
    refused(launch("new", "short.txt"), "short.txt 20,000")
    refused(launch("new", "numbers.jsonl"), "numbers.jsonl x")
    refused(launch("new", "nowhere"), "nowhere no such file")
    refused(launch("new", "roneneldan/TinyStories"), "roneneldan/TinyStories save_to_disk")
    refused(launch("new", "s3://bucket/x"), "s3://bucket/x docs/sources.md")
    refused(launch("new", "binary", "--name", "a/b"), "--name a/b")
    assert not Path("configs").exists()
    Path("text.txt").write_text(prose(9000))
    assert main(["new", "text.txt"]) == 0
    refused(launch("new", "text.txt"), "configs/data/text.py exists --name")
