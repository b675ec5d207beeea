"""Parses the command line, runs the command, and prints one line for an error.

Only the command's own module imports heavy packages, after the devices are chosen, so `--help` is fast.
"""

import argparse
import difflib
import errno
import gc
import importlib
import io
import os
import platform
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any, NoReturn, override

from jaxinfra import __version__, failpoints
from jaxinfra.cli.arguments import COMMANDS, Command
from jaxinfra.cli.places.arguments import is_elsewhere, sbatch_word
from jaxinfra.command import COMMAND, command_line
from jaxinfra.errors import ConfigError, JaxinfraError, Preempted, StorageError, quoted
from jaxinfra.launchers.restart_policy import RULES
from jaxinfra.machine import emulation, platforms
from jaxinfra.machine.compile_cache import cache_environment
from jaxinfra.machine.host_memory import keep_freed_memory
from jaxinfra.plugins import load_plugin, plugins
from jaxinfra.processes import signal_router
from jaxinfra.processes.discovery import find_processes
from jaxinfra.processes.door import SECRET
from jaxinfra.processes.join import join
from jaxinfra.processes.peers import current_peers
from jaxinfra.processes.requests import RunSignals
from jaxinfra.processes.run_secret import run_secret
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.user_code import ending_of

_MEANINGS = ", ".join(f"{code} {rule.meaning}" for code, rule in RULES.items())
_AGAIN = ", ".join(str(code) for code, rule in RULES.items() if rule.restarts)
EXIT_CODES = textwrap.fill(
    f"exit codes: {_MEANINGS}. After {_AGAIN} run the same command again, as --supervise does. docs/exit-codes.md says "
    "what to do.",
    width=116,
)
EPILOG = f"""\
examples:
  {COMMAND} configs/quickstart.py
  {COMMAND} configs/quickstart.py train.steps=800 optim.peak_lr=3e-3
  {COMMAND} configs/quickstart.py mesh.fsdp=4 mesh.tensor=2 --devices cpu:8
  {COMMAND} show configs/llama3_8b.py mesh.fsdp=64
  {COMMAND} compile configs/llama3_8b.py --on v5p:4x4x4
  {COMMAND} doctor configs/llama3_8b.py
  {COMMAND} data prepare configs/data/python_stdlib.py
  {COMMAND} data peek configs/quickstart.py --step 1234 --rank 3 --of 8
  {COMMAND} sample runs/quickstart "def main("
  {COMMAND} evaluate runs/quickstart mesh.fsdp=4 --devices cpu:4
  {COMMAND} checkpoints runs/quickstart verify
  {COMMAND} configs/quickstart.py --processes 2 --devices cpu:4
  {COMMAND} configs/story.py --supervise
  {COMMAND} configs/story.py root=s3://BUCKET/runs
  {COMMAND} configs/story.py root=gs://BUCKET/runs --place tpu-vm --create v6e-16 --spot --zone us-east5-b

{EXIT_CODES}
"""


class _Parser(argparse.ArgumentParser):
    """Repeats words of the command line in errors without the credentials in them."""

    @override
    def error(self, message: str) -> NoReturn:
        super().error(mask_credentials(message))


def help_parser() -> argparse.ArgumentParser:
    """Builds the parser of `--help` without a command."""
    about, raw = "Train JAX models on any mesh from one typed config.", argparse.RawDescriptionHelpFormatter
    usage = f"{COMMAND} [COMMAND] ..."
    parser = argparse.ArgumentParser(prog=COMMAND, usage=usage, description=about, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="store_true", help="print the versions of jaxinfra, Python and JAX")
    group = parser.add_argument_group("commands (each has its own --help)")
    for name, each in COMMANDS.items():
        group.add_argument(name, help=each.summary, nargs="?")
    return parser


