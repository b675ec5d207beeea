"""The handwritten digits that come with scikit-learn (Alpaydin and Kaynak 1998), as records; needs no network."""

from collections.abc import Iterator

import numpy as np

from jaxinfra.packages import import_optional


def records() -> Iterator[dict[str, np.ndarray | int]]:
    """Yields 1,797 gray images with values from 0 to 16, as `{"image": uint8[8, 8, 1], "label": int}`."""
    datasets = import_optional("sklearn.datasets", needed_by="the handwritten digits", install="jaxinfra[digits]")
    pixels, digits = datasets.load_digits(return_X_y=True)
    for image, digit in zip(np.asarray(pixels).reshape(-1, 8, 8, 1), digits, strict=True):
        yield {"image": image.astype(np.uint8), "label": int(digit)}
