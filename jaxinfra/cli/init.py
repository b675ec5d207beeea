"""`jaxinfra init [FOLDER]`: writes the quickstart's config and data recipe, to start from without a clone."""

import argparse
from pathlib import Path

from jaxinfra.command import COMMAND
from jaxinfra.errors import ConfigError
from jaxinfra.storage.errors import storage_errors

FILES = ("configs/quickstart.py", "configs/data/python_stdlib.py")


def run(options: argparse.Namespace) -> None:
    """Writes the files and prints the commands that use them; if one exists, raises ConfigError and writes none."""
    folder, example = Path(options.folder), Path(__file__).parents[1] / "example"
    for name in FILES:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name}: exists and is not overwritten; use {COMMAND} init ANOTHER_FOLDER")
    for name in FILES:
        text = (example / name).read_text(encoding="utf-8")  # a copy of a file of the clone: a wheel has no configs/
        with storage_errors(folder / name, fix="free space or name another folder"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
        print(f"wrote {folder / name}")
    print("next:" if options.folder == "." else f"next:\n  cd {options.folder}")
    print(f"  {COMMAND} data prepare {FILES[0]}\n  {COMMAND} {FILES[0]}")
