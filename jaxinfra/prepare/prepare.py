"""Makes a version of a store from a recipe: lists shards, runs jobs, assembles their parts, publishes the version.

    source --shards--> jobs --engine--> parts --assemble--> arrays --publish--> STORE/FINGERPRINT

Everything before the last arrow happens in a work folder whose name is a digest of the inputs, so a killed preparation
continues with the parts that it has. Jobs and their order are a function of the recipe and the files, so every engine
and any number of workers give the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxinfra.config import encode
from jaxinfra.config.text import error_prefix
from jaxinfra.data.store import versions
from jaxinfra.data.store.manifest import FILE_NAME, Manifest, digest_of
from jaxinfra.data.store.store import Store
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import engines, parts
from jaxinfra.prepare.builders.images import ImageStoreBuilder
from jaxinfra.prepare.builders.job import PrepareJob, StoreBuilder
from jaxinfra.prepare.builders.text import TextStoreBuilder
from jaxinfra.prepare.engines import EngineName
from jaxinfra.prepare.parts import PartMetadata
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.corpus import SHARD_BYTES, Corpus
from jaxinfra.prepare.recipes.validation import ByKey, OtherStore, validation_source
from jaxinfra.prepare.sources.any_source import AnySource
from jaxinfra.prepare.sources.record import Source, SourceShard
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.workspace import make_empty_folder, open_workspace, require_store
from jaxinfra.storage.checks import check_space
from jaxinfra.storage.objects import ObjectStore

_NOT_CONTENT = ("store", "shard_bytes", "work_dir")  # fields of a recipe that do not change what the store holds
_MIN_JOBS, _MIN_SHARD_BYTES = 32, 64 * 1024  # a small corpus gives enough jobs for all workers, but no tiny ones


@dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """Progress of preparing: `done` of about `total` source bytes, and tokens made by this call."""

    stage: str
    done: int
    total: int
    tokens: int = 0


type OnProgress = Callable[[PrepareProgress], None]


@dataclass(frozen=True, kw_only=True)
class PreparedVersion:
    """A version that was prepared, now or before."""

    path: str
    manifest: Manifest
    new: bool  # whether this call made it
    promoted: bool = False  # whether it existed before, and this call made it the newest one


def prepare(
    recipe: Recipe,
    *,
    engine: EngineName = "local",
    workers: int | None = None,
    on_progress: OnProgress = lambda progress: None,
    prepared_from: str = "",
) -> PreparedVersion:
    """Makes a version of the store, unless one of the same recipe and files exists; it becomes the newest version.

    `workers` jobs run at once; None is one per core. A worker holds the largest record and the output of one shard in
    memory; for the arrays of the version see `builders.select` and `builders.writers`. `prepared_from` goes into the
    manifest.

    Raises:
        ConfigError: the recipe cannot be used, or the store's folder holds other files; nothing is changed.
        DataError: a record cannot be read and the recipe does not skip it; finished parts are kept.
        StorageError: a file cannot be read, or the store cannot be written.
    """
    store = ObjectStore(recipe.store)
    require_store(store)
    recipe, _ = pin_sources(recipe)
    validation = validation_source(recipe.validation)
    train_shards = _list_shards(recipe.source, recipe.shard_bytes)
    # Messages of another store name its place in the recipe, those of a source its own fields.
    with error_prefix("" if isinstance(validation, OtherStore) else "validation."):
        validation_shards = _list_shards(validation, recipe.shard_bytes)
    _require_two_documents(recipe, train_shards)
    builder = TextStoreBuilder(recipe) if isinstance(recipe, Corpus) else ImageStoreBuilder(recipe)
    source_digest = digest_of([vars(shard) for shard in (*train_shards, *validation_shards)])
    made_of = digest_of([output_fields(recipe), source_digest, builder.input_digest])
    if (existing := find_existing(store, made_of)) is not None:
        return existing
    jobs = _make_jobs(recipe, train_shards, validation_shards)
    # The digest includes the jobs, because parts of other jobs would lose or repeat records.
    work_name = digest_of([made_of, *(len(job.shards) for job in jobs)])
    with open_workspace(store, work_name, recipe.work_dir) as work:
        folder = work / "parts"
        folder.mkdir(exist_ok=True)
        on_progress(PrepareProgress(stage="begin", done=0, total=sum(job.read_bytes for job in jobs)))
        # The tokenizer is always trained on shards of the default size, so that it does not depend on `shard_bytes`.
        has_default_shards = recipe.shard_bytes == SHARD_BYTES
        builder.setup(folder, train_shards if has_default_shards else _list_shards(recipe.source, SHARD_BYTES))
        progress = _make_parts(builder, folder, jobs, partial(engines.run_jobs, engine, workers=workers), on_progress)
        _check_unchanged(recipe.source, train_shards, recipe.shard_bytes)
        _check_unchanged(validation, validation_shards, recipe.shard_bytes)
        on_progress(replace(progress, stage="store"))
        build = make_empty_folder(work / "build")
        manifest = replace(builder.assemble(folder, len(jobs), build, source_digest), prepared_from=prepared_from)
        on_progress(replace(progress, stage="publish"))
        versions.publish_version(build, store, manifest, made_of)
    return PreparedVersion(path=store.url_of(manifest.fingerprint), manifest=manifest, new=True)


def pin_sources(recipe: Recipe) -> tuple[Recipe, Sequence[str]]:
    """Returns the recipe with the snapshots that its tables have now, and the overrides which set them.

    Raises as `Source.list_shards`.
    """
    overrides = []
    for field in ("source", "validation"):
        source = getattr(recipe, field)
        with error_prefix("" if field == "source" else "validation."):
            pinned = source.pinned() if isinstance(source, Source) else source
        if pinned != source:
            recipe = replace(recipe, **{field: pinned})
            changed = {name: value for name, value in vars(pinned).items() if value != getattr(source, name)}
            overrides += [f"{field}.{name}={value}" for name, value in changed.items()]
    return recipe, overrides


def _make_jobs(
    recipe: Recipe, train_shards: Sequence[SourceShard], validation_shards: Sequence[SourceShard]
) -> list[PrepareJob[Any]]:
    groups = [(group, False) for group in group_shards(train_shards, recipe.shard_bytes)]
    groups += [(group, True) for group in group_shards(validation_shards, recipe.shard_bytes)]
    return [
        PrepareJob(number=number, shards=group, recipe=recipe, validation=is_validation)
        for number, (group, is_validation) in enumerate(groups)
    ]


def _make_parts(
    builder: StoreBuilder[Any],
    folder: Path,
    jobs: Sequence[PrepareJob[Any]],
    run_jobs: Callable[..., None],
    on_progress: OnProgress,
) -> PrepareProgress:
    """Runs the jobs that have no part yet, and returns the progress at the end; `run_jobs` has engine and workers."""
    total = sum(job.read_bytes for job in jobs)
    needed_bytes = builder.estimate_bytes(total)
    check_space(folder, needed_bytes, purpose="preparing", fix="use work_dir=FOLDER on another disk")
    finished = set(parts.part_numbers(folder))
    todo = [job for job in jobs if job.number not in finished]
    progress = PrepareProgress(stage=builder.stage, done=total - sum(job.read_bytes for job in todo), total=total)
    on_progress(progress)

    def on_result(part: PartMetadata) -> None:
        nonlocal progress
        progress = replace(progress, done=progress.done + part.read_bytes, tokens=progress.tokens + part.tokens)
        on_progress(progress)

    run_jobs(partial(builder.make_part, folder), todo, on_result=on_result)
    return progress


def find_existing(store: ObjectStore, made_of: str) -> PreparedVersion | None:
    """Returns the version that was made of the same inputs, and makes it the newest one; None without such a version.

    If it is damaged, raises DataError and does not replace it, because others may be reading it.
    """
    for version in versions.list_versions(store):
        if version.made_of == made_of and store.child(version.fingerprint).exists(FILE_NAME):
            try:
                opened = Store.open(store.url, version.fingerprint)
            except DataError as error:
                raise DataError(
                    f"{store.url}: the version that this recipe made before is damaged ({error}); move the folder "
                    f"{version.fingerprint} away and prepare again"
                ) from error
            promoted = versions.make_newest(store, version)
            return PreparedVersion(path=str(opened), manifest=opened.manifest, new=False, promoted=promoted)
    return None


def output_fields(recipe: Recipe) -> Mapping[str, object]:
    """Returns the fields of a recipe that decide what the store holds."""
    return {name: value for name, value in encode(recipe).items() if name not in _NOT_CONTENT}


def group_shards(shards: Sequence[SourceShard], shard_bytes: int) -> list[tuple[SourceShard, ...]]:
    """Groups consecutive shards, so that each job reads about `shard_bytes`."""
    job_bytes = _job_bytes(shards, shard_bytes)
    groups: list[list[SourceShard]] = []
    group_bytes = 0
    for shard in shards:
        if not groups or group_bytes >= job_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(shard)
        group_bytes += shard.size_bytes
    return [tuple(group) for group in groups]


def _job_bytes(shards: Sequence[SourceShard], shard_bytes: int) -> int:
    """Returns the bytes that a job should read: `shard_bytes`, or less if there would be fewer than `_MIN_JOBS` jobs.

    It does not depend on the number of workers, which never changes the output.
    """
    bytes_for_min_jobs = sum(shard.size_bytes for shard in shards) // _MIN_JOBS
    return min(shard_bytes, max(bytes_for_min_jobs, _MIN_SHARD_BYTES))


def _list_shards(source: AnySource | OtherStore | None, shard_bytes: int) -> Sequence[SourceShard]:
    """Lists shards of about the bytes that a job should read; () without a source."""
    if source is None:
        return ()
    shards = source.list_shards(shard_bytes)
    job_bytes = _job_bytes(shards, shard_bytes)
    return shards if job_bytes == shard_bytes else source.list_shards(job_bytes)


def _require_two_documents(recipe: Recipe, shards: Sequence[SourceShard]) -> None:
    """Raises ConfigError, before anything is tokenized, if one document would have to be in both splits."""
    if isinstance(recipe.source, TextFiles) and isinstance(recipe.validation, ByKey) and len(shards) == 1:
        raise ConfigError(
            f"validation=by_key: {shards[0].name} is the only file, and whole files are drawn for validation; use "
            "validation=tail, which takes the end of the text"
        )


def _check_unchanged(source: AnySource | OtherStore | None, shards: Sequence[SourceShard], shard_bytes: int) -> None:
    """Raises DataError if a file was replaced after it was listed, because the parts may then mix two states of it."""
    if source is None or isinstance(source, OtherStore):  # versions of a store never change
        return
    stamps = {shard.name: shard.stamp for shard in source.list_shards(shard_bytes)}
    for shard in shards:
        if stamps.get(shard.name) != shard.stamp:
            raise DataError(f"{shard.name}: changed while it was read; start again when nothing writes to it")
