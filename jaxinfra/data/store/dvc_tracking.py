"""Stores that DVC tracks: a `.dvc` file stands for the folder beside it, which DVC keeps in its cache or remote."""

from pathlib import Path

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.packages import import_optional

SUFFIX = ".dvc"


def resolve_path(path: str) -> str:
    """Returns the folder of a store, given its path or the `.dvc` file beside it.

    If `path` is the `.dvc` file, or the folder is missing, DVC checks the folder out from its cache or remote.
    Otherwise the folder is used as it is.

    Raises ConfigError if DVC is not installed, or the file is in no DVC repository; DataError if the folder was changed
    after it was added; and StorageError if the data is neither in the cache nor in the remote.
    """
    if "://" in path:
        return path
    is_named = path.endswith(SUFFIX)
    absolute = Path(path).expanduser().absolute()
    file = absolute if is_named else Path(f"{absolute}{SUFFIX}")
    folder = file.with_suffix("")
    if not file.is_file() or (not is_named and folder.exists()):
        return path
    dvc = import_optional("dvc", "exceptions", "repo", needed_by=str(file), install="jaxinfra[dvc]")
    try:
        with dvc.repo.Repo(str(file.parent)) as repo:
            try:
                repo.checkout(targets=[str(file)])
            except dvc.exceptions.CheckoutError:  # not in the cache
                repo.pull(targets=[str(file)])
    except dvc.exceptions.NotDvcRepoError:
        raise ConfigError(f"{file}: is in no DVC repository; clone the repository that it belongs to") from None
    except dvc.exceptions.DvcException as error:
        cause = " ".join(str(error).split())
        if "unsaved files" in cause:  # only DVC's text tells this error from others
            fix = "run dvc add, or remove the folder"
            raise DataError(f"{file}: the folder beside it was changed after it was added; {fix}") from None
        fix = "run dvc pull where the remote can be reached"
        raise StorageError(f"{file}: checkout failed ({cause}); {fix}") from error
    return str(folder)
