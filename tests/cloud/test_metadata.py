"""The metadata server of hosts, asked by Google's own client and by what listens for notices."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfra.processes import maintenance
from tests.cloud.hosts import PROJECT, SERVICE_ACCOUNT, values_of
from tests.cloud.metadata import Metadata, token_of


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    values = values_of("w-0", "10.0.0.2", {"run": "/runs/7", "an-attribute": "x"}, "us-east5-a", 5, preemptible=True)
    metadata = Metadata(values)
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{listener.getsockname()[1]}")
    metadata.serve(listener)
    yield metadata
    metadata.close()


def test_googles_client_finds_project_and_token(metadata: Metadata, tmp_path: Path) -> None:
    """In a process of its own: the client reads the variables when it is imported."""
    del metadata
    code = (
        "import google.auth, google.auth.transport.requests as transport\n"
        "credentials, project = google.auth.default()\n"
        "credentials.refresh(transport.Request())\n"
        "print(project, credentials.token, credentials.service_account_email)\n"
    )
    host = os.environ["GCE_METADATA_HOST"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GCE_METADATA_HOST": host}
    environment["GCE_METADATA_IP"] = host
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == [PROJECT, token_of("w-0"), SERVICE_ACCOUNT]


def test_values_directories_and_json(metadata: Metadata) -> None:
    assert _get("instance/zone") == "projects/123456789012/zones/us-east5-a"
    assert _get("instance/attributes/") == "an-attribute\nrun\n"
    assert _get("instance/attributes") == "an-attribute\nrun\n"  # redirected
    assert "attributes/\n" in _get("instance/") and "preempted\n" in _get("instance/")
    assert json.loads(_get("instance/attributes/?recursive=true")) == {"an-attribute": "x", "run": "/runs/7"}
    tree = json.loads(_get("?recursive=true"))
    assert tree["project"] == {"projectId": "tests-project", "numericProjectId": 123456789012}
    assert tree["instance"]["networkInterfaces"] == [{"ip": "10.0.0.2"}]
    assert tree["instance"]["maintenanceEvent"] == "NONE"
    assert set(tree["instance"]["serviceAccounts"]) == {"default", SERVICE_ACCOUNT}
    assert "token" not in tree["instance"]["serviceAccounts"]["default"]
    assert "instance/name w-0\n" in _get("?recursive=true&alt=text")
    metadata.set("instance/upcoming-maintenance", json.dumps({"can_reschedule": "TRUE", "type": "SCHEDULED"}))
    assert json.loads(_get("instance/upcoming-maintenance?alt=json"))["can_reschedule"] == "TRUE"
    assert _get("instance/upcoming-maintenance/type") == "SCHEDULED"


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("instance/name", {}, 403),
        ("instance/name", {"Metadata-Flavor": "Google", "X-Forwarded-For": "1.2.3.4"}, 403),
        ("instance/nothing", {"Metadata-Flavor": "Google"}, 404),
        ("instance/attributes/nothing", {"Metadata-Flavor": "Google"}, 404),
        ("instance/upcoming-maintenance?alt=json", {"Metadata-Flavor": "Google"}, 503),
    ],
)
def test_refusals(metadata: Metadata, path: str, headers: dict[str, str], code: int) -> None:
    del metadata
    with pytest.raises(urllib.error.HTTPError) as refused:
        _get(path, headers)
    with refused.value:
        assert refused.value.code == code


def test_a_change_ends_the_wait(metadata: Metadata) -> None:
    threading.Timer(0.2, metadata.set, ("instance/preempted", "TRUE")).start()
    began = time.monotonic()
    assert _get("instance/preempted?wait_for_change=true&timeout_sec=30") == "TRUE"
    assert time.monotonic() - began < 10
    assert _get("instance/preempted?wait_for_change=true&timeout_sec=0") == "TRUE"


def test_notices_are_heard(metadata: Metadata) -> None:
    heard = threading.Event()
    environment = {"JAXINFRA_METADATA": "google", "GCE_METADATA_HOST": os.environ["GCE_METADATA_HOST"]}
    with maintenance.listen(environment, lambda notice: heard.set(), poll_s=0.05):
        assert not heard.wait(0.3)
        metadata.set("instance/preempted", "TRUE")
        assert heard.wait(10)


def _get(path: str, headers: dict[str, str] | None = None) -> str:
    url = f"http://{os.environ['GCE_METADATA_HOST']}/computeMetadata/v1/{path}"
    asked = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"} if headers is None else headers)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return answer.read().decode()
