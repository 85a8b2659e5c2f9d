"""Conversations to train on, and the order in which batches take them."""

from mint.data.batches import Batches, Cursor
from mint.data.chat_sets import CHAT_SETS, ChatSet, load_chat_set
from mint.data.conversations import Conversation, load_demo, load_jsonl
from mint.data.workers import Workers, stream_outcomes

__all__ = [
    "CHAT_SETS",
    "Batches",
    "ChatSet",
    "Conversation",
    "Cursor",
    "Workers",
    "load_chat_set",
    "load_demo",
    "load_jsonl",
    "stream_outcomes",
]
