"""The role for hosts with GPUs is linted, and run: on an overlay of this machine, which has no GPU and no systemd.

The driver needs NVIDIA's repository, so it is left out. A wheel of the test stands for jaxinfra, and a script for
systemd, which mounts and starts for real.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.infra.tools import INFRA, TOOLS, needs_tools

pytestmark = [needs_tools, pytest.mark.slow(25)]

ANSIBLE = INFRA / "ansible"
_OVERLAY = """
set -e
mount -t tmpfs disk $1
mkdir $1/upper $1/work $1/root
mount -t overlay root -o lowerdir=/,upperdir=$1/upper,workdir=$1/work $1/root
mount -t proc proc $1/root/proc
mount -t tmpfs run $1/root/run
mount --rbind /sys $1/root/sys
mount --rbind /dev $1/root/dev
exec chroot $1/root bash -c "$2"
"""
_SYSTEMCTL = """#!/bin/sh
case "$*" in
  show*) echo LoadState=loaded; echo ActiveState=$(cat "/run/active-$2" 2>/dev/null || echo inactive) ;;
  is-enabled*) test -e "/run/enabled-$2" ;;
  enable*) touch "/run/enabled-$2" ;;
  start*.mount)
    unit="/etc/systemd/system/$2"
    where=$(sed -n s/^Where=//p "$unit")
    mkdir -p "$where"
    mount "$(sed -n s/^What=//p "$unit")" "$where"
    echo active > "/run/active-$2" ;;
  *start*munge) install -d -o munge /run/munge; runuser -u munge munged; echo active > /run/active-munge ;;
esac
"""
_DOCTOR = "def main():\n    import os, sys\n    print('doctor of the test:', os.getcwd(), sys.argv[1:])\n"


def test_ansible_lint_has_nothing_to_say_for_production() -> None:
    environment = os.environ | {"PATH": f"{TOOLS / 'bin'}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    command = [TOOLS / "bin/ansible-lint", "--offline", "--strict", "--nocolor", "--profile", "production", ANSIBLE]
    done = subprocess.run(command, cwd=ANSIBLE, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 0 failure(s), 0 warning(s) in 7 files" in done.stdout + done.stderr


def test_the_example_sets_what_the_role_knows() -> None:
    names = re.compile(r"^\s*(gpu_host_\w+):", re.MULTILINE)
    known = {*names.findall((ANSIBLE / "roles/gpu_host/defaults/main.yml").read_text())}
    assert {*names.findall((ANSIBLE / "inventory.example.yml").read_text())} <= known
    used = "".join(
        path.read_text() for path in (ANSIBLE / "roles/gpu_host").rglob("*.*") if "defaults" not in path.parts
    )
    assert all(name in used for name in known)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who may make namespaces")
def test_the_role_prepares_a_host_and_changes_nothing_the_second_time(tmp_path: Path) -> None:
    """Runs it in a namespace without a network, then with --check and another disk, which has something on it."""
    wheel = tmp_path / "jaxinfra-0.0.1-py3-none-any.whl"
    with ZipFile(wheel, "w") as packed:
        info = "jaxinfra-0.0.1.dist-info"
        packed.writestr("jaxinfra_of_test.py", _DOCTOR)
        packed.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: jaxinfra\nVersion: 0.0.1\nProvides-Extra: cuda\n"
        )
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/entry_points.txt", "[console_scripts]\njaxinfra = jaxinfra_of_test:main\n")
        packed.writestr(f"{info}/RECORD", "")
    for name in ("new", "used"):
        with (tmp_path / name).open("wb") as disk:
            disk.truncate(32 << 20)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-L", "precious", tmp_path / "used"], check=True)
    (tmp_path / "munge.key").write_bytes(os.urandom(64).hex().encode())
    (tmp_path / "slurm.conf").write_text("ClusterName=test\n")
    (tmp_path / "systemctl").write_text(_SYSTEMCTL)
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "/usr/bin/python3",
        "gpu_host_driver": [],
        "gpu_host_packages": ["munge", "slurm-client"],
        "gpu_host_scratch": "/mnt/nvme-0",
        "gpu_host_scratch_device": str(tmp_path / "new"),
        "gpu_host_slurm_conf": str(tmp_path / "slurm.conf"),
        "gpu_host_munge_key": str(tmp_path / "munge.key"),
        "gpu_host_wheel": str(wheel),
        "gpu_host_pip_options": "--no-index --no-deps",
    }
    (tmp_path / "hosts.yml").write_text(json.dumps({"gpu_hosts": {"hosts": {"host": variables}}}))
    play = f"{TOOLS}/bin/ansible-playbook -v -i {tmp_path}/hosts.yml {ANSIBLE}/gpu_hosts.yml"
    script = f"""
        install -m 755 {tmp_path}/systemctl /usr/bin/systemctl
        mkdir -p /var/lib/apt/periodic && touch /var/lib/apt/periodic/update-success-stamp
        set -e
        {play} --diff
        echo second; {play} --check -e gpu_host_scratch_device={tmp_path}/used -e gpu_host_wheel=
        echo host; findmnt -n -o FSTYPE,OPTIONS /mnt/nvme-0; stat -c %a /mnt/nvme-0; munge -n | unmunge | grep STATUS
        stat -c '%U %a' /etc/munge/munge.key; cat /etc/slurm/slurm.conf /etc/security/limits.d/90-jaxinfra.conf
    """
    (tmp_path / "disk").mkdir()
    environment = {
        "PATH": f"{Path(sys.executable).resolve().parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_NOCOLOR": "1",
    }
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net"]
    command += ["bash", "-c", _OVERLAY, "overlay", str(tmp_path / "disk"), script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    first, _, rest = output.partition("\nsecond\n")
    second, _, host = rest.partition("\nhost\n")
    assert "doctor of the test: /mnt/nvme-0 ['doctor']" in first and "failed=0" in first, first
    assert _changed(second) == {"Say where to mount it"}, second  # which now names the other disk
    assert "Format a disk that has nothing" in _changed(first)
    secret = (tmp_path / "munge.key").read_text()
    assert secret not in output, "the key of munge is shown"
    assert host.splitlines()[0].startswith("ext4 ") and host.splitlines()[1:4] == [
        "1777",
        "STATUS:          Success (0)",
        "munge 400",
    ]
    assert "ClusterName=test\n* - memlock unlimited\n* - nofile 1048576\nroot - memlock unlimited\n" in host
    assert not Path("/mnt/nvme-0").exists() and not Path("/opt/jaxinfra").exists(), "this machine was changed"


def _changed(output: str) -> set[str]:
    """Returns the tasks that have changed something."""
    return {*re.findall(r"TASK \[gpu_host : (.*)\] \**\n(?:ok: .*\n)*changed: ", output)}
