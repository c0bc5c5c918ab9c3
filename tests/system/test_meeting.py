"""Nodes that meet: all come, one is missing, two claim one number, a stranger knocks."""

import contextlib
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from vaescale.errors import TrainingStopped, UserError
from vaescale.system import meeting
from vaescale.system.meeting import Place, gloo_variables, meet, patience


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def node(number: int, port: int, total: int = 3, kind: str = "node") -> Place:
    return Place(kind, number, total, "127.0.0.1", port, hosts=("a", "b", "c"))


def outcomes(calls: list[Callable[[], str | None]]) -> list[str | None]:
    """What each call returned, or the sentence that it raised."""

    def outcome(call: Callable[[], str | None]) -> str | None:
        try:
            return call()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(outcome, calls))


def test_all_come_and_learn_their_own_address(port: int) -> None:
    found = outcomes([lambda n=n: meet(node(n, port), seconds=20) for n in (2, 1, 0)])
    assert found == ["127.0.0.1"] * 3
    with socket.create_server(("127.0.0.1", port)):
        pass  # torch can use the port at once


def test_who_comes_late_is_waited_for(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    def late() -> str | None:
        time.sleep(1.0)
        return meet(node(1, port, 2), seconds=20)

    assert outcomes([lambda: meet(node(0, port, 2), seconds=20, first_word=0.3), late]) == ["127.0.0.1"] * 2
    assert (
        capsys.readouterr().err.count("waiting for node 1 (b) of 2, for 0 s so far; giving up after 20 s")
        == 1
    )


def test_the_missing_are_named_to_all(port: int) -> None:
    first, second = outcomes([lambda n=n: meet(node(n, port), seconds=1.0 + n) for n in (0, 1)])
    assert first is not None
    assert first.startswith(
        f"node 2 (c) of 3 did not come within 1 s to node 0 (a), port {port}: look into its log"
    )
    assert second is not None
    assert second.startswith("node 2 (c) of 3 did not come within 1 s")


def test_a_first_one_that_is_missing_is_named(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=rf"node 0 \(a\) at 127.0.0.1:{port} did not answer within 1 s"):
        meet(node(1, port), seconds=1.0, first_word=0.2)
    assert f"waiting for node 0 (a) at 127.0.0.1:{port} (Connection refused)" in capsys.readouterr().err


def test_one_that_ends_while_it_waits_may_come_again(port: int) -> None:
    def twice() -> str | None:
        message = {"vaescale": "node", "number": 1, "total": 3, "host": "b"}
        for _ in range(100):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=5) as first,
            ):
                first.sendall(json.dumps(message).encode() + b"\n")
                time.sleep(0.5)
                break
            time.sleep(0.05)
        return meet(node(1, port), seconds=20)

    def last() -> str | None:
        time.sleep(2.0)
        return meet(node(2, port), seconds=20)

    assert outcomes([lambda: meet(node(0, port), seconds=20), twice, last]) == ["127.0.0.1"] * 3


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda port: node(1, port, 4), "as one of 4 nodes, but node 0 (a) as one of 3"),
        (lambda port: node(1, port, kind="rank"), "as one of 3 ranks, but node 0 (a) as one of 3 nodes"),
    ],
)
def test_another_command_on_a_node_is_refused(
    port: int, other: Callable[[int], Place], sentence: str
) -> None:
    for said in outcomes([lambda: meet(node(0, port), seconds=20), lambda: meet(other(port), seconds=20)]):
        assert said is not None
        assert sentence in said


def test_two_of_one_number_are_refused(port: int) -> None:
    places = [node(0, port), node(1, port), node(1, port)]
    for said in outcomes([lambda place=place: meet(place, seconds=20) for place in places])[:1]:
        assert said is not None
        assert "both say that they are node 1" in said


def test_strangers_are_sent_away(port: int) -> None:
    def stranger() -> str | None:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"[]\n", b'{"vaescale"', b""):
            for _ in range(100):
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port), timeout=5) as guest,
                ):
                    guest.sendall(words)
                    break
                time.sleep(0.05)
        return meet(node(1, port, 2), seconds=20)

    assert outcomes([lambda: meet(node(0, port, 2), seconds=20), stranger]) == ["127.0.0.1"] * 2


def test_an_earlier_start_that_still_listens_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch's store does: it takes the connection, and neither answers nor closes it."""
    monkeypatch.setattr(meeting, "WELCOME_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(TrainingStopped, match="another program answers there"):
            meet(node(1, port, 2), seconds=2.5, first_word=0.2)
        assert (
            f"waiting for node 0 (a) at 127.0.0.1:{port} (another program answers" in capsys.readouterr().err
        )
    with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", port)) as earlier:
        guest = pool.submit(meet, node(1, port, 2), seconds=20)
        connection, _ = earlier.accept()
        earlier.close()  # it ends, and the next start listens on its port
        connection.close()
        assert meet(node(0, port, 2), seconds=20) == guest.result() == "127.0.0.1"


def test_one_that_waits_with_the_first_one_says_for_whom(
    port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [lambda n=n: meet(node(n, port), seconds=2.5 - n, first_word=0.5) for n in (0, 1)]
    _, second = outcomes(calls)
    assert "waiting for the other nodes, as node 0 (a) does" in capsys.readouterr().err
    assert second == "not all 3 nodes came to node 0 (a) within 2 s: its log names those that are missing"


def test_a_port_in_use_is_said(port: int) -> None:
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match=f"port {port} of this machine cannot be used"),
    ):
        meet(node(0, port), seconds=1.0)


def test_alone_nobody_is_met(port: int) -> None:
    assert meet(node(0, port, 1)) is None


def test_the_network_device_of_an_address() -> None:
    assert gloo_variables("127.0.0.1", {}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert gloo_variables("127.0.0.1", {"GLOO_SOCKET_IFNAME": "eth0"}) == {}
    assert gloo_variables("203.0.113.9", {}) == {}


def test_patience() -> None:
    assert patience({}) == 300
    assert patience({"VAESCALE_WAIT_SECONDS": "7.5"}) == 7.5
    for text in ("soon", "0", "-1", "inf", "nan"):
        with pytest.raises(UserError, match="VAESCALE_WAIT_SECONDS"):
            patience({"VAESCALE_WAIT_SECONDS": text})
