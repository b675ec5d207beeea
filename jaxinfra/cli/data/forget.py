"""`python -m launch data forget STORE KEY`: makes a version without a record, and says what has read it."""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from jaxinfra.checkpoint.inventory import stored_checkpoints
from jaxinfra.cli.data.location import store_location
from jaxinfra.command import command_line
from jaxinfra.config import load_file, read_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.data import labeled, mixture, pairs, tokens
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.store import dvc_tracking, layout
from jaxinfra.data.store.store import Store, TokenStore
from jaxinfra.data.store.versions import list_versions
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.interop.writing import RECEIPT
from jaxinfra.prepare.forget import Found, delete_versions, earlier, find, forget, line_of, successor
from jaxinfra.run import Run
from jaxinfra.storage import audit
from jaxinfra.storage.json_lines import parse_json
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.jsonl import METRICS_FILE, read_metrics
from jaxinfra.track.runs import RunOverview, list_runs, local_files, record_of

type _Records = Mapping[str, Mapping[str, Any]]  # of runs, by their directories


def run(options: argparse.Namespace) -> None:
    """Prints what is found, writes the version, and prints the commands that replay runs; ConfigError as `find`."""
    root = ObjectStore(dvc_tracking.resolve_path(store_location(options.store)))
    opened = Store.open(root.url, options.version)
    if opened.manifest.kind == "images":
        raise ConfigError(f"{opened}: holds images, which no padding replaces; prepare it again without the image")
    store = TokenStore(opened.storage, opened.manifest)
    if (after := successor(root, store)) and not options.dry_run:
        fix = f"use --version {after}, or --dry-run to see again what it prints of this one"
        raise ConfigError(f"--version {opened.manifest.fingerprint}: {after}, made of it, stands in its place; {fix}")
    found, line = find(store, options.key, ClassFinder.from_imports(options.imports)), line_of(store)
    # Versions that hold it, or may.
    old = [each for each in (line if found.documents else line[:-1]) if root.list_names(f"{each}/")]
    unrecorded = options.audit is not None and [*_unrecorded(options.audit, root, store)]  # it can be read, too
    if not found.documents and not unrecorded and not (options.delete_old and old):
        fix = f"add --delete-old to delete {', '.join(old)}, made before" if old else "there is nothing to do"
        raise ConfigError(f"{options.key}: is padding in {store} already; {fix}")
    options.runs = options.runs or ["runs"] * os.path.isdir("runs")
    overviews = [each for folder in options.runs for each in list_runs(folder)]
    records = {each.path: read_record(record_of(each.path)) for each in overviews if each.config}
    readers = [each for each in overviews if {*records.get(each.path, {}).get("data_versions", ())} & {*line}]
    if options.delete_old and (running := [each.path for each in readers if each.state == "running"]):
        raise ConfigError(f"--delete-old: {running[0]} is reading {store}; stop it, or leave the option out")
    commands, version = list[list[str]](), after or "VERSION"
    if found.documents:
        others = [each.fingerprint for each in list_versions(root) if each.fingerprint not in line]
        print("\n".join(_describe(store, found, others)))
        for each in overviews:
            if each in readers:
                commands += _print_reader(each, records, store, found, options)
            elif not each.config:
                print(f"run          {each.path}: unknown, {each.state}")
        if not options.dry_run:
            version = forget(root, store, found).fingerprint
            store = TokenStore.open(root.url, version)
            print(f"made         {root.url_of(version)}")
    if options.audit is not None and not options.dry_run:
        for url, entry in _unrecorded(options.audit, root, store):
            audit.append(options.audit, "forgot", url, of=entry["of"], hashes=entry["hashes"])
            print(f"recorded     {url}")
    if options.dry_run:
        print("dry run      nothing is written or deleted")
    elif options.delete_old:
        delete_versions(root, old)
        print(f"deleted      {', '.join(old)}")
    elif old:
        print(f"kept         {', '.join(old)}, with the record; the same command with --delete-old deletes them")
    if commands:
        print(
            "next:", *(f"  {command_line(*words)}".replace("=VERSION", f"={version}") for words in commands), sep="\n"
        )


