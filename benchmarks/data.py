"""Preparing chat data: against the per-message loop of the tutorials, beside training, and over long streams.

`rendering`: rows/s of rendering and tokenising, cold (in every pair both sides have new tokenizers, which have seen two
messages of a word, and new workers; no cache on disk), against the loop that renders every prefix of a conversation with
apply_chat_template, encodes it and takes the differences; in this process with one core and with all, and in 1 and 2
worker processes. Ids are compared where both are right: the loop's are those of the whole conversation in the
template, and ours is one example.
`training`: seconds of a training step on rows that are there already, prepared in this process, prepared by a worker.
`streaming`: memory of a process that sends generated conversations through a Converter.
One JSON line of everything at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import psutil
from peers import BASE_MODEL, LEARNING_RATE, RANK, machine, spread

import mint
from mint import types
from mint.chat import Converter
from mint.data import Batches, Conversation, Workers, load_demo, load_jsonl
from mint.hub import load_tokenizer

MAX_LENGTH = 8192
STARTS: list[Conversation] = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ok"}]] * 2
SHAPES = {"two messages": (2, 2), "four messages and more": (4, 10)}
# how rows are rendered: worker processes, and whether the tokenizer may use all cores of this one
SETTINGS = {"one core": (0, "false"), "all cores": (0, "true"), "1 worker": (1, "false"), "2 workers": (2, "false")}


@cache
def words() -> list[str]:
    return " ".join(message["content"] for row in load_demo()[0] for message in row).split()


def conversations(seed: int, messages: tuple[int, int]) -> Iterator[Conversation]:
    """Endless; of an even number of messages within the bounds, made of the words of the packaged chat set."""
    chance = random.Random(seed)
    while True:
        count = 2 * chance.randint(messages[0] // 2, messages[1] // 2)
        yield [
            {"role": "assistant", "content": " ".join(chance.choices(words(), k=chance.randint(40, 200)))}
            if index % 2
            else {"role": "user", "content": " ".join(chance.choices(words(), k=chance.randint(10, 60)))}
            for index in range(count)
        ]


def loop_ids(row: Conversation, tokenizer: Any) -> tuple[list[int], list[float]]:
    """What the tutorials do: the tokens by which each message makes the rendered conversation longer."""
    ids: list[int] = []
    weights: list[float] = []
    for index, message in enumerate(row):
        text = tokenizer.apply_chat_template(row[: index + 1], tokenize=False, add_generation_prompt=False)
        new = tokenizer.encode(text, add_special_tokens=False)[len(ids) :]
        ids += new
        weights += [float(message["role"] == "assistant")] * len(new)
    return ids, weights


def compare(rows: Sequence[Conversation], ours: Sequence[Any], theirs: Sequence[list[int]], tokenizer: Any) -> int:
    """How many rows could be compared. Both stop somewhere after the last answer: ours at its end-of-turn token."""
    compared = 0
    for row, outcome, ids in zip(rows, ours, theirs, strict=True):
        if outcome.conversion is None:
            raise SystemExit(f"a row of this benchmark cannot be used: {outcome.error}")
        whole = tokenizer.encode(tokenizer.apply_chat_template(row, tokenize=False), add_special_tokens=False)
        if len(outcome.conversion.examples) == 1 and ids == whole:
            tokens = outcome.conversion.examples[0].tokens
            if tokens != ids[: len(tokens)]:
                raise SystemExit(f"the two compute different things for {row!r}")
            compared += 1
    return compared


def rows_of(file: str | None, shape: tuple[int, int], number: int, count: int) -> list[Conversation]:
    """The `number`-th `count` rows of that many messages: of a JSONL file, else generated."""
    if file is None:
        return list(islice(conversations(number, shape), count))
    fitting = (row for row in load_jsonl(Path(file)) if shape[0] <= len(row) <= shape[1])
    rows = list(islice(fitting, number * count, (number + 1) * count))
    if len(rows) < count:
        raise SystemExit(f"{file}: too few rows of {shape[0]} to {shape[1]} messages; lower --rows or --pairs")
    return rows


def rendering(args: argparse.Namespace, shape: tuple[int, int], setting: str) -> dict[str, Any]:
    """Pairs on the same rows, the two sides in turns first, with nothing remembered; a worker's start is not counted."""
    model, pairs, count = args.model, args.pairs, args.rows
    workers, parallelism = SETTINGS[setting]
    made: dict[str, Any] = {}
    ratios, speeds, compared, tokens = [], [], 0, 0
    for pair in range(pairs + 1):  # one warm-up pair
        converter, peer = Converter(load_tokenizer(model), MAX_LENGTH), load_tokenizer(model)
        pool = Workers(converter.outcomes, workers) if workers else None

        def ours(rows: list[Conversation], side: Any = pool or converter) -> None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism  # read by the tokenizer library at every call
            made["ours"] = list(side.outcomes(enumerate(rows)))
            os.environ["TOKENIZERS_PARALLELISM"] = "false"

        def theirs(rows: list[Conversation], tokenizer: Any = peer) -> None:
            made["theirs"] = [loop_ids(row, tokenizer)[0] for row in rows]

        for side in (ours, theirs):  # workers are up, templates are read
            side(STARTS)
        rows = rows_of(args.data, shape, pair, count)
        seconds = {}
        for side in (ours, theirs) if pair % 2 else (theirs, ours):
            started = time.perf_counter()
            side(rows)
            seconds[side] = time.perf_counter() - started
        if pair:
            ratios.append(seconds[theirs] / seconds[ours])
            speeds.append(count / seconds[ours])
            compared += compare(rows, made["ours"], made["theirs"], peer)
            tokens += sum(map(len, made["theirs"]))
        if pool:
            pool.close()
    return {
        "setting": setting,
        "ratio": spread(ratios),
        "rows_per_s": spread(speeds, 0),
        "tokens_per_row": round(tokens / (pairs * count)),
        "rows": pairs * count,
        "rows_compared": compared,
    }


