"""The rules of every family write tensors in the form that they read."""

from typing import Any

import numpy as np
import pytest

from jaxinfra.families.registry import family
from jaxinfra.hub.published_model import param_shapes
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Binding
from tests.interop.references import TINY


def bindings_of(keys: dict[str, Any]) -> list[Binding]:
    of = family(keys["model_type"], "")
    model = of.read(ModelJson(keys))
    return of.bindings(model, param_shapes(model))


@pytest.mark.parametrize("name", TINY)
def test_tensors_are_written_as_they_are_read(name: str) -> None:
    for binding in bindings_of(TINY[name]):
        tensor = np.random.default_rng(0).normal(size=binding.shape)
        layouts = [part.layout for part in binding.parts]
        parts = [layout.to_ours(tensor[slice(*layout.rows(0, layout.cut_size))]) for layout in layouts]
        for part in parts:
            assert len(np.unique(part)) == part.size, binding.theirs
        written = [layout.to_theirs(part) for layout, part in zip(layouts, parts, strict=True)]
        axis = layouts[0].joined_axis() if layouts[0].alternates else 0
        assert np.array_equal(np.concatenate(written, axis).reshape(tensor.shape), tensor), binding.theirs
