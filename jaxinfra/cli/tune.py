"""Writes the recipe and the config that tune a published model on conversations, pairs of answers, or text."""

import json
import re
from dataclasses import dataclass, replace

from jaxinfra.data.packing import PackSpec
from jaxinfra.errors import ConfigError
from jaxinfra.hub.published_model import TOKENIZER, PublishedModel, open_published
from jaxinfra.interop.folder import is_published
from jaxinfra.prepare.detect import Detected, first_record
from jaxinfra.prepare.documents.chat_template import PRESETS, load_template
from jaxinfra.prepare.documents.document import RecordError, Text
from jaxinfra.prepare.documents.formats import Chat, Completion, Labeled, Preference
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.record import Fields
from jaxinfra.prepare.tokenizers import TokenizerFile

_BYTES_PER_TOKEN = 4  # of a tokenizer that was trained on much text
_SEQ_LEN, _BATCH = 1024, 16
_EPOCHS, _MIN_STEPS = {Chat: 2, Preference: 1}, 20
_ADDED = "chatml"  # the template of a model that has none: its tokens are added
_CLASSES = {"text": ("TokenData",), "pairs": ("PairData", "DPO"), "labeled": ("LabeledData", "KTO")}
_TEMPLATE_FILES = {  # by what is in a file that has a template
    "chat_template.jinja": re.compile(b""),
    "tokenizer_config.json": re.compile(rb'"chat_template"\s*:\s*["\[]'),
}

# Learning rates by what is trained: an adapter's are ten times those of all parameters (Schulman 2025, "LoRA without
# regret"); those of DPO and KTO are far smaller (Rafailov et al. 2023, appendix B).
_PEAK_LR = {(Chat, True): 2e-4, (Chat, False): 2e-5, (Preference, True): 5e-6, (Preference, False): 5e-7}

