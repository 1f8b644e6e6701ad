"""Ctrl-C waits while something is done whole, comes in the end, and can be insisted on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from sylinit.runtime import interrupts
from sylinit.runtime.interrupts import held_interrupts


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_waits_for_the_end():
    done = []

    def whole() -> None:
        with held_interrupts():
            press()
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        whole()
    assert done == ["whole"]


def test_it_can_be_delivered_before_the_end_and_then_only_once():
    with held_interrupts() as held:
        held.deliver()
        press()
        with pytest.raises(KeyboardInterrupt):
            held.deliver()
        held.deliver()


def test_one_that_insists_comes_through_at_once(monkeypatch):
    monkeypatch.setattr(interrupts, "PATIENCE_SECONDS", 0.01)
    with held_interrupts():
        press()
        time.sleep(0.02)
        with pytest.raises(KeyboardInterrupt):
            press()


def test_an_impatient_one_waits_like_the_first():
    done = []

    def whole() -> None:
        with held_interrupts():
            press()
            press()
            press()
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        whole()
    assert done == ["whole"]


def test_an_inner_hold_hands_on_to_the_outer_one():
    done = []

    def whole() -> None:
        with held_interrupts():
            with held_interrupts():
                press()
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        whole()
    assert done == ["inner", "outer"]


def test_a_handler_of_the_users_own_is_called():
    calls = []
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    with held_interrupts():
        press()
        assert calls == []
    assert calls == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_outside_the_main_thread_nothing_changes():
    seen = []

    def work() -> None:
        with held_interrupts() as held:
            seen.append(signal.getsignal(signal.SIGINT))
            held.deliver()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
