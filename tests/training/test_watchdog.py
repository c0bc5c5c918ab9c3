"""Who is named when nothing moves."""

import threading
import time

import pytest

from vaescale import comm
from vaescale.system import heartbeat
from vaescale.training.watchdog import Heard, Watchdog


class Store(dict):
    """The launcher's, in one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def get(self, key: str) -> str:
        return self[key]


def watch(bound: float = 0.5, **options: object) -> tuple[Watchdog, list[int], threading.Event]:
    codes, ended = [], threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    return Watchdog(bound, end=end, **options), codes, ended


def test_a_process_that_beats_is_left_alone() -> None:
    watchdog, codes, ended = watch()
    with watchdog:
        for _ in range(15):
            heartbeat.beat("reading data")
            time.sleep(0.1)
    assert not ended.is_set()
    assert codes == []


def test_one_that_does_not_is_ended_with_words(capsys) -> None:
    watchdog, codes, ended = watch()
    with watchdog:
        comm.at_step(7)
        heartbeat.beat("reading data")
        assert ended.wait(5)
    assert codes == [4]
    words = capsys.readouterr().err
    assert "no sign of life for 0 s" in words
    assert "rank 0 has been at step 7 in reading data" in words


def test_none_watches_nothing() -> None:
    with Watchdog(None, end=lambda _: pytest.fail("it ended")):
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({1: (0, "the backward pass", 5, False)}, "rank 1 has been at step 5 in the backward pass"),
        ({1: (0, "the all-reduce", 4, True)}, "rank 1 has been at step 4 in the all-reduce"),
        ({1: (60, "the all-reduce", 5, True)}, "rank 1 not heard from for 60 s, last at step 5"),
        ({}, "rank 1 was never heard from"),
    ],
)
def test_the_one_to_look_at_is_named(monkeypatch, others, named) -> None:
    monkeypatch.setattr(comm, "world_size", lambda: 2)
    watchdog = Watchdog(10.0, store=Store())
    comm.at_step(5)
    now = time.monotonic()
    for rank, (silent, place, step, waits) in others.items():
        watchdog._heard[rank] = Heard(1, now - silent, heartbeat.Pulse(step, place, now - silent, waits))
    with heartbeat.waiting_for_others("the all-reduce of 3 numbers"):
        sentence = watchdog._sentence()
    assert named in sentence
    assert "rank 0 has been" not in sentence
    assert "this rank is at step 5 in the all-reduce of 3 numbers" in sentence


def test_an_old_message_is_no_sign_of_life() -> None:
    watchdog = Watchdog(10.0, store=Store())
    watchdog._hear(1, 4, 7, "reading data", 0.5, False)
    first = watchdog._heard[1]
    watchdog._hear(1, 4, 7, "reading data", 0.5, False)
    assert watchdog._heard[1] is first
    watchdog._hear(1, 5, 8, "reading data", 0.1, False)
    assert watchdog._heard[1].pulse.step == 8


def test_before_training_it_ends_for_a_silent_rank_only(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The parts of a start may take their time, but a rank that was stopped is silent."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    store = Store({"pulse/1": '[1, 0, "starting", 0.0, false]'})
    watchdog, codes, ended = watch(bound=0.3)
    watchdog.start(store)
    for number in range(2, 12):
        store["pulse/1"] = f'[{number}, 0, "starting", 0.0, false]'
        time.sleep(0.1)
    assert codes == []
    assert ended.wait(5)
    watchdog.stop()
    assert codes == [4]
    assert "rank 1 not heard from for" in capsys.readouterr().err
