"""Compares an evaluation with the rules of a promotion: `eval/loss < champion * 0.99 and arc_easy/acc >= 0.4`."""

import difflib
import math
import operator
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxinfra.errors import ConfigError

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_CHANGE = {"*": operator.mul, "+": operator.add, "-": operator.sub}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RULE = re.compile(
    rf"(?P<metric>[A-Za-z_][\w/.,-]*)\s*(?P<compare><=|>=|<|>)\s*"
    rf"(?:champion(?:\s*(?P<change>[*+-])\s*(?P<by>{_NUMBER}))?|(?P<bound>{_NUMBER}))"
)


class Rule(NamedTuple):
    """One comparison; `bound` is None for one with the champion, whose value is changed by `change` and `by`."""

    metric: str
    compare: str
    bound: float | None
    change: str
    by: float
    text: str

    def limit(self, champion: Mapping[str, float]) -> float:
        """Returns the number that the metric is compared with; raises ConfigError if the champion lacks it."""
        if self.bound is not None:
            return self.bound
        if self.metric not in champion:
            known = f"it has {', '.join(sorted(champion))}" if champion else "it has none"
            raise ConfigError(f"--if {self.text}: the champion has no {self.metric}; {known}; compare with a number")
        return _CHANGE[self.change](champion[self.metric], self.by)


def parse_policy(text: str) -> tuple[Rule, ...]:
    """Parses comparisons with `and` between them; raises ConfigError for anything else."""
    rules = []
    for word in re.split(r"\s+and\s+", text.strip()):
        if not (found := _RULE.fullmatch(word)):
            raise ConfigError(
                f'--if {text}: "{word}" is no comparison; use --if "eval/loss < champion" or "eval/loss < 2.5"'
            )
        bound = None if found["bound"] is None else float(found["bound"])
        change, by = found["change"] or "+", float(found["by"] or 0)
        rules.append(Rule(found["metric"], found["compare"], bound, change, by, word))
    return tuple(rules)


def shortfalls(
    rules: tuple[Rule, ...], metrics: Mapping[str, float], champion: Mapping[str, float] | None
) -> list[str]:
    """Returns what the metrics of a model lack, a text for each rule that they break.

    No rule holds for NaN; one that compares with the champion holds if there is none. Raises ConfigError for a metric
    that is not there.
    """
    lacking = []
    for rule in rules:
        if rule.metric not in metrics:
            near = difflib.get_close_matches(rule.metric, metrics, n=1)
            hint = f"did you mean {near[0]}?" if near else "tasks of lm-eval are run by --tasks"
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"--if {rule.text}: the evaluation has no {rule.metric}, only {known}; {hint}")
        value = metrics[rule.metric]
        if math.isnan(value):
            lacking.append(f"{rule.metric} is not a number")
        elif rule.bound is not None or champion is not None:
            limit = rule.limit(champion or {})
            if not _COMPARE[rule.compare](value, limit):
                lacking.append(f"{rule.metric} is {value:.6g}, not {rule.compare} {limit:.6g}")
    return lacking
