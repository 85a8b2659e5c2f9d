"""Seconds from nothing, each in fresh processes: `import mint`, `mint --help`, a training client ready. One JSON line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from peers import BASE_MODEL, machine, spread

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import mint": [sys.executable, "-c", "import mint"],
    "mint --help": [str(Path(sys.executable).parent / "mint"), "--help"],
    "training client ready": [
        sys.executable,
        "-c",
        f"import mint; mint.ServiceClient().create_lora_training_client({BASE_MODEL!r}, rank=16)",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=7, help="of which the first is warm-up")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.times):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    found = {name: spread(taken[1:], 3) for name, taken in seconds.items()}
    print(json.dumps({"benchmark": "startup", "seconds": found, **machine()}))


if __name__ == "__main__":
    main()
