"""What other people run, in a process of its own: a peer's idle threads must not disturb ours, nor ours the peer's.

`Peer` starts this file as a child and talks to it in JSON lines; inside the child are transformers + PEFT in a padded loop,
TRL's SFTTrainer, or transformers generate. TRL is no dependency of MinT: it is installed into a folder that goes with the
process.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
LEARNING_RATE = 1e-4
BASE_MODEL = "SmolLM2-135M-Instruct"
TRL = "trl==1.16.0"


class Peer:
    """`run(**request)` has the child do one thing and returns its answer, which holds the seconds it took."""

    def __init__(self, kind: str, folder: str, dtype: str, threads: int) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._place = tempfile.TemporaryDirectory()
        if kind == "trl":
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", self._place.name, TRL]
            subprocess.run([*install, *os.environ.get("PIP_ARGS", "").split()], check=True)
            environment["PYTHONPATH"] = self._place.name
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
        self._place.cleanup()


def machine() -> dict[str, object]:
    import torch

    import mint

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    bf16 = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in info), "none known")
    return {
        "machine": platform.machine(), "processor": names[0] if names else platform.processor(), "bf16": bf16,
        "cores": cores, "torch": torch.__version__, "mint": mint.__version__,
    }  # fmt: skip


def peak_mb() -> float:
    """The most memory this process has held so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20), 1)


def spread(values: list[float], digits: int = 2) -> list[float]:
    """Median, smallest, largest."""
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [round(value, digits) for value in (middle, ordered[0], ordered[-1])]


def ratios(pairs: list[tuple[float, float]]) -> dict[str, object]:
    """Of (our seconds, the peer's seconds): median, smallest and largest ratio."""
    middle, *ends = spread([theirs / ours for ours, theirs in pairs])
    return {"ratio": middle, "ratio_min_max": ends}


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
        return {"seconds": time.perf_counter() - started, "loss": loss.item(), "peak_mb": peak_mb()}


class TrlTrainer:
    """SFTTrainer on rows that are tokenised already, so that the steps are timed and nothing else; a step for each
    request. The model in `dtype`, no gradient checkpointing: the fastest of its settings on the machines tried."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype

    def serve(self) -> None:
        """Reads requests itself: the trainer's loop asks for the next when it begins a step."""
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        answers, sys.stdout = sys.stdout, sys.stderr  # the trainer prints, too
        print(json.dumps({}), file=answers, flush=True)  # to the warm-up request
        batches: list[list[list[int]]] = json.loads(sys.stdin.readline())["batches"]
        print(json.dumps({}), file=answers, flush=True)
        taken: dict[str, float] = {}

        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if not sys.stdin.readline():
                    os._exit(0)
                taken["started"] = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                taken["seconds"] = time.perf_counter() - taken["started"]

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
                if "loss" in logs:
                    answer = {"seconds": taken["seconds"], "loss": float(logs["loss"]), "peak_mb": peak_mb()}
                    print(json.dumps(answer), file=answers, flush=True)

        with tempfile.TemporaryDirectory() as place:
            config = SFTConfig(
                output_dir=place, max_steps=len(batches), per_device_train_batch_size=len(batches[0]), use_cpu=True,
                learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.95,
                adam_epsilon=1e-12, max_grad_norm=0.0, max_length=None, logging_steps=1, report_to="none",
                save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, gradient_checkpointing=False,
                train_sampling_strategy="sequential", bf16=False, logging_nan_inf_filter=False,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, self.dtype)),
                args=config,
                train_dataset=Dataset.from_list([{"input_ids": row} for batch in batches for row in batch]),
                processing_class=AutoTokenizer.from_pretrained(self.folder),
                callbacks=[Steps()],
                peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM"),
            )
            trainer.train()


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
    if kind == "trl":
        sys.stdin.readline()
        TrlTrainer(folder, dtype).serve()
        return
    peer = {"peft": PeftLoop, "generate": Generate}[kind](folder, dtype)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {} if request.pop("warm_up", False) else peer.run(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
