"""Imports packages that only some data needs, and says what to install where one is missing."""

import importlib
from typing import Any

from jaxinfra.errors import ConfigError


def needed(module: str, *parts: str, by: str, install: str) -> Any:
    """Imports a module of an optional package.

    Args:
        module: its full name.
        parts: modules in it that are imported with it.
        by: what needs it, for the message.
        install: what to give to pip.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        for part in parts:
            importlib.import_module(f"{module}.{part}")
        return importlib.import_module(module)
    except ImportError as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError(f"{by}: needs {module.partition('.')[0]} ({cause}); run pip install '{install}'") from None
