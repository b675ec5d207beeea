"""Finds the store that a command line names."""

from jaxinfra.config import load
from jaxinfra.errors import ConfigError


def store_location(store: str) -> str:
    """Returns the folder or URL of a store; a config file stands for the store that it makes or reads.

    Raises ConfigError for a config file with no store or with several.
    """
    if not store.endswith(".py"):
        return store
    config = load(store).run
    data = getattr(config, "data", config)  # of a run, else it is a recipe or data
    if isinstance(location := getattr(data, "store", None), str):
        return location
    several = ", ".join(getattr(data, "recipes", ()))  # of a mixture
    raise ConfigError(f"{store}: names not one store; name {several or 'the folder or URL of a store'}")
