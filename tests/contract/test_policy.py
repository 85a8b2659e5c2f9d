"""Who runs next, as pure functions with a clock of the test's own; then the scheduler with a backend that only counts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint.engine.backend import PAUSE, GenerateRequest, Generation, MicroBatch, PartResult
from mint.errors import ClosedError
from mint.local.jobs import CallJob, PassJob, WorkJob
from mint.local.policy import Head, Kind, charge, next_heads, next_kind, whose_turn
from mint.local.scheduler import Scheduler
from mint.types.requests import prepare_training_input
from tests.support.clients import GUARD, batch

NOTHING: dict[Kind, float] = {"train": 0.0, "sample": 0.0}
COSTS = st.lists(st.integers(1, 1000).map(float), min_size=30, max_size=30)  # whole numbers, so that sums are exact
QUICK = settings(deadline=None, max_examples=50)


@pytest.mark.parametrize(
    ("train", "sample", "spent", "kind"),
    [
        (False, False, NOTHING, None),
        (True, False, NOTHING, "train"),
        (False, True, NOTHING, "sample"),
        (True, False, {"train": 9.0, "sample": 0.0}, "train"),
        (False, True, {"train": 0.0, "sample": 9.0}, "sample"),
        (True, True, {"train": 0.1, "sample": 0.2}, "train"),
        (True, True, {"train": 0.2, "sample": 0.1}, "sample"),
    ],
)
def test_the_kind_with_less_time_goes_next(train: bool, sample: bool, spent: Any, kind: Kind | None) -> None:
    assert next_kind(train=train, sample=sample, spent=spent) == kind


@QUICK
@given(COSTS, COSTS)
def test_while_both_wait_they_get_equal_time(train_units: list[float], sample_units: list[float]) -> None:
    """Whatever the units cost, nobody is ahead by more than one unit."""
    costs = {"train": iter(train_units), "sample": iter(sample_units)}
    spent, longest = dict(NOTHING), max(train_units + sample_units)
    for _ in range(30):
        kind = next_kind(train=True, sample=True, spent=spent)
        assert kind is not None
        spent = charge(spent, kind, next(costs[kind]), contended=True)
        assert abs(spent["train"] - spent["sample"]) <= longest


def test_nobody_saves_up_a_claim_while_alone() -> None:
    spent = dict(NOTHING)
    for _ in range(1000):  # training works alone for a long time
        kind = next_kind(train=True, sample=False, spent=spent)
        assert kind == "train"
        spent = charge(spent, kind, 1.0, contended=False)
    order = []
    for _ in range(10):  # then sampling joins: it gets half, not everything
        kind = next_kind(train=True, sample=True, spent=spent)
        assert kind is not None
        order.append(kind)
        spent = charge(spent, kind, 1.0, contended=True)
    assert order == ["train", "sample"] * 5


def test_charging_changes_nothing_that_was_given() -> None:
    given_spent = {"train": 1.0, "sample": 2.0}
    assert charge(given_spent, "train", 0.5, contended=True) == {"train": 1.5, "sample": 2.0}
    assert charge(given_spent, "train", 0.5, contended=False) == NOTHING
    assert given_spent == {"train": 1.0, "sample": 2.0}


def head(run_id: str, tenant: str, arrived: float, joins: Any = None, tokens: int = 1, most: int = 10) -> Head:
    return Head(run_id, tenant, arrived, joins, tokens, most)


@pytest.mark.parametrize(
    ("heads", "last_turn", "expected"),
    [
        ([], {}, []),
        ([head("a", "x", 2), head("b", "x", 1)], {}, ["b"]),  # the oldest
        ([head("a", "x", 1), head("b", "y", 2)], {"x": 5, "y": 1}, ["b"]),  # the tenant who waits longer for a turn
        ([head("a", "x", 1), head("b", "new", 2)], {"x": 5}, ["b"]),  # who had none yet
        ([head("a", "x", 1, "f"), head("b", "x", 2, "f"), head("c", "x", 3, "g")], {}, ["a", "b"]),  # what can join
        ([head("c", "y", 3, "f"), head("b", "x", 2, "f"), head("a", "x", 1, "f")], {}, ["a", "b", "c"]),  # in order
        ([head("a", "x", 1), head("b", "y", 2)], {}, ["a"]),  # None joins nobody, not even None
        ([head("a", "x", 1, "f"), head("b", "y", 2, "f")], {"x": 9, "y": 1}, ["b", "a"]),
        # as far as there is room: b does not fit, c does
        ([head("a", "x", 1, "f", 6), head("b", "x", 2, "f", 5), head("c", "x", 3, "f", 4)], {}, ["a", "c"]),
        # nobody is taken into a pass larger than its own plan allows
        ([head("a", "x", 1, "f", 6), head("b", "y", 2, "f", 2, most=7), head("c", "z", 3, "f", 4)], {}, ["a", "c"]),
        ([head("a", "x", 1, "f", 3, most=5), head("b", "y", 2, "f", 2), head("c", "z", 3, "f", 1)], {}, ["a", "b"]),
        ([head("long", "x", 1, "f", 30, most=30), head("b", "y", 2, "f", 1)], {}, ["long"]),
    ],
)
def test_which_runs_go_next(heads: list[Head], last_turn: dict[str, int], expected: list[str]) -> None:
    assert next_heads(heads, last_turn) == expected


@QUICK
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 10)), min_size=1, max_size=25), st.data())
def test_whoever_waits_is_served_after_at_most_one_pass_for_every_other_tenant(
    queued: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Whatever the tenants have queued and had before, of whatever sizes, joining or not."""
    last_turn = {f"t{i}": data.draw(st.integers(0, 9)) for i in range(5)}
    heads = [head(f"r{i}", f"t{tenant}", i, "f", tokens) for i, (tenant, tokens) in enumerate(queued)]
    wanted = data.draw(st.sampled_from(heads))
    oldest = min(int(h.arrived) for h in heads if h.tenant == wanted.tenant)
    turn, passes = 10, 0
    while f"r{oldest}" not in (chosen := next_heads(heads, last_turn)):  # nothing is taken away: everyone has more
        turn, passes = turn + 1, passes + 1
        last_turn |= dict.fromkeys(whose_turn(heads, chosen), turn)
    assert passes <= len({h.tenant for h in heads} - {wanted.tenant})


