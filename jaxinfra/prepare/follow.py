"""From a stream to versions of a store: what comes is tokenised and kept as it comes, and sealed again and again.

    stream --blocks--> parts --assemble--> arrays --publish--> STORE/FINGERPRINT
              ^          |
              +-position-+

A block becomes a part, and where the stream stands after it is written in that part: one rename commits both. So every
record is in the parts exactly once, whenever the process is killed. Parts of a stream are kept: a version is made of
all of them, and the stream may not be there to be read again.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxinfra.data.store import versions
from jaxinfra.data.store.manifest import digest_of
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.text import TextMaker
from jaxinfra.prepare.parts import Note
from jaxinfra.prepare.prepare import Prepared, Progress, content_of, existing
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.stream import WAIT_S, Stream, blocks
from jaxinfra.prepare.workspace import kept_folder, require_store, workspace
from jaxinfra.storage.checks import check_space
from jaxinfra.storage.objects import ObjectStore


def follow(
    recipe: Recipe,
    *,
    stopping: Callable[[], bool],
    until_idle_s: float | None = None,
    seal_every_tokens: int | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Prepared]:
    """Reads a stream from where the last call stood, and seals versions of all that has come since its beginning.

    Memory: a block of the stream, about `shard_bytes` of text, and its tokens; sealing, see `assemble`.

    Args:
        recipe: what to make; its source is a stream, its tokenizer an existing one.
        stopping: whether to seal what has come and end; asked at least twice a second while the stream is waited for.
        until_idle_s: seal and end when all has come and nothing more for so long; None waits for the end of the stream.
        seal_every_tokens: seal a version whenever so many have come, too; each takes as long as copying all tokens.
        tell: told about what has come.

    Yields:
        Each version that was sealed, and at the end the newest, `new` if it was sealed now.

    Raises as `prepare`, and DataError for another stream than before, ConfigError if a split of what came is empty.
    """
    source = recipe.source
    if not isinstance(recipe, Corpus) or not isinstance(source, Stream):
        raise ConfigError(f"source={type(source).__name__}: is no stream; leave out --follow")
    store = ObjectStore(recipe.store)
    require_store(store)
    maker = TextMaker(recipe)
    identity = digest_of([dict(content_of(recipe)) | {"source": source.name}, maker.identity])
    with workspace(store, identity, recipe.work) as work:
        kept = kept_folder(store, identity, recipe.work)
        maker.begin(kept, ())
        course = _Course(store, maker, work / "build", kept, identity, tell)
        course.tell("tokens")
        with source.open(course.position) as reader:
            heard_s = time.monotonic()
            wait_s = WAIT_S if until_idle_s is None else min(WAIT_S, until_idle_s)
            for block in blocks(reader, recipe.shard_bytes, stopping=stopping, wait_s=wait_s):
                if block is not None:
                    course.commit(maker.part(kept, block))
                    reader.committed(block.position)
                    heard_s = time.monotonic()
                elif until_idle_s is not None and time.monotonic() - heard_s >= until_idle_s and reader.at_end():
                    break
                if seal_every_tokens is not None and course.unsealed_tokens >= seal_every_tokens:
                    yield course.seal()
        if course.count or not stopping():
            yield course.seal()


class _Course:
    """What has come so far, and what of it is sealed."""

    def __init__(
        self,
        store: ObjectStore,
        maker: TextMaker,
        build: Path,
        kept: Path,
        identity: str,
        told: Callable[[Progress], None],
    ):
        self._store, self._maker, self._build, self._kept = store, maker, build, kept
        self._identity, self._told = identity, told
        self.position: Mapping[str, Any] = {}
        self.count = self.unsealed_tokens = self._read_bytes = self._tokens = 0
        known = {each.made_of for each in versions.list_versions(store)}
        for number in parts.numbers(kept):
            if number != self.count:
                raise DataError(
                    f"{parts.path_of(kept, self.count)}: missing, and the stream has gone on since; delete {kept} to "
                    "read the stream from its beginning"
                )
            self._count(parts.note(kept, number))
            if self._made_of in known:
                self.unsealed_tokens = 0

    def commit(self, part: parts.Part) -> None:
        note = parts.write(self._kept, self.count, part)
        self._count(note)
        self._tokens += note.tokens
        self.tell("tokens")

    def tell(self, stage: str) -> None:
        self._told(Progress(stage=stage, done=self._read_bytes, total=self._read_bytes, tokens=self._tokens))

    def seal(self) -> Prepared:
        """Makes a version of all that has come, unless there is one; it is the newest one then."""
        if (found := existing(self._store, versions.list_versions(self._store), self._made_of)) is not None:
            return found
        self.tell("store")
        needed_bytes = sum(path.stat().st_size for path in self._kept.iterdir())
        check_space(self._build.parent, needed_bytes, purpose="a version", fix="use work=FOLDER on another disk")
        shutil.rmtree(self._build, ignore_errors=True)
        self._build.mkdir(parents=True)
        manifest = self._maker.assemble(self._kept, range(self.count), self._build, digest_of(self.position))
        versions.publish_version(self._build, self._store, manifest, self._made_of)
        self.unsealed_tokens = 0
        return Prepared(path=self._store.url_of(manifest.fingerprint), manifest=manifest, new=True)

    @property
    def _made_of(self) -> str:
        return digest_of([self._identity, self.position])

    def _count(self, note: Note) -> None:
        self.count, self.position = self.count + 1, note.position
        self.unsealed_tokens += note.tokens
        self._read_bytes += note.read_bytes
