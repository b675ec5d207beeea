"""Runs in a container: fetches the code of the run from its directory, starts it, and records how it has ended.

The image has Python and packages; the code is that of the launching machine, so that an image serves many runs.
"""

import io
import os
import sys
import tarfile
from pathlib import Path

from jaxinfra.errors import DataError, JaxinfraError
from jaxinfra.launchers.places.bundle import short_hash
from jaxinfra.launchers.places.end_record import record_end
from jaxinfra.launchers.places.on_host import RUN_DIR, HostJob, run_job
from jaxinfra.launchers.restart_policy import RULES


def main(run_dir: str, attempt: str, bundle: str, folder: str, *command: str) -> int:
    """Runs the command in the code, and returns its exit code; that of an error, such as a lost bucket, else."""
    try:
        os.chdir(_unpacked(run_dir, bundle))
    except JaxinfraError as error:
        print(f"[pod] error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    environment = {RUN_DIR: run_dir, "PYTHONPATH": os.getcwd()}
    job = HostJob(
        command=[*command],
        folder=folder,
        environment=environment,
        run_dir=run_dir,
        attempt=int(attempt),
        is_first=_is_first(),
    )
    code, is_over = run_job(job)
    rule = RULES.get(code)
    if job.is_first and rule is not None and not rule.restarts:  # else the cluster starts a pod again
        print(f"[pod] {record_end(run_dir, job.attempt, code, is_over=is_over)}", flush=True)
    return code


def _is_first() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("JOB_COMPLETION_INDEX", "JOBSET_JOB_INDEX"))


def _unpacked(run_dir: str, bundle: str) -> Path:
    """Returns the folder of the code; raises DataError if it is missing or damaged."""
    from jaxinfra.storage.objects import ObjectStore  # takes a while to import

    folder = Path.home() / "bundles" / bundle
    if folder.exists():
        return folder
    name = f"place/bundle-{bundle}"
    content = ObjectStore(run_dir).read_or_none(name)
    if content is None or short_hash(content) != bundle:
        state = "missing" if content is None else "damaged"
        raise DataError(f"{run_dir}/{name}: {state}; start the run again by its config")
    new = folder.with_suffix(".new")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(new, filter="data")
    new.rename(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
