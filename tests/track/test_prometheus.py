"""A run answers Prometheus: the page is OpenMetrics, and its values are those of the run."""

import json
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from jaxinfra.errors import ConfigError, NonFiniteError, StorageError
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
            found.setdefault(sample.name, {})[sample.labels.get("on", sample.labels.get("error", ""))] = sample.value
    return found


def tracker(port: int, folder: Path) -> PrometheusTracker:
    made = PrometheusTracker(Prometheus(port=port, address="127.0.0.1"), folder / "story")
    (folder / "story").mkdir(exist_ok=True)
    made.start({}, {}, start_step=3, total_steps=10)
    return made


def test_an_address_that_cannot_be_is_named(port: int, tmp_path: Path) -> None:
    for address in ("nowhere.invalid", "192.0.2.1"):
        made = PrometheusTracker(Prometheus(port=port, address=address), tmp_path / "story")
        with raises(ConfigError, f"track.prometheus.address={address} machine"):
            made.start({}, {}, start_step=0, total_steps=1)


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
    one.log_saved(4)
    found = scraped(port)
    assert found["jaxinfra_step"] == {"": 4} and found["jaxinfra_steps_planned"] == {"": 10}
    assert found["jaxinfra_train_loss"] == {"": 2.25} and found["jaxinfra_eval_loss"] == {"": 3.0}
    assert found["jaxinfra_perf_tokens_per_s"] == {"": 100.0}
    assert str(found["jaxinfra_train_grad_norm"][""]) == "nan"
    assert found["jaxinfra_save_step"] == {"": 4} and found["jaxinfra_save_interval_seconds"][""] >= 0
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


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (None, "jaxinfra_end_timestamp_seconds"),
        (NonFiniteError("step 4: loss is nan"), "jaxinfra_failed"),
        (StorageError("full"), None),
    ],
)
def test_the_end_is_seen_by_the_last_scrape(
    port: int, tmp_path: Path, error: Exception | None, seen: str | None
) -> None:
    """The end of a run that is scraped waits for it, where an alert needs to know of the end."""
    one = tracker(port, tmp_path)
    assert "jaxinfra_failed" not in scraped(port)
    one.log(4, {"loss": 2.5, "skipped_steps": 2.0})
    one.log(5, {"loss": 2.5, "skipped_steps": 1.0})
    if error is None:
        one.log_summary({"status": "finished"})
    else:
        one.log_error(error)
    closing = threading.Thread(target=one.close)
    closing.start()
    if seen is not None:
        found = scraped(port)
        assert seen in found and found["jaxinfra_skipped_steps_total"] == {"": 3.0}
        assert seen != "jaxinfra_failed" or found[seen] == {"NonFiniteError": 1.0}
    closing.join()
    with pytest.raises(OSError):
        scraped(port)


def test_a_run_that_nobody_scrapes_does_not_wait(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    one = tracker(port, tmp_path)
    monkeypatch.setattr(one._scraped_last, "wait", lambda seconds: pytest.fail("waits"))
    one.log_summary({"status": "finished"})
    one.close()
