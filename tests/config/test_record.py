"""Hostile run records."""

import pytest

from jaxinfra.config import read_record
from jaxinfra.errors import ConfigError


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"format": ' + "9" * 6000 + "}"], ids=["too deep", "too long a number"]
)
def test_hostile_json_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a run record") as refused:
        read_record(path)
    assert "\n" not in str(refused.value)
