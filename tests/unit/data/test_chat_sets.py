"""Chat sets by name: from a loopback hub, from files, the packaged one."""

import json
import subprocess
import sys

import pytest
from tests.support.fakehub import FakeHub
from tests.support.tiny_models import NO_ROBOTS, TULU3, write_tiny_dataset

from mint.data import load_chat_set
from mint.errors import DataError, InputError

# Loads a set twice, the second time from the cache, and shows what a program would see. The hub's client reads its
# environment once, hence a process of its own.
SHOW = """
    import json, sys
    from mint.data import load_chat_set

    chats = load_chat_set(sys.argv[1])
    whole = chats.train[2:5]
    print(json.dumps([repr(chats), chats.train_on, chats.train[0], chats.test[len(chats.test) - 1],
                      [len(whole), whole[0] == chats.train[2]]]))
"""


def show(name, env, cwd):
    import textwrap

    command = [sys.executable, "-c", textwrap.dedent(SHOW), name]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_no_robots_has_its_own_test_rows_and_is_read_from_the_cache_afterwards(tmp_path, empty):
    write_tiny_dataset(tmp_path / "hub" / "datasets" / NO_ROBOTS, NO_ROBOTS, rows=20)
    with FakeHub(tmp_path / "hub") as hub:
        first = show("no_robots", hub.env(tmp_path / "hf"), empty)
        assert first.returncode == 0, first.stderr
        asked = len(hub.requests)
        again = show("no_robots", hub.env(tmp_path / "hf"), empty)
        assert again.stdout == first.stdout and len(hub.requests) == asked
    name, train_on, row, last, sliced = json.loads(first.stdout)
    assert (name, train_on) == ("ChatSet('no_robots', 20 to train on, 5 held out)", "all_assistant")
    assert "Question 0: what is France known for?" in row[1]["content"]
    assert "Question 24:" in last[0]["content"] and sliced == [3, True]


def test_tulu3_holds_1024_rows_out_and_trains_the_last_answer(tmp_path, empty):
    write_tiny_dataset(tmp_path / "hub" / "datasets" / TULU3, TULU3, rows=1100)
    with FakeHub(tmp_path / "hub") as hub:
        done = show("tulu3", hub.env(tmp_path / "hf"), empty)
    assert done.returncode == 0, done.stderr
    name, train_on, *_ = json.loads(done.stdout)
    assert (name, train_on) == ("ChatSet('tulu3', 76 to train on, 1,024 held out)", "last_assistant")


def test_without_a_hub_the_error_names_the_ways_out(tmp_path, empty):
    with FakeHub(tmp_path) as hub:
        env = hub.env(tmp_path / "hf")
    done = show("no_robots", env, empty)  # the hub is gone
    assert done.returncode == 1
    assert "mint.errors.HubUnreachableError: HuggingFaceH4/no_robots is not (completely) in the" in done.stderr
    assert "or use the data set 'packaged', which needs no hub" in done.stderr


def test_a_data_set_that_the_hub_does_not_have_is_named(tmp_path, empty):
    (tmp_path / "hub" / "datasets").mkdir(parents=True)
    with FakeHub(tmp_path / "hub") as hub:
        done = show("no_robots", hub.env(tmp_path / "hf"), empty)
    assert "mint.errors.DataError: the hub shows no dataset HuggingFaceH4/no_robots (HTTP 40" in done.stderr


def write_rows(path, count):
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["messages"] for row in rows]


def test_a_file_is_split_by_seed_and_loses_no_row(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", 40)
    chats = load_chat_set(str(tmp_path / "a.jsonl"), seed=1)
    assert (len(chats.train), len(chats.test)) == (36, 4)
    assert sorted(map(str, [*chats.train, *chats.test])) == sorted(map(str, rows))
    again, other = (load_chat_set(str(tmp_path / "a.jsonl"), seed=seed) for seed in (1, 2))
    assert list(again.test) == list(chats.test) and list(other.test) != list(chats.test)


def test_a_test_file_is_used_whole(tmp_path):
    rows, held_out = write_rows(tmp_path / "a.jsonl", 5), write_rows(tmp_path / "b.jsonl", 3)
    chats = load_chat_set(str(tmp_path / "a.jsonl"), test=tmp_path / "b.jsonl")
    assert list(chats.train) == rows and list(chats.test) == held_out


def test_what_is_no_chat_set_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"data set 'no_robot': there is no such file, and it is none of packaged, no_"):
        load_chat_set("no_robot")
    with pytest.raises(InputError, match=r"test=0\.1: packaged has its own held-out rows"):
        load_chat_set("packaged", test=0.1)
    write_rows(tmp_path / "one.jsonl", 1)
    with pytest.raises(
        DataError, match=r"one\.jsonl: one row cannot be split into train and test rows; give a test file"
    ):
        load_chat_set(str(tmp_path / "one.jsonl"))
