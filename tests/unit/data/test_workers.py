"""Worker processes: the same batches, cursors and reports as without, from any cursor; how they fail and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.preparations import (
    CannotBeLoaded,
    CannotBePickled,
    Fails,
    ModulesLoaded,
    Pid,
    Squares,
    Waits,
)
from tests.unit.chat.conversations import CONVERSATIONS
from tests.unit.chat.tiny_tokenizers import tokenizer_of

from mint.chat import Converter, UnusableRow
from mint.data import Batches, Cursor, Workers, stream_outcomes
from mint.errors import ClosedError, DataError, InputError, OperationError


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers[tuple[int, int | None]]]:
    with Workers(Squares(unusable=3).outcomes, 2, chunk_rows=4) as workers:
        yield workers


def taken(batches: Batches[int], count: int) -> list[tuple[list[int], Cursor]]:
    return [(next(batches), batches.cursor) for _ in range(count)]


def wait_until_ended(pids: set[int]) -> None:
    """Fails by the test runner's own limit, not by a clock of ours."""
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        time.sleep(0.01)


@given(num_rows=st.integers(0, 60), stop=st.integers(0, 60))
@settings(deadline=None, max_examples=40)
def test_outcomes_come_in_order_and_a_new_stream_replaces_one_that_was_left(pool, num_rows, stop):
    expected = list(Squares(unusable=3).outcomes((number, number) for number in range(num_rows)))
    outcomes = pool.outcomes((number, number) for number in range(num_rows))
    assert [outcome for _, outcome in zip(range(stop), outcomes, strict=False)] == expected[:stop]
    assert list(pool.outcomes((number, number) for number in range(num_rows))) == expected


