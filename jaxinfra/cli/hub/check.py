"""`python -m launch hub check SOURCE`: says what a folder of published weights holds; reads headers, no weights."""

import argparse
import hashlib
import json
from contextlib import ExitStack

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from jaxinfra.errors import DataError, quoted
from jaxinfra.families.catalog import BYTES_PER_PARAM
from jaxinfra.hub.peft import PeftAdapter, open_peft
from jaxinfra.hub.published_model import TOKENIZER, PublishedModel, open_published
from jaxinfra.inference.trained_params import adapter_overrides
from jaxinfra.interop.folder import PREFIX, ModelFolder
from jaxinfra.interop.safetensors import Weights
from jaxinfra.interop.writing import RECEIPT
from jaxinfra.registry import signing
from jaxinfra.storage import outputs
from jaxinfra.track.console import print_table, stdout_console
from jaxinfra.track.formatting import format_bytes, format_files, format_short


def run(options: argparse.Namespace) -> None:
    """Prints the model or the adapter, its tensors and their memory; raises if a tensor has no place in the model."""
    with ExitStack() as stack:
        if options.key is not None:
            stack.enter_context(signing.reading_verified(options.source, options.key, option="--key"))
        peft = open_peft(options.source)
        model = open_published(options.source) if peft is None else peft.base
        weights = model.check() if peft is None else peft.weights
        facts = _facts(model, weights) if peft is None else _adapter_facts(peft)
        if options.hashes:
            facts["hashes"] = _check_hashes(model.folder if peft is None else peft.folder, weights)
    if options.key is not None:
        facts["signature"] = f"of this folder, by the key of {options.key}"
    table = Table(Column(style="bold"), Column(overflow="fold"), box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    print_table(stdout_console(), table)
    source = options.source if options.source.startswith(PREFIX) else f"{PREFIX}{options.source}"
    base = source if peft is None else peft.source
    print(f'In a config: model=published("{base}"), imported from jaxinfra.hub, and init="{source}".')
    if peft is not None:
        print(f"The run has the same adapter with {adapter_overrides(peft.config)}")
    outputs.write_json(options.json, facts)


def _facts(model: PublishedModel, weights: Weights) -> dict[str, str]:
    tensors, config = weights.tensors.values(), model.config
    count = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors)
    files, dtypes = {tensor.file for tensor in tensors}, sorted({str(tensor.dtype) for tensor in tensors})
    kinds = ", ".join(f"{type(each.mixer).__name__} + {type(each.mlp).__name__}" for each in config.layers)
    nbytes = sum(each.nbytes for each in tensors)
    memory = {name: format_bytes(count * size) for name, size in BYTES_PER_PARAM.items()}
    facts = {
        "folder": model.folder.url,
        "family": f"{model.family.model_type} ({model.family.architecture})",
        "layers": f"{config.num_layers}, period of {len(config.layers)}: {kinds}",
        "hidden size": f"{config.hidden_size:,}",
        "vocabulary": f"{config.vocab_size:,}; {_tokenizer_text(model)}",
        "parameters": f"{format_short(count)} in {len(tensors):,} tensors: each has its place",
        "stored": f"{', '.join(dtypes)}, {format_bytes(nbytes)} in {format_files(len(files))}",
        "memory": f"{memory['weights']} in bfloat16; {memory['training']} to train it in float32 with AdamW",
    }
    if config.mtp_depths:
        facts["modules"] = f"{config.mtp_depths} for multi-token prediction, which sampling does not compute"
    for length in config.short_lengths:
        facts["positions"] = (
            f"LongRoPE: short_factor for documents up to {length:,} tokens, long_factor for longer ones; a text that "
            "becomes longer while it is sampled is computed anew"
        )
    return facts


def _adapter_facts(peft: PeftAdapter) -> dict[str, str]:
    """Describes an adapter; raises ConfigError if its matrices do not fit its base."""
    peft.check()
    tensors, adapter = peft.weights.tensors.values(), peft.config
    count = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors)
    return {
        "folder": peft.folder.url,
        "adapter": f"{'DoRA' if adapter.dora else 'LoRA'} of rank {adapter.rank}, alpha {adapter.alpha:g}",
        "targets": ", ".join(adapter.targets),
        "base": f"{peft.source}, {peft.base.family.model_type}",
        "parameters": f"{format_short(count)} in {len(tensors):,} tensors: each has its place",
        "stored": format_bytes(sum(tensor.nbytes for tensor in tensors)),
    }


def _tokenizer_text(model: PublishedModel) -> str:
    """Describes the tokenizer; DataError if it does not fit the model."""
    if not model.folder.exists(TOKENIZER):
        return f"no {TOKENIZER}"
    if not (ends := model.end_ids()):
        return "no eos_token_id ends a text"
    tokenizer, tokens = model.tokenizer(), ", ".join(map(str, ends))
    end = f"{quoted(tokenizer.end_of_document)} (token {tokenizer.eot_id})"
    return f"the tokenizer has {tokenizer.vocab_size:,}, and ends documents with {end}, texts with token {tokens}"


def _check_hashes(folder: ModelFolder, weights: Weights) -> str:
    """Compares each file with the receipt of its export; DataError if one differs."""
    receipt = folder.read_or_none(RECEIPT)
    if receipt is None:
        raise DataError(f"{folder.url_of(RECEIPT)}: missing, so there are no hashes to compare; leave --hashes out")
    try:
        files = json.loads(receipt)["files"]
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{folder.url_of(RECEIPT)}: is no receipt of an export; export it again") from None
    stored = {tensor.file for tensor in weights.tensors.values()}
    if sizes.keys() != stored or not all(type(size) is int and size > 0 for size in sizes.values()):
        raise DataError(f"{folder.url_of(RECEIPT)}: is of other files; export it again")
    for name, entry in files.items():
        found, buffer = hashlib.sha256(), np.empty(1 << 26, np.uint8)
        for start in range(0, entry["bytes"], len(buffer)):
            part = buffer[: entry["bytes"] - start]
            folder.read_into(name, start, part)
            found.update(part)
        if found.hexdigest() != entry["sha256"]:
            raise DataError(f"{folder.url_of(name)}: other bytes than were exported; export it again")
    return f"{format_files(len(files))} with the bytes that were exported"
