"""Imports packages that only some data needs, and says what to install where one is missing."""

import importlib
from typing import Any

from jaxinfra.errors import ConfigError


def needed(module: str, *parts: str, by: str, install: str) -> Any:
    """Imports a module of an optional package, and parts of it; a ConfigError where it cannot be imported.

    The message names what it is needed `by`, and what to have pip `install`.
    """
    try:
        for part in parts:
            importlib.import_module(f"{module}.{part}")
        return importlib.import_module(module)
    except ImportError as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError(f"{by}: needs {module.partition('.')[0]} ({cause}); run pip install '{install}'") from None
