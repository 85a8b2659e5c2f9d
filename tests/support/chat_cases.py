"""Conversations that every chat family is tested on, and the families' own templates as the reference for them.

What a template can express is written down here by hand, read off its source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any
from unittest.mock import patch

Messages = list[dict[str, Any]]
DAY = datetime(2024, 7, 26)  # the day that is written where a template asks for the date


@dataclass(frozen=True)
class Case:
    """A conversation. needs: features that a template must have to express it."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    needs: frozenset[str] = field(default_factory=frozenset)

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def prompts(self) -> list[int]:
        """How many messages to give as a prompt: those before every answer, and all where no answer is the last."""
        return self.answers + ([len(self.messages)] if self.messages[-1]["role"] != "assistant" else [])

    @property
    def has_reasoning(self) -> bool:
        return any(message.get("reasoning_content") for message in self.messages)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def answer(
    text: str | None, reasoning: str | None = None, calls: list[tuple[str, Any]] | None = None
) -> dict[str, Any]:
    """An assistant message; calls: (name, arguments) pairs."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return message


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": f"The {key}."} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    _tool("get_weather", "Current weather of a city.", city="string", days="integer"),
    _tool("search", "Search für alles: 世界.", query="string", filters="object"),
]
CODE = 'Use this:\n\n```python\ndef f(x):\n    return {"a": x, \'b\': "\\n"}\n```\n\n\tDone & <b>tested</b>.'
LIST = "Three steps:\n\n1. First, 10 g of salt\n2. Then 250 ml\n\n\n3. Wait 5 min"
UNICODE = "Grüße an naïve Köche, 世界 🙂👍🏽 — “quoted” \u0627\u0644\u0633\u0644\u0627\u0645 \u200bend"
WEATHER = ("get_weather", {"city": "Zürich", "days": 3})
NESTED = {
    "query": 'say "hi"\nthen \\ leave',
    "filters": {"tags": ["a", "b c"], "range": {"from": 1, "to": 2.5}, "strict": True, "owner": None, "e": {}},
}


def _needs(messages: Messages, tools: object, more: tuple[str, ...]) -> frozenset[str]:
    needs = set(more)
    roles = [message["role"] for message in messages]
    calls = [len(message.get("tool_calls") or ()) for message in messages]
    needs |= {"system"} if {"system", "developer"} & set(roles) else set()
    needs |= {"system in the middle"} if "system" in roles[1:] else set()
    needs |= {"roles in a row"} if any(a == b != "tool" for a, b in pairwise(roles)) else set()
    needs |= {"tools"} if tools else set()
    needs |= {"calls"} if any(calls) else set()
    needs |= {"parallel calls"} if max(calls) > 1 else set()
    needs |= {"several calls"} if sum(map(bool, calls)) > 1 else set()
    needs |= {"text beside a call"} if any(m.get("tool_calls") and m["content"] for m in messages) else set()
    needs |= {"reasoning"} if any(message.get("reasoning_content") for message in messages) else set()
    return frozenset(needs)


def case(*messages: dict[str, Any], tools: list[dict[str, Any]] | None = None, needs: tuple[str, ...] = ()) -> Case:
    return Case(list(messages), tools, _needs(list(messages), tools, needs))


def _turns(count: int) -> Messages:
    return [
        message
        for turn in range(count)
        for message in (user(f"Question {turn}: what is {turn} + {turn}?"), answer(f"It is {2 * turn}.\nNext?"))
    ]


CASES: dict[str, Case] = {
    "one turn": case(user("Hello!"), answer("Hi there! How can I help you?")),
    "two turns": case(user("Say hi."), answer("Hi there!"), user("Name a color."), answer("Blue is a color.")),
    "open question": case(user("Say hi."), answer("Hi there!"), user("And now?")),
    "system": case(system("Be short."), user("one?"), answer("1. one"), user("two?"), answer("Two.")),
    "developer": case({"role": "developer", "content": "Be kind."}, user("Hello"), answer("Hi, friend.")),
    "answers in a row": case(user("Hello"), answer("Hi."), answer("Well?"), user("Yes."), answer("Good.")),
    "questions in a row": case(user("a"), user("b"), answer("A and B.")),
    "system in the middle": case(
        user("Hello"), answer("Hi."), system("Now in French."), user("Hello"), answer("Bonjour.")
    ),
    "unicode": case(user(UNICODE), answer(UNICODE), user("再来一次"), answer("好的。\n\n再见!")),
    "code": case(user("Write f.\n\nAnd test it."), answer(CODE), user(CODE), answer("It says: '{{ x }}' {% y %}.")),
    "list": case(user(LIST), answer(LIST), user("4?"), answer("4. Serve\n\n5. Eat")),
    "long": case(system("You add."), *_turns(8)),
    "long text": case(user("Tell me a story. " * 20 + "Now."), answer("Once upon a time.\n\n" * 20 + "The end.")),
    "text parts": case(
        {"role": "user", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "you."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
    ),
    "json answer": case(user("As JSON."), answer('{"answer": [1, 2, {"x": null}]}')),
    "unused tools": case(user("Hello"), answer("Hi."), user("Bye"), answer("Bye."), tools=TOOLS),
    "tools and system": case(system("Use tools."), user("Hello"), answer("Hi."), tools=TOOLS),
    "call": case(
        *(user("Weather in Zürich?"), answer(None, calls=[WEATHER]), result("21 °C, sunny"), answer("It is 21 °C.")),
        *(user("Thanks!"), answer("Welcome.")),
        tools=TOOLS,
    ),
    "call without a list of tools": case(
        user("Weather?"), answer(None, calls=[WEATHER]), result("21 °C"), answer("It is 21 °C.")
    ),
    "call at the end": case(user("Weather?"), answer(None, calls=[WEATHER]), tools=TOOLS),
    "open result": case(user("Weather?"), answer("", calls=[WEATHER]), result('{"t": 21}'), tools=TOOLS),
    "arguments as text": case(
        *(user("Weather?"), answer(None, calls=[("get_weather", '{"city": "Zürich", "days": 3}')])),
        *(result("21 °C"), answer("It is 21 °C.")),
        tools=TOOLS,
    ),
    "nested arguments": case(
        user("Search."), answer(None, calls=[("search", NESTED)]), result("Nothing."), answer("No."), tools=TOOLS
    ),
    "no arguments": case(user("Go."), answer(None, calls=[("search", {})]), result("ok"), answer("Done."), tools=TOOLS),
    "two calls at once": case(
        *(user("Both?"), answer(None, calls=[WEATHER, ("search", {"query": "snow"})])),
        *(result("21 °C"), result("No snow"), answer("Warm, no snow.")),
        tools=TOOLS,
    ),
    "text beside a call": case(
        user("Weather?"), answer("Let me look.", calls=[WEATHER]), result("21 °C"), answer("It is 21 °C."), tools=TOOLS
    ),
    "two rounds of calls": case(
        *(user("Weather?"), answer(None, calls=[WEATHER]), result("no data")),
        *(answer(None, calls=[("search", {"query": "weather"})]), result("21 °C"), answer("It is 21 °C.")),
        *(user("And snow?"), answer(None, calls=[("search", {"query": "snow"})]), result("none"), answer("No snow.")),
        tools=TOOLS,
    ),
    "reasoning": case(user("2 + 2?"), answer("4.", "Two and two.\n\nThat is four.")),
    "reasoning in two turns": case(
        *(system("Think."), user("2 + 2?"), answer("4.", "Two and two.")),
        *(user("Twice that?"), answer("8.\n\nSee?", "Four and four,\nso 8.")),
    ),
    "reasoning in one of two turns": case(
        user("2 + 2?"), answer("4.", "Two and two."), user("Thanks."), answer("Welcome.")
    ),
    "reasoning and calls": case(
        *(user("Weather?"), answer(None, "I need the tool.", [WEATHER]), result("21 °C")),
        *(answer("It is 21 °C.", "The tool says 21."), user("Thanks."), answer("Welcome.", "Be polite.")),
        tools=TOOLS,
    ),
}

_PLAIN = frozenset({"system", "system in the middle", "roles in a row"})
_CALLS = frozenset({"tools", "calls", "several calls"})
_ALL_CALLS = _CALLS | {"parallel calls", "text beside a call"}
_QWEN3_5 = (_PLAIN | _ALL_CALLS | {"reasoning"}) - {"system in the middle"}
FEATURES: dict[str, frozenset[str]] = {
    "smollm2": _PLAIN,
    "qwen2_5": _PLAIN | _ALL_CALLS,
    "qwen2_5_training": _PLAIN | _ALL_CALLS,
    "qwen3": _PLAIN | _ALL_CALLS | {"reasoning"},
    "qwen3_instruct_2507": _PLAIN | _ALL_CALLS,
    "qwen3_5_think": _QWEN3_5,
    "qwen3_5_nothink": _QWEN3_5,
    "qwen3_6": _QWEN3_5,
    "llama3": _PLAIN,
    "llama3_1": _PLAIN | _CALLS,
    "llama3_2": _PLAIN | _CALLS,
    "gemma": frozenset(),
    "gemma3": frozenset({"system"}),
    "phi3": _PLAIN,
    "deepseekv3": frozenset({"system", "roles in a row", "calls", "reasoning"}),
    "deepseek_r1_distill": frozenset({"system", "roles in a row", "reasoning"}),
    "glm4moe": _PLAIN | _ALL_CALLS | {"reasoning"},
    "gptoss": frozenset({"system", "roles in a row", "reasoning"}) | _CALLS,
    "lfm2_v2": _PLAIN | _ALL_CALLS,
    "cohere2": frozenset({"system"}),
    "nemotron_3_nano": _PLAIN | _ALL_CALLS | {"reasoning"},
}
OPENS_THOUGHT = ("deepseekv3", "deepseek_r1_distill")  # in every prompt, and removes it from every finished turn
THINKING = (*OPENS_THOUGHT, "qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "glm4moe", "nemotron_3_nano")


def settings_of(template: str) -> tuple[bool, ...]:
    """The values of `thinking` that make sense for a template."""
    return (False, True) if template in THINKING else (False,)


def cases_of(template: str) -> Iterator[tuple[str, Case]]:
    """The cases that a template can express."""
    return ((name, case) for name, case in CASES.items() if case.needs <= FEATURES[template])


def can_be_trained(template: str, thinking: bool, case: Case) -> bool:
    """Whether the template's finished turns can be what a model writes after the template's prompts."""
    if template == "gptoss" and {"calls", "reasoning"} <= case.needs:  # an answer removes the thought before a call
        return False
    if template == "nemotron_3_nano" and thinking:  # prompts open a thought, which turns without reasoning do not have
        return all(case.messages[index].get("reasoning_content") for index in case.answers)
    # gpt-oss thinks without a switch
    return thinking or template == "gptoss" or not case.has_reasoning


def holds_closed_thought(template: str, thinking: bool, text: str) -> bool:
    """Whether a prompt's text holds an empty thought that the model closed after the prompt had opened it."""
    return thinking and template.startswith(("qwen3_5", "qwen3_6")) and "<think>\n\n</think>" in text


