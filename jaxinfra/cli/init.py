"""`jaxinfra init [FOLDER]`: the quickstart's config and the recipe of its data, to start from outside a clone."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxinfra.command import COMMAND
from jaxinfra.errors import ConfigError
from jaxinfra.storage.errors import storage_errors

FILES = ("configs/quickstart.py", "configs/data/python_stdlib.py")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Writes the files and prints the commands that use them.

    ConfigError where one is there already, and none is written then; StorageError where one cannot be written.
    """
    folder, package = Path(options.folder), Path(__file__).parents[1]
    for name in FILES:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name}: is there already and stays; use {COMMAND} init ANOTHER_FOLDER")
    for name in FILES:
        inside = package / "example" / name  # where the wheel has it
        text = (inside if inside.exists() else package.parent / name).read_text(encoding="utf-8")
        with storage_errors(folder / name, fix="free space or name another folder"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
        print(f"wrote {folder / name}")
    print("next:" if options.folder == "." else f"next:\n  cd {options.folder}")
    print(f"  {COMMAND} data prepare {FILES[0]}\n  {COMMAND} {FILES[0]}")
    return 0
