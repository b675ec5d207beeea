"""Recipes: configs of `data prepare`."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.image_set import ImageSet

Recipe = Corpus | ImageSet
