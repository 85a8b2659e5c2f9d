"""Chat conversations to tokens and loss weights, and sampled tokens back to answers.

    renderer = get_renderer(tokenizer)
    prompt = renderer.build_prompt(messages)                       # ids to sample from
    datums = conversation_to_datums(messages, tokenizer, 2048)     # to train on, same ids before every answer
    answer = renderer.parse_response(sequence.tokens)

Importing it loads numpy and mint.types, no tokenizer library. Supported templates: ChatML (SmolLM2, Qwen2, Qwen2.5,
Qwen3-Instruct-2507), Qwen3, Llama 3, 3.1 and 3.2; `get_renderer` refuses others by name.
"""

from mint.chat.datums import (
    OnOverlong,
    TrainOn,
    conversation_to_datum,
    conversation_to_datums,
    shift,
    tokenize_conversation,
)
from mint.chat.messages import Message, UnusableRow, check_messages, skip_reason
from mint.chat.renderer import Renderer, Response, get_renderer
from mint.chat.report import ConversionReport, Converter, convert_conversations
from mint.chat.view import ShownRow, ShownToken, TokenKind

__all__ = [
    "ConversionReport",
    "Converter",
    "Message",
    "OnOverlong",
    "Renderer",
    "Response",
    "ShownRow",
    "ShownToken",
    "TokenKind",
    "TrainOn",
    "UnusableRow",
    "check_messages",
    "conversation_to_datum",
    "conversation_to_datums",
    "convert_conversations",
    "get_renderer",
    "shift",
    "skip_reason",
    "tokenize_conversation",
]
