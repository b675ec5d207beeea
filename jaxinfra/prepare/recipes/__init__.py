"""Recipes: configs of `data prepare`."""

from jaxinfra.prepare.recipes.corpus import Corpus, ImageSet

Recipe = Corpus | ImageSet
