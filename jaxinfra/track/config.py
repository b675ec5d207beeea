"""The config of trackers. Imports none of them."""

from dataclasses import dataclass
from typing import Literal

from jaxinfra.config.limits import PositiveInt
from jaxinfra.track.base import TrackerConfig


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """How often metrics are logged, and where they go.

    Attributes:
        log_every: steps between two logs; other steps' metrics stay on the device.
        jsonl: writes metrics.jsonl and summary.json; the report is made from them.
        tensorboard: writes TensorBoard event files.
        console: "bar" draws a progress bar, "plain" prints a line every `log_every` steps, "auto" is "bar" on a
            terminal and "plain" elsewhere, "off" prints nothing.
        sample_prompt: a text that a language model continues at each evaluation, for the report. The parameters are
            copied to the first device for it, so the model must fit there. None samples nothing.
        trackers: your own trackers, besides these.
    """

    log_every: PositiveInt = 10
    jsonl: bool = True
    tensorboard: bool = True
    console: Literal["auto", "bar", "plain", "off"] = "auto"
    sample_prompt: str | None = None
    trackers: tuple[TrackerConfig, ...] = ()

    def due(self, completed_steps: int, total_steps: int) -> bool:
        """Returns whether to log after this number of steps: every `log_every`-th and the last."""
        return completed_steps % self.log_every == 0 or completed_steps == total_steps
