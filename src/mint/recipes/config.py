"""The options of the recipe `chat_sft`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mint.chat import OnOverlong, TrainOn
from mint.data import ChatSet, load_chat_set
from mint.data.certificate import MAX_LOSS
from mint.errors import InputError
from mint.recipes.run_folder import RunFolder
from mint.recipes.schedule import Schedule, learning_rate_at

PROMPTS = (
    "How do I keep basil alive on a windowsill?",
    "What is the difference between weather and climate?",
    "My laptop is slow. What should I do first?",
)


@dataclass(frozen=True, slots=True)
class ChatSftConfig:
    """What to train, on what, and how. A step is `batch_size` conversations.

    dataset, test, columns, shuffle_buffer: see `mint.data.load_chat_set`; several data sets are a mixture.
    train_on: None is what the data set is usually trained on. thinking: see `mint.chat.get_renderer`.
    schedule, warmup_steps: see `learning_rate_at`.
    max_length, on_overlong: tokens of a conversation, and what is done with an answer that does not fit; see
    `mint.chat.conversation_to_datums`.
    eval_size: test rows of every evaluation, always the same ones. eval_every, save_every: steps between two; 0: only
    at the end (and, for evaluations, the beginning).
    workers: processes that prepare rows ahead of their turn; 0: this one does; None: see `worker_count`. cache: keep what
    rows were converted to in MINT_HOME/cache. Neither changes a number that is trained.
    max_loss: the share of rows, or of answers, that may be lost; training is refused where it is more.
    check_resume: after saving, take one step more twice, with the run and with one resumed from the checkpoint, and
    compare the bits.
    """

    base_model: str = "Qwen/Qwen3-0.6B"
    dataset: str | tuple[str, ...] = "no_robots"
    test: str | None = None
    columns: tuple[str, ...] = ()
    shuffle_buffer: int | None = None
    num_steps: int = 50
    batch_size: int = 4
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    rank: int = 16
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    max_length: int = 2048
    on_overlong: OnOverlong = "drop"
    train_on: TrainOn | None = None
    thinking: bool = False
    max_loss: float = MAX_LOSS
    eval_size: int = 32
    eval_every: int = 0
    save_every: int = 50
    seed: int = 0
    prompts: tuple[str, ...] = PROMPTS
    sample_tokens: int = 120
    check_resume: bool = False
    workers: int | None = None
    cache: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "eval_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers={self.workers}: must be 0 (rows are prepared in this process) or more")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: must be 0 (never in between) or a number of steps")
        learning_rate_at(0, self.num_steps, self.learning_rate, self.schedule, self.warmup_steps)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> ChatSftConfig:
        """Of a run folder's config.json."""
        if unknown := found.keys() - {field.name for field in fields(cls)}:
            raise InputError(f"config.json: unknown options {', '.join(sorted(unknown))}; was another MinT here?")
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        return cls(**given)

    def load_chats(self) -> ChatSet:
        return load_chat_set(
            self.dataset, test=self.test, columns=self.columns, seed=self.seed, shuffle_buffer=self.shuffle_buffer
        )


def load_config(out: Path, **changes: Any) -> ChatSftConfig:
    """The options of the run in `out`, with `changes`."""
    return replace(ChatSftConfig.from_json(RunFolder(out).read_config()), **changes)
