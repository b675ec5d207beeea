"""The parts of a run of a language model, for what works on text alone."""

from jaxinfra.data.mixture import Mixture
from jaxinfra.data.pairs import PairData
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.run import Run


def require_text(run: Run) -> tuple[TransformerConfig, TokenData | Mixture | PairData]:
    """Returns the model and data of a run of a language model; ConfigError for a run of anything else."""
    model, data = run.model, run.data
    if isinstance(model, TransformerConfig) and isinstance(data, TokenData | Mixture | PairData):
        return model, data
    found = f"{type(model).__qualname__} with data of {data.modality}s"
    raise ConfigError(f"{run.name}: its model is {found}; name a run of a TransformerConfig with data of tokens")
