"""`python -m launch prepare CONFIG`: make the token store that a config trains on."""

import argparse
from collections.abc import Sequence

from launch import config_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    config_argument.add(parser)


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prepares the data and says what it holds."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from jaxinfra.config import validate
    from jaxinfra.data.prepare import prepare

    run = config_argument.loaded(options).run
    validate(run)
    data = run.data
    columns = (TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        manifest = prepare(data.corpus, data.store, progress)
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    baselines = manifest.baselines
    print(f"store      {data.store}, fingerprint {manifest.fingerprint}")
    print(f"tokenizer  {manifest.vocab_size} words, {manifest.bytes_per_token('train'):.2f} bytes a token")
    print(f"train      {train.documents} documents, {train.tokens} tokens, {train.bytes} bytes")
    print(f"held out   {heldout.documents} documents, {heldout.tokens} tokens, {heldout.bytes} bytes")
    if baselines.xz_bits_per_byte is not None and baselines.ngram_bits_per_byte is not None:
        print(
            f"to beat    {baselines.xz_bits_per_byte:.3f} bits a byte by xz -6, "
            f"{baselines.ngram_bits_per_byte:.3f} by a 5-gram over tokens"
        )
    return 0
