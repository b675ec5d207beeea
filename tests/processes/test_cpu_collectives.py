import pytest

from jaxinfra.processes.cpu_collectives import reachable_address

LOCAL = ("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(
    ("ends", "addresses"),
    [
        ([("10.0.0.1", "10.0.0.1"), ("10.0.0.2", "10.0.0.1")], ["10.0.0.1", "10.0.0.2"]),
        ([LOCAL, LOCAL], ["127.0.0.1", "127.0.0.1"]),
        # The name of process 0's host is a loopback address in its /etc/hosts, as Debian writes it.
        ([LOCAL, LOCAL, ("10.0.0.2", "10.0.0.1")], ["10.0.0.1", "10.0.0.1", "10.0.0.2"]),
        ([("::1", "::1"), ("fd00::2", "fd00::1")], ["fd00::1", "fd00::2"]),
    ],
)
def test_every_process_is_reached_from_other_hosts(ends: list[tuple[str, str]], addresses: list[str]) -> None:
    assert [reachable_address(ends, index) for index in range(len(ends))] == addresses
