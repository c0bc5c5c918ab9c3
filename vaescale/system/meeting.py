"""A meeting of all nodes or ranks before training starts, so that a missing one is named instead of waited for in silence.

The first one listens on the port that torch will use next; the others connect and say who they are. When all have come, the
first one lets them go. Messages are single lines of JSON, bounded in length; nothing else is read from the network.
"""

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psutil

from vaescale.errors import TrainingStopped, UserError
from vaescale.system.console import say

FIRST_WORD_SECONDS, EVERY_SECONDS = 10.0, 30.0
PATIENCE_SECONDS = 300.0
WAIT = "VAESCALE_WAIT_SECONDS"  # the variable that replaces it
RETRY_SECONDS = 0.2
WELCOME_SECONDS = 5.0  # in which the first one greets; it hears one guest at a time
MOST_BYTES = 1024
NAMED = 8  # of those that are missing


class Place(NamedTuple):
    """Who meets: `kind` (`node` or `rank`), this one's number, how many there are in total, and the first one's address and port."""

    kind: str
    number: int
    total: int
    address: str
    port: int
    hosts: Sequence[str] = ()

    def named(self, number: int) -> str:
        """`node 1 (name)`, with the host's name if it is known."""
        host = f" ({self.hosts[number]})" if number < len(self.hosts) else ""
        return f"{self.kind} {number}{host}"


def meet(
    place: Place, *, seconds: float = PATIENCE_SECONDS, first_word: float = FIRST_WORD_SECONDS
) -> str | None:
    """Return when all have come. Prints who is missing after `first_word` seconds and then every half minute.

    Returns this machine's address as the first one sees it, or as the others see the first one; None if there is no other.
    Raises TrainingStopped that names who did not come within `seconds`, because the same command may work later, and UserError
    that names two that claim one number, or different counts.
    """
    if place.total == 1:
        return None
    reminder = _Reminder(seconds, first_word)
    return _receive(place, reminder) if place.number == 0 else _visit(place, reminder)


