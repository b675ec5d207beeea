"""A name that users rely on goes or changes only on purpose: docs/stability.md."""

import pytest

from tests.golden.public_names import GONE, NEW, PATH, differences, public_names


def test_public_names_are_what_they_were() -> None:
    if changes := differences(PATH.read_text(encoding="utf-8"), public_names()):
        pytest.fail(f"public names differ from {PATH.name}:\n{changes}", pytrace=False)


def test_what_has_gone_or_changed_is_told_from_what_is_new() -> None:
    golden = "# Python\njaxinfra.f(a)\njaxinfra.g(a)\n\n# Exit codes\njaxinfra.errors.E: 75\n"
    assert differences(golden, golden) == ""
    assert differences(golden, f"{golden}jaxinfra.h(a)\n") == f"  new: jaxinfra.h(a)\n{NEW}"
    gone = differences(golden, golden.replace("jaxinfra.f(a)\n", ""))
    assert gone == f"  gone: jaxinfra.f(a)\n{GONE}"
    changed = differences(golden, golden.replace("75", "76").replace("g(a)", "g(b)"))
    assert (
        "jaxinfra.g(a)\n       to: jaxinfra.g(b)\n" in changed and "E: 75\n       to: jaxinfra.errors.E: 76" in changed
    )
    assert changed.endswith(GONE)


@pytest.mark.parametrize(
    "line",
    [
        "jaxinfra.Objective.loss(apply, params, batch)",
        "jaxinfra.Trainer.train()",
        "jaxinfra.load(source, overrides=..., root=..., imports=...)",
        "jaxinfra.models.layers.ParamFactory(*, partitioner, num_layers=...)",
        "jaxinfra.prepare.sources.record.Source.read(shard)",
        "Run optim.peak_lr",
        "Run optim.optimizer=muon",
        "Corpus tokenizer.vocab_size",
        "jaxinfra sample (RUN_DIR [PROMPT ...])",
        "jaxinfra hub export --dtype bfloat16",
        "jaxinfra.errors.Preempted: 75",
    ],
)
def test_the_list_has_each_kind(line: str) -> None:
    assert line in PATH.read_text(encoding="utf-8").splitlines()
