"""Imports packages that only some sources need, and says what to install where one is missing."""

import importlib
from typing import Any

from jaxinfra.errors import ConfigError


def needed(module: str, by: str, install: str) -> Any:
    """Imports a module of an optional package.

    Args:
        module: its full name.
        by: what needs it, for the message.
        install: what to give to pip.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError(f"{by} needs {module.partition('.')[0]} ({cause}); run pip install '{install}'") from None
