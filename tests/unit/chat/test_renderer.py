"""Which tokenizers get a renderer, what it stops at, and how sampled tokens become an answer."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tests.unit.chat.conversations import HELLO, TWO_TURNS, chat, template_ids, trained_texts
from tests.unit.chat.tiny_tokenizers import FAMILIES, TEMPLATES, make_tokenizer, tokenizer_of

from mint.chat import Response, conversation_to_datums, get_renderer
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
        "qwen3": "chatml",
        "qwen3_instruct_2507": "chatml",
        "llama3": "llama3",
        "llama3_1": "llama3",
        "llama3_2": "llama3",
    }


def test_repr_shows_what_a_run_has_to_record() -> None:
    tokenizer = tokenizer_of("llama3_2")
    template = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()[:16]
    assert repr(get_renderer(tokenizer, date="1 Jan 2030")) == (
        f"Renderer(family='llama3', template='{template}', thinking=False, date='01 Jan 2030')"
    )
    assert get_renderer(tokenizer_of("qwen3"), thinking=True).settings["thinking"] is True
    assert get_renderer(tokenizer_of("qwen3")).settings["date"] is None


def test_another_default_system_text_is_rendered() -> None:
    source = (TEMPLATES / "qwen2_5.jinja").read_text().replace("You are Qwen, created by Alibaba Cloud. ", "")
    tokenizer = make_tokenizer("qwen2_5", source)
    assert get_renderer(tokenizer).prompt(HELLO[:1]) == template_ids(tokenizer, HELLO[:1], add_generation_prompt=True)


def test_a_renderer_can_be_pickled() -> None:
    renderer = get_renderer(tokenizer_of("qwen3"), thinking=True)
    again = pickle.loads(pickle.dumps(renderer))
    assert again.settings == renderer.settings
    assert again.prompt(TWO_TURNS) == renderer.prompt(TWO_TURNS)


def test_setting_another_template_is_noticed() -> None:
    tokenizer = make_tokenizer("qwen3")
    before = get_renderer(tokenizer).prompt(HELLO[:1])
    tokenizer.chat_template = CHATML
    assert get_renderer(tokenizer).prompt(HELLO[:1]) != before


# templates of nobody's: each is used as it is
USED_AS_THEY_ARE = {
    "trims system texts": CHATML.replace("m.content", "(m.content|trim if m.role == 'system' else m.content)"),
    "trims answers": CHATML.replace("m.content", "(m.content|trim if m.role == 'assistant' else m.content)"),
    "ends a last answer otherwise": CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
    "keeps thoughts in the history": qwen3_source().replace("loop.index0 > ns.last_query_index", "true"),
    "shows every empty thought": qwen3_source().replace("loop.last or (not loop.last and reasoning_content)", "true"),
}


@pytest.mark.parametrize("template", USED_AS_THEY_ARE)
def test_a_changed_template_is_followed(template: str) -> None:
    tokenizer = make_tokenizer("qwen3", USED_AS_THEY_ARE[template])
    messages = chat(" Q ", "An answer.", "Another?", "Yes.", system=" S ")
    expected = template_ids(tokenizer, messages[:-1], add_generation_prompt=True, enable_thinking=False)
    assert get_renderer(tokenizer).prompt(messages[:-1]) == expected
    datums = conversation_to_datums(messages, tokenizer, 512)
    assert [text for datum in datums for text in trained_texts(tokenizer, datum)] == [
        "An answer.<|im_end|>",
        "Yes.<|im_end|>",
    ]


UNSUPPORTED = {
    "no end of turn": (CHATML.replace("<|im_end|>", ""), "writes no end-of-turn token after an answer"),
    "refuses everything": ("{{ raise_exception('no') }}", "cannot be run on one question and its answer: no"),
    "leaves answers out": (CHATML.replace("m.content", "('' if m.role == 'assistant' else m.content)"), "end-of-turn"),
    "upper case": (CHATML.replace("m.content", "m.content|upper"), "cannot be used to train on: .* changes its"),
    "computes a date": (CHATML + "{{ strftime_now(fmt) }}", "computes the format of today's date"),
}


@pytest.mark.parametrize("template", UNSUPPORTED)
def test_a_template_that_cannot_be_trained_on_is_refused_saying_why(template: str) -> None:
    source, text = UNSUPPORTED[template]
    tokenizer = make_tokenizer("qwen3", source)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(UnsupportedError, match=f"tokenizer 'some/model': its chat template .*{text}"):
        get_renderer(tokenizer)


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
    with pytest.raises(UnsupportedError, match=r"writes no end-of-turn token .*'<\|im_end\|>.*' follows it"):
        get_renderer(tokenizer)


def test_options_that_a_template_does_not_have_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"thinking=True: the chatml template .* writes no thoughts"):
        get_renderer(tokenizer_of("smollm2"), thinking=True)
    with pytest.raises(UnsupportedError, match=r"date='1 Jan 2030': the chatml template .* writes no date"):
        get_renderer(tokenizer_of("qwen3"), date="1 Jan 2030")
    for date in (" ", "1\n2", "tomorrow", 20300101):
        with pytest.raises(InputError, match=r"expected a date such as '26 Jul 2024' or '2024-07-26'"):
            get_renderer(tokenizer_of("llama3_1"), date=date)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("smollm2", ["<|im_end|>", "<|endoftext|>"]),
        ("qwen3", ["<|im_end|>", "<|endoftext|>"]),
        ("llama3_1", ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]),
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
        ended: Any = "end_of_turn" if stop in renderer.end_token_ids else "end_of_text"
        assert renderer.parse([*answer, stop, *answer]) == Response(content, None, (), ended)
    assert renderer.parse(answer) == Response(content, None, (), "cut_off")
    assert renderer.parse(np.array(answer)) == Response(content, None, (), "cut_off")  # type: ignore[arg-type]
    assert renderer.parse([]) == Response("", None, (), "cut_off")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<think>\nFirst this.\n</think>\n\nThen that.<|im_end|>",
            Response("Then that.", "First this.", (), "end_of_turn"),
        ),
        ("<think>\n\n</think>\n\nAt once.<|im_end|>", Response("At once.", None, (), "end_of_turn")),
        ("At once.<|im_end|>", Response("At once.", None, (), "end_of_turn")),
        ("<think>\nNever done", Response("", "Never done", (), "cut_off")),
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


@pytest.mark.parametrize(
    "block", ['{"name": "f", "arguments": {"a"', '{"name": "f"}</tool_call', "[" * 5_000 + "</tool_call>"]
)
def test_a_tool_call_that_cannot_be_read_leaves_its_text(qwen3: Any, block: str) -> None:
    text = f"I look.\n<tool_call>\n{block}"
    ids = qwen3.encode(text, add_special_tokens=False)
    renderer = get_renderer(qwen3)
    assert renderer.parse(ids) == Response(text, None, (), "cut_off")
    assert renderer.parse([*ids, qwen3.eos_token_id]) == Response(text, None, (), "end_of_turn")


def test_parse_takes_ids_in_any_array(smollm2: Any) -> None:
    torch = pytest.importorskip("torch")
    ids = smollm2.encode("Hello there<|im_end|>", add_special_tokens=False)
    renderer = get_renderer(smollm2)
    for given in (ids, tuple(ids), np.array(ids), torch.tensor(ids)):
        assert renderer.parse(given) == Response("Hello there", None, (), "end_of_turn")


@pytest.mark.parametrize(
    "options",
    [
        {"truncation": True, "max_length": 3},
        {"padding": "max_length", "max_length": 99},
        {"split_special_tokens": True},
    ],
)
def test_a_call_of_the_tokenizer_leaves_nothing_behind(options: dict[str, Any]) -> None:
    """The backend keeps the options of the last call: a common loop that pads would pad everything encoded here."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.pad_token = "<|endoftext|>"
    renderer = get_renderer(tokenizer)
    prompt, datums = renderer.prompt(TWO_TURNS), conversation_to_datums(TWO_TURNS, renderer, 2048)
    tokenizer(["a b c d e f"], **options)
    assert renderer.prompt(TWO_TURNS) == prompt
    tokenizer(["a b c d e f"], **options)
    assert conversation_to_datums(TWO_TURNS, renderer, 2048) == datums


def test_importing_the_package_loads_no_tokenizer_library_and_no_torch() -> None:
    code = "import mint.chat, sys; print(sorted({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_and_exist() -> None:
    import mint.chat

    assert mint.chat.__all__ == sorted(mint.chat.__all__)
    assert all(hasattr(mint.chat, name) for name in mint.chat.__all__)
