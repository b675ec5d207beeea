"""Which code of the user the processes of a run compare."""

from pathlib import Path

from jaxinfra.config import load
from jaxinfra.machine.environment import code_digest
from jaxinfra.processes.peers import Peers
from jaxinfra.train.run_record import user_code_digests
from tests.tiny_run import Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

CLASS = """\
from dataclasses import dataclass
from jaxinfra.data.tokens import TokenData
from helper_of_the_test import LIMIT

@dataclass(frozen=True, kw_only=True)
class OwnTokens(TokenData):
    limit: int = LIMIT
"""


def test_an_edit_of_a_class_or_of_what_it_imports_is_seen(tiny: Tiny) -> None:
    folder = tiny.config.parent
    config = tiny.edited("data=TokenData(", "data=OwnTokens(", "own.py")
    config.write_text(f"from classes_of_the_test import OwnTokens\n{config.read_text()}")
    found = []
    for limit, comment in (1, ""), (2, ""), (2, "# an edit\n"):
        (folder / "helper_of_the_test.py").write_text(f"LIMIT = {limit}\n")
        (folder / "classes_of_the_test.py").write_text(CLASS + comment)
        found.append(user_code_digests(load(config).run, Peers()))
    helper, classes = "the code of helper_of_the_test", "the code of classes_of_the_test"
    assert found[0][helper] != found[1][helper] == found[2][helper]
    assert found[1][classes] != found[2][classes]


def test_an_edit_of_the_package_is_seen(tmp_path: Path) -> None:
    for name in ("a.py", "b/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / ".#a.py").symlink_to("user@host.1234")  # as Emacs locks a file
    assert code_digest(tmp_path) == before
    (tmp_path / "b/c.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before
