"""Asks the API of a Kubernetes cluster through its official client, and turns its answers into errors of one line.

All methods raise ConfigError for what the cluster refuses, and StorageError if it does not answer.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.launchers.places.manifests import WORKLOADS, Manifest
from jaxinfra.packages import import_optional

_TIMEOUT_S = 60.0
_LOG_TIMEOUT_S = 3600.0  # between two lines of a log
_DONE = ("Complete", "Completed")  # conditions of a Job and a TrainJob, and of a JobSet
_LATER = (408, 429)  # codes of a cluster that is busy
_NO_KUBECONFIG = (AttributeError, KeyError, TypeError)  # which the client raises for YAML of another form
_FIXES = {
    401: "; sign in again: the token of this --context is not taken",
    403: "; ask for the right, or name another --namespace or --context",
}
_PARTS = {  # what has to be installed for a kind
    "jobset": "JobSet (jobset.sigs.k8s.io)",
    "runtime": "Kubeflow Trainer",
    "trainjob": "Kubeflow Trainer",
}


class Refused(ConfigError):
    """The cluster refuses a request."""

    def __init__(self, text: str, status: int) -> None:
        """`status` is that of HTTP."""
        super().__init__(text)
        self.status = status


class ClusterApi:
    """The objects of one namespace."""

    def __init__(self, context: str, namespace: str) -> None:
        """Reads the kubeconfig, or the service account of the pod that this runs in; asks nothing yet.

        Args:
            context: of the kubeconfig; "" is the current one.
            namespace: "" is that of the context.
        """
        kubernetes = import_optional("kubernetes", "config", "client", needed_by="--place k8s", install="jaxinfra[k8s]")
        config, not_yaml = kubernetes.config, import_module("yaml").YAMLError
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # an error says it after the last retry
        in_pod = not context and "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
        try:
            if in_pod:
                config.load_incluster_config()
            else:
                config.load_kube_config(context=context or None)
        except (config.ConfigException, OSError, not_yaml, *_NO_KUBECONFIG) as error:
            fix = "`kubectl config get-contexts` lists clusters; name one with --context, or set KUBECONFIG"
            raise ConfigError(f"--place k8s: no cluster: {_line(error)}; {fix}") from None
        self.namespace = namespace or ("default" if in_pod else _namespace(config, context))
        self._client, self._refusal = kubernetes.client.ApiClient(), kubernetes.client.ApiException
        self._lost: type[Exception] = import_module("urllib3.exceptions").HTTPError  # the client lets it through
        self.server: str = self._client.configuration.host

    def _request(
        self,
        method: str,
        path: str,
        body: Manifest | None = None,
        query: Mapping[str, object] | None = None,
        *,
        content: str = "application/json",
        stream: bool = False,
    ) -> Any:
        """Sends a request and returns what the answer says; with `stream` the response, of which nothing is read."""
        what = f"{self.server}: {method} {path}"
        try:
            response = self._client.call_api(
                path,
                method,
                query_params=[*(query or {}).items()],
                header_params={"Accept": "application/json", "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=(_TIMEOUT_S, _LOG_TIMEOUT_S if stream else _TIMEOUT_S),
            )
            return response if stream else json.loads(response.data)
        except self._refusal as error:
            status, said = error.status or 0, _message(error)
            if 400 <= status < 500 and status not in _LATER:
                raise Refused(f"{what}: {said}{_FIXES.get(status, '')}", status) from None
            raise StorageError(f"{what}: {status} {said}; try again") from None
        except self._lost as error:
            raise self._no_answer(error) from None

    def _no_answer(self, error: Exception) -> StorageError:
        fix = "is this the right --context, and does this network reach it?"
        return StorageError(f"{self.server}: no answer: {_line(error.__cause__ or error)}; {fix}")

    def path(self, api: str, plural: str, name: str = "") -> str:
        """Returns the path of objects in the namespace: `api` is v1, or GROUP/VERSION."""
        root = f"/apis/{api}" if "/" in api else f"/api/{api}"
        return f"{root}/namespaces/{self.namespace}/{plural}{f'/{name}' if name else ''}"

    def read(self, path: str, **query: str) -> Manifest | None:
        """Returns an object; None if there is none, or if the cluster does not know its kind."""
        try:
            return self._request("GET", path, query=query)
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def list(self, path: str, **query: str) -> list[Manifest]:
        """Returns objects, oldest first; none if the cluster does not know their kind."""
        items = (self.read(path, **query) or {}).get("items", [])
        return sorted(items, key=lambda each: each["metadata"].get("creationTimestamp") or "")

    def create(self, kind: str, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Creates an object, or returns the one of this name that there is.

        With `dry_run` the cluster checks it, and makes nothing.
        """
        api, plural = manifest["apiVersion"], plural_of(kind)
        query = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        try:
            return self._request("POST", self.path(api, plural), manifest, query)
        except Refused as error:
            if error.status == 409:
                return self.read(self.path(api, plural, manifest["metadata"]["name"])) or manifest
            if error.status == 404 and f'namespaces "{self.namespace}"' in str(error):
                fix = "`kubectl get namespaces` lists them; name one with --namespace"
                raise ConfigError(f"{self.server}: has no namespace {self.namespace}; {fix}") from None
            if error.status == 404 and kind in _PARTS:
                fix = f"install {_PARTS[kind]} there, or use --kind job"
                raise ConfigError(f"{self.server}: has no {manifest['kind']}; {fix}") from None
            raise

    def change(self, kind: str, manifest: Manifest, changes: Manifest) -> None:
        """Changes some fields of an object that exists."""
        path = self.path(manifest["apiVersion"], plural_of(kind), manifest["metadata"]["name"])
        self._request("PATCH", path, changes, content="application/merge-patch+json")

    def delete(self, path: str, *, grace_s: int | None = None) -> None:
        """Deletes an object, after what belongs to it; nothing happens if it is gone.

        `grace_s` are the seconds from SIGTERM to SIGKILL of a pod, if not its own.
        """
        query = {"propagationPolicy": "Foreground"} | ({} if grace_s is None else {"gracePeriodSeconds": grace_s})
        try:
            self._request("DELETE", path, query=query)
        except Refused as error:
            if error.status != 404:
                raise

    def log(self, pod: str, *, follow: bool) -> Iterator[bytes]:
        """Yields the lines of a pod's log, with `follow` until it ends; none if it has not started."""
        path = f"{self.path('v1', 'pods', pod)}/log"
        try:
            response = self._request("GET", path, query={"follow": str(follow).lower()}, stream=True)
        except Refused as error:
            if error.status in (400, 404):  # its container waits to be started, or the pod is gone
                return
            raise
        rest = b""
        try:
            for chunk in response.stream(2**16):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line + b"\n" for line in lines)
        except self._lost as error:
            raise self._no_answer(error) from None
        if rest:
            yield rest


def end_of(workload: Manifest) -> Manifest | None:
    """Returns the condition by which a workload has ended, of type Failed or of `_DONE`; None while it has not."""
    conditions = workload.get("status", {}).get("conditions", [])
    ended = (each for each in conditions if each["type"] in (*_DONE, "Failed") and each["status"] == "True")
    return next(ended, None)


def plural_of(kind: str) -> str:
    """Returns what paths call a kind."""
    return WORKLOADS[kind][2] if kind in WORKLOADS else f"{kind}s"


def _namespace(config: Any, context: str) -> str:
    """Returns the namespace of a context of the kubeconfig."""
    contexts, active = config.list_kube_config_contexts()
    named = next((each for each in contexts if each["name"] == context), active)
    return named["context"].get("namespace", "default")


def _message(error: Any) -> str:
    """Returns what the API says of an error, in a line."""
    try:
        return _line(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def _line(said: object) -> str:
    return " ".join(str(said).split())
