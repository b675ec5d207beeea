"""`python -m launch models [WORD]`: lists the published models that a config can name; uses no devices."""

import argparse

from jaxinfra.command import COMMAND
from jaxinfra.errors import ConfigError
from jaxinfra.families.catalog import BYTES_PER_PARAM, CatalogEntry, catalog
from jaxinfra.track.console import fitted_table, print_table, stdout_console
from jaxinfra.track.formatting import format_short

COLUMNS = ("name", "params", "active", *BYTES_PER_PARAM)  # the keys are "weights" and "training": GiB of memory
COLUMNS += ("context", "layers", "hidden", "heads/KV", "vocab")
"""The most important first: a terminal that is too narrow for all leaves out the last ones."""


def run(options: argparse.Namespace) -> None:
    """Prints a row for each model whose name contains the word."""
    entries = [entry for entry in catalog() if options.word.lower() in entry.name]
    if not entries:
        raise ConfigError(f"{options.word}: no model has this in its name; {COMMAND} models lists all")
    console = stdout_console()
    print_table(console, fitted_table(console, COLUMNS, [*map(cells, entries)], texts=("name",)))
    example = entries[-1]  # its function in the zoo is `shape` or `vision_shape`
    console.print(
        f'In a config: model={example.function}("{example.name}"), imported from jaxinfra.families.zoo. '
        "Memory in GiB: of bfloat16 weights; in training, of float32 parameters, gradients and AdamW's moments.",
        markup=False,
    )


def cells(entry: CatalogEntry) -> list[str]:
    """Returns the texts of a model's row."""
    heads = str(entry.num_heads) if entry.num_kv_heads is None else f"{entry.num_heads}/{entry.num_kv_heads}"
    active = entry.active_parameters
    return [
        entry.name,
        format_short(entry.parameters),
        "" if active == entry.parameters else format_short(active),
        *(f"{entry.parameters * n_bytes / 2**30:,.4g}" for n_bytes in BYTES_PER_PARAM.values()),
        "" if entry.context is None else f"{entry.context:,}",
        str(entry.num_layers),
        f"{entry.hidden_size:,}",
        heads,
        "" if entry.vocab_size is None else f"{entry.vocab_size:,}",
    ]
