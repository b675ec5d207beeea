"""The config of trackers. Imports none of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr, PositiveInt
from jaxinfra.track.base import TrackerConfig

_NOT_IN_PROJECTS = re.compile(r"[/\\#?%:]")  # W&B refuses these characters
_MLFLOW_URI = re.compile(r"(https?://|sqlite:///|file://|databricks(://|$)).*")


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Where Weights & Biases shows the run; the key comes from WANDB_API_KEY or `wandb login`.

    Attributes:
        project: name of the project; None sends nothing.
        entity: user or team that owns the project; None is your default.
        group: name that runs of one experiment share.
        tags: labels of the run.
        mode: "online" sends to WANDB_BASE_URL, by default https://api.wandb.ai; "offline" only writes files into the
            run directory, which `wandb sync` sends later.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = "online"

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if W&B would refuse the project's name."""
        if self.project is not None and (not self.project or _NOT_IN_PROJECTS.search(self.project)):
            yield Problem(
                fields=("project",),
                message=r"must be the name of a W&B project, without the characters / \ # ? % :",
                fix="use project=my-project; the user or team goes into entity=",
            )


@dataclass(frozen=True, kw_only=True)
class Mlflow:
    """The MLflow server that shows the run; credentials come from MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN.

    Attributes:
        uri: address of the tracking server, such as http://127.0.0.1:5000, or sqlite:///FILE; None sends nothing.
        experiment: name of the experiment, which is created if there is none.
        tags: labels of the run, such as team=speech.
    """

    uri: str | None = None
    experiment: str = "jaxinfra"
    tags: tuple[str, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields a problem for an address that MLflow does not know, and for a tag without a value."""
        if self.uri is not None and not _MLFLOW_URI.fullmatch(self.uri):
            yield Problem(
                fields=("uri",),
                message="expected http://HOST:PORT, https://HOST, sqlite:///FILE or databricks",
                fix="use uri=http://127.0.0.1:5000",
            )
        if not all(re.fullmatch("[^=]+=.*", tag) for tag in self.tags):
            yield Problem(fields=("tags",), message="expected NAME=VALUE", fix='use tags=("team=speech",)')


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """Where Prometheus finds the metrics of the run: http://ADDRESS:PORT/metrics of process 0, without a password.

    Attributes:
        port: None serves nothing.
        address: that of the host where it answers; "0.0.0.0" is all of them.
    """

    port: Annotated[int, Ge(1), Le(65535)] | None = None
    address: NonEmptyStr = "0.0.0.0"


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """How often metrics are logged, and where they go.

    Attributes:
        log_every: steps between two logs, besides the first and the last step; other steps' metrics stay on the device.
        jsonl: writes metrics.jsonl and summary.json; the report is made from them.
        tensorboard: writes TensorBoard event files.
        console: "bar" draws a progress bar, "plain" prints a line every `log_every` steps, "auto" is "bar" on a
            terminal and "plain" elsewhere, "off" prints nothing.
        sample_prompt: a text that a language model continues at each evaluation, for the report, on the mesh of the
            run. With pipeline stages the parameters are copied for it, sharded over all devices. None samples nothing.
        wandb: Weights & Biases.
        mlflow: MLflow.
        prometheus: Prometheus.
        audit: a folder or bucket prefix that records what is trained, promoted and exported, such as runs/audit.
        trackers: your own trackers, besides these.
        energy: "nvml" measures the energy of the NVIDIA GPUs that the run uses; None measures nothing.
        plan: a file of `plan --json`: after 100 steps a line says whether they are as planned, or what is off.
    """

    log_every: PositiveInt = 10
    jsonl: bool = True
    tensorboard: bool = True
    console: Literal["auto", "bar", "plain", "off"] = "auto"
    sample_prompt: str | None = None
    wandb: Wandb = Wandb()
    mlflow: Mlflow = Mlflow()
    prometheus: Prometheus = Prometheus()
    audit: NonEmptyStr | None = None
    trackers: tuple[TrackerConfig, ...] = ()
    energy: Literal["nvml"] | None = None
    plan: NonEmptyStr | None = None

    def due(self, completed_steps: int, total_steps: int) -> bool:
        """Returns whether to log after this number of steps: the first, every `log_every`-th and the last."""
        return completed_steps % self.log_every == 0 or completed_steps in (1, total_steps)
