"""Masks credentials in messages and records: in URLs, and the values of secret environment variables."""

import os
import re

# `user:password` before "@" in any URL, and a user alone where it is itself a secret, as in https://TOKEN@host but not
# in sftp://user@host.
_USER = re.compile(r"(://)[^/@\s:]*:[^/\s]*(?=@)|\b((?:https?|s3a?|gc?s)://)[^/@\s:]+(?=@)")
# Query parameters of signed URLs, such as ?X-Amz-Signature=0a1b.
_SIGNED = re.compile(
    r"(?<=[?&#;])(X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig|token|access_token"
    # A closing quote, bracket or comma belongs to the sentence, not to the URL.
    r"|client_secret|password)=(?:[^&#\s]*[^&#\s\"'`)\]}>,;:.]|[^&#\s]+)",
    re.IGNORECASE,
)
_SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
)
_MIN_SECRET_LENGTH = 8  # a shorter value may be part of an ordinary word


def mask_credentials(text: str) -> str:
    """Replaces credentials in URLs by `***`, and secrets from the environment by the names of their variables."""
    for name in _SECRETS:
        if len(secret := os.environ.get(name, "")) >= _MIN_SECRET_LENGTH:
            text = text.replace(secret, f"${name}")
    return _mask_urls(text)


def has_credentials(text: str) -> bool:
    """Returns whether a URL in the text contains a password, a token or a signature."""
    return _mask_urls(text) != text


def _mask_urls(text: str) -> str:
    return _SIGNED.sub(r"\1=***", _USER.sub(r"\1\2***", text))
