"""The 1,797 handwritten digits of scikit-learn (the extra `digits`): no network."""

from jaxinfra.data.image_set import ImageSet
from jaxinfra.data.records.python_source import PythonSource


def config() -> ImageSet:
    return ImageSet(
        store="stores/digits",
        source=PythonSource(factory="jaxinfra.data.digits:records"),
        classes=tuple("0123456789"),
        heldout_fraction=0.2,
        baselines=True,
    )
