"""Imports optional packages, and says what to install if one is missing."""

import importlib
import shlex
from importlib.metadata import distributions
from importlib.util import find_spec
from types import ModuleType

from jaxinfra.errors import ConfigError


def import_optional(module: str, *submodules: str, needed_by: str, install: str) -> ModuleType:
    """Imports a module of an optional package, and some of its submodules.

    If an import fails, the ConfigError names the field or file that the package is `needed_by`, and what to `install`
    with pip: a requirement, or an extra such as "jaxinfra[parquet]".
    """
    try:
        for submodule in submodules:
            importlib.import_module(f"{module}.{submodule}")
        return importlib.import_module(module)
    except ImportError as error:
        package, cause = module.partition(".")[0], str(error).partition("\n")[0]
        raise ConfigError(f"{needed_by}: needs {package} ({cause}); run {install_command(install)}") from None


def require_optional(module: str, *, needed_by: str, install: str) -> None:
    """Raises the ConfigError of `import_optional` if a package is not installed, without importing it."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:  # no origin: a folder of that name, which Python takes for a package
        raise ConfigError(f"{needed_by}: needs {module}, which is not installed; run {install_command(install)}")


def install_command(requirement: str) -> str:
    """Returns the pip command for a requirement; an extra of jaxinfra is that of the clone, if it is not installed."""
    # Where pip knows jaxinfra, also from a clone, it adds an extra without a registry's jaxinfra.
    if requirement.startswith("jaxinfra[") and not any(True for _ in distributions(name="jaxinfra")):
        return f"pip install -e {shlex.quote(requirement.replace('jaxinfra', '.'))}"
    return f"pip install {shlex.quote(requirement)}"
