"""Token ids with the vocabularies of real models, against those that transformers gave for the same conversations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from mint.chat import conversation_to_datums, get_renderer
from tests.goldens.make_goldens import FOLDER, unpacked
from tests.support import real_tokenizers
from tests.support.chat_cases import CASES, can_be_trained, cases_of, holds_closed_thought, settings_of
from tests.unit.chat.conversations import all_tokens, all_weights

SETTINGS = [(template, thinking) for template in real_tokenizers.SOURCES for thinking in settings_of(template)]
every_setting = pytest.mark.parametrize(
    ("template", "thinking"), SETTINGS, ids=[f"{name}{' thinking' if on else ''}" for name, on in SETTINGS]
)


@cache
def goldens(template: str) -> Any:
    return json.loads((FOLDER / f"{template}.json").read_text(encoding="utf-8"))


def read(template: str, thinking: bool) -> Iterator[tuple[str, list[int], dict[int, list[int]]]]:
    """Title, ids of the whole conversation, and ids of the prompts by the number of their messages."""
    for title, (whole, prompts) in goldens(template)["thinking" if thinking else "not thinking"].items():
        yield title, whole, {int(count): unpacked(whole, packed) for count, packed in prompts.items()}


def loaded(template: str) -> Any:
    try:
        return real_tokenizers.load(template)
    except real_tokenizers.NotHereError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def smollm2_is_loaded() -> None:
    """Before a test gets a MINT_HOME of its own: the user's holds the converted model."""
    with contextlib.suppress(real_tokenizers.NotHereError):
        real_tokenizers.load("smollm2")


@cache
def _renderer(template: str, thinking: bool) -> Any:
    return get_renderer(loaded(template), thinking=thinking)


@pytest.fixture
def renderer(template: str, thinking: bool) -> Any:
    return _renderer(template, thinking)


def row(title: str) -> Any:
    case = CASES[title]
    return {"messages": case.messages, "tools": case.tools} if case.tools else case.messages


@every_setting
def test_the_goldens_hold_every_conversation_and_prompt_of_the_template(template: str, thinking: bool) -> None:
    held = {title: list(prompts) for title, _, prompts in read(template, thinking)}
    assert held == {title: case.prompts for title, case in cases_of(template)}


@every_setting
def test_prompts_have_the_golden_ids(template: str, thinking: bool, renderer: Any) -> None:
    for title, _, prompts in read(template, thinking):
        case = CASES[title]
        for count, expected in prompts.items():
            found = renderer.prompt(case.messages[:count], case.tools)
            if holds_closed_thought(template, thinking, renderer.tokenizer.decode(expected)):
                assert renderer.tokenizer.decode(found) == renderer.tokenizer.decode(expected), title
            else:
                assert found == expected, f"{title}: {count} messages"


@every_setting
def test_every_answer_is_trained_after_the_golden_prompt(template: str, thinking: bool, renderer: Any) -> None:
    for title, _, prompts in read(template, thinking):
        if not can_be_trained(template, thinking, CASES[title]):
            continue
        runs = []  # (tokens before and in the answer, where its trained part starts)
        for datum in conversation_to_datums(row(title), renderer, 8192):
            tokens, weights = all_tokens(datum), all_weights(datum)
            stops = [i + 1 for i, weight in enumerate(weights) if weight and not [*weights, 0.0][i + 1]]
            starts = [i for i, weight in enumerate(weights) if weight and not weights[i - 1]]
            runs += [(tokens[:stop], start) for start, stop in zip(starts, stops, strict=True)]
        for (tokens, start), index in zip(runs, CASES[title].answers, strict=True):
            prompt = prompts[index]
            if holds_closed_thought(template, thinking, renderer.tokenizer.decode(prompt)):
                prompt = renderer.prompt(CASES[title].messages[:index], CASES[title].tools)
            assert tokens[: len(prompt)] == prompt, f"{title}: message {index}"
            assert start >= len(prompt)


@every_setting
def test_a_conversation_that_ends_with_an_answer_has_the_golden_ids(
    template: str, thinking: bool, renderer: Any
) -> None:
    compared = 0
    for title, whole, prompts in read(template, thinking):
        case = CASES[title]
        if case.answers[-1] != len(case.messages) - 1 or not can_be_trained(template, thinking, case):
            continue
        tokens = all_tokens(conversation_to_datums(row(title), renderer, 8192)[-1])
        prompt = prompts[case.answers[-1]]
        if whole[: len(prompt)] == prompt:
            assert tokens == whole[: len(tokens)], title
            rest = renderer.tokenizer.decode(whole[len(tokens) :])
        else:  # the sampler's tokens at the border of prompt and answer are not those of the text in one piece
            text, wanted = (renderer.tokenizer.decode(ids) for ids in (tokens, whole))
            assert wanted.startswith(text), title
            rest = wanted.removeprefix(text)
        assert rest in ("", "\n"), title
        compared += 1
    assert compared >= 10


def test_the_qwen3_tokenizer_is_the_published_one() -> None:
    """Sizes and ids as in the model's tokenizer.json."""
    tokenizer = loaded("qwen3")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert (len(tokenizer), len(model["vocab"]), len(model["merges"])) == (151669, 151643, 151387)
    ids = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<think>": 151667, "</think>": 151668}
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in ids} == ids


def test_the_qwen3_6_tokenizer_gives_the_ids_that_its_package_documents() -> None:
    expected = [9419, 0, 220, 97169, 97621, 6115, 16, 478, 220, 16, 283, 220, 17, 9551, 254]
    expected += [68933, 128, 97, 91914, 28495, 68933, 128, 105, 68933, 128, 95]
    text = "Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ"  # noqa: RUF001, as it stands there
    assert loaded("qwen3_6").encode(text, add_special_tokens=False) == expected


@pytest.mark.parametrize("template", real_tokenizers.SOURCES)
def test_words_are_remembered_with_real_tokenizers(template: str) -> None:
    """Their pre-tokenizers are recognised, so rendering is as fast as measured."""
    assert _renderer(template, False).style.encoder.words is not None
