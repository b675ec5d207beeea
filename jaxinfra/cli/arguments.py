"""The commands, with a summary and the arguments of each.

Imports nothing heavy, so that `--help` and a usage error are answered at once. `cli.main` imports a command's module
when it runs.
"""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxinfra.cli import model_arguments as model
from jaxinfra.cli.numbers import add_int, positive
from jaxinfra.cli.places.arguments import add_place
from jaxinfra.cli.shared_arguments import CHECKPOINT_HELP, CONFIG_HELP, HUB_HELP, RUN_HELP, add_imports, add_processes
from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.place import CLOUDS
from jaxinfra.launchers.restart_policy import DEFAULT_MAX_PER_HOUR
from jaxinfra.parity import PARITY_CONFIGS

ENGINES = ("local", "ray", "dask", "spark")  # what runs the workers of `data prepare`; the first is the default
PLAN_DEFAULTS = {"limit": 12, "pue": 1.1, "save_s": 5.0, "restart_minutes": 10.0}
"""The values of options of `plan` that count only beside another option."""
CHECKPOINT_ACTIONS = {
    "verify": "verify [STEP ...]",
    "diff": "diff A B",
    "prune": "prune",
    "copy-to": "copy-to DIR",
}
"""How each action of `checkpoints` is used."""


class Command(NamedTuple):
    """A command, which the `run(options)` of its module does.

    Besides the arguments, `options` has `argv`, the words of the command line, and `prints`: whether this process
    prints and writes the results, as one does of several that run a command together. A command that has the options of
    `add_processes` joins such others before it runs.
    """

    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str  # for --help
    module: str = ""  # by default the one of the command's name in this package
    check: Callable[[argparse.Namespace], None] = lambda options: None  # before `--processes` starts others


def _add_config(
    parser: argparse.ArgumentParser, config_help: str = CONFIG_HELP, example: str = "train.steps=400"
) -> None:
    parser.add_argument("config", metavar="CONFIG", help=config_help)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=f"overrides, such as {example}")
    add_imports(parser)


def _add_store(parser: argparse.ArgumentParser) -> None:
    places = "folder or URL of a store or of one of its versions, or the file of its recipe or of a run that reads it"
    parser.add_argument("store", metavar="STORE", help=places)
    parser.add_argument("--version", metavar="FINGERPRINT", help="the version or a prefix of it (default: the newest)")


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="where to write (default: here)")


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--changed", action="store_true", help="print only the fields that differ from their defaults")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    what = "go on with a run whose config was changed in a way that changes its numbers; the change is recorded"
    parser.add_argument("--accept-change", action="store_true", help=what)
    what = "compile the steps of this config into the compile cache, and train nothing"
    parser.add_argument("--compile-only", action="store_true", help=what)
    what = "train a run for each value, one after the other; repeatable, for all combinations (docs/transfer.md)"
    parser.add_argument("--sweep", metavar="FIELD=A,B[,...]", action="append", default=[], help=what)
    supervised = parser.add_argument_group("restarts")
    what = "start the run again when it is stopped, killed or loses a process, but not at an error that would recur"
    supervised.add_argument("--supervise", action="store_true", help=what)
    what = "restarts in any hour, after which the supervisor gives up (default %(default)s)"
    add_int(supervised, "--max-restarts-per-hour", 0, default=DEFAULT_MAX_PER_HOUR, metavar="N", help=what)
    what = "go on with the hosts that are there, MIN at least, and with up to MAX when they come back"
    supervised.add_argument("--elastic", type=_host_range, metavar="MIN..MAX", help=what)
    what = "time that a lost host gets to come back before the others go on without it (default %(default)s)"
    add_int(supervised, "--elastic-wait", 1, default=10, metavar="S", help=what)
    add_processes(parser)
    add_place(parser)


def _host_range(text: str) -> tuple[int, int]:
    """Parses MIN..MAX."""
    if not (match := re.fullmatch(r"(\d+)\.\.(\d+)", text)) or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--elastic {text}: expected the fewest and the most hosts; use --elastic 2..4")
    return int(match[1]), int(match[2])


def _add_new(parser: argparse.ArgumentParser) -> None:
    what = "a folder or file of text, JSON lines, Parquet, or of a dataset that save_to_disk wrote"
    parser.add_argument("path", metavar="PATH", help=what)
    parser.add_argument("--name", metavar="NAME", help="of the files and of the run (default: that of PATH)")
    what = "tune this published model, hf:ORG/NAME or hf:DIR, on conversations, pairs of answers, or text"
    parser.add_argument("--from", dest="base", metavar="MODEL", help=what)
    parser.add_argument("--full", action="store_true", help="with --from: train all parameters, not an adapter")


