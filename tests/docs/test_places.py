"""The commands of docs/places.md are right: each is parsed, its options fit its place, and its config loads.

They need a cloud or other hosts, so none is run here: `tests/cloud` and `tests/launchers` run the same there.
"""

import re
import shlex
import string
from pathlib import Path

import pytest

from jaxinfra.cli.main import parse_command_line
from jaxinfra.cli.places.arguments import place_options, variables
from jaxinfra.config import load, validate
from jaxinfra.launchers.places.google_errors import PERMISSIONS, ROLES
from jaxinfra.launchers.places.place import KINDS
from jaxinfra.launchers.places.run_files import files_of, split_location
from jaxinfra.launchers.places.sources import source_of
from jaxinfra.run import Run
from jaxinfra.storage.location import is_remote

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/places.md").read_text()
BASH = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)).replace("\\\n", "")
VARIABLES = dict(re.findall(r"(\w+)=([^\s\"]+)", "\n".join(line for line in BASH.splitlines() if "export" in line)))
LINES = [string.Template(line).safe_substitute(VARIABLES) for line in BASH.splitlines()]
COMMANDS = list(dict.fromkeys(line for line in LINES if line.startswith("python -m launch ")))
STARTS = [command for command in COMMANDS if "--place" in command and "configs/" in command]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)[3:]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_parsed(command: str) -> None:
    options = parse_command_line(words_of(command))
    if options.command in ("runs logs", "runs stop", "runs resume"):
        assert is_remote(options.run) or split_location(options.run), options.run
        files_of(options.run)


@pytest.mark.parametrize("command", STARTS)
def test_starts_fit_their_place(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The config is valid, the chips exist, and a dry run has its requests."""
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "my-project")
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse_command_line(words_of(command))
    place = place_options(options)
    run = load(ROOT / options.config, options.overrides, root=Run).run
    validate(run)
    assert is_remote(run.root) or not place.is_cloud
    requests = source_of(place, f"{run.root}/{run.name}").requests()
    assert bool(requests) == place.is_cloud


def test_every_start_is_shown_before_it_is_made() -> None:
    shown = [command.removesuffix(" --dry-run") for command in STARTS if command.endswith("--dry-run")]
    assert {parse_command_line(words_of(each)).place for each in shown} == {*KINDS}
    assert {*shown} <= {*STARTS}


def test_the_page_names_the_rights_that_places_need() -> None:
    """A role of one's own has all but those of another service account, which are given on that account alone."""
    for place, permissions in PERMISSIONS.items():
        name = {"tpu-vm": "jaxinfraTpu", "gce": "jaxinfraGce"}[place]
        found = re.search(rf"roles create {name} .*--permissions=(\S+)", BASH)
        assert found
        assert {*found[1].split(",")} == {each for each in permissions if not each.startswith("iam.")}
    assert all(role in PAGE for role in ROLES.values())


def test_the_options_of_the_page_exist() -> None:
    parsed = parse_command_line(["train", "configs/quickstart.py"])
    for words in re.findall(r"`(--env [^`.]+=[^`]+)`", PAGE):
        assert variables(words.replace("--env ", "").split())
    ours = {*re.findall(r"(?<![-\w])--([a-z][-a-z]+)", re.sub(r"^gcloud.*$", "", PAGE, flags=re.MULTILINE))}
    of_others = {"rank", "follow", "prices", "on", "shm-size", "member", "role", "permissions", "location"}
    of_others |= {
        "uniform-bucket-level-access",
        "kill",
        "no-kill",
        "partition",
        "gpus-per-node",
        "cpus-per-task",
        "time",
        "gpus",
        "gres",
        "tres",
        "build-arg",
    }
    dests = {"kind": "workload", "volume": "volumes"}
    missing = {name for name in ours if dests.get(name, name.replace("-", "_")) not in parsed} - of_others
    assert not missing


def test_the_files_of_the_page_are_those_of_a_job() -> None:
    """Its table of what is where names what code writes."""
    written = "".join((ROOT / f"jaxinfra/launchers/places/{name}").read_text() for name in ("job.py", "host.sh"))
    for name in ("attempt-", "stopped-", "bundles/", "environments/", "console-", "place/"):
        assert name in written and name in PAGE
