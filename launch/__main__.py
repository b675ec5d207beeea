"""Runs the command line: in a clone, `python -m launch CONFIG` is `jaxinfra CONFIG`."""

import sys

try:
    from jaxinfra.cli.entry import main
except (ModuleNotFoundError, SyntaxError) as error:  # of a Python without the packages, or an old one
    fix = "activate jaxinfra's environment: source .venv/bin/activate; make quickstart makes it, with Python >= 3.12"
    sys.exit(f"error: Python {sys.version.split()[0]}, {sys.executable}: {str(error).splitlines()[0]}; {fix}")


def add_commands() -> None:
    """Adds the commands of a clone."""
    from launch import arguments  # imported when signals are handled

    arguments.add_commands()


if __name__ == "__main__":
    sys.exit(main(add_commands))
