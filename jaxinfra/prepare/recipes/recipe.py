"""The configs that data is prepared from."""

from typing import Any, TypeGuard

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.image_set import ImageSet

type Recipe = Corpus | ImageSet


def is_recipe(config: Any) -> TypeGuard[Recipe]:
    """Whether a config is one."""
    return isinstance(config, Corpus | ImageSet)
