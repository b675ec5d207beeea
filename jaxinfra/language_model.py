"""Finds the language model of a source: its run and its tokenizer. All commands that need text begin here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfra.config import load
from jaxinfra.config.classes import ClassFinder
from jaxinfra.data.mixture import Mixture
from jaxinfra.data.pairs import PairData
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.run import Run
from jaxinfra.track.runs import parse_source, record_of


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A language model without its parameters.

    Attributes:
        run: its config.
        tokenizer: its tokenizer.
        documents_apart: whether it was trained on documents that do not see each other. Otherwise the end-of-document
            token of the one before stands before each document.
        max_length: the number of positions that it was trained with.
    """

    run: Run
    tokenizer: Tokenizer
    documents_apart: bool
    max_length: int

    @property
    def max_positions(self) -> int | None:
        """Number of learned positions; None if the model has none, and takes any length."""
        return require_text(self.run)[0].learned_positions

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of the beginning of a document, at least one."""
        ids = self.tokenizer.encode(text)
        return ids if ids and self.documents_apart else [self.tokenizer.eot_id, *ids]


def require_text(run: Run) -> tuple[TransformerConfig, TokenData | Mixture | PairData]:
    """Returns the model and data configs of a language model's run; ConfigError for any other run."""
    model, data = run.model, run.data
    if isinstance(model, TransformerConfig) and isinstance(data, TokenData | Mixture | PairData):
        return model, data
    found = f"{type(model).__qualname__} with data of {data.modality}s"
    raise ConfigError(f"{run.name}: is not a language model but {found}; name a run of a TransformerConfig with tokens")


def language_model(run: Run) -> LanguageModel:
    """Returns the language model that a run trains; ConfigError if it trains none, or its data is missing."""
    model, data = require_text(run)
    return LanguageModel(
        run=run,
        tokenizer=data.open().tokenizer,
        documents_apart=data.mask_documents,
        max_length=model.learned_positions or data.seq_len,
    )


def open_language_model(
    source: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] | ClassFinder = ()
) -> LanguageModel:
    """Opens the language model of a source (see `trained_params.load_params`, which reads its parameters)."""
    path, _ = parse_source(source)
    return language_model(load(record_of(path), overrides, Run, imports).run)