def patience(environment: Mapping[str, str]) -> float:
    """How many seconds to wait for the others. Raises UserError if the variable for it holds no positive number."""
    text = environment.get(WAIT, str(PATIENCE_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"the environment variable {WAIT} (={text!r}) must be a positive number of seconds")
    return seconds


def gloo_variables(address: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The network device that has an address, under the name of gloo's variable, unless the environment names one.

    Without it gloo takes the device of the machine's own name, which on many systems is the loopback.
    """
    if "GLOO_SOCKET_IFNAME" in environment:
        return {}
    devices = [
        name
        for name, entries in psutil.net_if_addrs().items()
        if address in {entry.address for entry in entries}
    ]
    return {"GLOO_SOCKET_IFNAME": devices[0]} if devices else {}


class _Reminder:
    """The clock of a meeting: when to speak and when to give up."""

    def __init__(self, seconds: float, first_word: float) -> None:
        self._begun = time.monotonic()
        self._end, self._next = self._begun + seconds, self._begun + first_word
        self.seconds = seconds
        self.meanwhile = ""  # whom a question for the end reminds of

    def over(self) -> bool:
        if self.meanwhile:
            self.remind(self.meanwhile)
        return time.monotonic() > self._end

    def remind(self, who: str) -> None:
        now = time.monotonic()
        if now > self._next:
            self._next = now + EVERY_SECONDS
            say(
                f"waiting for {who}, for {now - self._begun:.0f} s so far; giving up after {self.seconds:.0f} s"
            )


def _receive(place: Place, reminder: _Reminder) -> str:
    """The first one's part: collect the others, then let all go."""
    guests: dict[int, tuple[socket.socket, str]] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(place.port))
        stack.callback(_close, guests)
        while len(guests) < place.total - 1:
            missing = [number for number in range(1, place.total) if number not in guests]
            if reminder.over():
                fault = f"{_listed(place, missing)} did not come within {reminder.seconds:.0f} s"
                _tell(guests, fault, late=True)
                raise TrainingStopped(
                    f"{fault} to {place.named(0)}, port {place.port}: {_remedy(place, missing)}"
                )
            reminder.remind(_listed(place, missing))
            arrived = list(_arrivals(server))
            gone = [number for number, (guest, _) in guests.items() if _closed(guest)]
            for number in gone:  # ended while it waited; it may have come again
                guests.pop(number)[0].close()
            for guest, message in arrived:
                if fault := _contradiction(place, message, guests):
                    _answer(guest, fault)
                    _tell(guests, fault)
                    guest.close()
                    raise UserError(fault)
                _send(guest, {"welcome": True})
                guests[message["number"]] = guest, message["host"]
        own = _address(next(iter(guests.values()))[0])
        _tell(guests, "")
        for guest, _ in guests.values():  # who closes first keeps the port busy: let it be the others
            with contextlib.suppress(OSError):
                guest.settimeout(5)
                guest.recv(1)
    return own


def _visit(place: Place, reminder: _Reminder) -> str:
    """Every other one's part: find the first one, say who this is, wait to be let go."""
    first, trouble = f"{place.named(0)} at {place.address}:{place.port}", ""
    while not reminder.over():
        reminder.remind(first + (f" ({trouble})" if trouble else ""))
        try:
            with socket.create_connection((place.address, place.port), timeout=5) as connection:
                if _is_let_go(place, connection, reminder):
                    return _address(connection)
            trouble = "another program answers there, which may be an earlier start of this run"
        except OSError as error:  # not there yet: no name, no host, nobody listens
            trouble = error.strerror or str(error)
        time.sleep(RETRY_SECONDS)
    raise TrainingStopped(
        f"{first} did not answer within {reminder.seconds:.0f} s ({trouble}): {_remedy(place, [0])}"
    )


def _is_let_go(place: Place, connection: socket.socket, reminder: _Reminder) -> bool:
    """Say who this is, and wait for all. Returns whether they came; false if the other side is no meeting, or ended.

    Raises what the first one says, or TrainingStopped if it still waits for others at the end of this one's patience.
    """
    host = socket.gethostname()[:200]
    message = {"vaescale": place.kind, "number": place.number, "total": place.total, "host": host}
    connection.sendall(json.dumps(message).encode() + b"\n")
    lines, soon = _Lines(connection), time.monotonic() + WELCOME_SECONDS
    answer = lines.next(lambda: reminder.over() or time.monotonic() > soon)
    if answer is None:
        return False
    if answer.get("welcome"):
        reminder.meanwhile = f"the other {place.kind}s, as {place.named(0)} does"
        answer = lines.next(reminder.over)
        if answer is None and reminder.over():
            raise TrainingStopped(
                f"not all {place.total} {place.kind}s came to {place.named(0)} within {reminder.seconds:.0f} s: its log names "
                "those that are missing"
            )
        reminder.meanwhile = ""
    if answer is not None and (fault := answer.get("fault")):
        raise (TrainingStopped if answer.get("late") else UserError)(str(fault)[:MOST_BYTES])
    return answer is not None


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise UserError(
            f"port {port} of this machine cannot be used ({os.strerror(error.errno or 0)}): another run may be using it; pass a free one "
            "with MASTER_PORT or --port, the same on all nodes"
        ) from None


def _arrivals(server: socket.socket) -> Iterator[tuple[socket.socket, dict[str, Any]]]:
    """Those that connect within a fifth of a second and say something sensible."""
    if not select.select([server], [], [], RETRY_SECONDS)[0]:
        return
    guest, _ = server.accept()
    guest.settimeout(2)
    try:
        message = _parsed(guest.makefile("rb").readline(MOST_BYTES))
    except OSError:
        message = None
    if message is None or "vaescale" not in message:
        guest.close()  # a health check, a port scan
        return
    yield guest, message


def _contradiction(place: Place, message: dict[str, Any], guests: dict[int, Any]) -> str:
    """Why a guest cannot belong to this meeting, or nothing."""
    number, count = message.get("number"), message.get("total")
    host, kind = str(message.get("host"))[:200], place.kind
    message["host"] = host
    if message["vaescale"] != kind or count != place.total:
        return (
            f"{host} was started as one of {count} {message['vaescale']}s, but {place.named(0)} as one of {place.total} "
            f"{kind}s: start all with the same command"
        )
    if not isinstance(number, int) or not 0 < number < place.total:
        return f"{host} says that it is {kind} {number} of {place.total}: numbers are 0 to {place.total - 1}"
    if number in guests:
        return (
            f"{host} and {guests[number][1]} both say that they are {kind} {number}: give each its own number"
        )
    return ""


def _close(guests: dict[int, tuple[socket.socket, str]]) -> None:
    for guest, _ in guests.values():
        guest.close()


def _tell(guests: dict[int, tuple[socket.socket, str]], fault: str, *, late: bool = False) -> None:
    for guest, _ in guests.values():
        _answer(guest, fault, late=late)


def _answer(guest: socket.socket, fault: str, *, late: bool = False) -> None:
    _send(guest, {"fault": fault, "late": late})


def _send(guest: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        guest.sendall(json.dumps(message).encode() + b"\n")


class _Lines:
    """The lines of JSON that come over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._received = connection, b""

    def next(self, over: Callable[[], bool]) -> dict[str, Any] | None:
        """The next line; None if the other side left, or says nothing of this kind until `over`."""
        while b"\n" not in self._received:
            if over() or len(self._received) > 4 * MOST_BYTES:
                return None
            if select.select([self._connection], [], [], 1.0)[0]:
                part = self._connection.recv(MOST_BYTES)
                if not part:
                    return None
                self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return _parsed(line)


def _address(connection: socket.socket) -> str:
    """This machine's address of a connection; one of IPv4 as such."""
    return str(connection.getsockname()[0]).removeprefix("::ffff:")


def _closed(guest: socket.socket) -> bool:
    """Whether the other side has left: it has nothing to say while it waits."""
    return bool(select.select([guest], [], [], 0)[0])


def _parsed(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(line)
        return message if isinstance(message, dict) else None
    return None


def _listed(place: Place, numbers: list[int]) -> str:
    names = ", ".join(place.named(number) for number in numbers[:NAMED])
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"{names}{more} of {place.total}"


def _remedy(place: Place, missing: list[int]) -> str:
    its = "its log" if len(missing) == 1 else "their logs"
    return f"look into {its}, and check that all nodes reach port {place.port} of {place.address}"
