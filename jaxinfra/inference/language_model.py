"""Finds the language model of a source: its run and its tokenizer. All commands that need text begin here."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfra.config import apply, load, read_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.view import config_leaves
from jaxinfra.data.mixture import Mixture
from jaxinfra.data.pairs import PairData
from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.hub.peft import open_peft
from jaxinfra.hub.published_model import open_published
from jaxinfra.interop.folder import is_published
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.run import Precision, Run
from jaxinfra.track.runs import parse_source, record_of


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A language model without its parameters.

    Attributes:
        run: its config.
        tokenizer: its tokenizer.
        first_tokens: tokens before each document: the end of the one before, if documents see each other; a published
            model may have a token that begins a document.
        max_length: the number of positions that it was trained with.
        end_ids: tokens that end a text when it is sampled.
    """

    run: Run
    tokenizer: Tokenizer
    first_tokens: tuple[int, ...]
    max_length: int
    end_ids: tuple[int, ...]

    @property
    def max_positions(self) -> int | None:
        """Number of learned positions; None if the model has none, and takes any length."""
        return require_text(self.run)[0].learned_positions

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of the beginning of a document, at least one."""
        return [*self.first_tokens, *self.tokenizer.encode(text)] or [self.tokenizer.eot_id]


def is_text(run: Run) -> bool:
    """Returns whether a run trains a language model, from which texts can be sampled."""
    return isinstance(run.model, TransformerConfig) and isinstance(run.data, TokenData | Mixture | PairData)


def require_text(run: Run) -> tuple[TransformerConfig, TokenData | Mixture | PairData]:
    """Returns the model and data configs of a language model's run; ConfigError for any other run."""
    model, data = run.model, run.data
    if isinstance(model, TransformerConfig) and isinstance(data, TokenData | Mixture | PairData):
        return model, data
    raise _no_language_model(run.name, f"{type(model).__qualname__} with data of {data.modality}s")


def conversation_template_name(run: Run) -> str | None:
    """Returns the chat template of the conversations that a run is trained on; None for other data."""
    _, data = require_text(run)
    if not isinstance(data, TokenData | PairData):
        return None
    recipe = config_leaves(dict(TokenStore.open(data.store, data.version).manifest.recipe))
    name = recipe.get("format.template")
    return None if name in (None, "none") else str(name)


def _no_language_model(name: str, found: str) -> ConfigError:
    return ConfigError(f"{name}: is not a language model but {found}; name a run of a TransformerConfig with tokens")


def language_model(run: Run) -> LanguageModel:
    """Returns the language model that a run trains; ConfigError if it trains none, or its data is missing."""
    model, data = require_text(run)
    tokenizer = data.open().tokenizer
    return LanguageModel(
        run=run,
        tokenizer=tokenizer,
        first_tokens=() if data.mask_documents else (tokenizer.eot_id,),
        max_length=model.learned_positions or data.seq_len,
        end_ids=(tokenizer.eot_id,),
    )


def open_language_model(
    source: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] | ClassFinder = ()
) -> LanguageModel:
    """Opens the language model of a source (see `trained_params.load_params`, which reads its parameters)."""
    if is_published(source):
        return _published_language_model(str(source), overrides)
    path, _ = parse_source(source)
    config = config_leaves(read_record(record_of(path))["config"])
    kind = config.get("model", "")  # with a colon: a class of the user, which `load` imports only if it is named
    if ":" in kind and "model.layers.0.mixer" not in config:
        raise _no_language_model(path, kind)
    return language_model(load(record_of(path), overrides, Run, imports).run)


def _published_language_model(source: str, overrides: Sequence[str]) -> LanguageModel:
    """Opens a model in the format of Hugging Face.

    It computes in bfloat16 if most of its weights are stored so, else in float32.
    """
    peft = open_peft(source)
    model = open_published(source) if peft is None else peft.base
    stored = Counter[str]()
    for tensor in model.weights().tensors.values():
        stored[str(tensor.dtype)] += tensor.nbytes
    dtype = "bfloat16" if stored.most_common(1)[0][0] == "bfloat16" else "float32"
    run = Run(
        name="published",
        model=model.config,
        data=TokenData(store=source, seq_len=1),
        precision=Precision(params=dtype, compute=dtype),
        adapter=None if peft is None else peft.config,
        init=None if peft is None else source,
    )
    return LanguageModel(
        run=apply(run, overrides),
        tokenizer=model.tokenizer(),
        first_tokens=model.first_tokens(),
        max_length=model.max_positions,
        end_ids=(*model.end_ids(), *model.tokenizer_end_ids()),
    )
