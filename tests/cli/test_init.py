"""`init` writes the quickstart into a folder, from a clone and from the wheel, which holds one package."""

import os
import shutil
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


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with what `launch/Dockerfile` copies, and no more."""
    source = tmp_path / "source"
    source.mkdir()
    for line in (CLONE / "launch/Dockerfile").read_text().splitlines():
        for name in line.split()[1:-1] if line.startswith("COPY ") else []:
            if (CLONE / name).is_dir():
                shutil.copytree(CLONE / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(CLONE / name, source)
    return source


@pytest.mark.slow(15)
def test_the_wheel_is_one_package_that_works_outside_a_clone(tmp_path: Path, copied: Path) -> None:
    """It is built from what the image is built from, and has all that the last lines of the image run."""
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copied, capture_output=True, text=True, check=True
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
    lines = (CLONE / "launch/Dockerfile").read_text().splitlines()
    assert "RUN jaxinfra init ." in lines and "&& jaxinfra configs/quickstart.py && " in lines[-1]
    assert "jaxinfra data prepare configs/quickstart.py" in jaxinfra("init", ".")
    assert "name = quickstart" in jaxinfra("show", "configs/quickstart.py")
    for name in FILES:
        assert (empty / name).read_bytes() == (CLONE / name).read_bytes()
