"""Recipe of a store of labeled images."""

from dataclasses import dataclass

from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.recipes.corpus import StoreRecipe
from jaxinfra.prepare.recipes.validation import ByKey, ImageValidation


@dataclass(frozen=True, kw_only=True)
class ImageSet(StoreRecipe):
    """Makes a store of images, which must all have the same shape."""

    validation: ImageValidation = ByKey()
    image: NonEmpty = "image"  # its field: uint8[height, width, channels] or [height, width], or nested lists
    label: NonEmpty = "label"  # field of the class, a number from 0
    classes: tuple[str, ...] = ()  # names by number; () if they have none
