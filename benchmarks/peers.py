"""What other people run, in a process of its own: a peer's idle threads must not disturb ours, nor ours the peer's.

`Peer` starts this file as a child and talks to it in JSON lines; inside the child are transformers + PEFT in a padded loop,
and transformers generate.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
LEARNING_RATE = 1e-4
BASE_MODEL = "SmolLM2-135M-Instruct"


class Peer:
    """`run(**request)` has the child do one thing and returns its answer, which holds the seconds it took."""

    def __init__(self, kind: str, folder: str, dtype: str, threads: int) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-W", "ignore", __file__, kind, folder, dtype, str(threads)]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.run(warm_up=True)

    def run(self, **request: Any) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit("the peer's process ended; run it by hand to see why: " + " ".join(self._child.args))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def machine() -> dict[str, object]:
    import torch

    import mint

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": platform.machine(), "cores": cores, "torch": torch.__version__, "mint": mint.__version__}


def ratios(pairs: list[tuple[float, float]]) -> dict[str, object]:
    """Of (our seconds, the peer's seconds): median, smallest and largest ratio."""
    ordered = sorted(theirs / ours for ours, theirs in pairs)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {"ratio": round(middle, 2), "ratio_min_max": [round(ordered[0], 2), round(ordered[-1], 2)]}


# inside the child


class PeftLoop:
    """Right-padded batch, mean loss over real tokens, AdamW with the protocol's defaults."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=MODULES))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)

    def run(self, rows: list[list[int]]) -> dict[str, float]:
        import torch

        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        started = time.perf_counter()
        loss = self.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"seconds": time.perf_counter() - started, "loss": loss.item()}


class Generate:
    """transformers generate on a left-padded batch."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(self, prompts: list[list[int]], new_tokens: int, sample: bool) -> dict[str, object]:
        import torch

        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        options = {"do_sample": True, "temperature": 0.7} if sample else {"do_sample": False}
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(**padded, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "first": out[0, padded["input_ids"].shape[1] :].tolist()}


def main() -> None:
    kind, folder, dtype, threads = sys.argv[1:]
    import torch

    torch.set_num_threads(int(threads))
    peer = {"peft": PeftLoop, "generate": Generate}[kind](folder, dtype)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {} if request.pop("warm_up", False) else peer.run(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
