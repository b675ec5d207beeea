"""The command line of jaxinfra.

Parses, picks the command, prints one line for an error that is meant for the user. Everything heavy is imported
by the command that needs it, after the devices are chosen: `--help` answers at once.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from jaxinfra.errors import ConfigError, JaxinfraError

COMMANDS = {
    "train": "train CONFIG, or go on from its last checkpoint (the default: the word may be left out)",
    "show": "print the resolved config and every number that follows from it; no device is touched",
    "prepare": "make the data that CONFIG trains on",
    "sample": "continue a text with the newest checkpoint of a run, streamed as it is decoded",
    "diff": "compare two configs or run records",
    "bench": "time the framework against hand-written code",
}
EPILOG = """\
examples:
  python -m launch configs/quickstart.py
  python -m launch configs/quickstart.py train.steps=400 optim.peak_lr=3e-4
  python -m launch configs/quickstart.py mesh.fsdp=4 mesh.tensor=2 --devices cpu:8
  python -m launch show configs/llama3_8b.py mesh.fsdp=64
  python -m launch sample runs/quickstart "def main("
  python -m launch runs/quickstart/run.json

exit codes: 0 done, 75 stopped and saved (start again), 78 data damaged, 79 no good checkpoint,
81 config or layout wrong, 82 storage unavailable.
"""


def parser() -> argparse.ArgumentParser:
    """The options that all commands share; each command adds its own."""
    top = argparse.ArgumentParser(
        prog="python -m launch",
        description="Train JAX models on any mesh from one typed config.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared.add_argument(
        "--devices", metavar="PLATFORM[:N]", help="cpu, gpu or tpu; cpu:8 emulates eight devices on this machine"
    )
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary, parents=[shared])
        importlib.import_module(f"launch.{name}").arguments(sub)
    return top


def choose_devices(devices: str | None) -> None:
    """Tells JAX which platform to use, and how many CPU devices to emulate; before JAX is imported.

    Raises:
        ConfigError: it is not `cpu`, `cpu:N`, `gpu` or `tpu`.
    """
    if devices is None:
        return
    platform, _, count = devices.partition(":")
    known = platform in ("cpu", "gpu", "tpu") and (not count or platform == "cpu")
    if not known or (count and (not count.isdecimal() or int(count) < 1)):
        raise ConfigError(f"--devices {devices}: expected cpu, cpu:N, gpu or tpu; use --devices cpu:8")
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(platform, platform)
    if count:
        os.environ["JAX_NUM_CPU_DEVICES"] = count


def keep_compiled() -> None:
    """Names a folder for compiled programs, unless the environment does: the next start finds them there."""
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxinfra", "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if argv and argv[0] not in COMMANDS and not argv[0].startswith("-"):
        argv.insert(0, "train")
    options = parser().parse_intermixed_args(argv) if argv and argv[0] in ("diff",) else _parse(argv)
    try:
        choose_devices(options.devices)
        keep_compiled()
        return importlib.import_module(f"launch.{options.command}").run(options, argv)
    except JaxinfraError as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _parse(argv: list[str]) -> argparse.Namespace:
    return parser().parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
