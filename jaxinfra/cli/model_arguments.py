"""The arguments of the commands on models. Imports nothing heavy."""

import argparse

from jaxinfra.cli.numbers import add_int
from jaxinfra.cli.shared_arguments import CHECKPOINT_HELP, RUN_HELP


def add_registry(group: argparse._ActionsContainer) -> None:
    """Adds the option that names a registry."""
    what = "the MLflow server (default: track.mlflow.uri of the run, or the variable MLFLOW_TRACKING_URI)"
    group.add_argument("--registry", metavar="URL", help=what)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of commands on a registered model."""
    parser.add_argument("target", metavar="models:/NAME[@ALIAS]", help="the model in the registry (alias: champion)")
    add_registry(parser)


def add_rollback(parser: argparse.ArgumentParser) -> None:
    """Adds those of `model rollback`."""
    add_model(parser)
    what = "leave this version only: the same command again does not go back further"
    parser.add_argument("--from", dest="leaving", metavar="VERSION", help=what)


def add_key(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Adds the option that names the key of a signature."""
    what = "verify the signature of the folder with this public key, which reads all files"
    parser.add_argument("--key", metavar="FILE", required=required, help=what)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Adds those of `model verify`."""
    parser.add_argument("source", metavar="DIR", help="a folder that hub export --sign has written")
    add_key(parser, required=True)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Adds those of `model serve`."""
    parser.add_argument("run_dir", metavar="RUN", help=f"{CHECKPOINT_HELP}; or the folder of an export, as in hf:DIR")
    parser.add_argument("--engine", default="transformers", metavar="PROGRAM", help="the program (default %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="the address that answers (default %(default)s)")
    add_int(parser, "--port", 1, default=8000, metavar="N", help="its port (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="keep the export in this new folder")
    parser.add_argument("--merge", action="store_true", help="of a run with an adapter: serve the model with it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the export")
    what = "the text that the engine and sample both continue (default %(default)s)"
    parser.add_argument("--prompt", default="The", metavar="TEXT", help=what)
    what = "seconds to wait until the engine answers (default %(default)s)"
    add_int(parser, "--timeout", 1, default=600, metavar="S", help=what)


def add_stablehlo(parser: argparse.ArgumentParser) -> None:
    """Adds those of `model stablehlo`."""
    parser.add_argument("run_dir", metavar="RUN", help=f"{CHECKPOINT_HELP}; or published weights, as in hf:DIR")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    add_int(parser, "--batch", 1, default=1, metavar="N", help="rows (default %(default)s)")
    add_int(parser, "--length", 1, default=128, metavar="N", help="tokens of a row (default %(default)s)")
    what = "what the function runs on, of cpu, cuda and tpu (default %(default)s)"
    parser.add_argument("--platforms", default="cpu,cuda,tpu", metavar="NAME[,...]", help=what)


def add_card(parser: argparse.ArgumentParser) -> None:
    """Adds those of `model card`."""
    parser.add_argument("run_dir", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--output", metavar="FILE", help="write the card there, such as out/story/README.md")
    parser.add_argument("--license", metavar="ID", help="of the model, as Hugging Face names it, such as apache-2.0")
    parser.add_argument("--data-licenses", metavar="TEXT", help="what the card says about the licenses of the data")


def add_audit(parser: argparse.ArgumentParser) -> None:
    """Adds those of `model audit`."""
    parser.add_argument("location", metavar="LOCATION", help="what track.audit of the runs names, such as runs/audit")
