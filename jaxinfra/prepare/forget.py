"""Makes a version of a store in which a record is padding, and everything else is where it was.

Each token of the record becomes an end-of-document token. Among consecutive tokens each of those is a document without
targets: it counts in no loss, and no other token attends to it. In packed rows the segments of the record get no
targets, which leaves more padding at the end of the row; in a mask its tokens are 0. No document moves, so every step
reads the same samples as before.

The manifest lists under `forgotten` what a version and those that it was made of have forgotten, the oldest first.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import xxhash

from jaxinfra.config import decode
from jaxinfra.config.classes import ClassFinder
from jaxinfra.data.store import arrays, layout, versions
from jaxinfra.data.store.blocks import hash_blocks
from jaxinfra.data.store.manifest import FILE_NAME, SPLITS, Manifest, Split, StoredFile, digest_of
from jaxinfra.data.store.store import TokenStore
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.builders.baseline import measure_baselines
from jaxinfra.prepare.builders.text import record_text
from jaxinfra.prepare.documents.dedup import Signer
from jaxinfra.prepare.documents.document import Document, RecordError, Span
from jaxinfra.prepare.documents.encoding import encode_documents
from jaxinfra.prepare.recipes.corpus import SHARD_BYTES, Corpus
from jaxinfra.prepare.recipes.validation import validation_source
from jaxinfra.prepare.sources.record import Record, Source
from jaxinfra.prepare.sources.stream import StreamSource
from jaxinfra.prepare.workspace import make_empty_folder, open_workspace
from jaxinfra.storage import connection
from jaxinfra.storage.atomic import move_folder
from jaxinfra.storage.files import read_file
from jaxinfra.storage.objects import ObjectStore

_BATCH_TOKENS = 2**20  # compared at once
_REPLACED_BY = "+"  # in `made_of` of a version in the list of a store: what follows stands in its place
type _Index = Iterable[Mapping[str, Any]]  # the entries of that list


@dataclass(frozen=True, kw_only=True)
class ForgettingManifest(Manifest):
    """Adds entries to a manifest: the version that one was made `of`, `when`, counts, slow hashes of the records."""

    forgotten: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Found:
    """The documents of the records that a key names, and of equal ones; none if they are padding already."""

    documents: Mapping[Split, np.ndarray]  # numbers, int64, ascending
    hashes: Sequence[str] = ()  # of the records that the key names
    duplicates: Sequence[str] | None = None  # other records of the source that equal them or nearly do; None: unknown


def earlier(store: TokenStore) -> list[Mapping[str, Any]]:
    """Returns the entries of what a version, and those that it was made of, have forgotten."""
    return json.loads(store.storage.read(FILE_NAME)).get("forgotten", [])


def line_of(store: TokenStore) -> list[str]:
    """Returns the fingerprint of a version after those of the versions that it was made of by forgetting."""
    return [*(entry["of"] for entry in earlier(store)), store.manifest.fingerprint]


def successor(root: ObjectStore, store: TokenStore) -> str:
    """Returns the version that stands in the place of `store`, "" for none; ConfigError if `root` does not list it."""
    own = store.manifest.fingerprint
    made_of = {each.fingerprint: each.made_of for each in versions.list_versions(root)}.get(own)
    if made_of is None:
        raise ConfigError(f"{root.url}: is one version; name the store that lists it, and --version {own}")
    return made_of.partition(_REPLACED_BY)[2]


def find(store: TokenStore, key: str, finder: ClassFinder) -> Found:
    """Finds the documents of the records that a key names, and all with the same tokens, in both splits.

    `key` is `train:12`, a document by its number; `@FILE`, one by its whole text; else key or location of a record in
    the source of the recipe, or FIELD=VALUE of its fields. `finder` finds the classes of the recipe. ConfigError if
    there is none.
    """
    eot_id, per_record, duplicates = store.manifest.tokenizer_info.eot_id, _per_record(store), None
    if match := re.fullmatch("(train|validation):([0-9]+)", key):
        split, number = SPLITS[match[1] != "train"], int(match[2])
        if number >= (count := store.manifest.splits[split].documents):
            raise ConfigError(f"{key}: {store} has the documents {split}:0 to {split}:{count - 1}; name one of them")
        records = [[_read(store, split, number - number % per_record + i) for i in range(per_record)]]
    else:
        recipe = decode(Corpus, store.manifest.recipe, finder)
        if key.startswith("@"):
            named = [(key, [[Span(text=read_file(key[1:], "a record").decode(errors="replace"))]])]
        else:
            named = [
                (each.location, documents)
                for each, documents in _source(recipe)
                if key in (each.key, each.location, *(f"{name}={value}" for name, value in each.fields.items()))
            ]
        if not named:
            other = "FILE:LINE, FIELD=VALUE, train:NUMBER, or @FILE with its text"
            raise ConfigError(f"{key}: names no record that can be read again from the source of {store}; use {other}")
        encoded = [encode_documents(store.tokenizer, documents) for _, documents in named]
        records = [[np.append(document.ids_N, eot_id) for document in each] for each in encoded]
        if recipe.dedup is not None:
            duplicates = [*_duplicates(recipe, Signer(recipe.dedup), dict(named))]
    salt = line_of(store)[0].encode()  # one for the line, so that a record is known again
    hashes = [_hash(np.concatenate(each), salt) for each in records]
    known = {digest for entry in earlier(store) for digest in entry["hashes"]}
    if known.issuperset(hashes) or all((document == eot_id).all() for each in records for document in each):
        return Found(documents={}, duplicates=duplicates)
    found: dict[Split, np.ndarray] = {split: _equal_documents(store, split, records) for split in SPLITS}
    if not any(map(len, found.values())):
        last = store.manifest.splits["train"].documents - 1
        raise ConfigError(
            f"{key}: no document of {store} has the tokens of this record: filters or dedup have left it out, it has "
            f"changed, or validation has cut it in two; name a document by its number, such as train:{last}"
        )
    return Found(documents=found, hashes=hashes, duplicates=duplicates)


def forget(root: ObjectStore, store: TokenStore, found: Found) -> Manifest:
    """Publishes a version of a store without what was found in `store`, one of its versions; returns its manifest.

    It takes the place of that version: the newest if that was the newest, and the one that `data prepare` finds for
    the same recipe and files. The other one stays, and is listed before it. Raises ConfigError if another process is
    preparing the store, or has forgotten something in that version meanwhile, DataError if what it reads is damaged,
    and StorageError if it cannot be written.
    """
    manifest, work_dir = store.manifest, store.manifest.recipe.get("work_dir")
    name = digest_of([manifest.fingerprint, found.hashes])
    with open_workspace(root, name, None if work_dir is None else str(work_dir)) as work:
        build = make_empty_folder(work / "build")
        for name in manifest.files:
            _link(store.storage, name, build / name)
        edits = _edits(store, found.documents)
        changed = {file for name, elements in edits.items() for file in _write_padding(store, build, name, elements)}
        new = _new_manifest(store, found, build, changed)
        version = root.child(new.fingerprint)
        if not version.exists(FILE_NAME):
            (build / FILE_NAME).write_bytes(new.to_bytes())
            if version.folder is None or not move_folder(build, version.folder):
                version.upload(build, last=[FILE_NAME], resume=version.folder is None)
        try:
            _change_index(root, lambda entries: _with_version(entries, manifest.fingerprint, new))
        except ConfigError:  # nobody reads this one
            delete_versions(root, [new.fingerprint])
            raise
    return new


def delete_versions(root: ObjectStore, fingerprints: Sequence[str]) -> None:
    """Deletes versions of a store: first from its list, then their manifests, then everything else."""
    _change_index(root, lambda entries: (each for each in entries if each["fingerprint"] not in fingerprints))
    for fingerprint in fingerprints:
        root.delete(f"{fingerprint}/{FILE_NAME}")
        root.delete_below(fingerprint)
        if root.folder is not None:
            shutil.rmtree(root.folder / fingerprint, ignore_errors=True)  # folders that are empty now


def _per_record(store: TokenStore) -> int:
    return 2 if store.manifest.kind == "pairs" else 1


def _read(store: TokenStore, split: Split, number: int) -> np.ndarray:
    """Reads the tokens of a document, with its end."""
    start, end = store.read_ranges(split, layout.OFFSETS, np.array([number]), np.array([2])).tolist()
    return store.read(split, [start], end - start)[0].astype(np.int64)


def _source(recipe: Corpus) -> Iterator[tuple[Record, Sequence[Document]]]:
    """Yields all good records of a recipe but those of a stream, with their documents."""
    for source in (recipe.source, validation_source(recipe.validation)):
        if isinstance(source, Source) and not isinstance(source, StreamSource):
            for record in (record for shard in source.list_shards(SHARD_BYTES) for record in source.read(shard)):
                with suppress(RecordError):
                    if isinstance(record, Record):
                        yield record, recipe.format.to_documents(record.fields)


def _duplicates(recipe: Corpus, signer: Signer, named: Mapping[str, Sequence[Document]]) -> Iterator[str]:
    """Yields the locations of other records whose texts equal those of the named ones, or nearly do."""
    own = [signer(record_text(documents)) for documents in named.values()]
    for record, documents in _source(recipe):
        exact, near = signer(record_text(documents))
        is_near = (near is not None and (near == each).mean() >= signer.dedup.threshold for _, each in own)
        if record.location not in named and (any((exact == each).all() for each, _ in own) or any(is_near)):
            yield record.location


def _hash(tokens: np.ndarray, salt: bytes) -> str:
    return hashlib.scrypt(tokens.astype("<u4").tobytes(), salt=salt, n=2**12, r=8, p=1, dklen=16).hex()


def _equal_documents(store: TokenStore, split: Split, records: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Returns the numbers of the documents of all records of a split with the tokens of one of these, ascending."""
    per_record, offsets = _per_record(store), store.read_all(split, layout.OFFSETS)
    lengths = store.read_all(split, layout.LENGTHS).reshape(-1, per_record)
    by_lengths: dict[tuple[int, ...], list[np.ndarray]] = {}
    for record in records:
        by_lengths.setdefault(tuple(map(len, record)), []).append(np.concatenate(record))
    numbers = [np.empty(0, np.int64)]
    for own_lengths, contents in by_lengths.items():
        same, length = np.flatnonzero((lengths == own_lengths).all(axis=1)), sum(own_lengths)
        for some in np.array_split(same, 1 + len(same) * length // _BATCH_TOKENS) if len(same) else ():
            tokens = store.read(split, offsets[some * per_record], length)
            numbers.append(some[np.any([(tokens == content).all(axis=1) for content in contents], axis=0)])
    return (np.sort(np.concatenate(numbers))[:, None] * per_record + np.arange(per_record)).reshape(-1)


def _link(storage: ObjectStore, name: str, path: Path) -> None:
    """Makes a file of a version a file of another one, too; a copy where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if storage.folder is not None:
        with suppress(OSError):
            return os.link(storage.folder / name, path)
    path.write_bytes(storage.read(name))


def _edits(store: TokenStore, documents: Mapping[Split, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the elements of each array that become padding, ascending: tokens, masks, and segments of packings."""
    edits: dict[str, np.ndarray] = {}
    for split, numbers in documents.items():
        if len(numbers):
            offsets = store.read_all(split, layout.OFFSETS)
            ranges = zip(offsets[numbers].tolist(), offsets[numbers + 1].tolist(), strict=True)
            elements = np.concatenate([np.arange(start, end) for start, end in ranges])
            names = (layout.TOKENS, layout.MASK) if store.manifest.masked else (layout.TOKENS,)
            edits |= {f"{split}/{name}": elements for name in names}
            for pack in (key.partition("/")[2] for key in store.manifest.packs if key.startswith(f"{split}/")):
                name = f"{layout.PACKS}/{pack}/{layout.SEGMENTS}"
                document_of = np.searchsorted(offsets, store.read_all(split, name)[:, 0], "right") - 1
                edits[f"{split}/{name}"] = np.flatnonzero(np.isin(document_of, numbers))
    return edits


def _write_padding(store: TokenStore, build: Path, name: str, elements: np.ndarray) -> set[str]:
    """Writes padding into the elements of an array in `build`, and the hashes of its blocks; returns the files."""
    info, split = store.manifest.arrays[name], SPLITS[not name.startswith("train/")]
    own_name, numbers = name.partition("/")[2], np.unique(elements // info.block).tolist()
    fill = store.manifest.tokenizer_info.eot_id if own_name == layout.TOKENS else 0
    spec = {"driver": "zarr3", "kvstore": connection.kvstore_spec(str(build / name))}
    spec["store_data_equal_to_fill_value"] = True  # as `arrays.create`
    array = ts.open(ts.Spec(spec), read=True, write=True, context=connection.tensorstore_context()).result()
    changed = {f"{name}/{arrays.shard_of(array, number * info.block)}" for number in numbers}
    tables = {number: layout.table_name(name, number // layout.TABLE_HASHES) for number in numbers}
    contents = {file: (build / file).read_bytes() for file in {*tables.values(), *changed}}
    for file, content in contents.items():
        (build / file).unlink()  # it may be the file of the old version
        (build / file).write_bytes(content)
    hashes = {file: np.frombuffer(contents[file], "<u8").copy() for file in tables.values()}
    with ts.Transaction() as transaction:  # writes each file once
        for number in numbers:
            first, end = number * info.block, min((number + 1) * info.block, info.elements)
            values = store.read_ranges(split, own_name, np.array([first]), np.array([end - first]))
            own = elements[slice(*np.searchsorted(elements, [first, end]))] - first
            values.reshape(len(values), -1)[own, -1] = fill  # of a segment, the number of its targets
            array.with_transaction(transaction)[first:end].write(values).result()
            hashes[tables[number]][number % layout.TABLE_HASHES] = hash_blocks(values, info.block)[0]
    for file, content in hashes.items():
        (build / file).write_bytes(content.tobytes())
    return {*contents}


def _new_manifest(store: TokenStore, found: Found, build: Path, changed: Iterable[str]) -> ForgettingManifest:
    """Returns the manifest of the version in `build`, of which these files differ from those of `store`."""
    old = store.manifest
    files, splits = dict(old.files), dict(old.splits)
    for name in changed:
        content = (build / name).read_bytes()
        digest = None if layout.holds_blocks(name) else xxhash.xxh3_128_hexdigest(content)
        files[name] = StoredFile(bytes=len(content), digest=digest)
    count = tokens = 0
    for split, numbers in found.documents.items():
        contents = [_read(store, split, number).tolist() for number in numbers.tolist()]
        count, tokens = count + len(contents), tokens + sum(map(len, contents))
        text_bytes = sum(len(store.tokenizer.decode(content).encode()) for content in contents)
        splits[split] = replace(splits[split], bytes=splits[split].bytes - text_bytes)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"of": old.fingerprint, "when": now, "records": count // _per_record(store), "documents": count}
    entry |= {"tokens": tokens, "hashes": [*found.hashes]}
    values = {each.name: getattr(old, each.name) for each in fields(Manifest)}
    values |= {"files": files, "splits": splits, "created": now, "forgotten": (*earlier(store), entry)}
    new = ForgettingManifest(**values)
    if not new.baselines:
        return new
    baselines, repeated = measure_baselines(TokenStore(ObjectStore(build), new))
    return replace(new, baselines=baselines, counts=replace(new.counts, repeated=repeated))


def _with_version(entries: _Index, old: str, new: Manifest) -> _Index:
    """Puts a version behind the one that it was made of, and in its place for `data prepare`."""
    for entry in entries:
        if entry["fingerprint"] == old:
            made_of, _, after = entry["made_of"].partition(_REPLACED_BY)
            if after not in ("", new.fingerprint):
                raise ConfigError(f"{old}: another process has made {after} of it meanwhile; run the command again")
            yield {**entry, "made_of": f"{made_of}{_REPLACED_BY}{new.fingerprint}"}
            yield asdict(versions.Version(fingerprint=new.fingerprint, made_of=made_of, created=new.created))
        elif entry["fingerprint"] != new.fingerprint:  # it is there already if an answer of a bucket was lost
            yield entry


def _change_index(root: ObjectStore, change: Callable[[_Index], _Index]) -> None:
    def changed(content: bytes | None) -> bytes:
        entries = [] if content is None else json.loads(content)["versions"]
        return (json.dumps({"versions": [*change(entries)]}, indent=2) + "\n").encode()

    root.atomic_update(versions.INDEX, changed)
