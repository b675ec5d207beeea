"""Finds out what a folder or file of text is, and makes a recipe for it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.chat_template import TemplateFormat
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.formats import AnyFormat, Chat, Completion, Labeled, Preference
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import AnyValidation, ByKey, LastDocuments
from jaxinfra.prepare.sources.any_source import BoundedSource
from jaxinfra.prepare.sources.record import BadRecord, Fields
from jaxinfra.prepare.sources.tables import HuggingFace, Parquet
from jaxinfra.prepare.sources.text import Jsonl, TextFiles
from jaxinfra.prepare.tokenizers import TrainBpe
from jaxinfra.storage.errors import storage_errors

MIN_BYTES = 20_000
"""Text that is shorter gives no validation samples."""

_MIN_RECORDS = 200  # with fewer, a random twentieth of the records may be none
_MAX_BASELINE_BYTES = 100_000_000  # compressing more takes minutes
_PROBE_BYTES = 8192  # read of a file to see whether it is text
_COMPRESSED = (".gz", ".zst")
_JSON_LINES = (".jsonl", ".ndjson")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
_TEXT_FIELDS = ("text", "content", "document", "body")
_CHAT_FIELDS = ("messages", "conversations", "conversation")

# What a place holds: source, format and validation split of a recipe, a description, and about the bytes of its text.
type _Found = tuple[BoundedSource, AnyFormat, AnyValidation, str, int]


@dataclass(frozen=True, kw_only=True)
class Detected:
    """A recipe for a place, and what was found there."""

    recipe: Corpus
    summary: str  # one line about the place: kind, number and size of the files, what is left out, validation split
    text_bytes: int  # about how much text there is, in bytes


def detect(path: str, store: str, *, min_bytes: int = MIN_BYTES) -> Detected:
    """Makes a recipe for a local folder or file; reads the first record, and lists the files.

    Raises ConfigError if the place holds no text that `data prepare` can read, or less than `min_bytes`.
    """
    place = Path(path)
    if "://" in path:
        raise ConfigError(f"{path}: is a URL; copy a file of it here, or write a recipe for it (docs/sources.md)")
    if not place.exists():
        hub = path.count("/") == 1 and not path.startswith((".", "/"))
        hint = "; a dataset of the Hugging Face Hub must be saved first: load_dataset(NAME).save_to_disk(FOLDER)"
        raise ConfigError(f"{path}: no such file or folder{hint if hub else '; name a folder, or a file of text'}")
    with storage_errors(place, action="read", fix="name a folder that you may read"):
        files = sorted(_walk(place)) if place.is_dir() else [place]
        sizes = {file: file.stat().st_size for file in files}
    if not any(sizes.values()):
        raise ConfigError(f"{path}: has no files with text; name another folder")
    root = place if place.is_dir() else place.parent
    is_dataset = root / "dataset_dict.json" in sizes or root / "state.json" in sizes
    source, format, validation, found, text_bytes = (_hugging_face if is_dataset else _files)(path, sizes)
    if text_bytes < min_bytes:
        raise ConfigError(f"{path}: has {text_bytes:,} bytes; use at least {min_bytes:,} bytes of text")
    held_out = {LastDocuments: "the last 5 % of the text, whole documents if it can", ByKey: "5 % of the documents"}
    split = held_out.get(type(validation)) or f"the split {getattr(validation, 'split', '')}"
    special = ("<|im_start|>", "<|im_end|>") if isinstance(format, TemplateFormat) else ()
    # Tokens that a small model sees often enough to learn.
    vocab_size = next((size for limit, size in ((500_000, 1024), (5_000_000, 2048)) if text_bytes < limit), 4096)
    recipe = Corpus(
        store=store,
        source=source,
        validation=validation,
        format=format,
        tokenizer=TrainBpe(vocab_size=vocab_size, special_tokens=special),
        on_bad="skip",
        baselines=text_bytes < _MAX_BASELINE_BYTES and format.kind == "text",
    )
    summary = f"{path}: {found}, {text_bytes / 1e6:.1f} MB; validation on {split}"
    return Detected(recipe=recipe, summary=summary, text_bytes=text_bytes)


def _files(path: str, sizes: Mapping[Path, int]) -> _Found:
    """Chooses the kind of file that has most of the bytes."""
    place = Path(path)
    root = place if place.is_dir() else place.parent
    by_kind: dict[str, list[Path]] = {}
    for file in sizes:
        by_kind.setdefault(_kind(file), []).append(file)
    kind, chosen = max(by_kind.items(), key=lambda item: sum(sizes[file] for file in item[1]))
    if kind in _IMAGES:
        raise ConfigError(f"{path}: holds images; write a recipe with ImageFolders for them (docs/sources.md)")
    suffix = f"{kind}*" if any(file.suffix in _COMPRESSED for file in chosen) else kind
    pattern = f"**/*{suffix}" if place.is_dir() else place.name
    found = f"{len(chosen)} {kind} file{'s' if len(chosen) > 1 else ''}".replace("  ", " ")
    if left_out := len(sizes) - len(chosen):
        found += f" (without {left_out} of other kinds)"
    text_bytes = sum(sizes[file] for file in chosen)
    if kind in _JSON_LINES:
        source = Jsonl(root=str(root), pattern=pattern)
        record = first_record(source)
        format, num_records = _format(record, path), text_bytes // len(json.dumps(record))
    elif kind == ".parquet":
        format = _format(first_record(Parquet(root=str(root), pattern=pattern)), path)
        columns = (format.field,) if isinstance(format, Text | Chat) else format.fields
        source, num_records = Parquet(root=str(root), pattern=pattern, columns=columns), _MIN_RECORDS
    else:
        if binary := next((file for file in chosen if not _is_text(file)), None):
            raise ConfigError(f"{binary}: is not text in UTF-8; name a folder of text, .jsonl or .parquet files")
        source, format, num_records = TextFiles(root=str(root), pattern=pattern), Text(), len(chosen)
    return source, format, ByKey() if num_records >= _MIN_RECORDS else LastDocuments(), found, text_bytes


def _hugging_face(path: str, sizes: Mapping[Path, int]) -> _Found:
    """Chooses the splits of a folder that `datasets.save_to_disk` wrote."""
    folder, splits = Path(path), [None]
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
    train = "train" if "train" in splits else splits[0]
    source = HuggingFace(path=path, split=train)
    held_out = next((name for name in _VALIDATION_SPLITS if name in splits and name != train), None)
    validation = HuggingFace(path=path, split=held_out) if held_out else LastDocuments()
    text_bytes = sum(size for file, size in sizes.items() if file.is_relative_to(folder / (train or "")))
    found = f"a Hugging Face dataset, split {train}" if train else "a Hugging Face dataset"
    return source, _format(first_record(source), path), validation, found, text_bytes


def _format(record: Fields, path: str) -> Text | Chat | Completion | Preference | Labeled:
    """Chooses the fields of a pair of answers, a completion, the messages of a conversation, or a text."""
    for there, lacking in (("chosen", "rejected"), ("rejected", "chosen"), ("label", "completion")):
        if there in record and lacking not in record:
            fix = f"name the field {lacking}" + (f", not {near}" if (near := nearest(lacking, record)) else "")
            raise ConfigError(f"{path}: the first record has {there}, and no {lacking}; {fix}")
    if "chosen" in record:
        return Preference(prompt="prompt" if "prompt" in record else None)
    if {"prompt", "completion"} <= record.keys():
        return Labeled() if "label" in record else Completion(template="chatml")
    for name in _CHAT_FIELDS:
        if isinstance(record.get(name), list):
            return Chat(field=name)
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    longest = max(texts, key=lambda name: len(texts[name]), default="")
    field = next((name for name in _TEXT_FIELDS if name in texts), longest)
    if not field:
        raise ConfigError(f"{path}: no field of its first record is text; the fields are {', '.join(record)}")
    return Text(field=field)


def first_record(source: BoundedSource) -> Fields:
    """Returns the first record of a source; ConfigError if it is damaged, or there is none."""
    for shard in source.list_shards(2**20):
        for record in source.read(shard):
            if isinstance(record, BadRecord):
                raise ConfigError(f"{record.location}: {record.cause}; repair the file or leave it out")
            return record.fields
    raise ConfigError("no records; name a place with data")


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder, without hidden ones; OSError for a folder that cannot be read."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif not path.is_symlink():
            yield from _walk(path)


def _kind(file: Path) -> str:
    """Returns the suffix of a file, without that of its compression."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in _COMPRESSED else suffix


def _is_text(file: Path) -> bool:
    """Tells whether the start of a file is UTF-8 without NUL."""
    if file.suffix in _COMPRESSED:
        return True
    with file.open("rb") as stream:
        start = stream.read(_PROBE_BYTES)
    try:
        start.decode()
    except UnicodeDecodeError as error:  # the probe may end inside a character
        return error.start > len(start) - 4 and b"\0" not in start
    return b"\0" not in start
