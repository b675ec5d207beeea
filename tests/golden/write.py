"""Writes what the golden tests compare with.

python tests/golden/write.py                     # every config of configs/ as the tree of values that it stands for,
                                                 # and the names that users rely on
python tests/golden/write.py docs                # generated pages of docs/, and the catalog of models
python tests/golden/write.py picture RUN_DIR     # docs/images/report.png: the top of the report of a run
python tests/golden/write.py compile [NAME...]   # what is compiled for hardware that is not here; minutes for all
python tests/golden/write.py layouts [CASE...]   # the memory of layouts that `plan --search` may try; minutes
python tests/golden/write.py parity              # which programs have the numbers of one device; minutes
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CONFIGS = FOLDER.parent.parent / "configs"


def dumps() -> dict[str, str]:
    """The dump of every config by the name of its file."""
    from jaxinfra.config import dump, load
    from jaxinfra.run import Run

    return {path.stem: dump(load(path, root=Run).run) for path in sorted(CONFIGS.glob("*.py"))}


def write_picture(run_dir: Path) -> None:
    from tempfile import TemporaryDirectory

    from tests.track.browser import open_browser

    picture = FOLDER.parents[1] / "docs/images/report.png"
    picture.parent.mkdir(exist_ok=True)
    with TemporaryDirectory() as profile, open_browser(Path(profile)) as page:
        page.open(run_dir / "report.html", width=1000, height=640)
        page.screenshot(picture, whole=False)


def write_public_names() -> None:
    from tests.golden import public_names

    public_names.PATH.parent.mkdir(exist_ok=True)
    public_names.PATH.write_text(public_names.public_names(), encoding="utf-8")


def main(words: list[str]) -> None:
    if words[:1] == ["compile"]:
        from tests.golden import compiled, proofs

        compiled.write(words[1:])
        if not words[1:]:
            proofs.record()
        return
    if words[:1] == ["layouts"]:
        from tests.golden import layouts

        layouts.write(words[1:])
        return
    if words == ["parity"]:
        from tests.golden import proven

        proven.record_all()
        return
    if words[:1] == ["picture"]:
        write_picture(Path(words[1]))
        return
    if words == ["docs"]:
        from tests.golden.pages import pages

        for path, text in pages().items():
            path.write_text(text, encoding="utf-8")
        return
    wanted = dumps()
    for path in FOLDER.glob("*.txt"):
        if path.stem not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")
    write_public_names()


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent.parent))
    os.chdir(FOLDER.parent.parent)
    main(sys.argv[1:])