def _unrecorded(where: str, root: ObjectStore, store: TokenStore) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields versions that were made by forgetting and are not in the audit record, maybe as a call was killed."""
    recorded = {each.subject for each in audit.read_entries(where) if each.action == "forgot"}
    for version, entry in zip(line_of(store)[1:], earlier(store), strict=True):
        if (url := root.url_of(version)) not in recorded:
            yield url, entry


def _describe(store: TokenStore, found: Found, others: Sequence[str]) -> Iterator[str]:
    """Yields what is found in a store, and what it may have shaped there; `others` are versions of other recipes."""
    manifest, recipe, (train, validation) = store.manifest, store.manifest.recipe, found.documents.values()
    kinds = {name: part.get("kind") for name, part in recipe.items() if isinstance(part, Mapping)}
    yield f"record       {', '.join([f'train:{n}' for n in train] + [f'validation:{n}' for n in validation])}"
    if kinds.get("tokenizer") == "train_bpe":
        yield "tokenizer    may have been trained on it; its vocabulary stays"
    if recipe.get("dedup") is not None:
        which = f"some of {manifest.counts.duplicates:,} documents"
        if found.duplicates is not None:
            which = ", ".join(found.duplicates) or "no other record"
        yield f"dedup        may have left out {which} because of it; they stay out"
    if len(validation):
        both = "it is in both splits; " if len(train) else ""
        yield f"validation   {both}evaluations have read it: their losses, and what was chosen by them, as by keep_best"
    if kinds.get("validation") in ("tail", "last_documents"):
        last = manifest.splits["train"].documents - 1
        yield f"border       train:{last} and validation:0 may be halves of one record: forget both, if it is that one"
    yield "counts       it still counts in those of the manifest, and in the shares of a mixture by size"
    if kinds.get("source") in ("stdin", "kafka"):
        yield "stream       its parts keep it: the next sealed version has it again"
    if others:
        yield f"versions     {', '.join(others)} are of other recipes or files: name each by --version, too"
    yield "not found    parts of it in other documents, and near duplicates"


def _print_reader(
    overview: RunOverview, records: _Records, store: TokenStore, found: Found, options: argparse.Namespace
) -> list[list[str]]:
    """Prints which steps of a run have read what was found, and what came of them; returns commands that replay it."""
    path, record, line = overview.path, records[overview.path], line_of(store)
    own = [i for i, version in enumerate(record["data_versions"]) if version in line]
    url, version = store.storage.url.rsplit("/", 1)
    places = [f"data.sources.{i}" if "sources" in record["config"]["data"] else "data" for i in own]
    changes = [word for each in places for word in (f"{each}.store={url}", f"{each}.version=VERSION")]
    try:
        # All versions of the line have the same layout, and the one that the run has read may be deleted.
        overrides = [each.replace("=VERSION", f"={version}") for each in changes]
        run = load_file(path, Run, options.imports).with_overrides(overrides).run
        data, dataset, count, steps = run.data, run.data.open(hint=""), run.train.global_batch, list[int]()
        parts = data.source_configs if isinstance(data, mixture.Mixture) else [data]
        first_ids = dataset.train.offsets if isinstance(dataset, mixture.MixtureDataset) else [0]
        ids = np.concatenate([first_ids[i] + _samples(parts[i], store, found.documents["train"]) for i in own])
        for step in range(run.train.steps if len(ids) else 0):
            if np.isin(dataset.sample_ids(run.train.batch_of_step(step), count), ids).any():
                steps.append(step + 1)
        checkpoints = stored_checkpoints(path).steps()
        with local_files(path) as folder:
            rows = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    except JaxinfraError as error:
        print(f"run          {path}: unknown, {error}")
        return []
    done = max([overview.completed_steps, *checkpoints])
    read = [step for step in steps if step <= done]
    listed = ", ".join(map(str, read)) or "none"
    print(f"run          {path}: {overview.state}, {len(read)} of {done} steps have read it: {listed}")
    if not steps or (not read and done == run.train.steps):
        return []
    before = max((step for step in checkpoints if step < steps[0]), default=0)
    times_s = [row["step_time_s"] for row in rows if "step_time_s" in row]
    hours = f"{(done - before) * median(times_s) / 3600:.3g} hours" if times_s else "of unknown time"
    print(f"  replay     from {f'checkpoint {before}' if before else 'the start'}: {done - before} steps, {hours}")
    if after := [str(step) for step in checkpoints if step >= steps[0]]:
        print(f"  learned    checkpoints {', '.join(after)}")
    for each in _made_from(path, steps[0], records, options.runs):
        print(f"  made of it {each}")
    if not getattr(run.data, "mask_documents", True):
        print("  not masked data.mask_documents=false: its padding still counts in the loss, as ends of documents")
    parent, _, name = path.rpartition("/")
    target, more = f"{path}-forgot", [word for each in options.imports for word in ("--import", each)]
    words = [f"root={parent or '.'}", f"name={name}-forgot", *changes, *more]
    if not before:
        return [[path, *words]]
    return [["checkpoints", path, "copy-to", target, "--step", str(before)], [target, *words, "--accept-change"]]


def _samples(data: object, store: TokenStore, documents: np.ndarray) -> np.ndarray:
    """Returns the training samples that have tokens of these documents; ConfigError for data of a user class."""
    if isinstance(data, pairs.PairData):
        if not isinstance(data, labeled.LabeledData):
            return documents // len(pairs.SIDES)
        count = store.manifest.splits["train"].documents
        return np.concatenate([documents, (documents - max(round(labeled._DISTANCE * count), 1)) % count])
    if not isinstance(data, tokens.TokenData):
        raise ConfigError(f"{type(data).__name__}: nobody knows which samples have a document; look at its batches")
    offsets = store.read_all("train", layout.OFFSETS)
    if data.packing == "concat":  # a row has one token more than targets
        width, ranges = data.seq_len, zip(offsets[documents], offsets[documents + 1], strict=True)
        rows = [np.arange(max(0, -(-(start - width) // width)), (end - 1) // width + 1) for start, end in ranges]
        return np.concatenate([np.empty(0, np.int64), *rows])
    folder = f"packs/{PackSpec(seq_len=data.seq_len, by_length=data.packing == 'best_fit_by_length').name}"
    document_of = np.searchsorted(offsets, store.read_all("train", f"{folder}/segments")[:, 0], "right") - 1
    segments = np.flatnonzero(np.isin(document_of, documents))
    return np.searchsorted(store.read_all("train", f"{folder}/rows"), segments, "right") - 1


def _made_from(path: str, first: int, records: _Records, roots: Sequence[str]) -> Iterator[str]:
    """Yields the runs and exports that began with a checkpoint of a run from step `first` on, and what came of them."""

    def is_after(source: Mapping[str, Any], location: object, folder: str) -> bool:
        named = str(location) if is_remote(str(location)) else os.path.join(folder, str(location))
        return os.path.realpath(named) == os.path.realpath(path) and (source.get("step") or 0) >= first

    for other, record in records.items():
        if is_after(source := record.get("init") or {}, source.get("run"), str(record.get("folder", ""))):
            yield f"{other}, by init={source['run']}@{source['step']}"
            yield from _made_from(other, 0, records, roots)
    for file in (file for root in roots if not is_remote(root) for file in Path(root).glob(f"**/{RECEIPT}")):
        source = (parse_json(file.read_bytes()) or {}).get("source") or {}
        if is_after(source, source.get("source"), ""):
            yield f"{file.parent}, exported at step {source['step']}"
