"""Every image below folders that are named after classes is a record."""

import glob
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, override

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.sources.files import Files, cut
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record, read_as
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import FileInfo, display_url, list_files, list_folders, open_file

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, kw_only=True)
class ImageFolders(Files):
    """Images `class/name.png`, as records `{"image": uint8 (height, width, channels), "label": int, "class": str}`.

    A label is the number of its class, from 0, in the sorted names of the folders below the root. The key is the name
    of the file relative to the root. Images are turned as their EXIF data says. Only files whose names end as those of
    images do are read.

    Attributes:
        mode: RGB gives 3 channels, L (grey) 1, whatever a file has.
    """

    pattern: str = "*/**/*"
    mode: Literal["RGB", "L"] = "RGB"

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if "/" not in self.pattern:
            yield Problem(fields=("pattern",), message="names no folders of classes", fix="use pattern=*/*.png")

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Lists ranges of the sorted files of a class: one an image would be too many."""
        classes = _classes(list_files(self.root, self.pattern))
        if not classes:
            raise ConfigError(
                f"pattern={self.pattern}: matches no image in a folder in {display_url(self.root)}; mend it"
            )
        return cut(map(_folder, classes, classes.values()), lambda folder: len(classes[folder.name]), split_bytes)

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        label = list_folders(self.root).index(piece.name)
        first, _, rest = self.pattern.partition("/")
        below = f"{glob.escape(piece.name)}/{'**/' if first == '**' else ''}{rest}"
        files = _classes(list_files(self.root, below)).get(piece.name, [])
        if _folder(piece.name, files).stamp != piece.stamp:
            raise StorageError(
                f"{display_url(self.root)}/{piece.name}: changed since its files were listed; start again"
            )

        def parse(content: bytes) -> Record:
            return {"image": _decoded(content, self.mode), "label": label, "class": piece.name}

        for file in files[piece.start : piece.end]:
            with open_file(self.root, file.name) as stream:
                content = stream.read()
            yield read_as(parse, content, key=file.name, where=file.name)


def _classes(files: Iterable[FileInfo]) -> dict[str, list[FileInfo]]:
    """Sorts the images in folders into classes: in order of names alone, `a-b/1.png` is before `a/1.png`."""
    found: dict[str, list[FileInfo]] = {}
    for file in files:
        folder, slash, name = file.name.partition("/")
        if slash and name.lower().endswith(_SUFFIXES):
            found.setdefault(folder, []).append(file)
    return dict(sorted(found.items()))


def _folder(name: str, files: Sequence[FileInfo]) -> FileInfo:
    """Takes the files of a class for one."""
    stamps = hashlib.blake2b(digest_size=16)
    for file in files:
        stamps.update(f"{file.name}\0{file.stamp}\0".encode())
    return FileInfo(name=name, size_bytes=sum(file.size_bytes for file in files), stamp=stamps.hexdigest())


def _decoded(content: bytes, mode: str) -> np.ndarray:
    """Decodes an image to uint8 (height, width, channels); a ValueError says why it cannot."""
    pillow = import_optional("PIL", "Image", "ImageOps", needed_by="source=image_folders", install="jaxinfra[images]")
    try:
        with pillow.Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):  # converted, all that is brighter than 255 would become white
                raise ValueError("has more than 8 bits a channel")
            pixels = np.asarray(pillow.ImageOps.exif_transpose(image).convert(mode))
    except pillow.UnidentifiedImageError:
        raise ValueError("is no image that can be used (of no format that is known)") from None
    except Exception as error:  # what decoders raise on damaged images is of every kind
        raise ValueError(f"is no image that can be used ({cause_of(error)})") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
