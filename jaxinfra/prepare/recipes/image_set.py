"""Recipe of a store of labeled images."""

from dataclasses import dataclass

from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.recipes.corpus import StoreRecipe
from jaxinfra.prepare.recipes.validation import ByKey, ImageValidation


@dataclass(frozen=True, kw_only=True)
class ImageSet(StoreRecipe):
    """Makes a store of images, which must all have the same shape.

    Attributes:
        image: field of the image: uint8[height, width, channels] or [height, width], or nested lists.
        label: field of the class, a number from 0.
        classes: names of the classes by number; () if they have none.
    """

    validation: ImageValidation = ByKey()
    image: NonEmpty = "image"
    label: NonEmpty = "label"
    classes: tuple[str, ...] = ()
