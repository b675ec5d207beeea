"""Names the process that listens at a TCP port of this host, by /proc (Linux)."""

import os
from contextlib import suppress
from pathlib import Path

_LISTENS = "0A"  # TCP_LISTEN of include/net/tcp_states.h


def listener_of(port: int) -> str:
    """Returns " by process PID (COMMAND)"; "" if it cannot be found, such as of another user."""
    tables = [table.read_text() for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if table.exists()]
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    listens = [f":{port:04X}", _LISTENS]
    sockets = {f"socket:[{row[9]}]" for row in rows if [row[1][-5:], row[3]] == listens}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # of another user, or it has ended
            if any(os.readlink(descriptor) in sockets for descriptor in folder.iterdir()):
                command = folder.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f" by process {folder.parent.name} ({command[:100].strip()})"
    return ""
