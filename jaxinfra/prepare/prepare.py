"""From a recipe to a version of a store: list, work in parallel, assemble, publish.

    source --pieces--> jobs --engine--> parts --assemble--> arrays --publish--> STORE/FINGERPRINT

Everything before the last arrow happens in a work folder that is named by what is made, so that a killed preparation
goes on with the parts that it has. Jobs and their order are a function of the recipe and the files: the same bytes come
out of any engine and any number of workers.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxinfra.config import encode
from jaxinfra.data.store import versions
from jaxinfra.data.store.manifest import FILE_NAME, Manifest, digest_of
from jaxinfra.data.store.store import Store
from jaxinfra.data.store.versions import Version
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import engines, parts
from jaxinfra.prepare.builders.images import ImageMaker
from jaxinfra.prepare.builders.job import Job
from jaxinfra.prepare.builders.text import TextMaker
from jaxinfra.prepare.engines import EngineName
from jaxinfra.prepare.parts import Note
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.corpus import SHARD_BYTES, Corpus
from jaxinfra.prepare.recipes.validation import OtherStore, explicit
from jaxinfra.prepare.sources.any_source import AnySource
from jaxinfra.prepare.sources.record import Piece
from jaxinfra.prepare.workspace import require_store, workspace
from jaxinfra.storage.checks import check_space
from jaxinfra.storage.objects import ObjectStore

_NOT_CONTENT = ("store", "shard_bytes", "work")  # fields of a recipe that do not change what comes out
_LEAST_JOBS, _LEAST_BYTES = 32, 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far preparing is: `done` of about `total` bytes of the source, and tokens that were made in this call."""

    stage: str
    done: int
    total: int
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A version that is there.

    Attributes:
        new: whether this call made it.
        moved: whether it was there and another one was the newest, which it is now.
    """

    path: str
    manifest: Manifest
    new: bool
    moved: bool = False


def prepare(
    recipe: Recipe,
    *,
    engine: EngineName = "local",
    workers: int | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Prepared:
    """Makes a version of the store; one that this recipe has made of the same files is not made again.

    Either way it is the newest one then, which runs take. So many `workers` of the engine as there are cores do the
    jobs if None is given, and `tell` is told about the steps on the way.

    Memory: a worker holds the largest record and what it makes of a shard of the source; assembling, see `assemble`.

    Raises:
        ConfigError: the recipe does not work, or the store's folder holds something else; nothing is changed.
        DataError: a record cannot be read and the recipe does not skip it; what is done so far is kept.
        StorageError: something cannot be read, or the store cannot be written.
    """
    store = ObjectStore(recipe.store)
    require_store(store)
    known = versions.list_versions(store)
    sources = [_cut(recipe.source, recipe.shard_bytes), _validation_pieces(recipe)]
    maker = TextMaker(recipe) if isinstance(recipe, Corpus) else ImageMaker(recipe)
    source_digest = digest_of([vars(piece) for pieces in sources for piece in pieces])
    made_of = digest_of([content_of(recipe), source_digest, maker.identity])
    if (found := existing(store, known, made_of)) is not None:
        return found
    planned = [
        Job(number=0, pieces=group, recipe=recipe, folder="", validation=validation)
        for pieces, validation in zip(sources, (False, True), strict=True)
        for group in plan(pieces, recipe.shard_bytes)
    ]
    # Parts that were cut in another way would lose or repeat records.
    cut = digest_of([made_of, *(len(job.pieces) for job in planned)])
    with workspace(store, cut, recipe.work) as work:
        folder, build = work / "parts", work / "build"
        folder.mkdir(exist_ok=True)
        jobs: list[Job[Any]] = [replace(job, number=number, folder=str(folder)) for number, job in enumerate(planned)]
        total, done, tokens = sum(job.read_bytes for job in jobs), 0, 0

        def say(stage: str, note: Note | None = None) -> None:
            nonlocal done, tokens
            if note is not None:
                done, tokens = done + note.read_bytes, tokens + note.tokens
            tell(Progress(stage=stage, done=done, total=total, tokens=tokens))

        say("begin")
        usual = recipe.shard_bytes == SHARD_BYTES
        maker.begin(folder, sources[0] if usual else _cut(recipe.source, SHARD_BYTES))
        check_space(folder, maker.needed_bytes(total), purpose="preparing", fix="use work=FOLDER on another disk")
        there = set(parts.numbers(folder))
        todo = [job for job in jobs if job.number not in there]
        done = total - sum(job.read_bytes for job in todo)
        say(maker.stage)
        engines.run(engine, maker.job, todo, workers=workers, done=partial(say, maker.stage))
        _check_unchanged(recipe, sources)
        say("store")
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir()
        manifest = maker.assemble(folder, range(len(jobs)), build, source_digest)
        say("publish")
        versions.publish_version(build, store, manifest, made_of)
    return Prepared(path=store.url_of(manifest.fingerprint), manifest=manifest, new=True)


def _check_unchanged(recipe: Recipe, sources: Sequence[Sequence[Piece]]) -> None:
    """Raises DataError if what was read is not what was listed, so that parts are of different files."""
    for source, pieces in zip((recipe.source, explicit(recipe.validation)), sources, strict=True):
        if source is None or isinstance(source, OtherStore):  # whose versions never change
            continue
        stamps = {piece.name: piece.stamp for piece in source.pieces(recipe.shard_bytes)}
        for piece in pieces:
            if stamps.get(piece.name) != piece.stamp:
                raise DataError(
                    f"{piece.name}: was changed while the source was read; start again when it stays as it is"
                )


def existing(store: ObjectStore, known: Sequence[Version], made_of: str) -> Prepared | None:
    """Returns the known version that was made of the same, and makes it the newest one; None if there is none.

    A damaged one is a DataError: as others may read it, it is not replaced.
    """
    for each in known:
        if each.made_of == made_of and store.child(each.fingerprint).exists(FILE_NAME):
            try:
                found = Store.open(store.url, each.fingerprint)
            except DataError as error:
                raise DataError(
                    f"{store.url}: what this recipe made before is damaged ({error}); move the folder "
                    f"{each.fingerprint} away and prepare again"
                ) from error
            moved = versions.make_newest(store, each)
            return Prepared(path=str(found), manifest=found.manifest, new=False, moved=moved)
    return None


def content_of(recipe: Recipe) -> Mapping[str, object]:
    """Returns the recipe without what does not change what comes out."""
    return {name: value for name, value in encode(recipe).items() if name not in _NOT_CONTENT}


def _validation_pieces(recipe: Recipe) -> Sequence[Piece]:
    """Lists the validation source; () where the validation split is a share of the source."""
    validation = explicit(recipe.validation)
    if validation is None:
        return ()
    try:
        return _cut(validation, recipe.shard_bytes)
    except ConfigError as error:
        where = str(error)
        raise ConfigError(where if where.startswith("validation.") else f"validation.{where}") from error


def _cut(source: AnySource | OtherStore, shard_bytes: int) -> Sequence[Piece]:
    """A source in pieces of about a shard; in smaller ones where that would leave workers idle."""
    pieces = source.pieces(shard_bytes)
    size = _shard_size(pieces, shard_bytes)
    return pieces if size == shard_bytes else source.pieces(size)


def _shard_size(pieces: Sequence[Piece], shard_bytes: int) -> int:
    """Bytes that a job reads: a function of the source alone, not of the workers."""
    even = sum(piece.size_bytes for piece in pieces) // _LEAST_JOBS
    return min(shard_bytes, max(even, _LEAST_BYTES))


def plan(pieces: Sequence[Piece], shard_bytes: int) -> list[tuple[Piece, ...]]:
    """Pieces in groups of about a shard, each to be read by one job."""
    size = _shard_size(pieces, shard_bytes)
    groups: list[list[Piece]] = []
    filled = size
    for piece in pieces:
        if filled >= size:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.size_bytes
    return [tuple(group) for group in groups]
