"""The command line of jaxinfra.

Parses, picks the command, prints one line for an error that is meant for the user. Everything heavy is imported
by the command that needs it, after the devices are chosen: `--help` answers at once.
"""

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from jaxinfra.cli.arguments import ARGUMENTS, COMMANDS
from jaxinfra.command import COMMAND
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.runtime import emulation, platforms

EPILOG = f"""\
examples:
  {COMMAND} configs/quickstart.py
  {COMMAND} configs/quickstart.py train.steps=400 optim.peak_lr=3e-4
  {COMMAND} configs/quickstart.py mesh.fsdp=4 mesh.tensor=2 --devices cpu:8
  {COMMAND} show configs/llama3_8b.py mesh.fsdp=64
  {COMMAND} compile configs/llama3_8b.py --on v5p:4x4x4
  {COMMAND} data prepare configs/data/python_stdlib.py
  {COMMAND} data peek configs/quickstart.py --step 1234 --rank 3 --of 8
  {COMMAND} sample runs/quickstart "def main("
  {COMMAND} runs/quickstart/run.json

exit codes: 0 done, 75 stopped and saved (start again), 78 data damaged, 79 no good checkpoint,
80 no longer a number, 81 config or layout wrong, 82 storage unavailable.
"""


def help_parser() -> argparse.ArgumentParser:
    """Builds the help that `--help` prints when no command is named."""
    about, raw = "Train JAX models on any mesh from one typed config.", argparse.RawDescriptionHelpFormatter
    usage = f"{COMMAND} [COMMAND] ..."
    top = argparse.ArgumentParser(prog=COMMAND, usage=usage, description=about, epilog=EPILOG, formatter_class=raw)
    listed = top.add_argument_group("commands (each has its own --help)")
    for name, summary in COMMANDS.items():
        listed.add_argument(name, help=summary, nargs="?")
    return top


def command_parser(command: str) -> argparse.ArgumentParser:
    """The arguments of one command, with those that all share."""
    parser = argparse.ArgumentParser(prog=f"{COMMAND} {command}", description=COMMANDS[command])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    known = "cpu, gpu or tpu; cpu:8 emulates eight devices on this machine"
    parser.add_argument("--devices", metavar="PLATFORM[:N]", help=known)
    ARGUMENTS[command](parser)
    return parser


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line; options may stand anywhere after the command.

    ConfigError where the first word is neither a command nor a config; SystemExit for help, or a command used wrongly.
    """
    if not argv or argv[0] in ("-h", "--help"):
        help_parser().print_help(sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    length = next((n for n in (2, 1) if " ".join(argv[:n]) in COMMANDS), 0)
    if not length:
        _require_whole(argv)
    command = " ".join(argv[:length]) or "train"
    options = command_parser(command).parse_intermixed_args(argv[length:])
    if not length:
        _require_config_like(options.config)
    return argparse.Namespace(command=command, **vars(options))


def _require_whole(argv: Sequence[str]) -> None:
    """Refuses the first word of commands of two words without the second."""
    seconds = [command.split()[1] for command in COMMANDS if command.startswith(f"{argv[0]} ")]
    if not seconds or os.path.exists(argv[0]):
        return
    if argv[1:2] in (["-h"], ["--help"]):
        help_parser().print_help()
        raise SystemExit(0)
    given = f"{argv[0]} {argv[1]}: no such command" if argv[1:] else f"{argv[0]}: is not all of a command"
    raise ConfigError(f"{given}; use {argv[0]} {', '.join(seconds[:-1])} or {seconds[-1]}")


def _require_config_like(word: str) -> None:
    """Refuses a word that may be meant as a command: no path, no suffix and no file of that name."""
    if os.path.exists(word) or os.path.basename(word) != word or os.path.splitext(word)[1]:
        return
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "a config is a file, such as configs/quickstart.py"
    raise ConfigError(f"{word}: no such command and no such config; the commands are {', '.join(COMMANDS)}; {hint}")


def choose_devices(devices: str | None) -> None:
    """Tells JAX which platform to use, and how many CPU devices to emulate; before JAX is imported.

    Without `devices` and JAX_PLATFORMS, JAX tries the platforms that have hardware here. ConfigError where it is not
    `cpu`, `cpu:N`, `gpu` or `tpu`.
    """
    if devices is None:
        if "JAX_PLATFORMS" not in os.environ and (found := platforms.available_platforms()):
            os.environ["JAX_PLATFORMS"] = found
        return
    platform, _, count = devices.partition(":")
    known = platform in ("cpu", "gpu", "tpu") and (not count or platform == "cpu")
    if not known or (count and (not count.isdecimal() or int(count) < 1)):
        raise ConfigError(f"--devices {devices}: expected cpu, cpu:N, gpu or tpu; use --devices cpu:8")
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(platform, platform)
    if count:
        os.environ |= emulation.emulation_env(int(count))


def set_compilation_cache() -> None:
    """Names a folder for compiled programs, unless the environment does: the next start finds them there."""
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxinfra", "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    try:
        options = parse_command_line(argv)
        choose_devices(options.devices)
        set_compilation_cache()
        module = importlib.import_module(f"jaxinfra.cli.{options.command.replace(' ', '.')}")
        return module.run(options, argv)
    except JaxinfraError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
