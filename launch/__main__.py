"""Runs the command line: in a clone, `python -m launch CONFIG` is `jaxinfra CONFIG`."""

import sys

try:
    from jaxinfra.cli.entry import main
except (ModuleNotFoundError, SyntaxError) as error:  # of a Python without the packages, or an old one
    fix = "activate jaxinfra's environment: source .venv/bin/activate; make quickstart makes it, with Python >= 3.12"
    cause = str(error).splitlines()[0]
    print(f"error: Python {sys.version.split()[0]}, {sys.executable}: {cause}; {fix}", file=sys.stderr)
    sys.exit(81)  # the code of ConfigError, whose module may be missing, too


def add_commands() -> None:
    """Adds the commands of a clone."""
    from launch import arguments  # imported when signals are handled

    arguments.add_commands()


if __name__ == "__main__":
    sys.exit(main(add_commands))
