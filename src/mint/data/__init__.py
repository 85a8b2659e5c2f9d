"""Conversations to train on, and the order in which batches take them."""

from mint.data.batches import Batches, Cursor
from mint.data.chat_sets import CHAT_SETS, ChatSet, load_chat_set
from mint.data.conversations import Conversation, load_demo, load_jsonl
from mint.data.rows import origin

__all__ = [
    "CHAT_SETS",
    "Batches",
    "ChatSet",
    "Conversation",
    "Cursor",
    "load_chat_set",
    "load_demo",
    "load_jsonl",
    "origin",
]
