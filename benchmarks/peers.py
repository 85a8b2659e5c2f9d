"""What other people run: transformers + PEFT in a padded loop, and transformers generate. Also the shared inputs."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mint
from mint.data import load_demo
from mint.hub import ModelSource, resolve_model

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
LEARNING_RATE = 1e-4


def base() -> ModelSource:
    return resolve_model("SmolLM2-135M-Instruct")


def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(base().path)


def chat_batches(num_steps: int, batch_size: int) -> list[list[list[int]]]:
    """Token ids of conversations of the packaged set, whole (every token is trained on), as the chat template has them."""
    tok = tokenizer()
    train, _ = load_demo()
    rows = [tok.apply_chat_template(train[i % len(train)], return_dict=False) for i in range(num_steps * batch_size)]
    return [rows[i * batch_size : (i + 1) * batch_size] for i in range(num_steps)]


def machine() -> dict[str, object]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "mint": mint.__version__,
    }


@dataclass
class PeftLoop:
    """A hand-written transformers + PEFT loop: right-padded batch, mean loss, AdamW with the protocol's defaults."""

    dtype: torch.dtype

    def __post_init__(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(base().path, dtype=self.dtype)
        self.model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=MODULES))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)

    def step(self, rows: list[list[int]]) -> tuple[float, float]:
        """(token-mean loss, seconds)."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        started = time.perf_counter()
        loss = self.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), time.perf_counter() - started