def _add_compile(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--on", metavar="TOPOLOGY", required=True, help=_TOPOLOGIES)
    _add_chips(parser)
    parser.add_argument("--dump", metavar="FILE", help="write the compiled program as text, to a file or URL")


_TOPOLOGIES = "v5p-128 or v5p:4x4x4 (a TPU slice), 2xv5e:2x4 (two slices), h100 (one host), h100:2x8 (hosts x GPUs)"


def _add_chips(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chips", metavar="FILE", help="rows of chips that add to the built-in ones (docs/plan.md)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers as JSON, to a file or URL")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=CONFIG_HELP)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="overrides, such as mesh.tensor=4")
    add_imports(parser)
    what = f"{_TOPOLOGIES}; repeatable, to compare"
    parser.add_argument("--on", metavar="TOPOLOGY", action="append", default=[], help=what)
    _add_chips(parser)
    what = "of a step that does not fit: say so, and look for nothing that does"
    parser.add_argument("--as-is", action="store_true", help=what)
    layout = parser.add_argument_group("the fastest layout")
    what = "try meshes, microbatches and remat, and take the fastest"
    layout.add_argument("--search", action="store_true", help=what)
    add_int(layout, "--limit", 1, help=f"layouts to compile (default {PLAN_DEFAULTS['limit']})")
    add_int(layout, "--jobs", 1, help="layouts to compile at a time (default: half the cores)")
    layout.add_argument("--write", metavar="FILE.py", help="write the config with the layout that --search finds")
    what = "say what another value costs; repeatable"
    layout.add_argument("--why", metavar="FIELD=VALUE", action="append", default=[], help=what)
    cost = parser.add_argument_group("the run as a whole")
    cost.add_argument(
        "--tokens", type=positive("--tokens", "15e12"), metavar="N", help="how many to train on, such as 15e12"
    )
    cost.add_argument(
        "--deadline", type=positive("--deadline", "30d", unit="d"), metavar="DAYS", help="say if it takes longer"
    )
    cost.add_argument("--budget", type=positive("--budget", "2e6"), metavar="DOLLARS", help="say if it costs more")
    what = f"energy of the building over that of the chips (default {PLAN_DEFAULTS['pue']:g})"
    cost.add_argument("--pue", type=positive("--pue", "1.1", least=1.0), metavar="X", help=what)
    what = "one chip is lost in so many chip-hours: for the goodput of spot chips"
    cost.add_argument("--chip-hours-per-loss", type=positive("--chip-hours-per-loss", "50000"), metavar="H", help=what)
    what = "what a host writes to the place of the checkpoints: for the time of a save"
    cost.add_argument("--host-mb-s", type=positive("--host-mb-s", "500"), metavar="MB", help=what)
    what = f"seconds for which a save stalls training (default {PLAN_DEFAULTS['save_s']:g})"
    cost.add_argument("--save-s", type=positive("--save-s", "5"), metavar="S", help=what)
    what = f"from a loss to the next step (default {PLAN_DEFAULTS['restart_minutes']:g})"
    cost.add_argument("--restart-minutes", type=positive("--restart-minutes", "10"), metavar="M", help=what)
    run = parser.add_argument_group("a run and its plan")
    run.add_argument("--check", metavar="RUN", help="say whether the steps of a run are as planned, or what is off")
    run.add_argument("--plan", metavar="FILE", help="of --check: the plan (default: track.plan of the run)")
    run.add_argument("--fit", metavar="RUN", help="write a plan with what the steps of a run take, with --json")
    exam = parser.add_argument_group("published step times")
    exam.add_argument("--exam", metavar="ROWS.csv", help="predict these rows instead of a config, minutes for each")
    exam.add_argument("--only", metavar="ID", nargs="+", default=[], help="of --exam: only these rows")


def _add_data_prepare(parser: argparse.ArgumentParser) -> None:
    config = "a recipe such as configs/data/python_stdlib.py, or a run that names its recipes"
    _add_config(parser, config, "on_overlap=drop (of a recipe)")
    parser.add_argument("--engine", choices=ENGINES, help=f"what runs the workers (default {ENGINES[0]})")
    add_int(parser, "--workers", 1, metavar="N", help="number of workers (default: one per core)")
    follow = parser.add_argument_group("streams")
    follow.add_argument("--follow", action="store_true", help="read a stream (Stdin, Kafka) until it ends")
    follow.add_argument("--until-idle", type=float, metavar="S", help="stop after S seconds without records")
    add_int(follow, "--seal-every", 1, metavar="N", help="also publish a version after every N tokens")


def _add_data_show(parser: argparse.ArgumentParser) -> None:
    _add_store(parser)
    add_int(parser, "--samples", 0, default=2, help="documents to show per split (default %(default)s)")
    add_int(parser, "--chars", 0, default=300, help="characters per document (default %(default)s)")


def _add_data_forget(parser: argparse.ArgumentParser) -> None:
    _add_store(parser)
    what = (
        "train:12, a document; or of the source a location such as a.jsonl:3, a key, or FIELD=VALUE; or @FILE, its text"
    )
    parser.add_argument("key", metavar="KEY", help=what)
    what = "folder or URL of runs, and of exports, to look for what has read it; repeatable (default: runs)"
    parser.add_argument("--runs", metavar="ROOT", action="append", default=[], help=what)
    parser.add_argument("--dry-run", action="store_true", help="list everything, and write nothing")
    what = "also delete the versions that hold the record; no run may be reading them"
    parser.add_argument("--delete-old", action="store_true", help=what)
    what = "also say so in this audit record, a folder or bucket prefix such as runs/audit; without the text or the key"
    parser.add_argument("--audit", metavar="LOCATION", help=what)
    add_imports(parser)


def _add_data_peek(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "a run, or a file whose config() returns only its data")
    add_int(parser, "--step", 1, default=1, help="step, from 1 as in the logs (default %(default)s)")
    add_int(parser, "--rank", 0, default=0, help="process, from 0 (default %(default)s)")
    add_int(parser, "--of", 1, default=1, metavar="PROCESSES", help="number of processes (default 1)")
    parser.add_argument("--global-batch", type=int, metavar="N", help="batch size, if CONFIG returns only data")
    add_int(parser, "--rows", 0, help="number of rows to show (default: all)")
    add_int(parser, "--chars", 0, default=200, help="characters of text per row (default %(default)s)")
    what = "show what is trained on in color, also where the output is no terminal (default: the rest is in brackets)"
    parser.add_argument("--mask", action="store_true", help=what)


def _add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float) -> None:
    most = "maximum number of tokens to decode (default %(default)s)"
    add_int(parser, "--max-tokens", 1, alias="--max-new-tokens", default=max_tokens, help=most)
    greedy = "0 decodes greedily (default %(default)s)"
    parser.add_argument("--temperature", type=float, default=temperature, help=greedy)
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default %(default)s)")
    what = "end a text before this string; repeatable"
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help=what)


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help=CHECKPOINT_HELP)
    what = "the texts to continue; overrides of the mesh, such as mesh.tensor=4, may stand among them"
    parser.add_argument("words", metavar="PROMPT", nargs="*", help=what)
    what = "continue each line of this text file, and write JSON lines"
    parser.add_argument("--prompts", metavar="FILE", help=what)
    add_int(parser, "--batch", 1, default=32, metavar="N", help="texts to decode at once (default %(default)s)")
    what = "continue each prompt also with this adapter of the same base: a run or a folder of PEFT; may be repeated"
    parser.add_argument("--adapter", dest="adapters", metavar="SOURCE", action="append", default=[], help=what)
    _add_sampling(parser, max_tokens=200, temperature=0.8)
    parser.add_argument("--top-k", type=int, default=50, help="sample from the k likeliest; 0 is all (default 50)")
    parser.add_argument("--min-p", type=float, default=0.0, help="least part of the likeliest one's probability")
    add_imports(parser)
    add_processes(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help=f"{CHECKPOINT_HELP}; or published weights, as in hf:DIR")
    what = "overrides of its mesh, such as mesh.tensor=4 (default: all devices)"
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=what)
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: none)")
    what = "chatml, llama3, gemma, or a .jinja file (default: that of the run's data or of the model"
    what += ", or a preset whose tokens the model has)"
    parser.add_argument("--template", metavar="NAME|FILE", help=what)
    _add_sampling(parser, max_tokens=500, temperature=0.7)
    add_imports(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help=CHECKPOINT_HELP)
    example = "mesh.fsdp=4 or train.eval_samples=100"
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=f"overrides of its config, such as {example}")
    parser.add_argument("--json", metavar="FILE", help="also write the metrics as JSON, to a file or URL")
    tasks = parser.add_argument_group("tasks of lm-eval")
    what = "run these tasks in place of the validation samples: names, or YAML files of tasks"
    tasks.add_argument("--tasks", metavar="NAME|FILE[,...]", help=what)
    add_int(tasks, "--limit", 1, metavar="N", help="maximum of samples of each task (default: all)")
    add_int(tasks, "--num-fewshot", 0, metavar="N", help="examples in the prompts (default: what a task says)")
    what = "make conversations of the prompts, by the chat template of the run's data or of the published model"
    tasks.add_argument("--chat", action="store_true", help=what)
    what = "chatml, llama3, gemma, or a .jinja file: another template for --chat"
    tasks.add_argument("--template", metavar="NAME|FILE", help=what)
    tasks.add_argument("--system", metavar="TEXT", help="the system message of --chat, before that of a task")
    add_imports(parser)
    add_processes(parser)


