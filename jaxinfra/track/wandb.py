"""Sends a run to Weights & Biases, or writes the files that `wandb sync` sends later."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, override

from jaxinfra.errors import ConfigError
from jaxinfra.track.base import RunStatistics
from jaxinfra.track.config import Wandb
from jaxinfra.track.remote import CLOSE_S, RemoteRun, Row, remote_id


class WandbRun(RemoteRun):
    """A run of a W&B project; `wandb.json` in the run directory keeps its id."""

    def __init__(self, config: Wandb, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics) -> str:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of the client itself, to its makers
        import wandb

        config, is_online = self._config, self._config.mode == "online"
        if is_online and not wandb.login(prompt=False):
            raise ConfigError("no key; set WANDB_API_KEY, run wandb login, or use track.wandb.mode=offline")
        target = f"{config.entity or ''}/{config.project}"
        self._run = run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            mode=config.mode,
            name=self._run_dir.name,
            dir=self._run_dir,
            id=remote_id(self._run_dir / "wandb.json", target, lambda key: key[:8]),
            resume="allow",
            config={**record["config"], "derived": {name: value for name, (value, _) in statistics.items()}},
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=CLOSE_S),
        )
        run.define_metric("*", step_metric="step")  # W&B's own steps cannot go back at a resume
        return (run.url or target) if is_online else f"wandb sync {Path(run.dir).parent} sends the run later"

    @override
    def send(self, rows: Sequence[Row]) -> None:
        import wandb

        for row in rows:
            texts = {name: wandb.Html(f"<pre>{escape(text)}</pre>") for name, text in row.texts.items()}
            self._run.log({"step": row.step, **row.metrics, **texts})

    @override
    def finish(self, status: str, summary: Mapping[str, Any], end_ms: int | None = None) -> None:
        self._run.summary.update(dict(summary))
        if status == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "finished" else 1)
