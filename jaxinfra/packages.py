"""Imports optional packages, and says what to install if one is missing."""

import importlib
from types import ModuleType

from jaxinfra.errors import ConfigError


def import_optional(module: str, *submodules: str, needed_by: str, install: str) -> ModuleType:
    """Imports a module of an optional package, and some of its submodules.

    If an import fails, the ConfigError names the field or file that the package is `needed_by`, and what to `install`
    with pip, such as "jaxinfra[parquet]".
    """
    try:
        for submodule in submodules:
            importlib.import_module(f"{module}.{submodule}")
        return importlib.import_module(module)
    except ImportError as error:
        package, cause = module.partition(".")[0], str(error).partition("\n")[0]
        raise ConfigError(f"{needed_by}: needs {package} ({cause}); run pip install '{install}'") from None