def _add_model_promote(parser: argparse.ArgumentParser) -> None:
    _add_evaluate(parser)
    group = parser.add_argument_group("the registry")
    what = "the model in the registry, and the alias that moves (default champion)"
    group.add_argument("--to", required=True, metavar="models:/NAME[@ALIAS]", help=what)
    what = (
        'what the evaluation must show, such as "eval/loss < champion * 0.99 and eval/loss < 2.5"; a model without a '
    )
    what += "champion is the first one"
    group.add_argument("--if", dest="gate", required=True, metavar="RULES", help=what)
    model.add_registry(group)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"%(prog)s RUN [{' | '.join(CHECKPOINT_ACTIONS.values())}] [options]"
    parser.add_argument("run_dir", metavar="RUN", help=RUN_HELP)
    what = "verify: compare every byte with its hash; diff: compare two steps, or RUN@STEP, leaf by leaf; prune: "
    what += "delete superseded steps and what interrupted saves have left; copy-to: make a run directory of one step"
    parser.add_argument("action", metavar="ACTION", nargs="?", choices=(*CHECKPOINT_ACTIONS,), help=what)
    parser.add_argument("words", metavar="STEP or DIR", nargs="*", help="what the action works on")
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON, to a file or URL")
    parser.add_argument("--all", action="store_true", default=None, help="diff: show all leaves, not the worst 20")
    add_int(parser, "--keep-last", 1, metavar="N", help="prune: keep the newest N (default: what the config says)")
    add_int(parser, "--keep-every", 1, metavar="M", help="prune: also keep the multiples of M")
    add_int(parser, "--keep-best", 1, metavar="K", help="prune: also keep the K best")
    parser.add_argument("--damaged", action="store_true", default=None, help="prune: also delete steps set aside")
    parser.add_argument("--dry-run", action="store_true", default=None, help="prune: only say what would be deleted")
    add_int(parser, "--step", 0, metavar="N", help="copy-to: the checkpoint (default: the newest intact one)")


