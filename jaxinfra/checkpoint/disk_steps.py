"""The folders of checkpoints on a disk: which are steps, and what saves and deletions have left. Imports no JAX.

STEP                          a complete checkpoint
STEP.damaged, STEP.damaged-2  one that was set aside
STEP.orbax-checkpoint-tmp...  a save or a copy in progress, or what an interrupted one has left
.deleted-STEP                 what an interrupted deletion has left
"""

import re
import shutil
from pathlib import Path

TEMPORARY = ".orbax-checkpoint-tmp"
"""Ending of the name of a temporary folder, after the step; Orbax's `TMP_DIR_SUFFIX`."""

_DELETED = ".deleted-"
_STEP = re.compile(r"0|[1-9]\d*", re.ASCII)
_INCOMPLETE = re.compile(rf"\d+{re.escape(TEMPORARY)}.*|{re.escape(_DELETED)}.*", re.ASCII)
_DAMAGED = re.compile(r"\d+\.damaged(-\d+)?", re.ASCII)


def list_steps(directory: Path) -> list[int]:
    """Returns the steps, ascending; none if there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _STEP.fullmatch(path.name))


def incomplete(directory: Path) -> list[Path]:
    """Returns what saves and deletions that go on, or were interrupted, have left."""
    return [path for path in directory.iterdir() if _INCOMPLETE.fullmatch(path.name)] if directory.is_dir() else []


def set_aside(directory: Path) -> list[Path]:
    """Returns the folders of damaged steps that were set aside."""
    return [path for path in directory.iterdir() if _DAMAGED.fullmatch(path.name)] if directory.is_dir() else []


def path_aside(directory: Path, step: int) -> Path:
    """Returns a new name for the folder of a damaged step."""
    names = (f"{step}.damaged{'' if number == 1 else f'-{number}'}" for number in range(1, 1000))
    return next(path for name in names if not (path := directory / name).exists())


def hide(folder: Path) -> Path:
    """Renames a folder that will be deleted, so that no other process sees a part of it, or completes it."""
    if folder.name.startswith(_DELETED):
        return folder
    return folder.rename(folder.with_name(f"{_DELETED}{folder.name}"))


def delete(folder: Path) -> None:
    """Deletes a folder, which is hidden first."""
    shutil.rmtree(hide(folder))


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files in a folder, as far as they are there still."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a save in progress replaces its files
            continue
    return total
