"""Makes versions of a store from a stream: commits what arrives as parts, and seals all parts into versions.

Sealing assembles all parts so far into a version and publishes it.

    stream --batches--> parts --assemble--> arrays --publish--> STORE/FINGERPRINT
              ^           |
              +--position-+

A batch of records becomes a part, which also holds the position of the stream after it. One rename commits both, so
each record is in the parts exactly once, whenever the process is killed. Parts are kept forever, because every version
is made from all of them, and the stream cannot always be read again.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxinfra.data.store import versions
from jaxinfra.data.store.manifest import digest_of
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.select import EmptySplitError
from jaxinfra.prepare.builders.text import TextStoreBuilder, tokenize_batch
from jaxinfra.prepare.parts import PartMetadata
from jaxinfra.prepare.prepare import OnProgress, PreparedVersion, PrepareProgress, find_existing, output_fields
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.stream import LINGER_S, Position, StreamBatch, StreamSource, read_batches
from jaxinfra.prepare.workspace import make_empty_folder, open_workspace, require_store, stream_folder
from jaxinfra.storage.checks import check_space
from jaxinfra.storage.objects import ObjectStore


def follow(
    recipe: Recipe,
    *,
    should_stop: Callable[[], bool],
    idle_timeout_s: float | None = None,
    seal_every_tokens: int | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> Iterator[PreparedVersion]:
    """Reads a stream from the position where the last call ended, and seals versions of everything since its beginning.

    Yields each sealed version, and at the end the newest one. Memory: a batch (about `shard_bytes` of text) and its
    tokens; for sealing see `builders.select`. Raises as `prepare`, EmptySplitError if a split is empty at the end,
    and DataError if the stream is not the same as before.

    Args:
        recipe: its source is a stream, and its tokenizer is not `TrainBpe`.
        should_stop: whether to seal and end; called at least twice a second while waiting.
        idle_timeout_s: also ends when everything has been read and nothing arrived for this time; None waits for the
            end of the stream.
        seal_every_tokens: also seals whenever this many tokens have arrived and no split is empty. Sealing copies all
            tokens, old ones too.
        on_progress: called after each batch.
    """
    source = recipe.source
    if not isinstance(recipe, Corpus) or not isinstance(source, StreamSource):
        raise ConfigError(f"source={type(source).__name__}: is not a stream; leave out --follow")
    store = ObjectStore(recipe.store)
    require_store(store)
    builder = TextStoreBuilder(recipe)
    stream_digest = digest_of([dict(output_fields(recipe)) | {"source": source.name}, builder.input_digest])
    with open_workspace(store, stream_digest, recipe.work_dir) as work:
        folder = stream_folder(store, stream_digest, recipe.work_dir)
        builder.setup(folder, ())
        stream = _StreamParts(store, builder, work, folder, on_progress)
        stream.report("tokens")
        with source.open(stream.position) as reader:
            timeout_s = math.inf if idle_timeout_s is None else idle_timeout_s
            linger_s = min(LINGER_S, timeout_s)
            last_batch_s = time.monotonic()
            for batch in read_batches(reader, recipe.shard_bytes, should_stop=should_stop, linger_s=linger_s):
                if batch is not None:
                    stream.commit(batch)
                    reader.on_commit(batch.position)
                    last_batch_s = time.monotonic()
                elif time.monotonic() - last_batch_s >= timeout_s and reader.caught_up():
                    break
                if (version := stream.seal_if_due(seal_every_tokens)) is not None:
                    yield version
        if stream.num_parts or not should_stop():  # stopping before anything arrived is no error, an empty stream is
            yield stream.seal()


class _StreamParts:
    """The parts of a stream so far, and the number of their tokens that are not in a version yet."""

    def __init__(
        self, store: ObjectStore, builder: TextStoreBuilder, work: Path, folder: Path, on_progress: OnProgress
    ):
        self._store, self._builder, self._work, self._folder = store, builder, work, folder
        self._on_progress = on_progress
        self.position: Position = {}
        self.num_parts = self._unsealed_tokens = self._read_bytes = self._new_tokens = self._num_parts_tried = 0
        known = {version.made_of for version in versions.list_versions(store)}
        for number in parts.part_numbers(folder):
            if number != self.num_parts:
                raise DataError(
                    f"{parts.part_path(folder, self.num_parts)}: is missing, but later parts exist; delete {folder} to "
                    "read the stream from its beginning"
                )
            self._add(parts.read_metadata(folder, number))
            if self._made_of in known:  # the parts so far were sealed by an earlier call
                self._unsealed_tokens = 0

    def commit(self, batch: StreamBatch) -> None:
        """Makes and writes the next part."""
        metadata = tokenize_batch(self._builder.corpus, self._folder, self.num_parts, batch)
        self._add(metadata)
        self._new_tokens += metadata.tokens
        self.report("tokens")

    def report(self, stage: str) -> None:
        """Reports progress; the total of a stream is unknown."""
        done = self._read_bytes
        self._on_progress(PrepareProgress(stage=stage, done=done, total=done, tokens=self._new_tokens))

    def seal(self) -> PreparedVersion:
        """Makes a version of all parts, unless it exists; it becomes the newest version."""
        if (existing := find_existing(self._store, self._made_of)) is not None:
            return existing
        self.report("store")
        needed_bytes = sum(path.stat().st_size for path in self._folder.iterdir())
        check_space(self._work, needed_bytes, purpose="a version", fix="use work_dir=FOLDER on another disk")
        build = make_empty_folder(self._work / "build")
        manifest = self._builder.assemble(self._folder, self.num_parts, build, digest_of(self.position))
        versions.publish_version(build, self._store, manifest, self._made_of)
        self._unsealed_tokens = 0
        return PreparedVersion(path=self._store.url_of(manifest.fingerprint), manifest=manifest, new=True)

    def seal_if_due(self, every_tokens: int | None) -> PreparedVersion | None:
        """As `seal`, if that many tokens are in no version; None if a split is empty, until another part arrives."""
        if every_tokens is None or self._unsealed_tokens < every_tokens or self._num_parts_tried == self.num_parts:
            return None
        self._num_parts_tried = self.num_parts
        try:
            return self.seal()
        except EmptySplitError:
            return None

    @property
    def _made_of(self) -> str:
        """Digest of the recipe and the stream, which names the folder, and of the position after all parts."""
        return digest_of([self._folder.name, self.position])

    def _add(self, part: PartMetadata) -> None:
        self.num_parts, self.position = self.num_parts + 1, part.position
        self._unsealed_tokens += part.tokens
        self._read_bytes += part.read_bytes
