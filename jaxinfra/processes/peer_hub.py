"""The hub of process 0, to which all processes of a run connect, also process 0 itself.

It waits for all of them, passes values on, and tells the others when one leaves, fails, or is lost. What it sends to a
process waits in a queue of its own, so that one that is stopped holds up no others.
"""

import itertools
import logging
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from queue import SimpleQueue

from jaxinfra import __version__
from jaxinfra.errors import ConfigError, HungError, JaxinfraError, PeerLostError, error_of_code
from jaxinfra.processes.discovery import Processes
from jaxinfra.processes.door import SECRET, Json, OtherSecretError, ProtocolError, answer
from jaxinfra.processes.peer_connection import AGAIN, BEAT_S, RETRY_S, Connection
from jaxinfra.processes.peers import GRACE_S
from jaxinfra.processes.progress import compare, hung_error
from jaxinfra.processes.step_agreement import Action, Promise, agreed_step, are_together

_log = logging.getLogger(__name__)
_STRANGERS = 64  # that may wait at a time, beside the processes of the run


class Hub:
    """Process 0's side: a connection to each process, itself included, and two threads for each."""

    def __init__(
        self, listener: socket.socket, secret: str, processes: Processes, *, join_s: float, silence_s: float
    ) -> None:
        self._listener, self._secret = listener, secret
        self._count, self._known_hosts = processes.count, processes.hosts
        self._unknown: dict[socket.socket, None] = {}  # in the order in which they came
        self._other_secrets = set[str]()  # addresses of those with another one
        self._join_s, self._silence_s = join_s, silence_s
        self._members: dict[int, _Outbox] = {}
        self._hosts: dict[int, str] = {}
        self._left = set[int]()
        self._values: dict[str, dict[int, Json]] = {}
        self._for_first = set[str]()  # rounds whose values only process 0 gets
        self._progress: dict[int, Mapping[str, Json]] = {}
        self._requests: dict[int, tuple[Action, str]] = {}  # what all are asked for, and why, by number
        self._promises: dict[int, dict[int, Promise]] = {}  # to each request, by process
        self._numbers = itertools.count(1)
        self._failure: JaxinfraError | None = None
        self._lock = threading.RLock()
        self.all_left = threading.Event()
        threading.Thread(target=self._accept, name="peers-accept", daemon=True).start()
        threading.Thread(target=self._beat, name="peers-hub-beat", daemon=True).start()

    def _accept(self) -> None:
        """Accepts connections until all have joined or the time is over; also tells late ones of a failure."""
        deadline_s = time.monotonic() + self._join_s
        self._listener.settimeout(RETRY_S)
        while len(self._members) < self._count and time.monotonic() < deadline_s:
            try:
                channel, (address, *_) = self._listener.accept()
            except OSError:  # none came; or there are too many open files, for a while
                time.sleep(RETRY_S / 10)
            else:
                self._unknown[channel] = None
                if len(self._unknown) > self._count + _STRANGERS:
                    self._hang_up([*self._unknown][0])
                threading.Thread(target=self._serve, args=(channel, address), name="peers-serve", daemon=True).start()
        self._listener.close()
        if len(self._members) < self._count:
            self._fail(PeerLostError(self._missing()))

    def _hang_up(self, channel: socket.socket) -> None:
        self._unknown.pop(channel, None)
        with suppress(OSError):  # it has gone
            channel.shutdown(socket.SHUT_RDWR)  # wakes its thread

    def _missing(self) -> str:
        absent = [index for index in range(self._count) if index not in self._members]
        hosts = {index: f" ({self._known_hosts[index]})" if self._known_hosts else "" for index in absent}
        listed = ", ".join(f"{index}{hosts[index]}" for index in absent[:8]) + (" ..." if len(absent) > 8 else "")
        verb = "processes" if len(absent) > 1 else "process"
        others, fix = ", ".join(sorted(self._other_secrets)), "start all processes again"
        if others:
            others, fix = f", but one at {others} with another secret", f"{fix}, with the same {SECRET}"
        return f"{verb} {listed} of {self._count}: not joined within {self._join_s:.0f} s{others}; {fix}"

    def _serve(self, channel: socket.socket, address: str) -> None:
        """The thread of a connection: receives messages until the process leaves or is lost."""
        try:
            hello = answer(channel, self._secret)
            if not _is_hello(hello):  # without a secret anybody may send anything
                raise ProtocolError
        except OSError as error:  # not one of our processes
            if isinstance(error, OtherSecretError) and address not in self._other_secrets:
                self._other_secrets.add(address)
                _log.warning("a process at %s has another %s; it was turned away", address, SECRET)
            channel.close()
            return
        finally:
            self._unknown.pop(channel, None)
        with closing(Connection(channel, self._silence_s, of_hub=True)) as connection:
            index = self._admit(hello, connection)
            if index is not None:
                self._receive(index, connection)
                self._members[index].close()

    def _receive(self, index: int, connection: Connection) -> None:
        try:
            cause = "was killed"
            while (message := connection.receive()) is not None:
                if message["kind"] == "value":
                    self._collect(index, message["round"], message["value"], for_first="for_first" in message)
                elif message["kind"] == "beat":
                    self._progress[index] = message["progress"]
                elif message["kind"] == "stacks":
                    self._send_all(kind="stacks", why=message["why"])
                elif message["kind"] == "hung":
                    self._fail(self._hung(f"{self._name(index)}: {message['cause']}"))
                elif message["kind"] == "ask":
                    self._request(message["action"], f"{message['reason']} to {self._name(index)}")
                elif message["kind"] == "promise":
                    self._promise(index, message["number"], Promise(message["training"], message["step"]))
                elif message["kind"] == "leave":
                    self._leave(index, message["error"])
                    return
        except TimeoutError:
            cause = None
        except OSError as error:
            cause = error.strerror or str(error)
        if cause is None:
            self._fail(self._hung(f"{self._name(index)}: was silent for {self._silence_s:.0f} s, stopped or cut off"))
            # It may live, hears as little, and must have left before process 0 does: JAX would abort it.
            later = threading.Timer(GRACE_S + 2 * BEAT_S, self._leave, [index, None])
            later.daemon = True
            later.start()
        else:
            self._fail(PeerLostError(f"{self._name(index)}: {cause}; {AGAIN}"), cause_index=index)

    def _hung(self, cause: str) -> HungError:
        return hung_error(cause, compare(dict(self._progress), self._name))

    def _name(self, index: int) -> str:
        return f"process {index} ({self._hosts[index]})"

    def _admit(self, hello: Mapping[str, Json], connection: Connection) -> int | None:
        """Adds a process; returns None if it does not fit, which ends all of them."""
        index, count, host = hello["index"], hello["count"], hello["host"]
        with self._lock:
            failure = self._failure
            if (problem := self._misfit(index, count, host, hello["version"])) is not None:
                failure = ConfigError(problem)
            if failure is not None:
                with suppress(OSError):  # it has gone
                    connection.send(kind="failure", error=[failure.exit_code, str(failure)])
                self._fail(failure)
                return None
            self._members[index], self._hosts[index] = _Outbox(connection), host
            if len(self._members) == self._count:
                self._send_all(kind="joined", hosts=[self._hosts[each] for each in range(self._count)])
        return index

    def _misfit(self, index: int, count: int, host: str, version: str) -> str | None:
        """Returns why a process does not fit the others."""
        own_host = self._hosts.get(0, socket.gethostname())
        if index in self._members:
            return f"process {index}: on host {self._hosts[index]} and on host {host}; give each its own index"
        if count != self._count:
            both = f"started as one of {count}, process 0 ({own_host}) as one of {self._count}"
            return f"process {index} ({host}): {both}; start all with the same number of processes"
        if version != __version__:
            both = f"has jaxinfra {version}, process 0 ({own_host}) {__version__}"
            return f"process {index} ({host}): {both}; install the same version on all hosts"
        return None

    def _collect(self, index: int, key: str, value: Json, *, for_first: bool) -> None:
        with self._lock:
            if for_first:
                self._for_first.add(key)
            self._values.setdefault(key, {})[index] = value
            self._send_complete()

    def _send_complete(self) -> None:
        """Sends the values of each round that is complete; a process that has left is done."""
        for key, values in list(self._values.items()):
            if len(values.keys() | self._left) == self._count:
                del self._values[key]
                found = [values.get(each, {"left": True}) for each in range(self._count)]
                if key in self._for_first:
                    self._for_first.remove(key)
                    self._members[0].put(kind="values", round=key, values=found)
                else:
                    self._send_all(kind="values", round=key, values=found)

    def _request(self, action: Action, reason: str) -> None:
        """Makes a request to all processes, unless there is one for the same action already."""
        with self._lock:
            if all(action != other for other, _ in self._requests.values()):
                number = next(self._numbers)
                self._requests[number] = action, reason
                self._ask(number)

    def _ask(self, number: int) -> None:
        """Asks all processes for the last step that they have begun."""
        with self._lock:
            action, reason = self._requests[number]
            self._promises[number] = {}
            self._send_all(kind="request", number=number, action=action, reason=reason)

    def _promise(self, index: int, number: int, promise: Promise) -> None:
        """Tells all processes the agreed step, once each has promised one."""
        with self._lock:
            promises = self._promises[number]
            promises[index] = promise
            if len(promises) < self._count:
                return
            if are_together(promises.values()):
                step, (action, reason) = agreed_step(promises.values()), self._requests.pop(number)
                words = {"number": number, "training": promise.training, "step": step}
                self._send_all(kind="agreed", action=action, reason=reason, **words)
                return
        again = threading.Timer(BEAT_S, self._ask, [number])
        again.daemon = True
        again.start()

    def _leave(self, index: int, error: tuple[int, str] | None) -> None:
        with self._lock:
            self._left.add(index)
            if error is not None:
                code, line = error
                names_one = line.startswith("process ")  # such as the one that differs, or is lost
                told = line if names_one else f"{self._name(index)}: {line}"
                self._fail(error_of_code(code, told), cause_index=index)
            self._send_complete()
            self._set_if_all_left()

    def _set_if_all_left(self) -> None:
        if len(self._left) == self._count:
            self.all_left.set()

    def _fail(self, error: JaxinfraError, cause_index: int | None = None) -> None:
        """Tells all processes but the one that has caused it; only the first error counts."""
        with self._lock:
            if cause_index is not None:
                self._left.add(cause_index)
                self._set_if_all_left()
            if self._failure is None:
                self._failure = error
                self._send_all(kind="failure", error=[error.exit_code, str(error)])

    def _send_all(self, **message: Json) -> None:
        with self._lock:
            for index in self._members.keys() - self._left:
                self._members[index].put(**message)

    def _beat(self) -> None:
        while not self.all_left.wait(BEAT_S):
            self._send_all(kind="beat", progress={})


def _is_hello(hello: Json) -> bool:
    kinds = {"index": int, "count": int, "host": str, "version": str}
    if not isinstance(hello, dict) or not all(isinstance(hello.get(name), kind) for name, kind in kinds.items()):
        return False
    return 0 <= hello["index"] < hello["count"]


class _Outbox:
    """The messages that wait to be sent to a process, and the thread that sends them."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._messages = connection, SimpleQueue[dict[str, Json] | None]()
        self._thread = threading.Thread(target=self._send, name="peers-send", daemon=True)
        self._thread.start()

    def put(self, **message: Json) -> None:
        """Adds a message."""
        self._messages.put(message)

    def close(self) -> None:
        """Ends the thread after what it can send at once."""
        self._messages.put(None)
        self._thread.join(RETRY_S)

    def _send(self) -> None:
        with suppress(OSError):  # the thread that receives notices that the process is gone
            while (message := self._messages.get()) is not None:
                self._connection.send(**message)