_CONFIG = '''\
"""{about}."""

from jaxinfra import {names}
from jaxinfra.hub import published
{lora_import}

def config() -> Run:
    base = {source}
    return Run(
        name="{name}",
        model=published(base{vocab_size}),
        init=base,
{adapter}        data={data_class}(
            store="{store}", recipe="{recipe_file}", seq_len={seq_len}{packing}
        ),
{objective}        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps={warmup}), peak_lr={peak_lr}),
        train=TrainConfig(steps={steps}, global_batch={batch}, eval_every={eval_every}),
    )
'''


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The files that `new` writes, and the lines that it prints.

    Attributes:
        recipe: of the data.
        config: the text of the config file.
        recipe_note, config_note: what is printed of them.
        next_commands: what to do after the training.
    """

    recipe: Corpus
    config: str
    recipe_note: str
    config_note: str
    next_commands: tuple[str, ...]


def tuning(name: str, path: str, recipe_file: str, detected: Detected, source: str, *, full: bool) -> Tuning:
    """Returns the recipe and the config of a run that tunes a published model on what was detected at a path.

    With `full` all parameters are trained, else an adapter.
    """
    source = source if is_published(source) else f"hf:{source}"
    model = open_published(source)
    seq_len = min(_SEQ_LEN, model.max_positions)
    end = model.tokenizer().end_of_document
    tokenizer = TokenizerFile(path=model.folder.url_of(TOKENIZER), end_of_document=end)
    recipe, note, added = replace(detected.recipe, tokenizer=tokenizer), "", tuple[str, ...]()
    format, is_judged = recipe.format, recipe.format.kind != "text"
    if isinstance(format, Chat | Completion | Preference | Labeled):
        format, note, added = _with_template(format, first_record(recipe.source), model, path)
        packs = () if is_judged else (PackSpec(seq_len=seq_len),)
        recipe = replace(recipe, tokenizer=replace(tokenizer, special_tokens=added), format=format, packs=packs)
    vocab_size = _vocab_size(model, len(added)) if added else model.config.vocab_size
    embeddings = '"embedding",' if model.config.tie_embeddings else '"embedding", "unembedding"'
    also = f", trained=({embeddings})" if added else ""
    kind = Preference if is_judged else Chat
    epochs = _EPOCHS[kind]
    tokens_per_step = _BATCH * seq_len
    steps = max(round(epochs * detected.text_bytes / _BYTES_PER_TOKEN / tokens_per_step), _MIN_STEPS)
    data_class, *objective = _CLASSES[recipe.format.kind]
    packing = ', packing="best_fit"' if recipe.packs else ", cached_reference=True" if is_judged else ""
    names = ["AdamW", "Cosine", "OptimConfig", "Run", "TrainConfig", data_class, *objective]
    trained = "all parameters" if full else "a LoRA adapter"
    by = {Chat: "its answers", Preference: "preferred answers, with DPO", Labeled: "labeled answers, with KTO"}
    by = by.get(type(format), f"its field {recipe.format.field}" if isinstance(recipe.format, Text) else "its answers")
    config = _CONFIG.format(
        source=json.dumps(source, ensure_ascii=False),
        about=f"Tunes {source} on {path}: {trained}, on {by}".replace("\\", "/").replace('"', "'"),
        names=", ".join(sorted(names)),
        lora_import="" if full else "from jaxinfra.models.adapter import Lora\n",
        name=name,
        adapter=""
        if full
        else f"        adapter=Lora(rank=16, alpha=32.0{also}),  # all matrices of attention and MLPs\n",
        vocab_size="" if vocab_size == model.config.vocab_size else f", vocab_size={vocab_size}",
        data_class=data_class,
        store=recipe.store,
        recipe_file=recipe_file,
        seq_len=seq_len,
        packing=packing,
        objective="".join(f"        objective={name}(beta=0.1),\n" for name in objective),
        warmup=min(20, steps // 10),
        peak_lr=_PEAK_LR[kind, not full],
        steps=steps,
        batch=_BATCH,
        eval_every=max(steps // 4, 1),
    )
    is_text = not isinstance(format, Chat | Completion | Preference | Labeled)
    return Tuning(
        recipe=recipe,
        config=config,
        recipe_note=f"how the text becomes tokens{note}",
        config_note=f"{trained} of {source}, on {by}; {steps} steps",
        next_commands=(
            f'sample runs/{name} "Hello"' if is_text else f"chat runs/{name}",
            f"hub export runs/{name} out/{name}" + ("" if full else " --merge"),
        ),
    )


def _with_template[F: Chat | Completion | Preference | Labeled](
    format: F, record: Fields, model: PublishedModel, path: str
) -> tuple[F, str, tuple[str, ...]]:
    """Returns the format with a chat template, a note on it, and the special tokens that are added for it.

    The template is the model's own, if it says which tokens an answer has; else a preset whose tokens the model has;
    else ChatML, whose tokens are added. Raises ConfigError if the record fits none.
    """
    own_template, cause = "it has no template of its own", ""
    for template in (*templates_of(model), _ADDED):
        filled = replace(format, template=template)
        try:
            filled.to_documents(record)
        except (ConfigError, RecordError) as error:
            cause = str(error)
            if template not in PRESETS:
                own_template = f"instead of its own, {cause.partition('; ')[0]}"
            continue
        if template not in PRESETS:
            return filled, "", ()
        has_tokens = template in _presets_of(model)
        added = () if has_tokens else load_template(template).special_tokens
        tokens = "whose tokens the model has" if has_tokens else f"whose tokens {' and '.join(added)} are added"
        return filled, f"; template {template}, {tokens}; {own_template}", added
    raise ConfigError(f"{path}: the first record: {cause}")


def _vocab_size(model: PublishedModel, added: int) -> int:
    """Returns the size of an embedding with room for added tokens: a multiple of 128, which meshes divide."""
    size = model.tokenizer().vocab_size + added
    return model.config.vocab_size if size <= model.config.vocab_size else -(-size // 128) * 128


def templates_of(model: PublishedModel) -> list[str]:
    """Returns the chat templates that a published model may have: its own files, then presets whose tokens it has."""
    texts = {file: model.folder.read_or_none(file) for file in _TEMPLATE_FILES}
    own = [model.folder.url_of(file) for file, text in texts.items() if text and _TEMPLATE_FILES[file].search(text)]
    return [*own, *_presets_of(model)]


def _presets_of(model: PublishedModel) -> list[str]:
    tokens = (model.folder.read_or_none(TOKENIZER) or b"").decode(errors="replace")
    return [name for name in PRESETS if all(f'"{text}"' in tokens for text in load_template(name).special_tokens)]
