"""Masks credentials in messages and records: in URLs, and the values of secret environment variables."""

import io
import os
import re
import sys
from typing import Any, override

# `user:password` before "@" in any URL, and a user alone where it is itself a secret, as in https://TOKEN@host but not
# in sftp://user@host. A password may have "@" and "/" in it, but what follows a port is a path.
_USER = re.compile(r"(://)(?!\[)[^/@\s:]*:(?!\d{1,5}/)[^\s\"']{,200}(?=@)|\b((?:https?|s3a?|gc?s)://)[^/@\s:]+(?=@)")
_URL = re.compile(r"\w+://[^\s\"']+")
# Query parameters of signed URLs, such as ?X-Amz-Signature=0a1b.
_SIGNED = re.compile(
    r"(?<=[?&#;])([\w-]*(?:signature|credential|token|secret|passw(?:or)?d|pwd|(?:api|access|account)_?key(?:_?id)?)|sig|key)"
    # A closing quote, bracket or comma belongs to the sentence, not to the URL.
    r"=(?:[^&#\s]*[^&#\s\"'`)\]}>,;:.]|[^&#\s]+)",
    re.IGNORECASE,
)
# Headers that a client quotes in its error.
_HEADER = re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?(?:\w+ )?|\bbearer )[\w.~+/=-]{8,}", re.IGNORECASE)
# How the names of environment variables with secrets end: HF_TOKEN, PGPASSWORD, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY.
_SECRETS = (
    *("TOKEN", "SECRET", "PASSWORD", "PASSWD", "_PASS", "_PWD", "API_KEY", "ACCESS_KEY", "SECRET_KEY", "ACCOUNT_KEY"),
    "GOOGLE_AUTH_TOKEN_FOR_TESTING",
)
_MIN_SECRET_LENGTH = 8  # a shorter value may be part of an ordinary word


def mask_credentials(text: str) -> str:
    """Replaces credentials in URLs by `***`, and secrets from the environment by the names of their variables."""
    secrets = [(value, name) for name, value in os.environ.items() if name.endswith(_SECRETS)]
    for secret, name in sorted(secrets, key=lambda each: -len(each[0])):  # one may be a part of another
        if len(secret) >= _MIN_SECRET_LENGTH:
            text = text.replace(secret, f"${name}")
    return _HEADER.sub(r"\1***", _mask_urls(text))


def mask_tree(tree: Any) -> Any:
    """Masks the credentials in all texts of nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {key: mask_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mask_tree(value) for value in tree)
    return mask_credentials(tree) if isinstance(tree, str) else tree


def has_credentials(text: str) -> bool:
    """Returns whether a URL in the text contains a password, a token or a signature."""
    return any(_mask_urls(url) != url for url in _URL.findall(text))


def _mask_urls(text: str) -> str:
    return _SIGNED.sub(r"\1=***", _USER.sub(r"\1\2***", text))


def mask_stderr() -> None:
    """Masks what this process writes to standard error from now on: tracebacks, warnings, and logs of all packages."""
    stderr = sys.stderr
    if isinstance(stderr, io.TextIOWrapper):
        sys.stderr = _Masked(
            stderr.buffer, stderr.encoding, stderr.errors, line_buffering=True, write_through=stderr.write_through
        )


class _Masked(io.TextIOWrapper):
    @override
    def write(self, text: str, /) -> int:
        super().write(mask_credentials(text))
        return len(text)
