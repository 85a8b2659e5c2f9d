"""Conversations to train on, and the order in which batches take them."""

from mint.data.batches import Batches, Cursor
from mint.data.conversations import load_demo, load_jsonl

__all__ = ["Batches", "Cursor", "load_demo", "load_jsonl"]