@dataclass
class Clock:
    """A clock that stands still unless a unit of work moves it."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class CountingBackend:
    """A pass takes `units` units, a request `new` steps; every unit takes its time on the clock and is written down."""

    clock: Clock
    units: int = 1
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 1.0, "sample": 1.0})
    log: list[str] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def spend(self, kind: str, what: str) -> None:
        self.clock.now += self.seconds[kind]
        self.log.append(what)

    def micro_batches(self, run_id: str, training_input: Any) -> list[MicroBatch]:
        """A datum each, of which ten share a pass."""
        return [MicroBatch(replace(training_input, data=(datum,)), 1, 10) for datum in training_input.data]

    def forward(self, parts: Any) -> Any:
        for _ in range(self.units):
            self.spend("train", "+".join(part.run_id for part in parts))
            yield
        return [PartResult([], {}) for _ in parts]

    forward_backward = forward

    def add_request(self, request: GenerateRequest) -> int:
        number = next(self.numbers)
        self.running[number] = request.max_new
        return number

    def step(self) -> list[Generation]:
        self.spend("sample", "sample")
        self.running = {number: left - 1 for number, left in self.running.items()}
        done = [number for number, left in self.running.items() if left == 0]
        for number in done:
            del self.running[number]
        return [Generation(number, [], 0) for number in done]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("mint.local.scheduler.time", made)
    return made


@pytest.fixture
def scheduler(clock: Clock) -> Iterator[Scheduler]:
    made = Scheduler()
    yield made
    made.close()


def submit(
    scheduler: Scheduler, backend: Any, run_id: str, seq_id: int, mode: Any = "forward", num_datums: int = 1
) -> Future[Any]:
    given = prepare_training_input(num_datums * batch()[:1], "cross_entropy")
    return scheduler.submit(run_id, seq_id, PassJob(backend, mode, given, lambda result: result, Future()))


def request(new: int) -> GenerateRequest:
    return GenerateRequest((1,), None, 1, new, 1.0, -1, 1.0, 0, frozenset())


def hold(scheduler: Scheduler) -> threading.Event:
    """The engine stands still until the event is set."""
    let_go, inside = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        let_go.wait(GUARD)

    scheduler.submit(None, 0, CallJob(wait, Future()))
    assert inside.wait(GUARD)
    return let_go


def test_sampling_during_training_both_progress(scheduler: Scheduler, clock: Clock) -> None:
    """Training units are three times as long as sampling units, so there are three of these for each of those."""
    backend = CountingBackend(clock, units=4, seconds={"train": 3.0, "sample": 1.0})
    scheduler.add_queue("run", "x")
    let_go = hold(scheduler)
    passes = [submit(scheduler, backend, "run", seq) for seq in range(1, 6)]
    sampled = scheduler.submit_sample(backend, request(40))  # type: ignore[arg-type]
    let_go.set()
    for future in [*passes, sampled]:
        future.result(GUARD)
    contended = backend.log[: len(backend.log) - backend.log[::-1].index("run")]  # up to the last training unit
    assert contended.count("run") == 20
    trained, sampling = 3.0 * contended.count("run"), 1.0 * min(contended.count("sample"), 40)
    assert sampling == 40.0 or abs(trained - sampling) <= 3.0
    first = backend.log[:24]
    assert abs(3.0 * first.count("run") - first.count("sample")) <= 3.0


def test_heads_of_different_runs_join_one_pass_and_modes_do_not_mix(scheduler: Scheduler, clock: Clock) -> None:
    backend = CountingBackend(clock)
    for run_id in "abcd":
        scheduler.add_queue(run_id, "x")
    let_go = hold(scheduler)
    futures = [submit(scheduler, backend, run_id, 1) for run_id in "abc"]
    clock.now += 1
    futures.append(submit(scheduler, backend, "d", 1, "forward_backward"))
    clock.now += 1
    futures += [submit(scheduler, backend, run_id, 2, "forward_backward") for run_id in "ab"]
    let_go.set()
    for future in futures:
        future.result(GUARD)
    assert backend.log == ["a+b+c", "d+a+b"]


def test_operations_of_a_run_wait_for_the_missing_number(scheduler: Scheduler, clock: Clock) -> None:
    backend, done = CountingBackend(clock), []
    scheduler.add_queue("run", "x")
    futures = {seq: submit(scheduler, backend, "run", seq) for seq in (3, 2)}
    scheduler.submit(None, 0, CallJob(lambda: None, Future())).result(GUARD)
    assert backend.log == []
    for seq, future in futures.items():
        future.add_done_callback(lambda _, seq=seq: done.append(seq))
    submit(scheduler, backend, "run", 1).result(GUARD)
    futures[3].result(GUARD)
    assert done == [2, 3] and backend.log == ["run"] * 3


def test_two_waiting_tenants_take_turns(scheduler: Scheduler, clock: Clock) -> None:
    backends = {tenant: CountingBackend(clock) for tenant in "xy"}
    log: list[str] = []
    for backend in backends.values():
        backend.log = log
    for run_id in ("x1", "x2", "y"):
        scheduler.add_queue(run_id, run_id[0])
    let_go = hold(scheduler)
    futures = [submit(scheduler, backends["x"], "x1", seq) for seq in range(1, 5)]
    futures += [submit(scheduler, backends["y"], "y", seq) for seq in range(1, 5)]
    let_go.set()
    for future in futures:
        future.result(GUARD)
    assert log == ["x1", "y"] * 4


def test_a_tenant_that_worked_alone_does_not_pay_for_it_when_another_comes(scheduler: Scheduler, clock: Clock) -> None:
    old, new = CountingBackend(clock), CountingBackend(clock)
    new.log = old.log
    scheduler.add_queue("old", "x")
    scheduler.add_queue("new", "y")
    for seq in range(1, 101):
        submit(scheduler, old, "old", seq).result(GUARD)
    old.log.clear()
    let_go = hold(scheduler)
    futures = [submit(scheduler, old, "old", 100 + i) for i in range(1, 21)]
    futures += [submit(scheduler, new, "new", i) for i in range(1, 21)]
    let_go.set()
    for future in futures:
        future.result(GUARD)
    assert abs(old.log[:20].count("old") - old.log[:20].count("new")) <= 1


def test_a_thousand_queued_datums_delay_a_single_one_by_one_pass(scheduler: Scheduler, clock: Clock) -> None:
    backend = CountingBackend(clock)
    for run_id in "ab":
        scheduler.add_queue(run_id, run_id)
    let_go = hold(scheduler)
    many = submit(scheduler, backend, "a", 1, num_datums=1000)
    clock.now += 1
    one = submit(scheduler, backend, "b", 1)
    alone = submit(scheduler, backend, "b", 2, "forward_backward")  # which cannot join a forward
    let_go.set()
    for future in (many, one, alone):
        future.result(GUARD)
    assert backend.log == ["a+b", "a", "b", *["a"] * 998]


@pytest.mark.parametrize("num_tenants", [2, 5])
def test_every_waiting_tenant_has_a_turn_before_anybody_has_a_second(
    scheduler: Scheduler, clock: Clock, num_tenants: int
) -> None:
    """Each on a backend of its own, so that nobody joins anybody."""
    backends = [CountingBackend(clock) for _ in range(num_tenants)]
    for i, backend in enumerate(backends):
        scheduler.add_queue(f"r{i}", f"t{i}")
        backend.log = backends[0].log
    let_go = hold(scheduler)
    futures = [submit(scheduler, b, f"r{i}", 1, num_datums=50 if i == 0 else 3) for i, b in enumerate(backends)]
    let_go.set()
    for future in futures:
        future.result(GUARD)
    names = [f"r{i}" for i in range(num_tenants)]
    assert [sorted(backends[0].log[i * num_tenants :][:num_tenants]) for i in range(3)] == [names] * 3
    assert backends[0].log[3 * num_tenants :] == ["r0"] * 47


def test_a_work_of_several_passes_lets_others_in_between(scheduler: Scheduler, clock: Clock) -> None:
    """Only where it pauses: what a pass keeps must not be overwritten by another."""
    backend = CountingBackend(clock)
    for run_id in "ab":
        scheduler.add_queue(run_id, run_id)

    def work() -> Any:
        for _ in range(3):
            backend.spend("train", "begin")
            yield
            backend.spend("train", "end")
            yield PAUSE
        return "done"

    let_go = hold(scheduler)
    long = scheduler.submit("a", 1, WorkJob(work, Future()))
    futures = [submit(scheduler, backend, "b", seq) for seq in (1, 2)]
    let_go.set()
    assert long.result(GUARD) == "done"
    for future in futures:
        future.result(GUARD)
    assert backend.log == ["begin", "end", "b", "begin", "end", "b", "begin", "end"]


def test_what_waits_for_all_before_it_does_and_what_does_not_comes_between_passes(
    scheduler: Scheduler, clock: Clock
) -> None:
    backend = CountingBackend(clock)
    scheduler.add_queue("a", "x")
    let_go = hold(scheduler)
    futures = [submit(scheduler, backend, "a", 1, num_datums=5), submit(scheduler, backend, "a", 2)]
    clock.now += 1
    futures += [
        scheduler.submit(
            None, None, CallJob(lambda waits=waits: backend.log.append(f"waits={waits}"), Future()), waits=waits
        )
        for waits in (True, False)
    ]
    let_go.set()
    for future in futures:
        future.result(GUARD)
    assert backend.log == ["a", "waits=False", *["a"] * 5, "waits=True"]


def test_removing_a_run_between_its_micro_batches_ends_its_work(scheduler: Scheduler, clock: Clock) -> None:
    backend, closed = CountingBackend(clock), threading.Event()
    for run_id in "ab":
        scheduler.add_queue(run_id, "x")

    def work() -> Any:
        try:
            while True:
                yield PAUSE
        finally:
            closed.set()

    def remove() -> None:
        for run_id in "ab":
            scheduler.remove_queue(run_id)

    endless = scheduler.submit("a", 1, WorkJob(work, Future()))
    many = submit(scheduler, backend, "b", 1, num_datums=10**4)
    scheduler.submit(None, None, CallJob(remove, Future()), waits=False).result(GUARD)
    for future in (endless, many):
        with pytest.raises(ClosedError, match="was unloaded before this operation ran"):
            future.result(GUARD)
    assert closed.is_set() and len(backend.log) < 10**4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("call", ["add_request", "micro_batches"])
def test_an_unexpected_error_of_the_backend_reaches_its_caller_and_the_engine_lives(
    scheduler: Scheduler, clock: Clock, call: str
) -> None:
    backend, healthy = CountingBackend(clock), CountingBackend(clock)
    for run_id in ("a", "b"):
        scheduler.add_queue(run_id, "x")

    def fail(*args: Any) -> Any:
        raise RuntimeError("cannot allocate memory")

    setattr(backend, call, fail)
    if call == "add_request":
        future: Future[Any] = scheduler.submit_sample(backend, request(1))  # type: ignore[arg-type]
    else:
        future = submit(scheduler, backend, "a", 1)
    assert str(future.exception(1)) == "cannot allocate memory"
    submit(scheduler, healthy, "b", 1).result(1)
