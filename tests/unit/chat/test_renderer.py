"""Which tokenizers get a renderer, what it stops at, and how sampled tokens become an answer."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tests.unit.chat.conversations import HELLO, TWO_TURNS, chat, template_ids
from tests.unit.chat.tiny_tokenizers import FAMILIES, TEMPLATES, make_tokenizer, tokenizer_of

from mint.chat import Response, get_renderer
from mint.errors import InputError, UnsupportedError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen3_source() -> str:
    return (TEMPLATES / "qwen3.jinja").read_text()


def test_family_of_each_template() -> None:
    assert {name: get_renderer(tokenizer_of(name)).settings["family"] for name in FAMILIES} == {
        "smollm2": "chatml",
        "qwen2_5": "chatml",
        "qwen3": "qwen3",
        "qwen3_instruct_2507": "chatml",
        "llama3": "llama3",
        "llama3_1": "llama3-dated",
        "llama3_2": "llama3-dated",
    }


def test_repr_shows_what_a_run_has_to_record() -> None:
    assert repr(get_renderer(tokenizer_of("llama3_2"), date="1 Jan 2030")) == (
        "Renderer(family='llama3-dated', default_system=None, thinking=False, date='1 Jan 2030')"
    )
    assert get_renderer(tokenizer_of("qwen3"), thinking=True).settings == {
        "family": "qwen3",
        "default_system": None,
        "thinking": True,
        "date": None,
    }


def test_a_revised_template_that_behaves_the_same_is_recognised() -> None:
    tokenizer = make_tokenizer("qwen3", "{# revised #}" + qwen3_source().replace("multi_step_tool", "still_tools"))
    assert get_renderer(tokenizer).settings["family"] == "qwen3"


def test_another_default_system_text_is_found_and_rendered() -> None:
    source = (TEMPLATES / "qwen2_5.jinja").read_text().replace("You are Qwen, created by Alibaba Cloud. ", "")
    tokenizer = make_tokenizer("qwen2_5", source)
    renderer = get_renderer(tokenizer)
    assert renderer.settings["default_system"] == "You are a helpful assistant."
    assert renderer.prompt(HELLO[:1]) == template_ids(tokenizer, HELLO[:1], add_generation_prompt=True)


def test_setting_another_template_is_noticed() -> None:
    tokenizer = make_tokenizer("qwen3")
    assert get_renderer(tokenizer).settings["family"] == "qwen3"
    tokenizer.chat_template = CHATML
    assert get_renderer(tokenizer).settings["family"] == "chatml"


UNSUPPORTED = {
    "other headers": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}",
    "insists on taking turns": CHATML
    + "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}",
    "dates its default system text": "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\n' + strftime_now('%Y') + '<|im_end|>\n' }}{% endif %}" + CHATML,
    "always thinks": CHATML.replace("assistant\n", "assistant\n<think>\n"),
    "starts a thought when asked to": CHATML + "{% if enable_thinking is true %}<think>{% endif %}",
    "ends a last answer otherwise": CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
    "trims system texts": CHATML.replace("m.content", "(m.content|trim if m.role == 'system' else m.content)"),
    "trims answers": CHATML.replace("m.content", "(m.content|trim if m.role == 'assistant' else m.content)"),
    "qwen3 that keeps thoughts in the history": qwen3_source().replace("loop.index0 > ns.last_query_index", "true"),
    "qwen3 that shows every empty thought": qwen3_source().replace(
        "loop.last or (not loop.last and reasoning_content)", "true"
    ),
    "qwen3 that takes a tool's text for a question": qwen3_source().replace(
        "message.content.startswith(", "(false and "
    ),
    "no end of turn": CHATML.replace("<|im_end|>", ""),
    "refuses everything": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("template", UNSUPPORTED)
def test_any_other_template_is_refused_naming_what_it_writes_and_what_is_supported(template: str) -> None:
    tokenizer = make_tokenizer("qwen3", UNSUPPORTED[template])
    with pytest.raises(UnsupportedError) as caught:
        get_renderer(tokenizer)
    message = str(caught.value)
    assert "its chat template is of no supported family" in message
    assert "Supported: chatml (SmolLM2, Qwen2, Qwen2.5, Qwen3-Instruct-2507); qwen3 (" in message
    if template == "refuses everything":
        assert "cannot be run on a single user message" in message
    else:
        shown = tokenizer.apply_chat_template(chat("V"), tokenize=False, add_generation_prompt=True)
        assert f"writes the user message 'V' as {shown!r}" in message


def test_a_model_name_in_place_of_a_tokenizer_is_refused_saying_how_to_load_one() -> None:
    with pytest.raises(InputError, match=r"expected a transformers tokenizer, got str; load one with AutoTokenizer"):
        get_renderer("Qwen/Qwen3-0.6B")  # type: ignore[arg-type]


def test_a_tokenizer_without_template_is_refused_naming_it() -> None:
    tokenizer = make_tokenizer("qwen3", "")
    tokenizer.name_or_path = "some/base-model"
    with pytest.raises(
        UnsupportedError, match=r"tokenizer 'some/base-model' has no chat template \(is it a base model\?\)"
    ):
        get_renderer(tokenizer)


def test_an_end_of_turn_that_is_not_one_token_is_refused() -> None:
    tokenizer = make_tokenizer("llama3", CHATML)  # has none of ChatML's tokens
    with pytest.raises(UnsupportedError, match=r"ends turns with '<\|im_end\|>', which is not one token"):
        get_renderer(tokenizer)


def test_options_that_a_family_does_not_have_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"thinking=True: the chatml template .* has no thinking switch"):
        get_renderer(tokenizer_of("smollm2"), thinking=True)
    with pytest.raises(UnsupportedError, match=r"date='1 Jan 2030': the qwen3 template .* writes no date"):
        get_renderer(tokenizer_of("qwen3"), date="1 Jan 2030")
    for date in (" ", "1\n2", 20300101):
        with pytest.raises(InputError, match=r"expected one line of text such as '26 Jul 2024'"):
            get_renderer(tokenizer_of("llama3_1"), date=date)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("smollm2", ["<|im_end|>", "<|endoftext|>"]),
        ("qwen3", ["<|im_end|>", "<|endoftext|>"]),
        ("llama3_1", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]),
    ],
)
def test_stop_tokens_are_end_of_turn_first_then_the_ends_of_text(name: str, stops: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    assert get_renderer(tokenizer).stop_token_ids == tokenizer.convert_tokens_to_ids(stops)


def test_an_eos_of_its_own_is_a_stop_too() -> None:
    tokenizer = make_tokenizer("qwen3")
    tokenizer.add_special_tokens({"eos_token": "<|done|>"})
    assert get_renderer(tokenizer).stop_token_ids[-1] == tokenizer.eos_token_id


def encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def test_parse_ends_at_the_first_stop_token(family: str, tokenizer: Any) -> None:
    renderer = get_renderer(tokenizer)
    answer = encode(tokenizer, " Hi, 世界!\n")
    content = " Hi, 世界!\n"
    for stop in renderer.stop_token_ids:
        assert renderer.parse([*answer, stop, *answer]) == Response(content, None, True)
    assert renderer.parse(answer) == Response(content, None, False)
    assert renderer.parse(np.array(answer)) == Response(content, None, False)  # type: ignore[arg-type]
    assert renderer.parse([]) == Response("", None, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nFirst this.\n</think>\n\nThen that.<|im_end|>", Response("Then that.", "First this.", True)),
        ("<think>\n\n</think>\n\nAt once.<|im_end|>", Response("At once.", None, True)),
        ("At once.<|im_end|>", Response("At once.", None, True)),
        ("<think>\nNever done", Response("", "Never done", False)),
    ],
)
def test_parse_takes_the_thought_out(qwen3: Any, text: str, expected: Response) -> None:
    assert get_renderer(qwen3, thinking=True).parse(encode(qwen3, text)) == expected


def test_parsed_answer_put_into_the_conversation_continues_the_sampled_tokens(smollm2: Any) -> None:
    renderer = get_renderer(smollm2)
    prompt = renderer.prompt(TWO_TURNS[:1])
    sampled = [*encode(smollm2, "Hi there!"), smollm2.eos_token_id]
    response = renderer.parse(sampled)
    assert response.message == {"role": "assistant", "content": "Hi there!"}
    following = renderer.prompt([TWO_TURNS[0], response.message, TWO_TURNS[2]])
    assert following[: len(prompt) + len(sampled)] == [*prompt, *sampled]


def test_importing_the_package_loads_no_tokenizer_library_and_no_torch() -> None:
    code = "import mint.chat, sys; print(sorted({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_and_exist() -> None:
    import mint.chat

    assert mint.chat.__all__ == sorted(mint.chat.__all__)
    assert all(hasattr(mint.chat, name) for name in mint.chat.__all__)
