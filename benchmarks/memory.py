"""Peak memory of a training pass against what was planned for it, over lengths, vocabularies and model sizes; one JSON line.

Each pass runs in a process of its own, after a short one that makes kernels and threads allocate what they keep.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import machine, spread
from shapes import SHAPES, write_random_model

# (shape, lengths of the datums of a pass, layers recomputed)
GRID: list[tuple[str, list[int], int]] = [
    ("small", [384] * 4, 0),
    ("small", [4096], 0),
    ("SmolLM2-135M", [230] * 4, 0),
    ("SmolLM2-135M", [256] * 8, 0),
    ("SmolLM2-135M", [256] * 8, 15),
    ("SmolLM2-135M", [4096], 0),
    ("SmolLM2-135M", [8192], 30),
    ("Qwen3-0.6B", [2048], 0),
    ("Qwen3-0.6B", [2048], 28),
]
LONG: list[tuple[str, list[int], int]] = [("Qwen3-0.6B", [8192], 28)]  # takes minutes
STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def child(folder: Path, recomputed: int, dtype: str, lengths: list[int]) -> None:
    import numpy as np

    from mint import types
    from mint.engine.backend import Part, drain
    from mint.engine.decoder_backend import DecoderBackend
    from mint.settings import Settings
    from mint.types.requests import prepare_training_input

    settings = Settings(folder, None, dtype, max_tokens_per_pass=sum(lengths), recompute_layers=recomputed)
    backend = DecoderBackend(folder, folder.name, settings)
    base = resident("VmRSS")
    report = backend.add_run("run", types.LoraConfig(rank=16, train_unembed=False), 0)
    generator = np.random.default_rng(0)

    def run(lengths: list[int]) -> float:
        rows = [generator.integers(0, backend.limits.vocab_size, n + 1) for n in lengths]
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(row[:-1].tolist()),
                loss_fn_inputs={"target_tokens": row[1:], "weights": np.ones(len(row) - 1)},
            )
            for row in rows
        ]
        part = Part("run", prepare_training_input(data, "cross_entropy"))
        started = time.perf_counter()
        (result,) = drain(backend.forward_backward([part]))
        assert result.error is None
        return time.perf_counter() - started

    run([16])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = run(lengths)
    peak = resident("VmHWM")
    planned = backend._compute.pass_memory.of_pass(sum(lengths), recomputed, max(lengths))
    result = {
        "planned_mb": round(planned / 1e6),
        "measured_mb": round((peak - before) / 1e6),
        "planned_over_measured": round(planned / (peak - before), 3),
        "peak_beside_base_mb": round((peak - base) / 1e6),
        "adapter_mb": round(16 * report.num_parameters / 1e6),
        "tokens_per_s": round(sum(lengths) / seconds, 1),
        "dtype": backend.limits.dtype,
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), help="only this one")
    parser.add_argument("--long", action="store_true", help="also the longest row of the largest shape: minutes more")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, recomputed, dtype, lengths = args.child
        child(Path(folder), int(recomputed), dtype, json.loads(lengths))
        return
    passes = []
    with tempfile.TemporaryDirectory() as place:
        for shape, lengths, recomputed in GRID + LONG * args.long:
            if args.shape in (None, shape):
                folder = Path(place) / shape
                if not folder.exists():
                    write_random_model(folder, SHAPES[shape])
                command = [
                    sys.executable,
                    __file__,
                    "--child",
                    str(folder),
                    str(recomputed),
                    args.dtype,
                    json.dumps(lengths),
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                passes.append(
                    {"shape": shape, "lengths": lengths, "recomputed_layers": recomputed, **json.loads(done.stdout)}
                )
                print(json.dumps(passes[-1]), file=sys.stderr, flush=True)
    ratios = spread([one["planned_over_measured"] for one in passes])
    print(json.dumps({"benchmark": "memory", "planned_over_measured": ratios, "passes": passes, **machine()}))


if __name__ == "__main__":
    main()
