"""Workers and the one pass: sites in one order whatever route a batch takes, one end for all, nothing misled."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sylinit.errors import SylinitError
from sylinit.runtime import workers
from sylinit.runtime.workers import Interleaved, OnePass, Stopped

Compute = Callable[[int, dict[int, Any]], None]


def own(site: int | None) -> int | None:
    """Agree with nobody."""
    return site


def nothing(site: int, waiting: dict[int, Any]) -> None:
    pass


def meet_all(
    routes: list[list[int]], fail_at: tuple[int, int] | None = None, compute: Compute | None = None
) -> list[tuple[Any, ...]]:
    """Send batches along routes of sites, each in a worker; return the order of events."""
    events: list[tuple[Any, ...]] = []

    def noted(site: int, waiting: dict[int, Any]) -> None:
        events.append(("compute", site, tuple(waiting)))

    runner = Interleaved(len(routes), compute or noted, own, nn.Module())

    def forward(part: int) -> None:
        for site in routes[part]:
            if fail_at == (part, site):
                raise RuntimeError(f"batch {part} at site {site}")
            events.append(("arrive", part, site))
            runner.meet(site, str(site), (part, site))

    runner.run(forward)
    return events


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_site_is_computed_once_with_all_batches(count):
    events = meet_all([[0, 1, 2]] * count)
    assert [e for e in events if e[0] == "compute"] == [("compute", site, tuple(range(count))) for site in range(3)]
    assert events == meet_all([[0, 1, 2]] * count), "the order is always the same"


def test_no_batch_passes_a_site_before_all_have_come():
    events = meet_all([[0, 1]] * 3)
    first = events.index(("compute", 0, (0, 1, 2)))
    assert {e[1] for e in events[:first] if e[0] == "arrive"} == {0, 1, 2}


def test_batches_that_skip_a_site_or_end_early_do_not_block():
    events = meet_all([[0, 2], [0, 1, 2], [0], []])
    computed = [e[1:] for e in events if e[0] == "compute"]
    assert computed == [(0, (0, 1, 2)), (1, (1,)), (2, (0, 1))]


def test_a_site_that_is_met_again_is_computed_again_with_those_that_came_back():
    events = meet_all([[0, 1, 0], [0, 1]])
    assert [e[1:] for e in events if e[0] == "compute"] == [(0, (0, 1)), (1, (0, 1)), (0, (0,))]


def test_the_payload_reaches_the_computing():
    seen: dict[int, Any] = {}
    meet_all([[0], [0]], compute=lambda site, waiting: seen.update(waiting))
    assert seen == {0: (0, 0), 1: (1, 0)}


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("site", [0, 1])
def test_a_failure_of_one_batch_ends_all(part, site):
    with pytest.raises(RuntimeError, match=f"batch {part} at site {site}"):
        meet_all([[0, 1]] * 3, fail_at=(part, site))


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("count", [1, 3])
def test_a_failure_in_computing_is_raised_though_the_model_catches_exceptions(error, count):
    def compute(site: int, waiting: dict[int, Any]) -> None:
        raise error

    runner = OnePass(compute, own) if count == 1 else Interleaved(count, compute, own, nn.Module())
    went_on = []

    def forward(part: int) -> None:
        try:
            runner.meet(0, "0", None)
            went_on.append(part)
        except Exception:
            return

    with pytest.raises(type(error)):
        runner.run(forward)
    assert not went_on


def test_a_failure_that_the_model_catches_whatever_it_is_ends_the_pass():
    """A bare ``except:`` catches `Stopped`, too; what was raised in computing is raised in the end."""

    def compute(site: int, waiting: dict[int, Any]) -> None:
        raise ValueError(f"at site {site}")

    runner = OnePass(compute, own)

    def forward(part: int) -> None:
        for site in range(2):
            try:
                runner.meet(site, "a", None)
            except Stopped:
                continue

    with pytest.raises(ValueError, match="at site 0"):
        runner.run(forward)


def test_only_one_worker_runs_at_a_time():
    running = 0
    most = 0
    runner = Interleaved(4, nothing, own, nn.Module())

    def forward(part: int) -> None:
        nonlocal running, most
        for site in range(5):
            running += 1
            most = max(most, running)
            torch.randn(50, 50) @ torch.randn(50, 50)
            running -= 1
            runner.meet(site, str(site), None)

    runner.run(forward)
    assert most == 1


@pytest.mark.parametrize("count", [1, 3])
def test_sites_are_computed_in_the_callers_thread(count):
    """One batch runs there, too: no thread is made for it."""
    computing: set[int] = set()
    running: set[int] = set()

    def compute(site: int, waiting: dict[int, Any]) -> None:
        computing.add(threading.get_ident())

    runner = OnePass(compute, own) if count == 1 else Interleaved(count, compute, own, nn.Module())

    def forward(part: int) -> None:
        running.add(threading.get_ident())
        runner.meet(0, "0", None)

    runner.run(forward)
    assert computing == {threading.get_ident()}
    assert (running == computing) == (count == 1)
    assert len(running) == count


def test_workers_see_the_callers_modes():
    seen: list[tuple[Any, ...]] = []

    def forward(part: int) -> None:
        seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
                torch.empty(0).device.type,
            )
        )

    def modes() -> tuple[Any, ...]:
        seen.clear()
        Interleaved(3, nothing, own, nn.Module()).run(forward)
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


# With other processes


def test_what_only_other_processes_meet_is_computed_without_input():
    """The others meet site 1, which this one never does, and go on to site 3 after its end."""
    coming = [0, 1, 2, 3, None]
    computed: list[tuple[int, dict[int, Any]]] = []
    for count in (1, 2):
        computed.clear()
        turns = iter(coming)

        def agree(site: int | None, turns: Any = turns) -> int | None:
            chosen = next(turns)
            assert site is None or chosen is None or chosen <= site
            return chosen

        def compute(site: int, waiting: dict[int, Any]) -> None:
            computed.append((site, waiting))

        runner = OnePass(compute, agree) if count == 1 else Interleaved(count, compute, agree, nn.Module())

        def forward(part: int, runner: Any = runner) -> None:
            runner.meet(0, "0", "first")
            runner.meet(2, "2", "third")

        runner.run(forward)
        here = range(count)
        assert computed == [(0, dict.fromkeys(here, "first")), (1, {}), (2, dict.fromkeys(here, "third")), (3, {})]


# What would be misled is refused


class Model(nn.Module):
    """Runs whatever it is given, and holds whatever it writes."""

    def __init__(self, forward: Callable[[Any, Any, int], None], **attributes: Any) -> None:
        super().__init__()
        self.runs = forward
        for name, value in attributes.items():
            setattr(self, name, value)


def interleave(model: Model, count: int = 2) -> None:
    runner = Interleaved(count, nothing, own, model)
    runner.run(lambda part: model.runs(model, functools.partial(runner.meet, 0, "fc", None), part))


def writes(model: Any, meet: Any, part: int) -> None:
    model.skip = torch.ones(2)
    meet()


def appends(model: Any, meet: Any, part: int) -> None:
    model.held.append(part)
    meet()


def fills(model: Any, meet: Any, part: int) -> None:
    model.cache["key"] = torch.ones(2)
    meet()


def counts(model: Any, meet: Any, part: int) -> None:
    meet()
    model.step += 1


def in_place(model: Any, meet: Any, part: int) -> None:
    model.total.add_(1)
    meet()


class Holder:
    def __init__(self) -> None:
        self.last: Tensor | None = None


def nested(model: Any, meet: Any, part: int) -> None:
    model.holder.last = torch.ones(2)
    meet()


@pytest.mark.parametrize(
    ("forward", "attributes", "name"),
    [
        (writes, {"skip": None}, "Model.skip"),
        (writes, {}, "Model.skip"),
        (appends, {"held": []}, "Model.held"),
        (fills, {"cache": {}}, r"Model.cache\['key'\]"),
        (counts, {"step": 0}, "Model.step"),
        (in_place, {"total": torch.zeros(2)}, "Model.total"),
        (nested, {"holder": Holder()}, "Model.holder.last"),
    ],
)
def test_state_that_one_forward_leaves_to_another_is_refused(forward, attributes, name):
    with pytest.raises(SylinitError, match=rf"leaves state in {name}.*another batch's forward.*single batch"):
        interleave(Model(forward, **attributes))


def test_state_of_a_buffer_and_of_a_hook_is_refused_too():
    def replaces(model: Any, meet: Any, part: int) -> None:
        model.seen = model.seen + 1
        meet()

    model = Model(replaces)
    model.register_buffer("seen", torch.zeros(2))
    with pytest.raises(SylinitError, match=r"leaves state in Model\._buffers\['seen'\]"):
        interleave(model)

    noted: list[int] = []
    model = Model(lambda model, meet, part: (noted.append(part), meet()))
    model.register_forward_hook(lambda *_: noted)
    with pytest.raises(SylinitError, match=r"leaves state in a hook of Model \(noted\)"):
        interleave(model)


def test_state_that_is_put_back_before_a_site_is_no_state():
    def forward(model: Any, meet: Any, part: int) -> None:
        model.depth += 1
        model.depth -= 1
        meet()

    interleave(Model(forward, depth=0))


class Opaque:
    """Holds a lock where nobody looks for one."""

    lock = threading.Lock()


@pytest.mark.parametrize("kind", [threading.Lock, threading.RLock, threading.Condition, threading.Semaphore])
def test_a_lock_that_is_held_at_a_site_is_refused(kind):
    def forward(model: Any, meet: Any, part: int) -> None:
        with model.lock:
            meet()

    with pytest.raises(SylinitError, match=r"waits at layer 'fc'.*holds a lock \(Model\.lock\)"):
        interleave(Model(forward, lock=kind()))


def test_a_lock_that_is_given_back_before_a_site_is_none():
    def forward(model: Any, meet: Any, part: int) -> None:
        with model.lock:
            pass
        meet()

    interleave(Model(forward, lock=threading.Lock()))


def test_a_lock_that_cannot_be_seen_ends_the_pass_in_time(monkeypatch):
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.5)

    def forward(model: Any, meet: Any, part: int) -> None:
        with Opaque.lock:
            meet()

    with pytest.raises(SylinitError, match="batch 1 waits for something that another batch holds, such as a lock"):
        interleave(Model(forward))


def test_a_changed_switch_is_refused_and_where_it_is_given_back_not():
    def changes(model: Any, meet: Any, part: int) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            meet()
        finally:
            torch.set_default_dtype(torch.float32)

    def gives_back(model: Any, meet: Any, part: int) -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_default_dtype(torch.float32)
        meet()

    with pytest.raises(SylinitError, match=r"changes the default dtype for the whole process"):
        interleave(Model(changes))
    assert torch.get_default_dtype() == torch.float32
    interleave(Model(gives_back))


@pytest.mark.parametrize("count", [1, 2])
def test_a_site_that_a_thread_of_the_model_meets_is_refused(count):
    def compute(site: int, waiting: dict[int, Any]) -> None:
        raise AssertionError("computed out of order")

    runner = OnePass(compute, own) if count == 1 else Interleaved(count, compute, own, nn.Module())

    def forward(part: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(runner.meet, 0, "fc", None).result()

    with pytest.raises(SylinitError, match="layer 'fc' is called in a thread that the model's forward has made"):
        runner.run(forward)
