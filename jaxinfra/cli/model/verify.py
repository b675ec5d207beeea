"""`python -m launch model verify DIR --key FILE`: compares a signed export with its signature."""

import argparse

from jaxinfra.interop.folder import PREFIX
from jaxinfra.registry import signing


def run(options: argparse.Namespace) -> None:
    """Prints where the model comes from; raises DataError if any file differs from what was signed."""
    lineage = signing.verify(options.source, options.key, option="--key")
    print(f"{options.source.removeprefix(PREFIX)}: every file is as it was signed, by the key of {options.key}")
    model, run = lineage.get("model", {}), lineage.get("run", {})
    for name, value in {
        "checkpoint": f"{model.get('source')}@{model.get('step')}, hash {model.get('checkpoint')}",
        "config": f"{run.get('fingerprint')}, of {run.get('created')}",
        "data": ", ".join(run.get("data_versions") or ()) or run.get("data"),
        "from": (run.get("init") or {}).get("run"),
        "code": (run.get("git") or {}).get("commit"),
    }.items():
        if value:
            print(f"  {name:<11} {value}")
