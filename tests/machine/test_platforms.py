from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from jaxinfra.machine import platforms


@pytest.mark.parametrize(
    ("plugins", "libtpu", "hardware", "found"),
    [
        (["xla_cuda13"], True, "", "cpu"),
        (["xla_cuda13"], True, "gpu", "cuda,cpu"),
        (["xla_cuda13"], True, "tpu", "tpu,cpu"),
        (["xla_cuda13"], True, "gpu tpu", None),
        (["xla_cuda13"], False, "gpu", None),
        ([], True, "tpu", None),
        ([], True, "gpu", "cpu"),  # a GPU without its plugin is unusable
        ([], False, "gpu tpu", None),
        (["xla_cuda13", "xla_rocm7"], True, "", None),  # an unknown plugin
    ],
)
def test_only_plugins_without_hardware_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plugins: list[str], libtpu: bool, hardware: str, found: str | None
) -> None:
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    monkeypatch.setattr(platforms, "entry_points", lambda group: [EntryPoint(each, "x", group) for each in plugins])
    monkeypatch.setattr(platforms, "find_spec", lambda name: object() if libtpu else None)
    monkeypatch.setattr(platforms, "has_tpu_on_pci", lambda: False)
    for name in ("gpu", "tpu"):
        monkeypatch.setattr(platforms, f"_{name.upper()}_PATHS", (str(tmp_path / f"{name}[0-9]*"),))
    for name in hardware.split():
        (tmp_path / f"{name}0").touch()
    assert platforms.available_platforms() == found
