"""`init` writes the quickstart into a folder; `tests/test_installed.py` does it outside a clone."""

from pathlib import Path

from jaxinfra.cli.init import FILES
from tests.tiny_run import launch

CLONE = Path(__file__).parents[2]


def test_init_writes_the_files_of_the_clone_and_overwrites_nothing(tmp_path: Path) -> None:
    ended = launch("init", str(tmp_path))
    assert ended.code == 0 and "data prepare configs/quickstart.py" in ended.out
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (CLONE / name).read_bytes()
        # pip would write a link in an archive of GitHub as a text.
        assert not (CLONE / "jaxinfra/example" / name).is_symlink()
    (tmp_path / FILES[0]).unlink()
    (tmp_path / FILES[1]).write_text("mine")
    again = launch("init", str(tmp_path))
    assert again.code == 81 and again.err.startswith(f"error: {tmp_path / FILES[1]}: ")
    assert not (tmp_path / FILES[0]).exists() and (tmp_path / FILES[1]).read_text() == "mine"
    (tmp_path / "file").touch()
    assert launch("init", str(tmp_path / "file")).code == 82
