"""A Prometheus of Debian on loopback, which scrapes a few runs and evaluates rules every second."""

import json
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers.guard import free_ports, guarded, wait_until

PROGRAMS = ("prometheus", "promtool")
needs_prometheus = pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)), reason="needs prometheus promtool: apt-get install prometheus"
)


class Server:
    """The answers of a server."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """Returns the data of an answer of the API."""
        address = f"{self._address}/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=60) as response:
            return json.load(response)["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        """Returns the series that a query finds now."""
        return self.get("api/v1/query", query=text)["result"]

    def firing(self) -> dict[tuple[str, str], dict[str, str]]:
        """Returns the annotations of the alerts that fire, by their names and runs."""
        alerts = [each for each in self.get("api/v1/alerts")["alerts"] if each["state"] == "firing"]
        return {(each["labels"]["alertname"], each["labels"]["run"]): each["annotations"] for each in alerts}


@contextmanager
def prometheus(folder: Path, rules: Path, ports: Sequence[int]) -> Iterator[Server]:
    """A server inside the block, which scrapes these ports of this machine."""
    config, log, (port,) = folder / "prometheus.yml", folder / "log", free_ports(1)
    often = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    runs = {"job_name": "jaxinfra", "static_configs": [{"targets": [f"127.0.0.1:{each}" for each in ports]}]}
    config.write_text(yaml.safe_dump({"global": often, "rule_files": [str(rules)], "scrape_configs": [runs]}))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
    with guarded([*command, f"--web.listen-address=127.0.0.1:{port}"], log, cwd=folder):
        server = Server(port)
        wait_until(lambda: server.query("vector(1)"), (OSError,), log, timeout_s=600)
        yield server
