"""Tests checks on given facts; cards, links and mounts that this machine lacks are made up."""

import pytest

from jaxinfra.doctor.compare import equal, judge_clocks
from jaxinfra.doctor.findings import Finding, exit_code, merge
from jaxinfra.doctor.host import judge_driver, locked_memory, mount_options, open_files, shared_memory
from jaxinfra.doctor.speeds import judge_axis, judge_links, judge_storage

NAMES = [f"process {index} (node{index})" for index in range(4)]
NFS = "10.0.0.2:/export /mnt/a\\040disk nfs4 rw,relatime,vers=4.2,rsize=1048576,{},proto=tcp,timeo=600 0 0"
LUSTRE = "10.0.0.5@tcp:/scratch /mnt lustre rw,{}user_xattr,lazystatfs 0 0"
ROOT = "overlay / overlay rw,relatime 0 0"


@pytest.mark.parametrize(
    ("line", "level", "words"),
    [
        (NFS.format("hard,local_lock=none"), "ok", "nfs4 at /mnt/a disk"),
        (NFS.format("soft"), "warn", "soft"),
        (NFS.format("hard,noac"), "warn", "noac"),
        (NFS.format("hard,actimeo=600"), "warn", "actimeo=600"),
        (NFS.replace("nfs4", "nfs").format("hard,nolock"), "warn", "nolock"),
        (NFS.replace(" rw,", " ro,").format("hard"), "fail", "ro"),
        (LUSTRE.format("flock,"), "ok", "lustre at /mnt"),
        (LUSTRE.format(""), "warn", "no flock"),
        (LUSTRE.format("localflock,"), "warn", "no flock"),
    ],
)
def test_mount_options(line: str, level: str, words: str) -> None:
    found = mount_options(f"{ROOT}\n{line}\nproc /proc proc rw 0 0", "/mnt/a disk/runs")
    assert found.level == level and words in found.found and bool(found.fix) == (level != "ok"), found


def test_limits() -> None:
    assert [open_files(soft, 10**6).level for soft in (200, 1024, 65536, -1)] == ["fail", "warn", "ok", "ok"]
    assert "ulimit -n 65536" in open_files(200, 10**6).fix and "limits.conf" in open_files(200, 300).fix
    assert [locked_memory(2**26, has_rdma=each).level for each in (True, False)] == ["warn", "ok"]
    assert [shared_memory(64e6, each).level for each in ("cuda", "cpu")] == ["warn", "ok"]


def test_slow_ones_are_named_and_equal_ones_are_not() -> None:
    assert judge_links([900e6, 300e6, 2e9, 500e6], NAMES).level == "ok"
    assert judge_links([900e6, 60e6, 2e9, 500e6], NAMES).found.startswith(f"{NAMES[0]} to {NAMES[1]}: 60 MB/s; ")
    assert judge_links([5e6, 5e6], NAMES).level == "warn"  # both of two
    assert judge_links([900e6, 0.0], NAMES).level == "fail"
    assert judge_storage("disk", [(900e6, 1e9), (200e6, 1e9)], NAMES[:2]).level == "ok"
    assert judge_storage("disk", [(900e6, 1e9), (float("nan"),) * 2], NAMES[:2]).level == "ok"
    assert NAMES[1] in judge_storage("disk", [(900e6, 1e9), (900e6, 9e6)], NAMES[:2]).found


def test_collectives_beside_what_is_published() -> None:
    """The chip is made up by its kind; no card was measured."""
    assert judge_axis("mesh.fsdp=8", 300e9, "NVIDIA H100 80GB HBM3", is_network=False).level == "ok"
    slow = judge_axis("mesh.fsdp=8", 20e9, "NVIDIA H100 80GB HBM3", is_network=False)
    assert slow.level == "warn" and "published 450.00 GB/s" in slow.found, slow
    assert judge_axis("mesh.fsdp=16", 20e9, "NVIDIA H100 80GB HBM3", is_network=True).level == "ok"


def test_a_gpu_that_jax_does_not_use() -> None:
    assert judge_driver([["580.95.05", "NVIDIA H100"]] * 8, "cpu").level == "warn"
    assert judge_driver([["580.95.05", "NVIDIA H100"]] * 8, "cuda").found == "580.95.05, 8 x NVIDIA H100"


def test_all_that_differs_is_named() -> None:
    versions = [{"jax": "1", "optax": "3", "numpy": "4"}] * 3 + [{"jax": "2", "optax": None, "numpy": "4"}]
    found = equal("packages", versions, NAMES, level="fail", ok="", fix="install the same").found
    others = " and ".join(NAMES[:3])
    assert found == f"jax is 2 in {NAMES[3]}, 1 in {others}; optax is None in {NAMES[3]}, 3 in {others}"
    assert judge_clocks([0.0, -3600.0], NAMES[:2], signs=False).level == "warn"
    assert judge_clocks([0.0, 2.0], NAMES[:2], signs=True).level == "ok"


def test_the_worst_level_counts_with_its_processes() -> None:
    ok, full = Finding("disk", "ok", "1 GB/s"), Finding("disk", "fail", "full", "free some", 82)
    merged = merge([[ok], [full]], NAMES.__getitem__)
    assert merged == [full._replace(found=f"{NAMES[1]}: full")] and exit_code(merged) == 82
    assert exit_code([*merged, Finding("x", "fail", "")]) == 81 and exit_code([ok]) == 0
