"""Makes the pages of docs/ and the tables of jaxinfra/ that follow from the code."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import jax
from flax import nnx

from jaxinfra.config.explain import Field, fields_below
from jaxinfra.config.extensible import class_name
from jaxinfra.config.schema import is_choice
from jaxinfra.families.catalog import CatalogEntry, catalog
from jaxinfra.families.zoo import SHAPES, VISION_SHAPES
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.prepare.recipes import Corpus, ImageSet
from jaxinfra.run import Run

ROOT = Path(__file__).parents[2]

# Longest sequence of the published weights, in tokens, by prefix of the name: `max_position_embeddings` of their
# configs, and of Qwen3 and Gemma 3 what their model cards say. The longest prefix counts.
CONTEXT = {
    "llama-2": 4096,
    "llama-3-": 8192,
    "llama-3.": 131072,
    "smollm2": 8192,
    "smollm3": 65536,
    "qwen2-": 131072,
    "qwen2.5": 131072,
    "qwen2.5-0.5b": 32768,
    "qwen2.5-1.5b": 32768,
    "qwen2.5-3b": 32768,
    "qwen3": 32768,
    "mistral": 32768,
    "mistral-nemo": 131072,
    "mixtral": 32768,
    "gemma-2": 8192,
    "gemma-3": 131072,
    "gemma-3-1b": 32768,
    "gemma-4": 262144,
    "qwen3-next": 262144,
    "qwen3.5": 262144,
    "deepseek-v3": 163840,
    "kimi-k2": 131072,
    "glm-4.5": 131072,
    "gpt-oss": 131072,
    "llama-4-scout": 10485760,
    "llama-4-maverick": 1048576,
    "gpt2": 1024,
    "gpt3": 2048,
    "olmo-2": 4096,
    "olmo-3": 65536,
    "phi-3": 4096,
    "phi-4": 16384,
    "phi-4-mini": 131072,
    "granite-3.1": 131072,
}


def pages() -> dict[Path, str]:
    """The generated files and their texts."""
    return {
        ROOT / "docs/configs.md": configs_page(),
        ROOT / "docs/models.md": models_page(),
        ROOT / "jaxinfra/config/field_paths.json": field_paths(),
        ROOT / "jaxinfra/families/catalog.json": catalog_json(),
    }


def field_paths() -> str:
    """The paths of all config fields by the name of the root class, in the order of the fields."""
    roots = (Run, Corpus, ImageSet)
    paths = {root.__name__: list(dict.fromkeys(field.path for field in all_fields(root))) for root in roots}
    return json.dumps(paths, indent=0) + "\n"


def catalog_json() -> str:
    """All models of the zoo, a line for each."""
    entries = map(catalog_entry, SHAPES | VISION_SHAPES)
    return "[\n" + ",\n".join(json.dumps(asdict(entry)) for entry in entries) + "\n]\n"


def catalog_entry(name: str) -> CatalogEntry:
    """Builds a model of the zoo without arrays, and counts its parameters."""
    config = (SHAPES | VISION_SHAPES)[name]
    _, state = nnx.split(config.build(Partitioner()))
    specs = jax.tree.leaves(nnx.to_pure_dict(state))
    layers = config.layers if isinstance(config, TransformerConfig) else ()
    moe = next((layer.mlp for layer in layers if isinstance(layer.mlp, MixtureOfExperts)), None)
    heads = next((found[1] for layer in layers if (found := layer.mixer.attention(config.hidden_size))), None)
    # The experts that a token does not choose.
    idle = sum(s.size * (moe.num_experts - moe.top_k) // moe.num_experts for s in specs if moe and "experts" in s.axes)
    parameters = sum(spec.size for spec in specs)
    known = [prefix for prefix in CONTEXT if name.startswith(prefix)]
    return CatalogEntry(
        name=name,
        function="shape" if name in SHAPES else "vision_shape",
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=heads.num_heads if heads else config.num_heads,
        num_kv_heads=heads.num_kv_heads if heads else None,
        vocab_size=getattr(config, "vocab_size", None),
        parameters=parameters,
        active_parameters=parameters - idle,
        context=CONTEXT[max(known, key=len)] if known else None,
    )


def models_page() -> str:
    """docs/models.md."""
    from jaxinfra.cli.models import COLUMNS, cells

    table = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    table += ["| " + " | ".join(cells(entry)) + " |" for entry in catalog()]
    return MODELS_INTRODUCTION + "\n".join(table) + "\n"


MODELS_INTRODUCTION = """\
# Models

    python -m launch models            # this table
    python -m launch models qwen3      # those whose name contains a word

`shape(NAME)` of `jaxinfra.families.zoo` returns the config of a published model; `vision_shape(NAME)` that of an image
classifier. Change fields with `dataclasses.replace`:

```python
from dataclasses import replace

from jaxinfra.families.zoo import shape

model = replace(shape("qwen3-0.6b"), num_layers=12, remat="full")
```

## A pattern of layers

