"""Prints what one rank has printed in all its pods, one after the other: the console of a run on Kubernetes."""

import sys
import time
from collections.abc import Iterator

from jaxinfra.errors import JaxinfraError
from jaxinfra.launchers.places.cluster_api import ClusterApi, end_of
from jaxinfra.launchers.places.manifests import Manifest
from jaxinfra.launchers.places.ssh import MARK

_POLL_S = 1.0
_JOB, _RANK = "jobset.sigs.k8s.io/job-index", "batch.kubernetes.io/job-completion-index"


def main(
    context: str, namespace: str, workload: str, labels: str, job: str, index: str, lines: str, follow: str
) -> int:
    """Prints the mark, then lines: all from number N on for `+N`, or the last N; with `follow` until the run ends.

    Args:
        context: see `ClusterApi`.
        namespace: see `ClusterApi`.
        workload: path of what runs the pods.
        labels: a selector of the pods.
        job: index of the slice, by the labels of its pods.
        index: of the rank's pods in it.
        lines: as of `tail -n`.
        follow: yes or no.
    """
    out = sys.stdout.buffer
    out.write(MARK)
    out.flush()
    api = ClusterApi(context, namespace)
    skip = int(lines[1:]) - 1 if lines.startswith("+") else 0
    if not lines.startswith("+"):
        there = [*_printed(api, labels, job, index, set[str](), follow=False)]
        out.writelines(there[max(0, len(there) - int(lines)) :])
        out.flush()
        if follow == "no":
            return 0
        skip = len(there)
    shown = set[str]()
    while True:
        found = api.read(workload)
        is_last = follow == "no" or found is None or end_of(found) is not None
        for line in _printed(api, labels, job, index, shown, follow=not is_last):
            if skip:
                skip -= 1
            else:
                out.write(line)
                out.flush()
        if is_last:
            return 0
        time.sleep(_POLL_S)


def _printed(api: ClusterApi, labels: str, job: str, index: str, shown: set[str], *, follow: bool) -> Iterator[bytes]:
    """Yields the lines of the rank's pods that are not `shown` yet, oldest pod first."""
    for pod in api.list(api.path("v1", "pods"), labelSelector=labels):
        name = pod["metadata"]["name"]
        if _is(pod, job, index) and name not in shown and pod["status"].get("phase") != "Pending":
            shown.add(name)
            yield from api.log(name, follow=follow)


def _is(pod: Manifest, job: str, index: str) -> bool:
    labels = pod["metadata"].get("labels", {})
    return labels.get(_JOB, "0") == job and labels.get(_RANK, "0") == index


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except JaxinfraError as error:
        print(f"[pod] error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
