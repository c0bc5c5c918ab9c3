"""A meeting of all nodes or ranks before training starts, so that a missing one is named instead of waited for in silence.

The first one listens on the port that torch will use next; the others connect and say who they are. When all have come, the
first one lets them go. Messages are single lines of JSON, bounded in length; nothing else is read from the network.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psutil

from vaescale.errors import TrainingStopped, UserError
from vaescale.system.console import say

FIRST_WORD_SECONDS, EVERY_SECONDS = 10.0, 30.0
PATIENCE_SECONDS = 300.0
WAIT = "VAESCALE_WAIT_SECONDS"  # the variable that replaces it
RETRY_SECONDS = 0.2
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

    def over(self) -> bool:
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
    message = {
        "vaescale": place.kind,
        "number": place.number,
        "total": place.total,
        "host": socket.gethostname()[:200],
    }
    trouble = ""
    while not reminder.over():
        reminder.remind(
            f"{place.named(0)} at {place.address}:{place.port}" + (f" ({trouble})" if trouble else "")
        )
        try:
            with socket.create_connection((place.address, place.port), timeout=5) as connection:
                connection.sendall(json.dumps(message).encode() + b"\n")
                own, answer = _address(connection), _line(connection, reminder)
        except OSError as error:  # not there yet: no name, no host, nobody listens
            trouble = error.strerror or str(error)
        else:
            if answer is not None:
                if fault := answer.get("fault"):
                    kind = TrainingStopped if answer.get("late") else UserError
                    raise kind(str(fault)[:MOST_BYTES])
                return own
            trouble = "it closed the connection"
        time.sleep(RETRY_SECONDS)
    raise TrainingStopped(
        f"{place.named(0)} at {place.address}:{place.port} did not answer within {reminder.seconds:.0f} s ({trouble}): "
        f"{_remedy(place, [0])}"
    )


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise UserError(
            f"port {port} of this machine cannot be used ({error.strerror}): another run may be using it; pass a free one "
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
    with contextlib.suppress(OSError):
        guest.sendall(json.dumps({"fault": fault, "late": late}).encode() + b"\n")


def _line(connection: socket.socket, reminder: _Reminder) -> dict[str, Any] | None:
    """The first one's answer, however long the others take; None if it left without one."""
    received = b""
    while not reminder.over():
        if not select.select([connection], [], [], 1.0)[0]:
            continue
        part = connection.recv(MOST_BYTES)
        received += part
        if not part or b"\n" in received or len(received) > 4 * MOST_BYTES:
            return _parsed(received)
    return None


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
