"""The cleaning of "chitchat", on conversations of the package's form; the package itself is not fetched here."""

import json
import zipfile
from dataclasses import replace

import pytest

from mint.data import chitchat, load_chat_set, origin
from mint.data.chitchat import cleaned
from mint.hub import CHITCHAT
from mint.hub.package_files import sha256_of


def conversation(*turns):
    """Of (sender, text, text, ...)."""
    return {"messages": [[{"text": text, "sender": sender} for text in texts] for sender, *texts in turns]}


TALK = [("x", "Hello", " how are you? "), ("y", "fine"), ("x", "good"), ("x", "really"), ("y", "yes"), ("x", "bye")]


def test_turns_are_joined_and_the_second_speaker_is_the_assistant():
    assert cleaned(conversation(*TALK)) == [
        {"role": "user", "content": "Hello how are you?"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "good really"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "bye"},
    ]


@pytest.mark.parametrize(
    "turns",
    [
        [("x", "Hello"), ("x", "anybody?"), ("x", "no"), ("x", "bye")],
        [("x", "Hello"), ("y", "hi"), ("x", "bye")],
        [*TALK, ("z", "hi")],
        [("x", "Hello"), ("y", "hi"), ("x", "a"), ("x", "b"), ("y", "  ")],
        *([*TALK, ("y", text)] for text in ("oh SHIT", "write me@mail.org", "call (555) 123-4567", "5551234567?")),
    ],
)
def test_monologues_short_talks_third_people_profanity_and_addresses_are_left_out(turns):
    assert cleaned(conversation(*turns)) is None


@pytest.mark.parametrize("text", ["hello Essex", "I assess the class", "0.0000000013 %", "in 1914-1918", "at 10:30"])
def test_words_and_numbers_that_only_look_like_it_stay(text):
    assert cleaned(conversation(*TALK, ("y", text)))[-1] == {"role": "assistant", "content": text}


def test_the_set_is_made_once_from_the_wheel_and_split(tmp_path, mint_home, monkeypatch):
    talks = {f"id{i}": conversation(*TALK, ("y", f"talk {i}")) for i in range(30)} | {"bad": conversation(("x", "a"))}
    wheel = mint_home / "downloads" / CHITCHAT.wheel
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(CHITCHAT.member, json.dumps(talks))
    (tmp_path / "member").write_text(json.dumps(talks))
    record = replace(CHITCHAT, wheel_sha256=sha256_of(wheel), member_sha256=sha256_of(tmp_path / "member"))
    monkeypatch.setattr(chitchat, "CHITCHAT", record)

    chats = load_chat_set("chitchat", seed=1)
    assert (len(chats.train), len(chats.test), chats.train_on) == (27, 3, "all_assistant")
    assert {row[-1]["content"] for rows in (chats.train, chats.test) for row in rows} == {
        f"talk {i}" for i in range(30)
    }
    number = int(chats.train[4][-1]["content"].split()[1])
    assert origin(chats.train, 4) == f"chitchat, row {number} (line {number + 1})"
    wheel.unlink()
    assert list(load_chat_set("chitchat", seed=1).test) == list(chats.test)
