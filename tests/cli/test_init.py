"""`init` writes the quickstart into a folder, from a clone and from the wheel, which holds one package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny_run import launch

CLONE = Path(__file__).parents[2]
FILES = ("configs/quickstart.py", "configs/data/python_stdlib.py")


def test_init_writes_the_files_of_the_clone_and_overwrites_nothing(tmp_path: Path) -> None:
    ended = launch("init", str(tmp_path))
    assert ended.code == 0 and "data prepare configs/quickstart.py" in ended.out
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (CLONE / name).read_bytes()
    (tmp_path / FILES[0]).unlink()
    (tmp_path / FILES[1]).write_text("mine")
    again = launch("init", str(tmp_path))
    assert again.code == 81 and again.err.startswith(f"error: {tmp_path / FILES[1]}: ")
    assert not (tmp_path / FILES[0]).exists() and (tmp_path / FILES[1]).read_text() == "mine"
    (tmp_path / "file").touch()
    assert launch("init", str(tmp_path / "file")).code == 82


@pytest.mark.slow
def test_the_wheel_is_one_package_that_works_outside_a_clone(tmp_path: Path) -> None:
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=CLONE, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / built.stdout.split()[-1]
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jaxinfra"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    scratch = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(scratch)], env=environment, check=True)
    (packages,) = scratch.glob("lib/python*/site-packages")
    (packages / "z.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = [scratch / "bin/pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel]
    subprocess.run(install, env=environment, check=True)
    empty = tmp_path / "empty"
    empty.mkdir()

    def jaxinfra(*words: str) -> str:
        done = subprocess.run(
            [scratch / "bin/jaxinfra", *words], cwd=empty, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "jaxinfra configs/quickstart.py" in jaxinfra("--help")
    assert "jaxinfra data prepare configs/quickstart.py" in jaxinfra("init")
    assert "name = quickstart" in jaxinfra("show", "configs/quickstart.py")
    for name in FILES:
        assert (empty / name).read_bytes() == (CLONE / name).read_bytes()