def _add_hub_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=HUB_HELP)
    what = "also compare the files with the hashes of their export, which reads all of them"
    parser.add_argument("--hashes", action="store_true", help=what)
    model.add_key(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON, to a file or URL")


def _add_hub_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help=f"{CHECKPOINT_HELP}; or published weights, as in hf:DIR")
    parser.add_argument("out", metavar="OUT", help="a new folder or URL; several processes need a disk that all share")
    what = "overrides of its mesh, such as mesh.tensor=4 (default: all devices)"
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=what)
    add_int(parser, "--step", 0, metavar="N", help="the checkpoint (default: the newest intact one)")
    kind = parser.add_mutually_exclusive_group()
    what = "of a run with an adapter: write the adapter alone, as PEFT loads it"
    kind.add_argument("--adapter", action="store_true", help=what)
    what = "of a run with an adapter: write the whole model, with the adapter added to its weights in float32"
    kind.add_argument("--merge", action="store_true", help=what)
    what = "dtype of the tensors (default: that of the parameters, or of the published weights)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=what)
    what = "model_type of the export, such as llama (default: one that can say what the model has)"
    parser.add_argument("--family", metavar="TYPE", help=what)
    what = "maximum size of a file of weights, such as 500MB or 2GiB; one tensor may be longer (default %(default)s)"
    parser.add_argument("--max-shard-size", type=_size_bytes, default="5GB", metavar="SIZE", help=what)
    what = "sign the folder with this private key, a PEM file: its weights, receipt, lineage and list of packages"
    parser.add_argument("--sign", metavar="FILE", help=what)
    add_imports(parser)
    add_processes(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN_HELP)
    page = "file or URL of the page (default: report.html in the run, or comparison.html beside the first of several)"
    parser.add_argument("--output", metavar="PAGE", help=page)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", metavar="A", help=CONFIG_HELP)
    parser.add_argument("right", metavar="B", help=CONFIG_HELP)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    what = "such as optim.peak_lr or tokenizer.vocab_size (default: list the fields)"
    parser.add_argument("field", metavar="FIELD", nargs="?", help=what)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("word", metavar="WORD", nargs="?", default="", help="part of a name, such as qwen3")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    what = "folder or URL of runs (default %(default)s)"
    parser.add_argument("root", metavar="ROOT", nargs="?", default="runs", help=what)
    place = parser.add_argument_group("machines of runs elsewhere (docs/places.md)")
    what = "list what runs have made in a project of Google Cloud"
    place.add_argument("--place", choices=CLOUDS, help=what)
    place.add_argument("--project", metavar="ID", default="", help="the project (default: that of gcloud)")
    place.add_argument("--zone", metavar="ZONE", default="", help="such as us-east5-a (default: all)")
    what = 'dollars of a chip and hour, as JSON or TOML, such as {"v6e": 2.7, "v6e-spot": 1.2}'
    place.add_argument("--prices", metavar="FILE", default="", help=what)


