"""Whatever refuses, a message has the place, the cause and a fix in one line, and never a credential."""

import errno
import os

import pytest

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.storage.errors import cause_of, storage_errors, store_error
from jaxinfra.storage.mask import has_credentials, masked

STATUS = "{}: Error reading \"x\" [source locations='a.cc:1\\nb.cc:2']"


class ClientError(Exception):
    """As the clients of fsspec raise, by its module."""


ClientError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (FileNotFoundError("bucket/x"), "No such file or directory"),
        (ValueError("UNKNOWN: failed [os_error_code='28']"), "No space left on device"),
        (ValueError(STATUS.format("UNAVAILABLE")), 'UNAVAILABLE: Error reading "x"'),
        (ClientError("a\nb sEcReT-value"), "a b $AWS_SESSION_TOKEN"),
    ],
)
def test_a_failure_of_storage_is_one_line(error, cause, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sEcReT-value")
    with pytest.raises(StorageError) as caught, storage_errors("s3://a:sEcReT@b/x"):
        raise error
    assert str(caught.value).startswith(f"s3://***@b/x: cannot be written: {cause}; ")
    assert "\n" not in str(caught.value) and cause_of(error) == cause


def test_other_exceptions_pass_and_what_is_missing_is_an_error_of_the_config():
    for error in (ValueError("X: y"), RuntimeError("x"), DataError("x")):
        with pytest.raises(type(error)) as caught, storage_errors("x"):
            raise error
        assert caught.value is error
    with pytest.raises(ConfigError) as caught, storage_errors("x", missing="path=http://a:b@h/x"):
        raise FileNotFoundError("x")
    assert str(caught.value) == "path=http://***@h/x"


@pytest.mark.parametrize(
    ("status", "writing", "kind"),
    [
        ("NOT_FOUND", False, DataError),
        ("DATA_LOSS", False, DataError),
        ("NOT_FOUND", True, StorageError),
        ("PERMISSION_DENIED", False, StorageError),
        ("FAILED_PRECONDITION: x [http_response_code='403']", False, StorageError),
        ("NOT_FOUND: x [http_response_code='404']", False, DataError),
        ("NOT_FOUND: NoSuchBucket [http_response_code='404']", False, StorageError),
    ],
)
def test_damaged_data_is_told_from_storage_that_refuses(status, writing, kind):
    assert type(store_error("s3://b/x", ValueError(status + ": x"), writing=writing)) is kind


def test_a_user_alone_is_masked_where_it_may_be_a_token(monkeypatch):
    for text in ("https://sEcReT@host/x", "s3://sEcReT@bucket/x", "https://h/x?access_token=sEcReT"):
        assert has_credentials(text) and "sEcReT" not in masked(text)
    for text in ("abfs://container@account.dfs.core.windows.net/x", "sftp://user@host/x", "a@b", "s3://b/x@y"):
        assert not has_credentials(text) and masked(text) == text
    monkeypatch.setenv("HF_TOKEN", "sEcReT-token")
    assert masked("refused: sEcReT-token") == "refused: $HF_TOKEN" and not has_credentials("sEcReT-token")
