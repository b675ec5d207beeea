"""Signs a folder of published weights and verifies it, by the OpenSSF's model signing with a key of one's own.

The signature `model.sig` covers every file of the folder: weights, config, tokenizer, and three that say what it is:

    export.json      the receipt: the checkpoint that was exported, and the SHA-256 of each file of weights
    lineage.json     where it comes from: versions of the data, the run with its config, the checkpoint
    sbom.cdx.json    the Python packages that trained it, as CycloneDX
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxinfra.errors import ConfigError, DataError, quoted
from jaxinfra.interop.folder import PREFIX
from jaxinfra.packages import import_optional
from jaxinfra.registry.sbom import bill_of_materials, installed
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import storage_errors

_UNUSABLE = (OSError, ValueError, TypeError, AttributeError)  # the last one for a key without a curve, such as RSA
SIGNATURE, LINEAGE, SBOM = "model.sig", "lineage.json", "sbom.cdx.json"
_IN_LINEAGE = ("created", "command", "config", "fingerprint", "data", "data_versions", "init", "git", "versions")


def sign(folder: Path, key: Path, receipt: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Writes lineage and SBOM into a folder, then signs all of it with a private key (PEM, elliptic curve).

    Raises ConfigError for a key that cannot be used, StorageError if the folder cannot be written.
    """
    check_key(key)
    lineage = {"model": receipt["source"], "run": {name: record[name] for name in _IN_LINEAGE if name in record}}
    with storage_errors(folder):
        write_bytes_atomic(folder / LINEAGE, json.dumps(lineage, indent=2).encode() + b"\n")
        write_bytes_atomic(folder / SBOM, bill_of_materials("training", installed()))
        signing = _library().signing.Config().use_elliptic_key_signer(private_key=key)
        signing.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)


def check_key(key: Path) -> None:
    """Raises ConfigError unless a private key can be used, before anything is written."""
    library = _library()
    try:
        library.signing.Config().use_elliptic_key_signer(private_key=key)
    except _UNUSABLE as error:
        fix = "make one with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        raise ConfigError(f"--sign {key}: {_cause_of_key(error)}; {fix}") from None


def verify(source: str, key: str, *, option: str) -> dict[str, Any]:
    """Returns the lineage of a folder after every byte of it was compared with its signature.

    Raises ConfigError if there is no signature, or the key cannot be used, and DataError if a file was changed, added
    or removed, or another key has signed.

    Args:
        source: the folder, with or without hf: before it.
        key: a file with the public key.
        option: the option or field that names the key, for messages.
    """
    folder, library = Path(source.removeprefix(PREFIX)), _library()
    if not folder.is_dir():
        raise ConfigError(f"{source}: no such folder; a signature is verified on a disk")
    if not (folder / SIGNATURE).is_file():
        raise ConfigError(f"{source}: has no {SIGNATURE}; export it with hub export --sign, or leave out {option}")
    try:
        verifying = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except _UNUSABLE as error:
        fix = "take it from the private one with: openssl ec -in key.pem -pubout -out key.pub"
        raise ConfigError(f"{option} {key}: {_cause_of_key(error)}; {fix}") from None
    try:
        verifying.set_hashing_config(_hashing()).verify(folder, folder / SIGNATURE)
        return json.loads((folder / LINEAGE).read_text()) if (folder / LINEAGE).exists() else {}
    except Exception as error:  # the library and its cryptography raise classes of many kinds
        raise DataError(f"{source}: {_cause(error)}; take the model from its source again") from error


@contextmanager
def reading_verified(source: str, key: str, *, option: str) -> Iterator[None]:
    """Verifies a folder as `verify`, for what is read from it within this context.

    Raises DataError at the end if the folder, or a file in it, was changed or exchanged since then.
    """
    before = _identities(source)
    verify(source, key, option=option)
    yield
    if _identities(source) != before:
        raise DataError(f"{source}: was changed after it was verified, while it was read; let nobody write there")


def _identities(source: str) -> Mapping[Path, tuple[int, int, int]]:
    """Returns inode, bytes and time of the last change of a folder and all in it; a rename changes that time, too."""
    folder = Path(source.removeprefix(PREFIX)).resolve()
    found = {path: path.lstat() for path in (folder, *folder.rglob("*"))} if folder.is_dir() else {}
    return {path: (stat.st_ino, stat.st_size, stat.st_ctime_ns) for path, stat in found.items()}


def _hashing() -> Any:
    """Returns how files are hashed; what a version control keeps beside them is not part of a model."""
    return _library().hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=True)


def _library() -> Any:
    submodules = "signing", "verifying", "hashing"
    return import_optional("model_signing", *submodules, needed_by="signatures", install="jaxinfra[sign]")


def _cause_of_key(error: Exception) -> str:
    return "is a key of another kind than elliptic curves" if isinstance(error, AttributeError) else _cause(error)


def _cause(error: Exception) -> str:
    return quoted(" ".join(str(error).split()) or type(error).__name__, 300)
