"""What tests ask of a cloud's machines, whether they are real hosts (`hosts.Hosts`) or only on paper."""

from collections.abc import Mapping
from typing import Protocol


class Machine(Protocol):
    """A virtual machine of the cloud, from its boot to its deletion."""

    @property
    def name(self) -> str:
        """Its name in the cloud, which is its hostname."""
        ...

    @property
    def address(self) -> str:
        """Its IP address, by which the other hosts and the tests reach it."""
        ...

    @property
    def is_running(self) -> bool:
        """Whether it has power."""
        ...

    def set(self, key: str, value: str) -> None:
        """Sets a value of its metadata, by the path under `instance/`: "attributes/KEY", "maintenance-event".

        A new "attributes/ssh-keys" changes the users who may log in.
        """
        ...

    def preempt(self, after_s: float = 30.0) -> None:
        """Gives it the notice of preemption, and takes its power after this time; 0 takes it before this returns."""
        ...

    def delete(self) -> None:
        """Takes its power, and all that it has stored; does nothing if it is deleted already."""
        ...


class Machines(Protocol):
    """Where machines come from."""

    def boot(self, name: str, *, attributes: Mapping[str, str], zone: str, preemptible: bool = False) -> Machine:
        """Makes a machine that runs, with these attributes of its metadata; its name is unique while it exists."""
        ...


class PaperMachine:
    """A machine without processes; its metadata is for tests to look at."""

    def __init__(self, name: str, address: str, attributes: Mapping[str, str], zone: str, *, preemptible: bool) -> None:
        self.name, self.address, self.zone, self.preemptible = name, address, zone, preemptible
        self.metadata = {f"attributes/{key}": value for key, value in attributes.items()}
        self.metadata |= {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.is_running = True

    def set(self, key: str, value: str) -> None:
        """See `Machine.set`."""
        self.metadata[key] = value

    def preempt(self, after_s: float = 30.0) -> None:
        """Gives the notice and takes the power, at once whatever the time is."""
        del after_s
        self.set("preempted", "TRUE")
        self.is_running = False

    def delete(self) -> None:
        """See `Machine.delete`."""
        self.is_running = False


class PaperMachines:
    """Machines with the addresses 10.0.0.1 and so on, for tests of an API alone."""

    def __init__(self) -> None:
        self.booted: list[PaperMachine] = []  # all that ever were

    def boot(self, name: str, *, attributes: Mapping[str, str], zone: str, preemptible: bool = False) -> PaperMachine:
        """See `Machines.boot`."""
        if any(machine.name == name and machine.is_running for machine in self.booted):
            raise ValueError(f"{name}: a machine of this name runs")
        number = len(self.booted)
        address = f"10.0.{number // 250}.{number % 250 + 1}"
        machine = PaperMachine(name, address, attributes, zone, preemptible=preemptible)
        self.booted.append(machine)
        return machine
