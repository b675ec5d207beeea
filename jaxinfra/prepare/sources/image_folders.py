"""Images in folders that are named after their classes."""

import glob
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, override

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.sources.files import FileSource, split_files
from jaxinfra.prepare.sources.record import Fields, Records, SourceShard, parse_record
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import FileInfo, display_url, list_files, list_folders, open_file

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, kw_only=True)
class ImageFolders(FileSource):
    """Images `class/name.png`, as records `{"image": uint8[height, width, channels], "label": int, "class": str}`.

    A label is the index of the class in the sorted folder names. The key is the file name relative to the root.
    Images are rotated according to their EXIF data. Files that do not end in a known image suffix are ignored.

    Attributes:
        mode: "RGB" converts to 3 channels, "L" (gray) to 1.
    """

    pattern: str = "*/**/*"
    mode: Literal["RGB", "L"] = "RGB"

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if "/" not in self.pattern:
            yield Problem(fields=("pattern",), message="matches no class folders", fix="use pattern=*/*.png")

    @override
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        classes = _group_by_class(list_files(self.root, self.pattern))
        if not classes:
            place = f"a class folder of {display_url(self.root)}"
            raise ConfigError(f"pattern={self.pattern}: matches no image in {place}; use pattern=*/**/*")
        # A shard is a range of the sorted files of a class, because one shard per image would be too many.
        files = [_merge_files(name, images) for name, images in classes.items()]
        return split_files(files, lambda file: len(classes[file.name]), shard_bytes)

    @override
    def read(self, shard: SourceShard) -> Records:
        label = list_folders(self.root).index(shard.name)
        first, _, rest = self.pattern.partition("/")  # for the class cats, */*.png becomes cats/*.png
        pattern = f"{glob.escape(shard.name)}/{'**/' if first == '**' else ''}{rest}"
        files = _group_by_class(list_files(self.root, pattern)).get(shard.name, [])
        if _merge_files(shard.name, files).stamp != shard.stamp:
            raise StorageError(f"{display_url(self.root)}/{shard.name}: changed since it was listed; start again")

        def parse(content: bytes) -> Fields:
            return {"image": _decode(content, self.mode), "label": label, "class": shard.name}

        for file in files[shard.start : shard.end]:
            with open_file(self.root, file.name) as stream:
                content = stream.read()
            yield parse_record(parse, content, key=file.name, location=file.name)


def _group_by_class(files: Iterable[FileInfo]) -> dict[str, list[FileInfo]]:
    """Groups images by class folder, sorted by class."""
    classes: dict[str, list[FileInfo]] = {}
    for file in files:
        folder, slash, name = file.name.partition("/")
        if slash and name.lower().endswith(_SUFFIXES):
            classes.setdefault(folder, []).append(file)
    # The file names are sorted already, but "a-b/1.png" sorts before "a/1.png".
    return dict(sorted(classes.items()))


def _merge_files(name: str, files: Sequence[FileInfo]) -> FileInfo:
    """Returns one file that stands for all files of a class."""
    stamps = hashlib.blake2b(digest_size=16)
    for file in files:
        stamps.update(f"{file.name}\0{file.stamp}\0".encode())
    return FileInfo(name=name, size_bytes=sum(file.size_bytes for file in files), stamp=stamps.hexdigest())


def _decode(content: bytes, mode: str) -> np.ndarray:
    """Decodes an image to uint8[height, width, channels]; ValueError if it cannot be decoded."""
    pillow = import_optional("PIL", "Image", "ImageOps", needed_by="source=image_folders", install="jaxinfra[images]")
    try:
        with pillow.Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip all values above 255
                raise ValueError("has more than 8 bits a channel")
            pixels = np.asarray(pillow.ImageOps.exif_transpose(image).convert(mode))
    except pillow.UnidentifiedImageError:
        raise ValueError("is not an image of a known format") from None
    except Exception as error:  # decoders raise every kind of error on damaged images
        raise ValueError(f"cannot be decoded as an image ({cause_of(error)})") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
