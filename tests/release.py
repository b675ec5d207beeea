"""Makes a release of the clone: `make release VERSION=0.2.0`.

It sets the version, dates the heading of the changelog, and builds the sdist and the wheel into dist/. The commit and
the tag are left to you, and printed. VERSION=0.3.0.dev0 begins the next version: it only sets the version and adds a
heading. A refusal changes nothing; with --check it does nothing else. It needs no package before it builds.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INIT = ROOT / "jaxinfra/__init__.py"
CHANGELOG = ROOT / "docs/changelog.md"
VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)
UNRELEASED = re.compile(r"^## (\S+), not yet released$", re.MULTILINE)


def refuse(line: str) -> SystemExit:
    return SystemExit(f"error: {line}")


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def order(version: str) -> tuple[list[int], bool]:
    """Returns the key by which versions are sorted: that of a version follows those of what led to it."""
    return [int(part) for part in version.removesuffix(".dev0").split(".")], not version.endswith(".dev0")


def check_version(new: str, current: str) -> None:
    if not re.fullmatch(r"\d+\.\d+\.\d+(\.dev0)?", new):
        raise refuse(f"VERSION={new}: expected MAJOR.MINOR.PATCH; use VERSION={current.removesuffix('.dev0')}")
    if order(new) <= order(current):
        raise refuse(f"VERSION={new}: must be larger than {current}, that of {INIT.relative_to(ROOT)}")


def dated(changelog: str, version: str) -> str:
    """Returns the changelog with the date of today in its newest heading, which must be that of the version."""
    heading = UNRELEASED.search(changelog)
    if heading is None or heading[1] != version:
        found = f"has {heading[0]!r}" if heading else "has no heading that is not yet released"
        raise refuse(f"docs/changelog.md {found}; write '## {version}, not yet released' above what has changed")
    entries = changelog[heading.end() :].partition("\n## ")[0]
    if not re.search(r"^- ", entries, re.MULTILINE):
        raise refuse(f"docs/changelog.md: nothing below {heading[0]!r}; write what has changed for users")
    return changelog.replace(heading[0], f"## {version}, {datetime.now(UTC).date()}", 1)


def begun(changelog: str, version: str) -> str:
    """Returns the changelog with a heading for the next version."""
    if heading := UNRELEASED.search(changelog):
        raise refuse(f"docs/changelog.md has {heading[0]!r}; release it first, by VERSION={heading[1]}")
    return changelog.replace("\n## ", f"\n## {version}, not yet released\n\n## ", 1)


def build() -> None:
    """Builds into dist/ all files or none."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", folder]
        if subprocess.run(words, cwd=ROOT, check=False).returncode:
            raise refuse("the build has failed, as said above; the version is what it was")
        (ROOT / "dist").mkdir(exist_ok=True)
        for built in Path(folder).iterdir():
            shutil.move(built, ROOT / "dist" / built.name)
            print(f"wrote dist/{built.name}")


def main(new: str, *, only_check: bool) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (INIT, CHANGELOG)}
    found = VERSION.search(texts[INIT])
    assert found is not None
    check_version(new, found[1])
    if changed := git("status", "--porcelain").splitlines():
        raise refuse(
            f"{changed[0][3:]}: is not committed; commit or remove it, so that the release is what the tag names"
        )
    version, is_next = new.removesuffix(".dev0"), new.endswith(".dev0")
    if git("tag", "--list", f"v{new}"):
        raise refuse(f"VERSION={new}: there is a tag v{new} already; use another version")
    changelog = (begun if is_next else dated)(texts[CHANGELOG], version)
    if only_check:
        return
    try:
        INIT.write_text(texts[INIT].replace(found[0], f'__version__ = "{new}"'), encoding="utf-8")
        CHANGELOG.write_text(changelog, encoding="utf-8")
        if not is_next:
            build()
    except BaseException:  # Ctrl-C, too
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        raise
    message = f"Begin {version}" if is_next else f"Release {version}"
    print(f'next:\n  git commit --all --message "{message}"')
    if not is_next:
        major, minor, _ = version.split(".")
        print(f'  git tag --annotate v{version} --message "jaxinfra {version}"')
        print(f"  make release VERSION={major}.{int(minor) + 1}.0.dev0    # begins the next version, in another commit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if not arguments.version:
        raise refuse("which version? use make release VERSION=0.2.0")
    main(arguments.version, only_check=arguments.check)
