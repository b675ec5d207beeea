"""Cuts the tail of a text off for validation, after it was tokenized.

A record is one document, or several that stay together, such as the two answers of a preference pair.

Shape suffixes: N tokens and D documents of a part, 2 halves of a 128-bit hash, P permutations of a MinHash signature.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare.documents.dedup import Dedup, Signer
from jaxinfra.prepare.documents.shingles import hash128
from jaxinfra.prepare.parts import Arrays, PartSplits, open_part
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import Tail

_DECODE_TOKENS = 16  # tokens to decode before a cut, to see whether it splits a character


def split_tail(splits: PartSplits, corpus: Corpus, config: Tail, tokenizer: Tokenizer) -> PartSplits:
    """Splits the tail off parts that hold training data only; DataError if a part is damaged.

    The document in which the tail begins is split between two tokens if it is plain text; other records stay whole.
    """
    if not splits.num_parts:  # nothing to split; `select_documents`, which the caller calls next, raises the error
        return splits
    per_record = corpus.format.documents_per_record
    bytes_of_parts = [bytes_D for (bytes_D,) in splits.read("train", "bytes_D")]
    document_bytes = np.concatenate(bytes_of_parts)
    document_ends = np.cumsum(document_bytes)
    part_ends = np.cumsum([len(bytes_D) for bytes_D in bytes_of_parts])  # in documents
    # For documents of 40, 40 and 20 bytes and fraction=0.3, the tail begins after 70 bytes: 30 bytes into document 1.
    train_bytes = int(document_bytes.sum() * (1 - config.fraction))
    document = int(np.searchsorted(document_ends, train_bytes, side="right"))
    part_index = min(int(np.searchsorted(part_ends, document, side="right")), len(part_ends) - 1)
    with open_part(splits.folder, part_index) as part:
        arrays = {key.removeprefix("train."): part[key] for key in part if key.startswith("train.")}
    num_before = int(part_ends[part_index]) - len(bytes_of_parts[part_index])  # documents of the parts before
    cut = document - num_before  # documents of this part that are for training
    if document < len(document_bytes) and per_record == 1 and not corpus.format.has_loss_mask:
        num_bytes = int(document_bytes[document])
        document_start = int(document_ends[document]) - num_bytes  # in bytes, like `train_bytes`
        fraction = (train_bytes - document_start) / num_bytes
        if halved := _split_document(arrays, cut, fraction, tokenizer, corpus.dedup):
            arrays, cut = halved, cut + 1
    cut = cut // per_record * per_record  # before the first document of its record
    if num_before + cut == 0:
        cut = per_record  # the first record is for training
    cut_token = int(arrays["lengths_D"][:cut].sum())
    cuts = {name: cut_token if name.endswith("_N") else cut for name in arrays}
    train = {name: values[: cuts[name]] for name, values in arrays.items()}
    validation = {name: values[cuts[name] :] for name, values in arrays.items()}
    later_parts = range(part_index + 1, splits.num_parts)
    # The parts of each split in order: the number of a whole part, or the arrays of the part that is cut.
    return replace(splits, tail={"train": [*range(part_index), train], "validation": [validation, *later_parts]})


def _split_document(
    arrays: Arrays, document: int, fraction: float, tokenizer: Tokenizer, dedup: Dedup | None
) -> Arrays | None:
    """Splits a document at the first token after `fraction` that begins a character; None without such a token."""
    start = int(arrays["lengths_D"][:document].sum())
    tokens_N = arrays["tokens_N"][start : start + int(arrays["lengths_D"][document])]
    ids, eot_id = tokens_N[:-1].tolist(), tokens_N[-1]
    cut = int(len(ids) * fraction)
    while 0 < cut < len(ids) and tokenizer.decode(ids[max(0, cut - _DECODE_TOKENS) : cut]).endswith("\ufffd"):
        cut += 1
    if not 0 < cut < len(ids):
        return None
    halves = np.append(tokens_N[:cut], eot_id), tokens_N[cut:]
    texts = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])
    first_bytes = len(texts[0].encode())
    values_of_halves: dict[str, Any] = {
        "lengths_D": [len(half_N) for half_N in halves],
        "bytes_D": [first_bytes, int(arrays["bytes_D"][document]) - first_bytes],
        "digest_D2": [hash128(half_N.tobytes()) for half_N in halves],
    }
    if dedup is not None:
        signer = Signer(dedup)
        (first_exact, first_near), (second_exact, second_near) = signer(texts[0]), signer(texts[1])
        values_of_halves |= {"exact_D2": [first_exact, second_exact], "near_DP": [first_near, second_near]}
    split = {"tokens_N": np.insert(arrays["tokens_N"], start + cut, eot_id)}
    for name, values in arrays.items():
        if name != "tokens_N":
            both = values_of_halves.get(name, values[[document, document]])  # both halves have the same location
            split[name] = np.concatenate([values[:document], np.array(both, values.dtype), values[document + 1 :]])
    return split