class _FrozenDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return DAY


def as_template_expects(template: str, messages: Messages) -> Messages:
    """The messages in the dialect of a template: names of roles and keys, arguments as text or as mappings."""
    return [_translated(template, message) for message in messages]


def _translated(template: str, message: dict[str, Any]) -> dict[str, Any]:
    message = dict(message)
    if message["role"] == "developer" and template != "gptoss":
        message["role"] = "system"
    content = message["content"]
    if isinstance(content, list):
        message["content"] = "".join(part["text"] for part in content)
    elif content is None:
        message["content"] = ""  # GLM would write "None"
    if template == "gptoss" and "reasoning_content" in message:
        message["thinking"] = message.pop("reasoning_content")
    if "tool_calls" in message:
        message["tool_calls"] = [_translated_call(template, call["function"]) for call in message["tool_calls"]]
    return message


def _translated_call(template: str, function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if template.startswith("deepseek"):  # these put the text in as it is
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def reference_ids(
    template: str, tokenizer: Any, messages: Messages, tools: Any, *, as_prompt: bool, thinking: bool = False
) -> list[int]:
    """Token ids that the tokenizer's own template gives, on the frozen day.

    Where it opens a thought in every prompt, prompts without thinking are taken without it, as finished turns are.
    """
    with patch("transformers.utils.chat_template_utils.datetime", _FrozenDay):  # the clock of templates that ask for it
        text = tokenizer.apply_chat_template(
            as_template_expects(template, messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=as_prompt,
            enable_thinking=thinking,
            date_string=DAY.strftime("%d %b %Y"),
        )
    if template in OPENS_THOUGHT and as_prompt and not thinking:
        text = text.removesuffix("<think>\n")
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
