"""Lanes: they meet at every door, in one order, whatever route each takes, and end together when one fails."""

from __future__ import annotations

import threading

import pytest
import torch

from sylinit.runtime.workers import Lanes


def meet_all(routes: list[list[int]], fail_at: tuple[int, int] | None = None, settle=None):
    """Send lanes along routes of doors; return the order of events."""
    events: list[tuple] = []

    def default_settle(door, waiting):
        events.append(("settle", door, tuple(waiting)))

    lanes = Lanes(len(routes), settle or default_settle)

    def forward(lane):
        for door in routes[lane]:
            if fail_at == (lane, door):
                raise RuntimeError(f"lane {lane} at door {door}")
            events.append(("arrive", lane, door))
            lanes.meet(door, (lane, door))

    lanes.run(forward)
    return events


def sylinit_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sylinit-lane")]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_door_is_settled_once_with_all_lanes(count):
    events = meet_all([[0, 1, 2]] * count)
    assert [e for e in events if e[0] == "settle"] == [("settle", door, tuple(range(count))) for door in range(3)]
    assert events == meet_all([[0, 1, 2]] * count), "the order is always the same"


def test_no_lane_passes_a_door_before_all_have_come():
    events = meet_all([[0, 1]] * 3)
    first_settle = events.index(("settle", 0, (0, 1, 2)))
    assert {e[1] for e in events[:first_settle] if e[0] == "arrive"} == {0, 1, 2}


def test_lanes_that_skip_a_door_or_end_early_do_not_block():
    events = meet_all([[0, 2], [0, 1, 2], [0], []])
    settled = [e[1:] for e in events if e[0] == "settle"]
    assert settled == [(0, (0, 1, 2)), (1, (1,)), (2, (0, 1))]


def test_the_payload_reaches_the_settling():
    seen = {}
    meet_all([[0], [0]], settle=lambda door, waiting: seen.update(waiting))
    assert seen == {0: (0, 0), 1: (1, 0)}


@pytest.mark.parametrize("lane", [0, 1, 2])
@pytest.mark.parametrize("door", [0, 1])
def test_a_failure_in_one_lane_ends_all(lane, door):
    with pytest.raises(RuntimeError, match=f"lane {lane} at door {door}"):
        meet_all([[0, 1]] * 3, fail_at=(lane, door))
    assert not sylinit_threads()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_in_settling_is_raised_though_the_model_catches_exceptions(error):
    def settle(door, waiting):
        raise error

    lanes = Lanes(3, settle)

    def forward(lane):
        try:
            lanes.meet(0, None)
        except Exception:
            return

    with pytest.raises(type(error)):
        lanes.run(forward)
    assert not sylinit_threads()


def test_only_one_lane_runs_at_a_time():
    running = 0
    most = 0
    lanes = Lanes(4, lambda door, waiting: None)

    def forward(lane):
        nonlocal running, most
        for door in range(5):
            running += 1
            most = max(most, running)
            torch.randn(50, 50) @ torch.randn(50, 50)
            running -= 1
            lanes.meet(door, None)

    lanes.run(forward)
    assert most == 1


def test_lanes_see_the_callers_modes():
    seen = []

    def forward(lane):
        seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
                torch.get_default_device().type,
            )
        )

    def modes():
        seen.clear()
        Lanes(3, lambda door, waiting: None).run(forward)
        assert len(set(seen)) == 1
        return seen[0]

    assert modes() == (True, False, False, None, "cpu")
    with torch.no_grad():
        assert modes()[0] is False
    with torch.inference_mode():
        assert modes()[1] is True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert modes()[2:4] == (True, torch.bfloat16)
    with torch.device("meta"):
        assert modes()[4] == "meta"
