"""What a template's source says of how it treats texts; where it does more than write them, nothing is remembered."""

from __future__ import annotations

import pytest
from tests.unit.chat.conversations import chat
from tests.unit.chat.tiny_tokenizers import ALL_FAMILIES, TEMPLATES, make_tokenizer

from mint.chat import get_renderer
from mint.chat.template_source import read_source

HAZARDS = {
    "its length": "{% if m.content|length > 9 %}x{% endif %}",
    "its length under another name": "{% set text = m.content %}{{ text|length }}",
    "its length in a block": "{% set text %}{{ m['content'] }}{% endset %}{{ text|length }}",
    "its length in a macro": "{% macro show(text) %}{{ text|length }}{% endmacro %}{{ show(m.content) }}",
    "the length of its lines": "{% for line in m.content.split('\n') %}{{ line|length }}{% endfor %}",
    "a slice": "{{ m.content[:5] }}",
    "a letter": "{{ m.content[0] }}",
    "a comparison of two texts": "{% if m.content == messages[0].content %}x{% endif %}",
    "the order of texts": "{% if m.content < 'm' %}x{% endif %}",
    "capitals": "{{ m.content|upper }}",
    "a test": "{% if m.content is upper %}x{% endif %}",
    "its words": "{{ m.content.split()|join(' ') }}",
    "a text that is computed": "{% if m.content.startswith(m.role) %}x{% endif %}",
    "one of several": "{% if m.content in ['a', 'b'] %}x{% endif %}",
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_more_than_writing_a_text_is_noticed(hazard: str) -> None:
    source = "{% for m in messages %}" + HAZARDS[hazard] + "{% endfor %}"
    assert read_source(source).depends_on_texts


HARMLESS = {
    "{{ m.content }}": ((), ()),
    "{{ m.content|trim }}{{ m['content'].strip() }}": ((), ()),
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0]['text'] }}{% endif %}": ((), ()),
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}": ((), ("text",)),
    "{% if m.content != 'x' %}{{ m.content }}{% endif %}": ((), ("x",)),
    "{% if 'x' in m.content %}{{ m.content.split('y')[-1] }}{% endif %}": (("x", "y"), ("x",)),
    "{% if m.content.startswith(('x', 'y')) %}{{ m.content }}{% endif %}": (("x", "y"), ()),
    "{{ messages|length }}{{ m.role|upper }}{{ messages[0].role[0] }}": ((), ()),
}


@pytest.mark.parametrize("source", HARMLESS)
def test_what_is_looked_for_and_compared_with_is_read(source: str) -> None:
    reading = read_source("{% for m in messages %}" + source + "{% endfor %}")
    searched, compared = HARMLESS[source]
    assert not reading.depends_on_texts
    assert (reading.searched, reading.compared) == (frozenset(searched), frozenset(compared))


# cohere2 compares two texts with each other, nemotron_3_nano computes on them
DEPENDING = {"cohere2", "nemotron_3_nano"}


def test_most_templates_do_no_more_than_write_texts() -> None:
    names = {family.template or name for name, family in ALL_FAMILIES.items()} - {"qwen2_5_training"}
    sources = {name: (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8") for name in names}
    assert {name for name in names if read_source(sources[name]).depends_on_texts} == DEPENDING


def test_a_text_is_compared_as_the_template_trims_it() -> None:
    """The shape of both questions is the same, but the template has an answer of its own to one of them."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
        "{% if m.content|trim == 'x' %}{{ '!' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer("smollm2", source)
    renderer = get_renderer(tokenizer)
    texts = [tokenizer.decode(renderer.prompt(chat(text))) for text in (" a ", " x ")]
    assert [text.partition("<|im_end|>")[2][:1] for text in texts] == ["<", "!"]
