"""Prepares the 1,797 handwritten digits of scikit-learn (extra `digits`); needs no network."""

from jaxinfra.prepare.recipes.corpus import ImageSet
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.any_source import PythonSource


def config() -> ImageSet:
    return ImageSet(
        store="stores/digits",
        source=PythonSource(factory="jaxinfra.prepare.sources.digits:records"),
        classes=tuple("0123456789"),
        validation=ByKey(fraction=0.2),
        baselines=True,
    )
