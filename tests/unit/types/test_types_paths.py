"""Names of checkpoints: one scheme, parsed strictly; nothing in them can leave the folder of its run."""

from __future__ import annotations

import string
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint import InputError
from mint.types import CheckpointType, ParsedCheckpointTinkerPath
from mint.types.checkpoints import check_checkpoint_name

PLAIN = string.ascii_letters + string.digits + "_"
NAMES = st.builds(str.__add__, st.sampled_from(PLAIN), st.text(PLAIN + "-.", max_size=40))
RUNS = st.builds(str.__add__, st.sampled_from(PLAIN), st.text(PLAIN + "-.:", max_size=40))
KINDS = st.sampled_from(get_args(CheckpointType))
FORM = "a checkpoint path has the form tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME"
NAME_RULE = "use 1 to 240 letters, digits, '_', '-' or '.', starting with a letter, digit or '_'"


@pytest.mark.parametrize(
    ("path", "parsed"),
    [
        ("tinker://abc:train:0/weights/000020", ("abc:train:0", "training", "000020")),
        ("tinker://abc:train:0/sampler_weights/final", ("abc:train:0", "sampler", "final")),
        ("mint://abc/weights/step-1.5_b", ("abc", "training", "step-1.5_b")),
        ("mint://abc/sampler_weights/a..b", ("abc", "sampler", "a..b")),
    ],
)
def test_a_path_is_taken_apart(path: str, parsed: tuple[str, str, str]) -> None:
    assert tuple(ParsedCheckpointTinkerPath.from_tinker_path(path)) == parsed


def test_a_path_is_always_rendered_with_the_one_scheme() -> None:
    parsed = ParsedCheckpointTinkerPath.from_tinker_path("mint://run/sampler_weights/n")
    assert parsed.tinker_path == "tinker://run/sampler_weights/n"
    assert parsed.checkpoint_id == "sampler_weights/n"
    assert ParsedCheckpointTinkerPath("run", "training", "n").checkpoint_id == "weights/n"


@settings(deadline=None)
@given(RUNS, KINDS, NAMES)
def test_what_is_rendered_parses_to_the_same(run: str, kind: CheckpointType, name: str) -> None:
    made = ParsedCheckpointTinkerPath(run, kind, name)
    assert ParsedCheckpointTinkerPath.from_tinker_path(made.tinker_path) == made


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_whatever_parses_has_three_plain_parts(run: str, segment: str, name: str) -> None:
    path = f"tinker://{run}/{segment}/{name}"
    try:
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
    except InputError:
        return
    assert parsed.tinker_path == path
    for part in (parsed.training_run_id, parsed.name):
        assert set(part) <= set(PLAIN + "-.:")
        assert part[0] in PLAIN


@pytest.mark.parametrize(
    "path",
    [
        "",
        "final",
        "abc/weights/final",
        "http://abc/weights/final",
        "TINKER://abc/weights/final",
        "tinker:/abc/weights/final",
        "tinker://abc/final",
        "tinker://abc/weights/final/more",
        "tinker://abc/weights/final/",
        "tinker://abc//final",
        "tinker:///weights/final",
        "tinker://abc/external_weights/final",
        "tinker://abc/Weights/final",
        "tinker://../weights/final",
        "tinker://.abc/weights/final",
        "tinker://:abc/weights/final",
        "tinker://a b/weights/final",
        "tinker://a\\b/weights/final",
        "tinker://abc\0/weights/final",
        "tinker://abc\n/weights/final",
        "tinker://äbc/weights/final",
        f"tinker://{'a' * 241}/weights/final",
        None,
        5,
        b"tinker://abc/weights/final",
    ],
)
def test_any_other_form_is_refused_with_the_right_one(path: Any) -> None:
    with pytest.raises(InputError) as caught:
        ParsedCheckpointTinkerPath.from_tinker_path(path)
    assert str(caught.value) == f"checkpoint path {path!r}: {FORM}"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "a b",
        "a/b",
        "a\\b",
        "a:b",
        "a\n",
        "a\0",
        "ä",
        "..%2f",
        "~",
        "a" * 241,
        None,
        7,
        ["a"],
    ],
)
def test_names_that_could_leave_the_folder_or_hide_are_refused(name: Any) -> None:
    with pytest.raises(InputError) as caught:
        check_checkpoint_name(name)
    assert str(caught.value) == f"checkpoint name {name!r}: {NAME_RULE}"
    if isinstance(name, str) and "/" not in name:
        with pytest.raises(InputError, match="checkpoint name"):
            ParsedCheckpointTinkerPath.from_tinker_path(f"tinker://abc/weights/{name}")


@settings(deadline=None)
@given(NAMES)
def test_plain_names_are_handed_back(name: str) -> None:
    assert check_checkpoint_name(name) == name