def _add_sync(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help=RUN_HELP)
    what = "where to send, if the run does not say it, such as track.mlflow.uri=http://127.0.0.1:5000"
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=what)


def _add_run_elsewhere(parser: argparse.ArgumentParser) -> None:
    what = "its directory: s3://BUCKET/runs/NAME, gs://BUCKET/runs/NAME, or HOST:/path/to/runs/NAME"
    parser.add_argument("run", metavar="RUN", help=what)
    parser.add_argument("--workdir", metavar="DIR", default="", help="that of the start, if RUN is on a host's disk")


def _add_logs(parser: argparse.ArgumentParser) -> None:
    _add_run_elsewhere(parser)
    add_int(parser, "--rank", 0, default=0, metavar="N", help="the process, which is the host (default %(default)s)")
    add_int(parser, "--lines", 0, metavar="N", help="the last N lines (default: all of the last start)")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")


def _add_stop(parser: argparse.ArgumentParser) -> None:
    _add_run_elsewhere(parser)
    parser.add_argument("--kill", action="store_true", help="at once, without a checkpoint")


def _add_goodput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN_HELP)
    what = "also model the goodput for a mean time between failures, such as 3.1h, 90m or 2d"
    parser.add_argument("--mtbf", type=_duration_s, metavar="TIME", help=what)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON, to a file or URL")


def _duration_s(text: str) -> float:
    """Parses a time such as 3.1h; ConfigError if it is none, or not positive."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    unit = text[-1:] if text[-1:] in units else "s"
    try:
        value = float(text.removesuffix(unit)) * units[unit]
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--mtbf {text}: expected a time such as 3.1h, 90m, 2d or 600s; use --mtbf 3.1h")
    return value


def _size_bytes(text: str) -> int:
    """Parses a size as transformers writes it, such as 5GB; ConfigError if it is none, or zero."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(I?)B)?", text.strip().upper())
    number, unit, binary = found.groups() if found else ("0", "", "")
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))
    if size < 1:
        raise ConfigError(f"--max-shard-size {text}: expected a size such as 500MB or 2GiB; use --max-shard-size 5GB")
    return size


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"{CONFIG_HELP} (default: this folder, no mesh)")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="overrides, such as root=s3://BUCKET/runs")
    add_imports(parser)
    parser.add_argument("--json", metavar="FILE", help="also write what is found as JSON, to a file or URL")
    add_processes(parser)


def _add_coordinate_check(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, example="optim.parametrization=mup optim.base_width=64")
    what = "the widths, at least two (default 64,128,256,512)"
    parser.add_argument("--widths", type=_widths, default=(64, 128, 256, 512), metavar="N,N[,...]", help=what)
    add_int(parser, "--steps", 1, default=10, metavar="N", help="steps at each width (default %(default)s)")


def _widths(text: str) -> tuple[int, ...]:
    """Parses rising widths."""
    words = text.split(",")
    widths = tuple(int(word) for word in words if word.isdecimal() and int(word))
    if len(widths) < max(2, len(words)) or sorted({*widths}) != [*widths]:
        raise ConfigError(f"--widths {text}: expected rising numbers; use --widths 64,128,256,512")
    return widths