@pytest.mark.parametrize("workers", [1, 2])
@given(
    num_rows=st.integers(1, 40),
    unusable=st.sampled_from([0, 2, 3, 7]),
    stop=st.integers(0, 12),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(deadline=None, max_examples=4)
def test_batches_cursors_and_what_was_taken_are_those_without_workers(workers, num_rows, unusable, stop, seed, data):
    batch_size = data.draw(st.integers(1, max(1, num_rows // 3)))
    plain, ahead, resumed = (Squares(unusable) for _ in range(3))
    rows = range(1, num_rows + 1) if num_rows == 1 else range(num_rows)
    expected = taken(Batches(rows, batch_size, seed, prepare=plain), 12)
    with Batches(rows, batch_size, seed, prepare=ahead, workers=workers) as batches:
        first = taken(batches, stop)
    with Batches(rows, batch_size, seed, batches.cursor, prepare=resumed, workers=workers) as batches:
        assert first + taken(batches, 12 - stop) == expected
    assert ahead.taken + resumed.taken == plain.taken


def test_a_cursor_that_is_set_by_hand_is_where_the_next_batch_begins():
    rows = range(50)
    plain, ahead = Batches(rows, 4, prepare=Squares()), Batches(rows, 4, prepare=Squares(), workers=1)
    for cursor in (Cursor(0, 8), Cursor(3, 2), Cursor(0, 0), Cursor(1, 49), Cursor(2, 50)):
        plain.cursor = ahead.cursor = cursor
        assert taken(ahead, 3) == taken(plain, 3)
    ahead.close()


@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_a_converter_gives_the_same_datums_and_report(name):
    rows = [*CONVERSATIONS.values(), UnusableRow("file.jsonl, line 3: no 'messages'"), [{"role": "user"}]] * 3
    rows.append([{"role": "user", "content": "x"}, {"role": "assistant", "content": "much too long " * 60}])
    plain, ahead = (Converter(tokenizer_of(name), 300, on_overlong="truncate_left_turns") for _ in range(2))
    expected = Batches(rows, 5, prepare=plain)
    with Batches(rows, 5, prepare=ahead, workers=2) as batches:
        for _ in range(12):
            assert next(batches) == next(expected)
            assert batches.cursor == expected.cursor
    assert ahead.report == plain.report
    assert (
        ahead.report.skipped.keys()
        == {"unreadable", "bad_content", "overlong", "empty_answer"} & ahead.report.skipped.keys()
    )


def test_an_error_that_a_converter_raises_by_its_rules_is_raised_in_its_turn_and_again():
    rows = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * n}] for n in range(1, 60)]
    plain, ahead = (Converter(tokenizer_of("smollm2"), 120, on_overlong="error") for _ in range(2))
    expected = Batches(rows, 4, prepare=plain)
    with Batches(rows, 4, prepare=ahead, workers=1) as batches:
        for _ in range(8):
            results = []
            for which in (expected, batches):
                try:
                    results.append(next(which))
                except DataError as error:
                    results.append(str(error))
            assert results[0] == results[1]
    assert isinstance(results[0], str)


def test_a_stream_of_a_converter_is_the_same_in_process_and_in_workers():
    rows = list(CONVERSATIONS.values())
    converter = Converter(tokenizer_of("qwen2_5"), 200)
    plain, ahead = (list(stream_outcomes(rows, converter, workers)) for workers in (0, 1))
    assert len(plain) == len(rows)
    assert [str(outcome.error) for outcome in ahead] == [str(outcome.error) for outcome in plain]
    assert [converter.take(outcome) for outcome in ahead] == [converter.take(outcome) for outcome in plain]


def test_rows_are_prepared_in_other_processes_a_bounded_number_ahead():
    read = []

    def rows() -> Iterator[tuple[int, int]]:
        for number in range(10_000):
            read.append(number)
            yield number, number

    with Workers(Pid().outcomes, 2, chunk_rows=5) as workers:
        pids = {pid for pid, _ in zip(workers.outcomes(rows()), range(500), strict=False)}
    assert len(pids) == 2 and os.getpid() not in pids
    assert 500 <= len(read) <= 500 + 5 * 5  # the chunk in hand, and 2 * 2 that are prepared or in preparation


def test_a_worker_that_renders_has_loaded_neither_torch_nor_datasets():
    rows = list(CONVERSATIONS.values())
    preparation = ModulesLoaded(Converter(tokenizer_of("qwen3"), 500))
    assert list(stream_outcomes(rows, preparation, workers=1)) == [[]] * len(rows)


def test_what_a_preparation_raises_comes_in_its_rows_turn():
    with Workers(Fails().outcomes, 1, chunk_rows=8) as workers:
        outcomes = workers.outcomes(enumerate(["a", "data error", "b", "bug", "c"]))
        made = list(outcomes)
    assert [made[0], made[2], made[4]] == ["a", "b", "c"]
    assert isinstance(made[1].error, DataError) and str(made[1].error) == "[bad_content] row 1 is bad"
    assert isinstance(made[3].error, OperationError)
    assert str(made[3].error) == "row 3: preparing it failed in a worker process (KeyError: 'bug')"
    assert "raise KeyError(row)" in made[3].error.__notes__[0]
    with pytest.raises(DataError, match=r"\[bad_content\] row 1 is bad"):
        list(stream_outcomes(["a", "data error"], Fails(), workers=1))


@pytest.mark.parametrize("seed", range(4))
def test_a_row_that_raises_is_heard_of_only_when_a_batch_comes_to_it(seed):
    """Also where it is left over at the end of an epoch, although it was prepared."""
    rows = ["a", "b", "c", "d", "e", "f", "g", "data error"]

    def until_error(batches: Batches[str]) -> list[list[str] | str]:
        made: list[list[str] | str] = []
        while not made or isinstance(made[-1], list):
            try:
                made.append(next(batches))
            except DataError as error:
                made.append(str(error))
        return made

    expected = until_error(Batches(rows, 5, seed, prepare=Fails()))
    with Batches(rows, 5, seed, prepare=Fails(), workers=1) as batches:
        assert until_error(batches) == expected
        assert until_error(batches) == expected[-1:]  # it stands where the next batch begins


def test_an_interrupt_while_waiting_closes_the_workers(tmp_path):
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    batches = Batches(range(8), 2, prepare=Waits(tmp_path), workers=1)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not any(psutil.pid_exists(pid) for pid in pids_of(tmp_path))
    with pytest.raises(ClosedError, match="make new batches from the last cursor"):
        next(batches)


@pytest.mark.parametrize(("row", "how"), [("killed", "was ended by SIGKILL"), ("exit", "ended with exit code 3")])
def test_a_worker_that_dies_is_an_error_that_says_so(row, how):
    batches = Batches(["a", "a", row], 3, prepare=Fails(), workers=1)
    with pytest.raises(OperationError, match=f"a worker process that prepares rows {how}.*workers=0"):
        next(batches)
    with pytest.raises(ClosedError, match="the worker processes were closed"):
        next(batches)


def test_what_cannot_go_to_a_worker_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"CannotBePickled cannot be sent to a worker process.*workers=0"):
        Batches([1, 2], 1, prepare=CannotBePickled(), workers=1)
    with pytest.raises(InputError, match=r"rows 0 to 1 cannot be sent to a worker process.*workers=0"):
        Batches([lambda: 1, 2], 1, prepare=Squares(), workers=1)
    with (
        pytest.raises(InputError, match=r"could not be set up in a worker process \(ValueError: not here\)"),
        Batches([1, 2], 1, prepare=CannotBeLoaded(), workers=1) as batches,
    ):
        next(batches)
    with pytest.raises(InputError, match="workers=1: prepare must come in two halves"):
        Batches([1, 2], 1, prepare=lambda number, row: [row], workers=1)
    with pytest.raises(InputError, match=r"workers=-1: must be 0 .* or more"):
        Batches([1, 2], 1, prepare=Squares(), workers=-1)
    with pytest.raises(InputError, match="-1 worker processes with 32 rows a message: both must be at least 1"):
        list(stream_outcomes([1, 2], Squares(), workers=-1))


