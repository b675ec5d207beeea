"""Whether a host without a network installs Python and packages from a disk, as the page of places says."""

import json
import os
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote
from urllib.request import urlopen

import pytest

from jaxinfra.launchers.places.place import Host
from jaxinfra.launchers.places.requirements import lock, uv_for, uv_version
from jaxinfra.launchers.places.ssh import Ssh
from tests.cloud.hosts import Hosts
from tests.cloud.packages import PackageServer
from tests.cloud.test_hosts import ZONE, Key
from tests.cloud.wheels import installed, normalized, wheel, wheel_name


def read(url: str) -> bytes:
    with urlopen(url) as answer:
        return answer.read()


@pytest.mark.slow(10)
def test_installs_from_a_shared_disk(tmp_path: Path) -> None:
    key = Key(tmp_path)
    with Hosts() as hosts:
        folder, machine = hosts.shared, hosts.boot("w-0", attributes={"ssh-keys": f"ada:{key.public}"}, zone=ZONE)
        with PackageServer(hosts.gateway) as packages:
            environment = lock([], os.uname().machine, packages.environment)
            builds = json.loads(read(packages.environment["UV_PYTHON_DOWNLOADS_JSON_URL"]))
            for build in builds.values():
                path = unquote(build["url"].partition("/download/")[2])
                target = folder / "python" / path
                target.parent.mkdir(parents=True)
                target.write_bytes(read(f"{packages.url}/python/{build['url'].partition('/download/')[2]}"))
        (folder / "python" / "downloads.json").write_text(json.dumps(builds))
        (folder / "wheels").mkdir()
        for line in environment.requirements.splitlines():
            found = installed()[normalized(line.partition("==")[0])]
            shutil.copyfile(wheel(found), folder / "wheels" / wheel_name(found))
        told = {
            "UV_OFFLINE": "1",
            "UV_FIND_LINKS": "/shared/wheels",
            "UV_PYTHON_INSTALL_MIRROR": "file:///shared/python",
            "UV_PYTHON_DOWNLOADS_JSON_URL": "/shared/python/downloads.json",
        }
        host, ssh = Host(address=f"ada@{machine.address}"), Ssh(options=key.options)
        ssh.call(host, "receive", f"bin/uv-{uv_version()}", stdin=uv_for(os.uname().machine))
        requirements = f"environments/{environment.hash}/requirements.txt"
        ssh.call(host, "receive", requirements, stdin=environment.requirements.encode())
        variables = "\n".join(f"{name}={shlex.quote(value)}" for name, value in told.items())
        ssh.call(host, "install", environment.hash, uv_version(), environment.python, stdin=variables.encode())
        python = f".cache/jaxinfra/environments/{environment.hash}/bin/python"
        assert "numpy" in key.ssh(machine, f"{python} -c 'import numpy; print(numpy.__name__)'")
