"""Conversations to train on, and the order in which batches take them."""

from mint.data.batches import Batches, Cursor
from mint.data.cache import CachedConverter, DiskCache, cached
from mint.data.chat_sets import CHAT_SETS, ChatSet, load_chat_set
from mint.data.conversations import Conversation, load_demo, load_jsonl
from mint.data.rows import origin
from mint.data.workers import Workers, stream_outcomes

__all__ = [
    "CHAT_SETS",
    "Batches",
    "CachedConverter",
    "ChatSet",
    "Conversation",
    "Cursor",
    "DiskCache",
    "Workers",
    "cached",
    "load_chat_set",
    "load_demo",
    "load_jsonl",
    "origin",
    "stream_outcomes",
]
