"""Makes wheels of what is installed here again, for hosts without the internet."""

import csv
import hashlib
import io
import json
import re
import tempfile
import zipfile
from email import message_from_string
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath

from tests.cloud.root import CACHE, locked

_FOLDER = CACHE / "wheels"
_WRITTEN_BY_INSTALLERS = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json", "uv_build.json"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


def normalized(name: str) -> str:
    """Returns the name of a distribution as an index has it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def installed() -> dict[str, Distribution]:
    """Returns the distributions by normalized names, without those that are installed to be edited."""
    found: dict[str, Distribution] = {}
    for each in distributions():
        if each.read_text("RECORD") and not _is_editable(each):
            found.setdefault(normalized(each.name), each)
    return found


def wheel_name(distribution: Distribution) -> str:
    """Returns the file name of its wheel."""
    tags = message_from_string(distribution.read_text("WHEEL") or "").get_all("Tag", [])
    parts = zip(*(tag.split("-") for tag in tags), strict=True)
    return f"{_stem(distribution)}-{'-'.join('.'.join(dict.fromkeys(part)) for part in parts)}.whl"


def wheel(distribution: Distribution) -> Path:
    """Returns its wheel, which is not compressed; makes it if it is not there, in a second for 100 MB."""
    key = hashlib.sha256((distribution.read_text("RECORD") or "").encode()).hexdigest()[:8]
    path = _FOLDER / key / wheel_name(distribution)
    with locked(f"wheel-{key}"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                unfinished = Path(folder, path.name)
                with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
                    _pack(distribution, archive)
                unfinished.rename(path)
    return path


def _pack(distribution: Distribution, archive: zipfile.ZipFile) -> None:
    record = io.StringIO()
    lines = csv.writer(record, lineterminator="\n")
    for name, source in _files(distribution).items():
        content = source.read_bytes()
        if ".data/scripts/" in name:
            content = re.sub(rb"\A#!.*python.*", b"#!python", content)
        info = zipfile.ZipInfo(name, _EPOCH)
        info.external_attr = (0o100755 if source.stat().st_mode & 0o100 else 0o100644) << 16
        archive.writestr(info, content)
        lines.writerow([name, "", len(content)])  # installers write the hashes of what they have installed
    lines.writerow([f"{_stem(distribution)}.dist-info/RECORD", "", ""])
    archive.writestr(zipfile.ZipInfo(f"{_stem(distribution)}.dist-info/RECORD", _EPOCH), record.getvalue())


def _files(distribution: Distribution) -> dict[str, Path]:
    """Returns what the wheel has, by its names in there; what is outside of site-packages is its `.data`."""
    made = {entry.name for entry in distribution.entry_points if entry.group in ("console_scripts", "gui_scripts")}
    info = f"{_stem(distribution)}.dist-info"
    found: dict[str, Path] = {}
    for path in distribution.files or ():
        source = Path(str(distribution.locate_file(path)))
        name = PurePosixPath(path)
        if "__pycache__" in name.parts or (name.parts[0] == info and name.name in _WRITTEN_BY_INSTALLERS):
            continue
        outside = [part for part in name.parts if part != ".."]
        if len(outside) == len(name.parts):
            found[str(name)] = source
        elif outside[0] != "bin":
            found[f"{_stem(distribution)}.data/data/{'/'.join(outside)}"] = source
        elif name.name not in made:
            found[f"{_stem(distribution)}.data/scripts/{name.name}"] = source
    return found


def _stem(distribution: Distribution) -> str:
    folders = {PurePosixPath(path).parts[0] for path in distribution.files or ()}
    return next(folder for folder in folders if folder.endswith(".dist-info")).removesuffix(".dist-info")


def _is_editable(distribution: Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return origin.get("dir_info", {}).get("editable", False)