def command_parser(command: str) -> argparse.ArgumentParser:
    """Builds the parser of one command, with the options that all commands share."""
    parser = _Parser(prog=f"{COMMAND} {command}", description=COMMANDS[command].summary)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    devices_help = "cpu, gpu or tpu; cpu:8 emulates eight devices on this machine"
    parser.add_argument("--devices", metavar="PLATFORM[:N]", help=devices_help)
    COMMANDS[command].add_arguments(parser)
    return parser


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line; options may stand anywhere after the command.

    Raises ConfigError if the first word is neither a command nor a config, or if an override has dashes, and SystemExit
    for help and usage errors.
    """
    if argv[:1] == ["--version"]:
        print(f"jaxinfra {__version__}, Python {platform.python_version()}, JAX {version('jax')}")
        raise SystemExit(0)
    if not argv or argv[0] in ("-h", "--help"):
        _add_plugins(argv)
        help_parser().print_help(sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    # A word that may be the name of a command is no option, and has neither a folder nor a suffix.
    is_name = not argv[0].startswith("-") and os.path.splitext(os.path.basename(argv[0])) == (argv[0], "")
    if is_name and not _command_words(argv):
        _add_plugins(argv)
    num_words = _command_words(argv)  # 0: CONFIG, which means train
    if not num_words:
        _check_subcommand(argv)
        if is_name:
            _check_config_word(argv[0])
    command = " ".join(argv[:num_words]) or "train"
    parser = command_parser(command)
    for option, word, after in zip(argv, argv[1:], [*argv[2:], ""], strict=False):
        if option == "--sbatch" and word.startswith("-"):  # to argparse an option of ours
            raise ConfigError(f"--sbatch {word}: needs a = before the option; use {sbatch_word(word, _value(after))}")
    options, unknown = parser.parse_known_intermixed_args(argv[num_words:])
    if unknown:
        if "overrides" in options:
            _check_dashes(command, unknown, argv, vars(options))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from jaxinfra.cli import run_names  # imports configs

    options.command, options.argv = command, [*argv]
    options.notes = run_names.resolve(options)
    return options


def _command_words(argv: Sequence[str]) -> int:
    """Returns how many words at the begin of a command line name a command."""
    return next((n for n in (2, 1) if " ".join(argv[:n]) in COMMANDS), 0)


def _add_plugins(argv: Sequence[str]) -> None:
    """Adds the commands of other packages to `COMMANDS`; raises ConfigError if `argv` has one that cannot be used."""
    for name in sorted(plugins("commands").keys() - COMMANDS):
        try:
            COMMANDS[name] = load_plugin("commands", name, Command)
        except ConfigError as error:
            if " ".join([*argv, ""]).startswith(f"{name} "):
                raise
            print(f"warning: {error}", file=sys.stderr)


def _check_subcommand(argv: Sequence[str]) -> None:
    """Raises ConfigError for the first word of two-word commands with a wrong or missing second word."""
    subcommands = [command.split()[1] for command in COMMANDS if command.startswith(f"{argv[0]} ")]
    if not subcommands or os.path.exists(argv[0]):
        return
    if argv[1:2] in (["-h"], ["--help"]):
        help_parser().print_help()
        raise SystemExit(0)
    wrong = f"{argv[0]} {argv[1]}: no such command" if argv[1:] else f"{argv[0]}: needs a subcommand"
    raise ConfigError(f"{wrong}; use {argv[0]} {', '.join(subcommands[:-1])} or {subcommands[-1]}")


def _value(word: str) -> str:
    """Returns the word after an option if it may be its value, else ""."""
    return "" if "=" in word or word.startswith("-") else word


def _check_dashes(command: str, unknown: Sequence[str], argv: Sequence[str], known: Mapping[str, Any]) -> None:
    """Raises ConfigError for an unknown option that is meant as an override, or for sbatch: --lr 3e-3, --qos=high.

    `known` are the options of the command with their values.
    """
    from jaxinfra.config.aliases import override_of_alias  # imports pathlib, inspect and more
    from jaxinfra.run import Run

    for_sbatch = known.get("place") == "slurm"
    word = next((each for each in unknown if each.startswith("-" if for_sbatch else "--")), "")
    name, equals, value = word.removeprefix("--").partition("=")
    if word and not equals:
        value = _value("".join(argv[argv.index(word) + 1 :][:1]))
    override = None if command == "data prepare" else override_of_alias(name, value)  # aliases are those of a run
    similar = difflib.get_close_matches(name, [each.replace("_", "-") for each in known], n=1, cutoff=0.85)
    if for_sbatch and similar:
        raise ConfigError(f"{word}: no such option; did you mean --{similar[0]}?")
    if for_sbatch and override is None and "." not in name and name not in Run.__dataclass_fields__:
        raise ConfigError(f"{word}: no such option; use {sbatch_word(word, '' if equals else value)}")
    if override is None and not equals and "." not in name:
        return
    raise ConfigError(f"{word}: no such option; overrides have no dashes: {override or f'{name}={value or "VALUE"}'}")


def _check_config_word(word: str) -> None:
    """Raises ConfigError for a name that is no config either: it may be a misspelled command."""
    if os.path.exists(word):
        return
    similar = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {similar[0]}?" if similar else "a config is a file, such as configs/quickstart.py"
    if word in ("bench", "faults"):
        hint = "it needs the tests, so it is a command of python -m launch alone"
    raise ConfigError(f"{word}: no such command or config; {hint}; the commands are {', '.join(COMMANDS)}")


def choose_devices(devices: str | None) -> None:
    """Sets the platform, and the number of CPU devices to emulate, before JAX is imported.

    `devices` is `cpu`, `cpu:N`, `gpu` or `tpu`. Without it and without JAX_PLATFORMS, JAX tries the platforms whose
    hardware is present.
    """
    if devices is None:
        if "JAX_PLATFORMS" not in os.environ and (available := platforms.available_platforms()):
            os.environ["JAX_PLATFORMS"] = available
        return
    kind, _, count = devices.partition(":")
    valid_count = not count or (kind == "cpu" and count.isdecimal() and int(count) >= 1)
    if kind not in ("cpu", "gpu", "tpu") or not valid_count:
        raise ConfigError(f"--devices {devices}: expected cpu, cpu:N, gpu or tpu; use --devices cpu:8")
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(kind, kind)
    if count:
        os.environ |= emulation.emulation_env(int(count))


@contextmanager
def _all_processes(options: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes of a command that several run together; a signal may end it at any time.

    At the end it tells them how this one leaves.
    """
    with RunSignals(interrupts=options.command == "train"), ExitStack() as joined:
        processes = find_processes(
            os.environ, coordinator=options.coordinator, process_id=options.process_id, of=options.of
        )
        if processes is not None:
            secret, join_s, silence_s = os.environ.get(SECRET), options.join_timeout, options.heartbeat_timeout
            has_run = options.command == "train" or not getattr(options, "run_dir", "hf:").startswith("hf:")
            if not secret and has_run:
                location = importlib.import_module("jaxinfra.cli.processes").ask_location(options.argv)
                secret = run_secret(location) if location else secret
            joined.enter_context(join(processes, join_s=join_s, silence_s=silence_s, secret=secret))
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal shows "?" for other characters
    try:
        exit_code = run_command(argv)
        sys.stdout.flush()
        if current_peers().is_cut_off or (current_peers().count > 1 and exit_code not in (0, Preempted.exit_code)):
            current_peers().exit(exit_code)  # JAX would wait for the other processes
    except BrokenPipeError:  # the reader of our output has ended, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 1  # as rich does
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: a file or the output cannot be written: {error.strerror}; free some space", file=sys.stderr)
        return StorageError.exit_code
    return exit_code


