"""The recipe of a store of images with labels, as a config file describes it."""

from dataclasses import dataclass

from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.recipes.corpus import StoreRecipe
from jaxinfra.prepare.recipes.validation import ByKey, ImageValidation


@dataclass(frozen=True, kw_only=True)
class ImageSet(StoreRecipe):
    """How a store of images is made; all have one shape.

    Attributes:
        image: field of the image: uint8 (height, width, channels) or (height, width), or nested lists of such.
        label: field of its class, a number from 0.
        classes: names of the classes, in the order of their numbers; () where they have none.
    """

    validation: ImageValidation = ByKey()
    image: NonEmpty = "image"
    label: NonEmpty = "label"
    classes: tuple[str, ...] = ()
