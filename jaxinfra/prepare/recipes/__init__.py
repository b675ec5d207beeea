"""Recipes: what a config file of `data prepare` returns."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.image_set import ImageSet

Recipe = Corpus | ImageSet
