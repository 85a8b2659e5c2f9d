"""Chat conversations to tokens and loss weights, and sampled tokens back to answers.

    renderer = get_renderer(tokenizer)
    prompt = renderer.prompt(messages)                             # ids to sample from
    datums = conversation_to_datums(messages, tokenizer, 2048)     # to train on, same ids before every answer
    answer = renderer.parse(sequence.tokens)

Importing it loads numpy and mint.types, no tokenizer library. Everything is written by the tokenizer's own chat template;
what cannot be trained on safely is refused, naming the message.
"""

from mint.chat.datums import conversation_to_datum, conversation_to_datums, shift, tokenize_conversation
from mint.chat.examples import OnOverlong, TrainOn
from mint.chat.messages import Message, UnusableRow, check_messages, skip_reason
from mint.chat.renderer import Renderer, Response, get_renderer, prompt
from mint.chat.report import ConversionReport, Converter, convert_conversations
from mint.chat.show import show_row
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
    "prompt",
    "shift",
    "show_row",
    "skip_reason",
    "tokenize_conversation",
]
