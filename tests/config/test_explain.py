"""Fields are explained by their annotations and docstrings, and found by other frameworks' names."""

from collections.abc import Iterator

import pytest

from jaxinfra.config.aliases import _PATHS
from jaxinfra.config.explain import find
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.recipes import Corpus, ImageSet
from jaxinfra.run import Run
from tests.golden.pages import all_fields
from tests.refusals import raises


def test_a_field_has_type_default_and_meaning() -> None:
    (field,) = find([Run], "optim.peak_lr")
    assert (field.allowed, field.default, field.meaning) == (
        "float above 0 and finite",
        "0.0003",
        "the highest learning rate.",
    )
    assert field.in_fingerprint and not find([Run], "mesh.fsdp")[0].in_fingerprint


def test_fields_of_a_choice_are_found_in_each_class_that_has_them() -> None:
    owners = {field.owner.__name__ for field in find([Run], "optim.optimizer.b1")}
    assert owners == {"AdamW", "Lion", "Muon"}
    assert [*find([Run], "model")[0].options] == ["transformer_config", "vision_transformer_config"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lr", "optim.peak_lr"),
        ("training.max_steps", "train.steps"),
        ("n_layers", "model.num_layers"),
        ("peak_lr", "optim.peak_lr"),
        ("mesh.fsdp", "mesh.fsdp"),
    ],
)
def test_other_names_find_the_field(name: str, path: str) -> None:
    assert {field.path for field in find([Run], name)} == {path}


def test_an_unknown_field_names_the_nearest() -> None:
    with raises(ConfigError, "optim.peek_lr no such config field optim.peak_lr"):
        find([Run], "optim.peek_lr")


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("tokenizer.vocab_size", {"tokenizer.vocab_size"}),
        ("near", {"dedup.near"}),
        ("classes", {"classes"}),  # of ImageSet
        ("store", {"store"}),  # a full path comes before data.store
    ],
)
def test_a_field_that_a_run_lacks_is_found_in_the_recipes(name: str, paths: set[str]) -> None:
    assert {field.path for field in find([Run, Corpus, ImageSet], name)} == paths


def test_a_recipe_is_only_looked_up_if_a_run_lacks_the_field() -> None:
    def roots() -> Iterator[type]:
        yield Run
        raise AssertionError("asked for another root")

    assert find(roots(), "lr")


def test_an_unknown_field_names_the_nearest_of_a_recipe() -> None:
    with raises(ConfigError, "tokeniser.vocab_size no such config field tokenizer.vocab_size"):
        find([Run, Corpus, ImageSet], "tokeniser.vocab_size")


def test_every_alias_names_a_field_and_no_field_of_its_own() -> None:
    paths = {field.path for field in all_fields(Run)}
    assert set(_PATHS.values()) <= paths
    own_names = {path for path in paths if "." not in path}
    in_recipes = {field.field.name for recipe in (Corpus, ImageSet) for field in all_fields(recipe)}
    assert not (own_names | in_recipes) & _PATHS.keys()


@pytest.mark.parametrize("root", [Run, Corpus, ImageSet])
def test_every_field_has_a_meaning(root: type) -> None:
    missing = {f"{field.owner.__name__}.{field.field.name}" for field in all_fields(root) if not field.meaning}
    assert not missing
