"""A run answers Prometheus: the page is OpenMetrics, and its values are those of the run."""

import json
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from jaxinfra.errors import ConfigError
from jaxinfra.track.config import Prometheus
from jaxinfra.track.prometheus import PrometheusTracker
from tests.refusals import raises


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def scraped(port: int) -> dict[str, dict[str, float]]:
    """The samples by name and by the last label."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        text = response.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["run"] == "story"
            found.setdefault(sample.name, {})[sample.labels.get("on", "")] = sample.value
    return found


def tracker(port: int, folder: Path) -> PrometheusTracker:
    made = PrometheusTracker(Prometheus(port=port, address="127.0.0.1"), folder / "story")
    (folder / "story").mkdir(exist_ok=True)
    made.start({}, {}, start_step=3, total_steps=10)
    return made


def test_a_scrape_has_what_was_logged(port: int, tmp_path: Path) -> None:
    (tmp_path / "story").mkdir()
    row = {"attempt": 1, "t": 1.0, "step": 0, "saves": 0, "from": 0, "resumes": 1, "seconds": {"init": 1.0}}
    rows = [{**row, "start": 5.0}, {**row, "t": 4.0, "step": 3, "seconds": {"init": 1.0, "step": 3.0}}]
    (tmp_path / "story/goodput.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    one = tracker(port, tmp_path)
    assert scraped(port)["jaxinfra_step"] == {"": 3}
    one.log(4, {"loss": 2.5, "loss_mean": 2.25, "tokens_per_s": 100.0, "grad_norm": float("nan")})
    one.log(4, {"eval/loss": 3.0})
    one.finish_step(4)
    one.log_save(4)
    found = scraped(port)
    assert found["jaxinfra_step"] == {"": 4} and found["jaxinfra_steps_planned"] == {"": 10}
    assert found["jaxinfra_train_loss"] == {"": 2.25} and found["jaxinfra_eval_loss"] == {"": 3.0}
    assert found["jaxinfra_perf_tokens_per_s"] == {"": 100.0}
    assert str(found["jaxinfra_train_grad_norm"][""]) == "nan"
    assert found["jaxinfra_save_step"] == {"": 4}
    assert found["jaxinfra_goodput"] == {"": 0.75} and found["jaxinfra_spent_seconds"] == {
        "init": 1.0,
        "step": 3.0,
    }
    with raises(ConfigError, f"track.prometheus.port={port} 127.0.0.1 another"):
        tracker(port, tmp_path)
    one.close()
    with pytest.raises(OSError):
        scraped(port)
    tracker(port, tmp_path).close()
