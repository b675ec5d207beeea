"""Which sockets the processes below this one listen on."""

import psutil


def outside_of_loopback() -> list[tuple[str, int]]:
    """Addresses that other machines could reach."""
    this = psutil.Process()
    found = []
    for process in [this, *this.children(recursive=True)]:
        try:
            found += [each.laddr for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            continue
    return [
        (address.ip, address.port) for address in found if address.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]