def training(steps: int, batch_size: int) -> dict[str, Any]:
    """The three kinds take the same steps in turn, each on a run of its own."""
    service = mint.ServiceClient()
    runs = [service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=0, train_unembed=False) for _ in range(3)]
    rows = list(islice(conversations(0, SHAPES["two messages"]), (steps + 2) * batch_size))
    ready, here, ahead = (Converter(runs[0].get_tokenizer(), MAX_LENGTH) for _ in range(3))
    datums = Batches(rows, batch_size, prepare=ready)
    kinds: dict[str, Iterator[list[types.Datum]]] = {
        "ready": iter([next(datums) for _ in range(steps + 1)]),
        "in process": Batches(rows, batch_size, prepare=here),
        "one worker": (worked := Batches(rows, batch_size, prepare=ahead, workers=1)),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    waits: dict[str, list[float]] = {kind: [] for kind in kinds}
    for step in range(steps + 1):
        lengths = set()
        for (kind, batches), run in zip(kinds.items(), runs, strict=True):
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            run.forward_backward(batch)
            run.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
            lengths.add(tuple(datum.model_input.length for datum in batch))
            if step:  # the first is warm-up
                seconds[kind].append(time.perf_counter() - started)
                waits[kind].append(waited)
        if len(lengths) != 1:
            raise SystemExit(f"step {step}: the three were given different batches")
    worked.close()
    service.close()
    return {
        kind: {
            "step_time_against_ready": spread([a / b for a, b in zip(taken, seconds["ready"], strict=True)], 3),
            "wait_share": round(sum(waits[kind]) / sum(taken), 5),
            "step_seconds": spread(taken, 3),
        }
        for kind, taken in seconds.items()
    } | {"steps": steps, "batch": batch_size}


def stream(model: str, count: int, workers: int) -> dict[str, Any]:
    """In a process of its own: memory at the first tenth, at the end, and the most in between, in MB."""
    converter = Converter(load_tokenizer(model), MAX_LENGTH)
    process, sizes = psutil.Process(), []
    rows = enumerate(islice(conversations(7, (2, 6)), count))
    pool = Workers(converter.outcomes, workers) if workers else None
    outcomes = (pool or converter).outcomes(rows)
    every = max(1, count // 100)
    for number, outcome in enumerate(outcomes, 1):
        converter.take(outcome)
        if number % every == 0:
            sizes.append(sum(p.memory_info().rss for p in (process, *process.children())) / 1e6)
    if pool:
        pool.close()
    assert converter.report.rows == count
    early = sizes[max(0, len(sizes) // 10 - 1)]
    return {
        "conversations": count, "workers": workers, "rss_mb_first_tenth": round(early, 1),
        "rss_mb_end": round(sizes[-1], 1), "rss_mb_max": round(max(sizes), 1), "tokens": converter.report.tokens,
    }  # fmt: skip


def in_a_child(arguments: argparse.Namespace, count: int, workers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", arguments.model, "--one-stream", f"{count},{workers}"]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BASE_MODEL, help="whose tokenizer renders; training is the packaged model's")
    parser.add_argument("--data", help="JSONL with messages whose rows are rendered, instead of generated ones")
    parser.add_argument("--part", choices=["rendering", "training", "streaming"], action="append")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=200, help="of one side of a pair")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--streams", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--one-stream", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_stream:
        count, workers = map(int, args.one_stream.split(","))
        print(json.dumps(stream(args.model, count, workers)))
        return
    parts = args.part or ["rendering", "training", "streaming"]
    result: dict[str, Any] = {
        "benchmark": "data", "peer": "the per-message loop", "model": args.model, "data": args.data or "generated",
    }  # fmt: skip
    if "rendering" in parts:
        result["rendering"] = {}
        for name, shape in SHAPES.items():
            found = [rendering(args, shape, setting) for setting in SETTINGS]
            result["rendering"][name] = found
            for one in found:
                print(
                    f"{name:<24} {one['setting']:<9} {one['ratio'][0]:>6.2f} x the loop "
                    f"({one['ratio'][1]} to {one['ratio'][2]})  {one['rows_per_s'][0]:>7.0f} rows/s  "
                    f"same ids in {one['rows_compared']} of {one['rows']} rows compared"
                )
    if "training" in parts:
        result["training"] = training(args.steps, args.batch)
        for kind in ("ready", "in process", "one worker"):
            one = result["training"][kind]
            print(
                f"training, {kind:<14} {one['step_time_against_ready'][0]:.3f} x the step on ready rows "
                f"({one['step_time_against_ready'][1]} to {one['step_time_against_ready'][2]})  "
                f"waited {one['wait_share']:.2%} of the time"
            )
    if "streaming" in parts:
        result["streaming"] = [in_a_child(args, count, workers) for workers in (0, 1) for count in args.streams]
        for one in result["streaming"]:
            print(
                f"stream of {one['conversations']:>7,}, {one['workers']} workers  {one['rss_mb_first_tenth']} MB after a "
                f"tenth, {one['rss_mb_end']} MB at the end, at most {one['rss_mb_max']} MB"
            )
    print(json.dumps({**result, **machine()}))


if __name__ == "__main__":
    main()
