"""Versions of a model in an MLflow registry, and the alias that says which of them is in use.

MLflow moves an alias without looking at what it was, so two that promote at once would both succeed. Therefore an alias
moves only under a lease: a folder or bucket prefix that the registered model names in the tag `jaxinfra_lease`, which
is set as the model is created, once. An owner that was stopped and lost the lease finds out before it moves the alias;
only between that look and the request is a gap, which MLflow cannot close.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jaxinfra.errors import ConfigError, RunInUseError, StorageError, quoted
from jaxinfra.packages import import_optional
from jaxinfra.storage.lease import Lease, hold

_LEASE = "jaxinfra_lease"
_TARGET = re.compile(r"models:/(?P<model>[^/@:.'\x00-\x1f]+)(?:@(?P<alias>[A-Za-z][\w-]*))?")
_PATIENCE_S = 60.0  # with another one that promotes: it takes seconds
_MAX_CHARS = 5000  # of a tag of a version
_NO_SUCH = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a model; each field but the number is a tag.

    Attributes:
        number: as the registry counts, "" before it is registered.
        source: the run and step that it is, such as gs://bucket/runs/story@200.
        checkpoint: the digest of the checkpoint.
        data: the fingerprint of the data of its evaluation.
        metrics: of its evaluation, such as eval/loss.
        replaced: the number of the version that had this alias before, "" for none.
    """

    number: str = ""
    source: str
    checkpoint: str
    data: str
    metrics: Mapping[str, float]
    replaced: str = ""

    def is_same(self, other: "Version") -> bool:
        """Whether both are evaluations of one checkpoint on the same data."""
        return (self.checkpoint, self.data) == (other.checkpoint, other.data)

    def tags(self) -> dict[str, str]:
        """Returns the tags that say so."""
        metrics = json.dumps(dict(self.metrics))
        if len(metrics) > _MAX_CHARS:
            raise ConfigError(
                f"{len(self.metrics)} metrics: more than a registry keeps of a version; use fewer --tasks"
            )
        named = {"source": self.source, "checkpoint": self.checkpoint, "data": self.data, "metrics": metrics}
        return {f"jaxinfra_{name}": value for name, value in named.items()}


class Registry:
    """One registered model.

    Every method raises StorageError if the registry does not answer, or refuses, ConfigError for what is not there or
    has been damaged.

    Args:
        uri: the address of the MLflow server.
        target: models:/NAME or models:/NAME@ALIAS; the alias is "champion" by default.
    """

    def __init__(self, uri: str, target: str) -> None:
        if not (found := _TARGET.fullmatch(target)):
            raise ConfigError(f"{target}: expected models:/NAME or models:/NAME@ALIAS; use --to models:/lm")
        try:
            urlsplit(uri)
        except ValueError as error:
            raise ConfigError(f"{uri}: {error}; expected the address of a server, as http://HOST:5000") from None
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        mlflow = import_optional("mlflow", "exceptions", needed_by=target, install="jaxinfra[mlflow]")
        self._failure: type[Exception] = mlflow.exceptions.MlflowException
        self.uri, self.model, self.alias = uri, found["model"], found["alias"] or "champion"
        self._replaced = f"jaxinfra_replaced_{self.alias}"  # another alias of the version has replaced another one
        with self._answers():
            self._client: Any = mlflow.MlflowClient(uri, registry_uri=uri)

    @property
    def target(self) -> str:
        """The alias, for messages."""
        return f"models:/{self.model}@{self.alias}"

    def exists(self) -> bool:
        """Whether the model is registered."""
        return self._model() is not None

    def champion(self) -> Version | None:
        """Returns the version that the alias names; None if it names none, or there is no such model."""
        number = getattr(self._model(), "aliases", {}).get(self.alias)
        return None if number is None else self.version(str(number))

    def version(self, number: str) -> Version:
        """Returns a version."""
        with self._answers():
            return self._parse(self._client.get_model_version(self.model, number))

    def versions(self) -> list[Version]:
        """Returns all versions, the newest first."""
        with self._answers():
            found = self._client.search_model_versions(f"name='{self.model}'")
            while found.token:
                found += self._client.search_model_versions(f"name='{self.model}'", page_token=found.token)
        return [self._parse(each) for each in sorted(found, key=lambda each: -int(each.version))]

    @contextmanager
    def locked(self, lease: str) -> Iterator[Lease]:
        """Creates the model if it is missing, and holds its lease: the one in its tag, `lease` for a new model.

        Waits up to a minute for another one that promotes. Raises RunInUseError, which names it, if it takes longer.
        """
        with self._answers():
            try:
                self._client.create_registered_model(self.model, tags={_LEASE: lease})
            except self._failure as error:
                if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                    raise
            tags = self._client.get_registered_model(self.model).tags
        if not (where := tags.get(_LEASE)):
            fix = f"set its tag {_LEASE} to a folder or bucket prefix that all who promote can write to"
            raise ConfigError(f"models:/{self.model}: was not registered by model promote, so it has no lease; {fix}")
        doing = f"is promoting a model to models:/{self.model}; run the same command again"
        deadline_s = time.monotonic() + _PATIENCE_S
        with ExitStack() as stack:
            while True:
                try:
                    held = stack.enter_context(hold(where, busy=doing))
                    break
                except RunInUseError:
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(1.0)
            yield held

    def register(self, version: Version) -> Version:
        """Returns the version of this checkpoint and evaluation; it is registered if it is not there yet."""
        if (found := next(filter(version.is_same, self.versions()), None)) is not None:
            return found
        # MLflow takes no path of a host as a source.
        source = version.source if "://" in version.source else f"jaxinfra://{version.source}"
        with self._answers():
            made = self._client.create_model_version(self.model, source, tags=version.tags(), await_creation_for=0)
        return self._parse(made)

    def move(self, to: Version, replaced: Version | None, lease: Lease) -> None:
        """Moves the alias, after it is written down which version it leaves."""
        with self._answers():
            if replaced is not None and replaced.number != to.number:
                self._client.set_model_version_tag(self.model, to.number, self._replaced, replaced.number)
            lease.check_now()
            self._client.set_registered_model_alias(self.model, self.alias, to.number)

    def _model(self) -> Any:
        with self._answers():
            try:
                return self._client.get_registered_model(self.model)
            except self._failure as error:
                if getattr(error, "error_code", "") != _NO_SUCH:
                    raise
        return None

    def _parse(self, found: Any) -> Version:
        tags = {name.removeprefix("jaxinfra_"): value for name, value in found.tags.items()}
        try:
            metrics = {name: float(value) for name, value in json.loads(tags.get("metrics", "{}")).items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            tag = f"models:/{self.model}: version {found.version} has a damaged tag jaxinfra_metrics"
            raise ConfigError(f"{tag}; delete the tag, or the version, and run the same command again") from None
        return Version(
            number=str(found.version),
            source=tags.get("source", found.source),
            checkpoint=tags.get("checkpoint", ""),
            data=tags.get("data", ""),
            metrics=metrics,
            replaced=found.tags.get(self._replaced, ""),
        )

    @contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except self._failure as error:
            code, text = getattr(error, "error_code", ""), quoted(" ".join(str(error).split()), 200)
            away = code in ("INTERNAL_ERROR", "") and "failed with exception" in str(error)
            what = "the registry does not answer" if away else f"the registry refuses: {text}"
            fix = "nothing was moved; run the same command again when it does" if away else "nothing was moved"
            kind = ConfigError if code in (_NO_SUCH, "INVALID_PARAMETER_VALUE") else StorageError
            raise kind(f"{self.uri}: {what}; {fix}") from error