A decoder is a period of layers, which is repeated until there are `num_layers`; the last repetition may be cut short.
Each layer names its *mixer* (`Attention`, `LatentAttention` or `GatedDeltaNet`, with its own heads, window and rotary
positions), its `MLP` or `MixtureOfExperts`, and where its norms are. This one has three layers with a window for each
layer that sees everything, and experts in every other layer:

```python
from dataclasses import replace

from jaxinfra import MLP, Attention, Layer, MixtureOfExperts, Rope, TransformerConfig

full = Attention(num_heads=16, num_kv_heads=4, head_dim=64, qk_norm="head", rope=Rope(theta=1e6))
local = replace(full, window=512, rope=Rope(theta=1e4))
dense, experts = MLP(dim=2816), MixtureOfExperts(dim=704, num_experts=32, top_k=4)
model = TransformerConfig(
    vocab_size=32768,
    hidden_size=1024,
    num_layers=24,  # six periods
    layers=(
        Layer(mixer=local, mlp=dense),
        Layer(mixer=local, mlp=experts),
        Layer(mixer=local, mlp=dense),
        Layer(mixer=full, mlp=experts),
    ),
)
```

On the command line an index names one layer of the period, and a path without an index all that have the field:

    python -m launch show configs/gemma2_2b.py model.layers.0.mixer.window=1024 model.layers.mlp.dim=4608

- `first_layers` are layers before the first period: the dense layers of DeepSeek-V3.
- Parameters are stacked by position in the period: `blocks.layer_2.mlp.up.weight` is `[6, 1024, 2816]` here. Without
  unlike layers the name of the position is left out: `blocks.mlp.up.weight`. Layers of a period that is cut short are
  in `tail`, first layers in `prefix`.
- One step of a scan applies a period, so compile time grows with the period, not with the number of layers: on a CPU,
  48 layers with a period of four take 1.6 times as long to compile as 48 alike layers, with a period of six 2.2 times.
- `GatedDeltaNet` is the linear attention of Qwen3-Next: time and memory grow with the length, not with its square, and
  decoding keeps a state of fixed size. It needs no positions.
- `remat` is repeated over the layers, pipeline stages split whole periods, and decoding has a cache for each layer.
- A mixer or an MLP may be a class of your own ([extend](extend.md#a-mixer-or-an-mlp)).

## Published models

The models start from random weights. *Params* are all parameters, *active* those that a token passes through.
*Weights* is the memory of the parameters in bfloat16, in GiB; *training* that of float32 parameters, gradients and the
two moments of AdamW, without activations. *Context* is the longest sequence of the published weights, in tokens.

"""

CONFIGS_INTRODUCTION = """\
# Config fields

Every field of a `Run` can be set in a config file and on the command line, as `path=value`. This page lists the fields
of `Run`, of the recipes of `data prepare`, and of all classes that they can hold. `explain` finds a field also by the
name that Hugging Face, MaxText or torchtitan give it:

    python -m launch explain                    # lists the fields
    python -m launch explain optim.peak_lr      # type, default and meaning of a field
    python -m launch explain lr                 # finds the same field
    python -m launch explain source.pattern     # a field of a recipe

Fields with a * may change when a run resumes: losses stay the same but for rounding. A field that takes the name of a
class, such as `optim.schedule=cosine`, also takes the import path of a class of your own ([extend](extend.md)).
"""

RECIPES_INTRODUCTION = """\
## Recipes

`data prepare` reads a recipe: a `Corpus` for text, an `ImageSet` for images. Its overrides are written in the same way.
Classes of both recipes are listed once, below `Corpus`.
"""


def configs_page() -> str:
    """docs/configs.md: a table for each config class."""
    recipes, done = [], set[type]()
    for recipe in (Corpus, ImageSet):
        recipes += _tables(recipe, done=done)  # the classes of both are described once
    return "\n".join([CONFIGS_INTRODUCTION, *_tables(Run), "", RECIPES_INTRODUCTION, *recipes]) + "\n"


def all_fields(root: type, parent: Field | None = None) -> Iterator[Field]:
    """Yields every field below a config class, depth first; imports all classes of open bases."""
    for field in fields_below(root, parent):
        yield field
        for cls in field.options.values():
            yield from all_fields(cls, field)


def _default(field: Field) -> str:
    return field.default if field.default in ("", "required") else f"`{field.default}`"


def _tables(root: type, parent: Field | None = None, title: str = "", done: set[type] | None = None) -> Iterator[str]:
    """Yields the lines of the table of a class, then those of the classes of its fields; each class once."""
    done = set() if done is None else done
    done.add(root)
    fields = fields_below(root, parent)
    yield f"## {title or root.__name__}\n\n`{class_name(root)}`\n"
    if fields:
        yield "| field | takes | default | meaning |\n| --- | --- | --- | --- |"
    for field in fields:
        mark = "" if field.in_fingerprint else "*"
        cells = [f"`{field.path}`{mark}", field.allowed, _default(field), field.meaning]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for field in fields:
        for name, cls in field.options.items():
            if cls not in done:
                title = f"{field.path}={name}" if is_choice(field.field.annotation) else field.path
                yield from _tables(cls, field, title, done)
