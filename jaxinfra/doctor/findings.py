"""Holds findings of the checks of `doctor`, and merges those of all processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from jaxinfra.errors import ConfigError, JaxinfraError

type Level = Literal["ok", "warn", "fail"]
_LEVELS = ("ok", "warn", "fail")
_NAMED = 4  # processes in a row of the table


class Finding(NamedTuple):
    """Holds the result of a check: its level, the facts, the fix, and the exit code if it is a "fail"."""

    check: str
    level: Level
    found: str
    fix: str = ""
    code: int = ConfigError.exit_code


def failed(check: str, error: JaxinfraError) -> Finding:
    """Returns the finding of a check that has ended with an error for users, whose line ends with a fix."""
    found, _, fix = str(error).partition("; ")
    return Finding(check, "fail", found, fix, error.exit_code)


def merge(by_process: Sequence[Sequence[Finding]], name_of: Callable[[int], str]) -> list[Finding]:
    """Returns one finding for each check: the worst level, and the processes that have it."""
    checks: dict[str, dict[int, Finding]] = {}
    for index, findings in enumerate(by_process):
        for each in findings:
            checks.setdefault(each.check, {})[index] = each
    merged = list[Finding]()
    for found in checks.values():
        first = max(found.values(), key=lambda each: _LEVELS.index(each.level))
        those = {index: each.found for index, each in found.items() if each.level == first.level}
        if len({*those.values()}) > 1 or len(those) < len(by_process):
            first = first._replace(found=listed(f"{name_of(index)}: {text}" for index, text in those.items()))
        merged.append(first)
    return merged


def listed(texts: Iterable[str], between: str = "; ") -> str:
    """Joins the first few texts, and says how many more there are."""
    texts = [*texts]
    return between.join([*texts[:_NAMED], *([f"and {len(texts) - _NAMED} more"] if len(texts) > _NAMED else [])])


def exit_code(findings: Iterable[Finding]) -> int:
    """Returns 0 if no check has failed, the code that all have that did, else that of ConfigError."""
    codes = {each.code for each in findings if each.level == "fail"}
    return codes.pop() if len(codes) == 1 else ConfigError.exit_code if codes else 0
