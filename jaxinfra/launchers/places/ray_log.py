"""Prints what one rank has printed in a job of Ray, whose log has the lines of all workers: the console of a run."""

import asyncio
import re
import sys
from collections.abc import Iterable, Iterator

from jaxinfra.errors import JaxinfraError, StorageError
from jaxinfra.launchers.places.ray_jobs import RayJobs
from jaxinfra.launchers.places.ray_package import RANK_LINE
from jaxinfra.launchers.places.ssh import MARK

_LINE = re.compile(r"\((?P<worker>[^)]*pid=[^)]*)\) ?(?P<text>.*)")
_RANK = re.compile(re.escape(RANK_LINE.format(rank="N")).replace("N", r"(\d+)"))


class RankFilter:
    """Lets the lines of one rank through; rank 0 has also those of the driver."""

    def __init__(self, rank: int) -> None:
        self._rank, self._ranks = rank, {"": 0}

    def of_rank(self, lines: Iterable[str]) -> Iterator[str]:
        """Yields the lines of the rank, without the name of the worker."""
        for line in lines:
            found = _LINE.fullmatch(line)
            worker, text = ("", line) if found is None else found.groups()
            if rank := _RANK.fullmatch(text):
                self._ranks[worker] = int(rank[1])
            elif self._ranks.get(worker) == self._rank:
                yield text


def main(address: str, name: str, rank: str, lines: str, follow: str) -> int:
    """Prints the mark, then lines: all from number N on for `+N`, or the last N; with `follow` until the job ends."""
    out = sys.stdout.buffer
    out.write(MARK)
    out.flush()
    jobs = RayJobs(address)
    if follow == "no":
        shown = [*RankFilter(int(rank)).of_rank(jobs.call("get_job_logs", name).splitlines())]
        shown = shown[int(lines[1:]) - 1 :] if lines.startswith("+") else shown[max(0, len(shown) - int(lines)) :]
        out.writelines(f"{line}\n".encode() for line in shown)
        return 0
    skip = int(lines[1:]) - 1 if lines.startswith("+") else None
    if skip is None:
        skip = len([*RankFilter(int(rank)).of_rank(jobs.call("get_job_logs", name).splitlines())]) - int(lines)
    try:
        asyncio.run(_follow(jobs, name, RankFilter(int(rank)), skip))
    except RuntimeError as error:
        raise StorageError(f"{address}: the log of {name} was cut off: {error}") from None
    return 0


async def _follow(jobs: RayJobs, name: str, ranks: RankFilter, skip: int) -> None:
    rest = ""
    async for chunk in jobs.call("tail_job_logs", name):
        *lines, rest = (rest + chunk).split("\n")
        for line in ranks.of_rank(lines):
            skip -= 1
            if skip < 0:
                sys.stdout.buffer.write(f"{line}\n".encode())
                sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except JaxinfraError as error:
        print(f"[ray] error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
