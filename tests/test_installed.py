"""The package outside a clone, from a wheel or from an sdist, and as an editable install."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import jaxinfra
from jaxinfra.cli.init import FILES

CLONE = Path(__file__).parents[1]
ONLY_IN_A_CLONE = ("launch", "configs", "tests")
WHERE = f"""
from importlib.util import find_spec
import jaxinfra
from jaxinfra.command import COMMAND
print(jaxinfra.__file__, COMMAND, *(name for name in {ONLY_IN_A_CLONE} if find_spec(name)), sep="\\n")
"""
pytestmark = pytest.mark.slow(8)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: object, cwd: Path) -> str:
    """Runs a command where only what is installed can be imported; returns what it prints."""
    words = [str(word) for word in command]
    ended = subprocess.run(words, cwd=cwd, env=clean_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def build(source: Path, folder: Path, target: str) -> Path:
    """Builds the wheel or the sdist of a tree as its package index would get it."""
    run(Path(sys.executable).with_name("hatchling"), "build", "-t", target, "-d", folder, cwd=source)
    (built,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


def install(environment: Path, *words: object) -> Path:
    """Makes an environment that has all packages of this one but jaxinfra, and installs it; returns its programs."""
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    packages = environment.with_name("packages")
    packages.mkdir()
    for folder in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for entry in folder.iterdir():
            is_of_jaxinfra = entry.name.startswith(("jaxinfra", "_editable_impl_jaxinfra"))
            if not is_of_jaxinfra and entry.suffix != ".pth" and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "00.pth").write_text(f"{packages}\n")  # before the .pth file of an editable install, which imports
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--quiet", "--no-index")
    run(*pip, "--no-deps", "--no-build-isolation", "--no-compile", *words, cwd=environment.parent)
    return environment / "bin"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CLONE, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel by the command of the README, with the hatchling that is installed."""
    found = re.search("`pip (wheel .*) dist \\.`", (CLONE / "README.md").read_text())
    assert found is not None
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", *found[1].split(), folder, "--quiet", "--no-build-isolation", ".", cwd=CLONE)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with what `launch/Dockerfile` copies, and no more."""
    source = tmp_path / "source"
    source.mkdir()
    for line in (CLONE / "launch/Dockerfile").read_text().splitlines():
        for name in line.split()[1:-1] if line.startswith("COPY ") and "--from=" not in line else []:
            if (CLONE / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(CLONE / name, source / name, symlinks=True, ignore=ignored)
            else:
                shutil.copy(CLONE / name, source)
    return source


def test_one_wheel_comes_from_the_clone_the_sdist_and_the_image(
    wheel: Path, sdist: Path, copied: Path, tmp_path: Path
) -> None:
    """Byte for byte, and it holds one package; the sdist holds what the wheel is built from."""
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jaxinfra"}
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    files = {".gitignore", "PKG-INFO", "pyproject.toml", "README.md", "LICENSE"}
    assert tops == {"jaxinfra"} | files
    (unpacked,) = tmp_path.glob("jaxinfra-*")
    for number, source in enumerate((unpacked, copied)):
        assert build(source, tmp_path / f"{number}", "wheel").read_bytes() == wheel.read_bytes()


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_package_trains_the_quickstart(
    kind: str, tmp_path: Path, empty: Path, request: pytest.FixtureRequest
) -> None:
    """In an empty folder, by `jaxinfra` alone."""
    programs = install(tmp_path / "environment", request.getfixturevalue(kind))

    def command(*words: str) -> str:
        return run(programs / "jaxinfra", *words, cwd=empty)

    package, name, *of_a_clone = run(programs / "python", "-c", WHERE, cwd=empty).splitlines()
    assert Path(package).is_relative_to(tmp_path) and name == "jaxinfra" and not of_a_clone
    assert command("--version").startswith(f"jaxinfra {jaxinfra.__version__},")
    assert "jaxinfra data prepare configs/quickstart.py" in command("init")
    for file in FILES:
        assert (empty / file).read_bytes() == (CLONE / file).read_bytes()
    if kind == "sdist":
        return  # the same bytes, as the test above shows
    assert "name = quickstart" in command("show", "configs/quickstart.py")
    lines = (CLONE / "launch/Dockerfile").read_text().splitlines()
    assert "RUN jaxinfra init ." in lines and "&& jaxinfra configs/quickstart.py && " in lines[-1]
    recipe, small = "configs/data/python_stdlib.py", "source.pattern=json/*.py"
    command("data", "prepare", recipe, small, "tokenizer.vocab_size=400", "validation.fraction=0.5", "--workers", "1")
    small = ("model.vocab_size=400", "model.num_layers=1", "train.global_batch=2", "data.seq_len=64")
    trained = command("configs/quickstart.py", *small, "train.steps=3", "name=few", "--devices", "cpu:1")
    (run_dir,) = (empty / "runs").glob("few*")
    assert f"runs/{run_dir.name}" in trained and len((run_dir / "metrics.jsonl").read_text().splitlines()) >= 1
    assert command("sample", str(run_dir), "def main(", "--max-tokens", "5").startswith("def main(")


def test_an_editable_install_finds_the_package_of_the_clone_and_nothing_else(tmp_path: Path, empty: Path) -> None:
    programs = install(tmp_path / "environment", "--editable", CLONE)
    package, name, *of_a_clone = run(programs / "python", "-c", WHERE, cwd=empty).splitlines()
    assert Path(package) == CLONE / "jaxinfra/__init__.py" and name == "jaxinfra" and not of_a_clone
    assert "jaxinfra data prepare configs/quickstart.py" in run(programs / "jaxinfra", "init", cwd=empty)
    in_clone = run(programs / "python", "-m", "launch", "--help", cwd=CLONE)
    assert "faults" in in_clone and "python -m launch configs/quickstart.py" in in_clone
