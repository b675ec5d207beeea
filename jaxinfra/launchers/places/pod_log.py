"""Prints what one rank has printed in all its pods, one after the other: the console of a run on Kubernetes."""

import sys
import time
from collections import deque

from jaxinfra.errors import JaxinfraError
from jaxinfra.launchers.places.cluster_api import ClusterApi
from jaxinfra.launchers.places.manifests import Manifest
from jaxinfra.launchers.places.ssh import MARK

_POLL_S = 1.0
_JOB, _RANK = "jobset.sigs.k8s.io/job-index", "batch.kubernetes.io/job-completion-index"


def main(context: str, namespace: str, labels: str, job: str, index: str, lines: str, follow: str) -> int:
    """Prints the mark, then the lines: all from number N for `+N`, or the last N of those that there are."""
    out = sys.stdout.buffer
    out.write(MARK)
    out.flush()
    api, follows = ClusterApi(context, namespace), follow == "yes"
    skip = int(lines[1:]) - 1 if lines.startswith("+") else 0
    last = deque[bytes](maxlen=None if lines.startswith("+") else int(lines))
    shown = set[str]()
    while True:
        pods = [pod for pod in api.list(api.path("v1", "pods"), labelSelector=labels) if _is(pod, job, index)]
        for pod in pods:
            name, phase = pod["metadata"]["name"], pod["status"].get("phase")
            if name in shown or phase == "Pending":
                continue
            shown.add(name)
            for line in api.log(name, follow=follows and not last.maxlen):
                if last.maxlen:
                    last.append(line)
                elif skip:
                    skip -= 1
                else:
                    out.write(line)
                    out.flush()
        if last.maxlen:
            out.writelines(last)
            last = deque[bytes]()
        if not follows or (pods and all(pod["status"].get("phase") == "Succeeded" for pod in pods)):
            return 0
        time.sleep(_POLL_S)


def _is(pod: Manifest, job: str, index: str) -> bool:
    labels = pod["metadata"].get("labels", {})
    return labels.get(_JOB, "0") == job and labels.get(_RANK, "0") == index


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except JaxinfraError as error:
        print(f"[pod] error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
