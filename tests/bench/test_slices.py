import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.errors import ConfigError
from tests.bench import slices, slow_link
from tests.refusals import names
from tests.tiny_run import launch

TINY = [
    "model.hidden_size=64",
    "model.layers.mixer.num_heads=4",
    "model.layers.mlp.dim=128",
    "model.num_layers=1",
    "data.seq_len=16",
]
PARAMS = 2 * 2048 * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64


def refusal() -> str | None:
    """Why this machine makes no host of a slow link."""
    try:
        with slow_link.SlowLink(delay_s=0, bits_per_s=1e9) as link:
            link.start(["true"], os.environ).communicate()
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.slow(40)
def test_gradients_alone_cross_the_link_with_replica(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts the bytes that the compiled program sends, plus headers; the losses are equal."""
    if reason := refusal():
        pytest.skip(reason)
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr(slices, "DELAY_S", 0.001)
    out, options = tmp_path / "out.json", ["train.accumulate=2", "--pairs", "4"]
    ended = launch("bench", "slices", *TINY, *options, "--json", str(out))
    assert ended.code == 0, ended
    replica, fsdp = json.loads(out.read_text())["rows"]
    assert replica["expected_mb"] == pytest.approx(4e-6 * PARAMS, rel=1e-3), "float32, and scalars of the loss"
    for row in replica, fsdp:
        assert row["expected_mb"] <= row["sent_mb"] < 1.05 * row["expected_mb"] + 0.02, row
        assert f"| {row['case']} " in ended.out
    assert fsdp["sent_mb"] > 2 * replica["sent_mb"]
    assert fsdp["loss"] == pytest.approx(replica["loss"], rel=1e-5)


FORBIDDEN = """
import os, sys
user = os.geteuid()
os.unshare(os.CLONE_NEWUSER)
open("/proc/self/uid_map", "w").write(f"{user} {user} 1")
open("/proc/sys/user/max_net_namespaces", "w").write("0")
os.execv(sys.executable, [sys.executable, "-m", "launch", "bench", "slices"])
"""
"""Runs the benchmark where nobody may make a network namespace."""


def test_who_may_not_make_namespaces_is_told_how(repo_root: Path) -> None:
    if reason := refusal():
        names(reason, "namespace root --privileged user.max_net_namespaces")
        return
    forbidden = subprocess.run(
        [sys.executable, "-c", FORBIDDEN], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert forbidden.returncode == ConfigError.exit_code, forbidden
    names(forbidden.stderr.splitlines()[-1], "error: namespace root --privileged user.max_net_namespaces")


def test_a_wrong_override_is_one_line(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := refusal():
        pytest.skip(reason)
    monkeypatch.chdir(repo_root)
    ended = launch("bench", "slices", "model.num_layer=1", "--only", "replica")
    assert ended.code == ConfigError.exit_code, ended
    names(ended.err.splitlines()[-1], "error: model.num_layer")
