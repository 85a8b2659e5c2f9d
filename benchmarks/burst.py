"""Many sample requests at once: whether all are answered, how fast, what they hold, and how long a running one waits.

One JSON line. Prompts of 5 to 300 tokens, every fifth with a beginning that others share, 1 to 3 samples each, from the
base model and two adapters. A stream that runs already shows the longest wait between two tokens of a running sequence.
Without --model: a small random model.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
from peers import RANK, machine

import mint
from mint import types

SHARED = 256  # tokens


def write_random_model(folder: Path) -> str:
    """Six million parameters, 8,192 tokens, no tokenizer: nothing here needs one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return chance.choices(range(300), k=length)

    shared = tokens(SHARED)
    return [
        [*shared, *tokens(chance.randint(5, 300 - SHARED))] if number % 5 == 0 else tokens(chance.randint(5, 300))
        for number in range(count)
    ]


class PeakMemory:
    """The most memory that the process holds from `start` to `stop`, looked at every hundredth of a second."""

    def __init__(self) -> None:
        self._process, self._stopped = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.before = self.peak = 0

    def start(self) -> None:
        self.before = self.peak = self._process.memory_info().rss
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.01):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def stop(self) -> float:
        """MB above what was held at the start."""
        self._stopped.set()
        self._thread.join()
        return round((max(self.peak, self._process.memory_info().rss) - self.before) / 1e6, 1)


class Running:
    """A stream that is read beside all else; `waits` are the seconds between its tokens."""

    def __init__(self, client: mint.SamplingClient, num_tokens: int) -> None:
        params = types.SamplingParams(max_tokens=num_tokens, temperature=1.0, stop=[], seed=0)
        self._stream = client.stream(types.ModelInput.from_ints(prompts(1)[0]), params)
        self._times: list[float] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self._started.wait()

    def _read(self) -> None:
        try:
            for _ in self._stream:
                self._times.append(time.perf_counter())
                self._started.set()
        finally:
            self._started.set()

    def waits(self) -> list[float]:
        self._thread.join()
        return [after - before for before, after in pairwise(self._times)]


def measure(model: str, num_requests: int, new_tokens: int) -> dict[str, object]:
    with mint.ServiceClient() as service:
        clients = [service.create_sampling_client(base_model=model)]
        for seed in range(2):
            run = service.create_lora_training_client(model, rank=RANK, seed=seed)
            clients.append(run.save_weights_and_get_sampling_client())
        params = [
            types.SamplingParams(max_tokens=1 + number % new_tokens, temperature=1.0, stop=[], seed=number)
            for number in range(num_requests)
        ]
        given = [types.ModelInput.from_ints(ids) for ids in prompts(num_requests)]
        clients[0].sample(given[0], 1, params[0]).result()  # prepares the weights
        memory = PeakMemory()
        memory.start()
        running = Running(clients[0], 20 * new_tokens)
        started = time.perf_counter()
        futures = [clients[i % 3].sample(given[i], 1 + i % 3, params[i]) for i in range(num_requests)]
        answers = [future.result() for future in futures]
        seconds = time.perf_counter() - started
        waits = running.waits()
        above = memory.stop()
    lengths = [[len(sequence.tokens) for sequence in answer.sequences] for answer in answers]
    expected = [[params[i].max_tokens] * (1 + i % 3) for i in range(num_requests)]
    return {
        "requests": num_requests,
        "all_completed": lengths == expected,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(map(sum, lengths)) / seconds, 1),
        "prompt_tokens_per_s": round(sum(prompt.length for prompt in given) / seconds, 1),
        "peak_mb_above_the_loaded_model": above,
        "longest_wait_between_two_tokens_of_a_running_sequence": round(max(waits), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's name or folder, such as SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--new", type=int, default=32, help="tokens of the longest answers; the others have fewer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = args.model or write_random_model(Path(place) / "small-random")
        result = measure(model, args.requests, args.new)
    name = args.model or "small random"
    print(json.dumps({"benchmark": "burst", "model": name, **result, **machine()}))


if __name__ == "__main__":
    main()