def _add_parity(parser: argparse.ArgumentParser) -> None:
    what = f"models (default {', '.join(PARITY_CONFIGS)}) and overrides"
    parser.add_argument("words", metavar="CONFIG or KEY=VALUE", nargs="*", help=what)
    add_int(parser, "--jobs", 1, default=os.cpu_count(), help="number of parallel processes (default: one per core)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="insert the tables into this Markdown page")
    add_processes(parser)


COMMANDS = {
    "train": Command(_add_train, "train CONFIG, or resume from its last checkpoint (the default command)"),
    "new": Command(_add_new, "write the recipe and the config to train on your own text"),
    "init": Command(_add_init, "write the quickstart's config and data recipe into a folder"),
    "explain": Command(_add_explain, "explain a config field, or list the fields"),
    "show": Command(_add_show, "print the resolved config and its statistics; uses no devices"),
    "plan": Command(_add_plan, "say how long a step takes on hardware that is absent, and what limits it"),
    "doctor": Command(_add_doctor, "check hosts, packages, limits, clocks, disks and links of a run before its start"),
    "compile": Command(_add_compile, "compile the train step for hardware that is absent: memory, cycles, collectives"),
    "data prepare": Command(_add_data_prepare, "tokenize a corpus into a store, in parallel; resumes if interrupted"),
    "data show": Command(_add_data_show, "print the counts, lengths, versions and samples of a store"),
    "data verify": Command(_add_store, "read a whole store and check the hash of every block"),
    "data forget": Command(_add_data_forget, "make a version of a store without a record, and list what has read it"),
    "data peek": Command(_add_data_peek, "print the batch of one step and process"),
    "sample": Command(_add_sample, "continue a text with a checkpoint of a run, the newest by default"),
    "chat": Command(_add_chat, "talk with a model, line by line, by its chat template"),
    "evaluate": Command(_add_evaluate, "evaluate a checkpoint of a run on validation samples or tasks, on any mesh"),
    "hub check": Command(_add_hub_check, "say what published weights hold, and whether each tensor has its place"),
    "hub export": Command(_add_hub_export, "write a checkpoint as a folder that transformers and other engines load"),
    "models": Command(_add_models, "list the published models that a config can name"),
    "model promote": Command(_add_model_promote, "evaluate a run, and put it in use in a registry if it passes a gate"),
    "model rollback": Command(model.add_rollback, "put the version in use that was before"),
    "model verify": Command(model.add_verify, "compare every byte of a signed export, and say where it comes from"),
    "model serve": Command(model.add_serve, "start an engine on a run, which answers as OpenAI's API does"),
    "model stablehlo": Command(model.add_stablehlo, "write a model as a function that JAX runs without jaxinfra"),
    "model card": Command(model.add_card, "write the model card of a run: data, computation, energy, evaluation"),
    "model audit": Command(model.add_audit, "list what was trained, promoted and exported, and check the record"),
    "model show": Command(model.add_model, "list the versions of a model in a registry, and which is in use"),
    "runs": Command(_add_runs, "list runs with their state, progress and results"),
    "runs sync": Command(
        _add_sync, "send MLflow what it lacks of a run: rows of metrics, and how it ended", "jaxinfra.cli.sync"
    ),
    "runs logs": Command(_add_logs, "show what a rank of a run elsewhere has printed", "jaxinfra.cli.places.logs"),
    "runs stop": Command(_add_stop, "end a run elsewhere, and delete what was made for it", "jaxinfra.cli.places.stop"),
    "runs resume": Command(
        _add_run_elsewhere, "watch a run elsewhere, and go on with it if it does not live", "jaxinfra.cli.places.resume"
    ),
    "goodput": Command(_add_goodput, "say where the time of runs went: steps, restarts, saves, waits, steps redone"),
    "checkpoints": Command(_add_checkpoints, "list, verify, compare, prune or copy the checkpoints of a run"),
    "report": Command(_add_report, "write the page of a run in any state, or one that compares several"),
    "diff": Command(_add_diff, "compare two configs or run records"),
    "coordinate-check": Command(
        _add_coordinate_check,
        "train at several widths for a few steps, and say which activations grow (muP)",
        "jaxinfra.cli.coordinate_check",
    ),
    "parity": Command(_add_parity, "compare loss and gradients on each mesh to those of one device, and in processes"),
}