def _collect_garbage_again() -> None:
    """Ends what `entry.main` has begun; what is imported by now stays, and is not looked at again."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def run_command(argv: Sequence[str]) -> int:
    """Runs one command; prints its error on one line and returns the exit code of its kind."""
    try:
        options = parse_command_line(argv)
        failpoints.check_environment(os.environ)
        leaves = options.command == "train" and is_elsewhere(options)
        trains = options.command == "train" and not leaves
        joins = "processes" in options and not leaves
        signal_router.leave_start(interrupts=not trains, all_signals=not joins)
        choose_devices(options.devices)
        os.environ |= cache_environment(os.environ)
        if joins and (options.processes > 1 or (trains and options.supervise)):
            supervising = importlib.import_module("jaxinfra.cli.processes")
            _collect_garbage_again()
            return supervising.run(options)
        if joins and platforms.default_platform() == "cpu" and os.environ.get("JAX_NUM_CPU_DEVICES", "1") == "1":
            keep_freed_memory()  # of the one device
        with _all_processes(options) if joins else nullcontext():
            options.prints = current_peers().index == 0
            if options.prints and options.notes:
                print(*options.notes, sep="\n", file=sys.stderr)
            name = COMMANDS[options.command].module or f"jaxinfra.cli.{options.command.replace(' ', '.')}"
            module = importlib.import_module("jaxinfra.cli.places.start" if leaves else name)
            if "jax" in sys.modules:  # the command compiles, maybe
                importlib.import_module("jaxinfra.machine.checked_programs").use_cache()
            _collect_garbage_again()
            return module.run(options) or 0
    except Preempted as error:  # asked for: no error
        print(mask_credentials(str(error)), file=sys.stderr)
        return error.exit_code
    except Exception as error:
        code, line = ending_of(error)
        is_for_users = isinstance(error, JaxinfraError)
        if code == 1 and not is_for_users:  # a bug
            raise
        if "--debug" in argv:
            print(mask_credentials(traceback.format_exc()), end="", file=sys.stderr)
        if missing := re.search("; add (--import .+)", line):
            line += f": {command_line(*argv)} {missing[1]}"
        if meant := re.fullmatch(r"(.+?): .*; did you mean (.+)\?", line):
            wrong, right = meant.groups()  # a word, or the value of an override, such as init=runs/story
            words = [word.removesuffix(wrong) + right if f"={word}".endswith(f"={wrong}") else word for word in argv]
            line += f" use {command_line(*words)}" if words != argv else ""
        notes = getattr(error, "__notes__", ()) if is_for_users else ()
        failures_to_close = (note for note in notes if "JAX_TRACEBACK_FILTERING" not in note)  # JAX adds that one
        line = " ".join("; then ".join((line, *failures_to_close)).split())
        print(f"error: {quoted(mask_credentials(line), 10_000)}", file=sys.stderr)  # nothing that a terminal acts on
        return code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
