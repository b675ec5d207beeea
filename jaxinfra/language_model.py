"""Checks that a run trains a language model, for commands that work only on text."""

from jaxinfra.data.mixture import Mixture
from jaxinfra.data.pairs import PairData
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.run import Run


def require_text(run: Run) -> tuple[TransformerConfig, TokenData | Mixture | PairData]:
    """Returns the model and data configs of a language model's run; ConfigError for any other run."""
    model, data = run.model, run.data
    if isinstance(model, TransformerConfig) and isinstance(data, TokenData | Mixture | PairData):
        return model, data
    found = f"{type(model).__qualname__} with data of {data.modality}s"
    raise ConfigError(f"{run.name}: is not a language model but {found}; name a run of a TransformerConfig with tokens")