def test_closing_ends_workers_that_are_busy(tmp_path):
    batches = Batches(range(8), 2, prepare=Waits(tmp_path), workers=2)
    while len(pids := pids_of(tmp_path)) < 2:
        time.sleep(0.01)
    assert {child.pid for child in psutil.Process().children()} >= pids
    batches.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(ClosedError, match="make new batches from the last cursor"):
        next(batches)


def test_batches_that_nobody_holds_take_their_workers_with_them(tmp_path):
    batches = Batches(range(8), 2, prepare=Waits(tmp_path), workers=1)
    while not (pids := pids_of(tmp_path)):
        time.sleep(0.01)
    del batches
    assert not any(psutil.pid_exists(pid) for pid in pids)


def pids_of(marks: Path) -> set[int]:
    return {int(path.name) for path in marks.iterdir() if path.name.isdecimal()}


def with_our_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


SCRIPT = """
    import sys
    from pathlib import Path
    from tests.support.preparations import Waits
    from mint.data import Batches

    print("script runs", flush=True)
    next(Batches(range(8), 2, prepare=Waits(Path(sys.argv[1])), workers=2))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_an_interrupted_or_killed_script_without_main_guard_leaves_no_worker(tmp_path, sent, ctrl_c_interrupts):
    """Both go to the whole process group, as a terminal sends Ctrl-C."""
    script, marks = tmp_path / "script.py", tmp_path / "marks"
    script.write_text(textwrap.dedent(SCRIPT))
    marks.mkdir()
    process = subprocess.Popen(
        [sys.executable, script, marks], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=with_our_path(),
        process_group=0,
    )  # fmt: skip
    while len(pids := pids_of(marks)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    process.wait()
    (marks / "go on").touch()  # killed, it tidies nothing up: the workers find out at the end of what they are at
    out, err = process.communicate()
    assert out == "script runs\n"
    assert err.count("Traceback") == (1 if sent == signal.SIGINT else 0)
    wait_until_ended(pids)


def test_idle_workers_notice_that_their_parent_was_killed(tmp_path):
    code = """
        import os, signal, sys
        from tests.support.preparations import Pid
        from mint.data import Workers

        workers = Workers(Pid().outcomes, 2, chunk_rows=1)
        print(*set(workers.outcomes((n, n) for n in range(50))), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=with_our_path(), check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    pids = {int(pid) for pid in done.stdout.split()}
    assert len(pids) == 2
    wait_until_ended(pids)


def test_what_a_worker_prints_does_not_stand_on_standard_output(tmp_path):
    code = """
        from tests.support.preparations import Prints
        from mint.data import Workers

        list(Workers(Prints().outcomes, 1).outcomes([(1, "row")]))
        print("mine")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=with_our_path(), check=True
    )
    assert (done.stdout, done.stderr) == ("mine\n", "1 row\n")
