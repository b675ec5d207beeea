"""Arguments that several commands have: a config with its overrides, a store, whole numbers from a least one on."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxinfra.command import COMMAND
from jaxinfra.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfra.config import Loaded
    from jaxinfra.prepare.recipes.recipe import Recipe
    from jaxinfra.run import Run


def add(parser: argparse.ArgumentParser, what: str = "a config file, or the run.json of a run") -> None:
    """Adds CONFIG, which is `what`, and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help=what)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to it, such as train.steps=400")


def add_store(parser: argparse.ArgumentParser) -> None:
    """Adds STORE and --version."""
    parser.add_argument("store", metavar="STORE", help="folder or URL of a store, or of one of its versions")
    parser.add_argument("--version", metavar="FINGERPRINT", help="the version, or its beginning (default: the newest)")


def add_number(parser: argparse._ActionsContainer, option: str, least: int, **settings: Any) -> None:
    """Adds an option that takes a whole number; one below `least` is a ConfigError."""

    def read(text: str) -> int:
        if (value := int(text)) < least:
            raise ConfigError(f"{option} {value}: expected {least} or more; use {option} {least}")
        return value

    read.__name__ = "int"  # as argparse names it where the text is no number
    parser.add_argument(option, type=read, **settings)


def loaded(options: argparse.Namespace) -> "Loaded[Run]":
    """The config with its overrides, and a name of its own where they change its numbers.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    from jaxinfra.config import load
    from jaxinfra.run import Run, named

    file = load(options.config, root=Run)
    return named(load(options.config, options.overrides, root=Run), file.run) if options.overrides else file


def recipes(options: argparse.Namespace) -> "list[Recipe]":
    """The recipe that the file is, or those of the stores that a run trains on.

    Raises:
        ConfigError: the file or an override is wrong, or the run names no recipe.
    """
    from jaxinfra.config import load
    from jaxinfra.prepare.recipes.recipe import is_recipe

    config = load(options.config, options.overrides).run
    if is_recipe(config):
        return [config]
    from jaxinfra.run import Run

    if not isinstance(config, Run):
        raise ConfigError(f"{options.config}: is neither a recipe nor a run; name a file such as configs/data/NAME.py")
    made = config.parts.data.recipes
    if not made:
        raise ConfigError(
            f"{options.config}: its data names no recipe; name the file of the recipe, or give each store its recipe"
        )
    found = []
    for store, path in made.items():
        recipe = load(path).run
        if not is_recipe(recipe):
            raise ConfigError(f"{path}: is no recipe; name a file whose config() returns one")
        found.append(replace(recipe, store=store))
    return found


def prepare_hint(options: argparse.Namespace, run: "Run") -> str:
    """The command that makes the data of a run."""
    changed = [each for each in options.overrides if each.startswith("data.")]
    known = run.parts.data.recipes
    return " ".join([f"{COMMAND} data prepare", options.config if known else "RECIPE", *changed])
