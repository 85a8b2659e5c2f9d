"""All benchmarks one after the other, each in processes of its own: results/MACHINE.json and the bar chart of the README.

    make bench                            # everything, twenty minutes to three quarters of an hour
    python benchmarks/run.py sft limits   # some of it; what was measured before stays in the file
    python benchmarks/run.py --chart      # only draw what is in the file

Nothing else should run meanwhile: two programs that compute on the same cores slow each other down many times over.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from peers import machine

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
CHART = HERE.parent / "docs" / "images" / "speed.png"
COMMANDS = {
    "sft": ["sft.py", "--steps", "24"],
    "sft-trl": ["sft.py", "--steps", "24", "--peer", "trl"],
    "sampling": ["sampling.py", "--pairs", "5", "--batches", "1,8,32,128"],
    "limits": ["limits.py", "--pairs", "7"],
    "kernels": ["kernels.py"],
    "tenants": ["tenants.py", "--pairs", "7"],
    "sharing": ["sharing.py"],
    "fairness": ["fairness.py"],
    "invariant": ["invariant.py"],
    "memory": ["memory.py"],
    "data": ["data.py", "--part", "rendering", "--pairs", "5", "--rows", "400"],
    "startup": ["startup.py"],
}
Result = dict[str, Any]


def measure(name: str) -> list[Result]:
    """The JSON lines that a benchmark prints."""
    script, *options = COMMANDS[name]
    print(f"{name}: {script} {' '.join(options)}", flush=True)
    done = subprocess.run([sys.executable, str(HERE / script), *options], stdout=subprocess.PIPE, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    for line in lines:
        print("  " + line[:150], flush=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [{**json.loads(line), "command": " ".join(COMMANDS[name]), "measured": now} for line in lines]


def bars(results: dict[str, list[Result]]) -> list[tuple[str, float, float, float]]:
    """What MinT is compared with, and how many times as fast it is: median, smallest, largest."""
    found = []
    for one in results.get("sft", []) + results.get("sft-trl", []):
        found.append((f"training, against {one['peer']}", one["ratio"], *one["ratio_min_max"]))
    for one in results.get("sampling", []):
        found.append((f"sampling {one['prompts']} at once, against {one['peer']}", one["ratio"], *one["ratio_min_max"]))
    for one in results.get("data", []):
        for rows, settings in one["rendering"].items():
            ratio = next(setting["ratio"] for setting in settings if setting["setting"] == "1 worker")
            found.append((f"rendering {rows} (1 worker), against {one['peer']}", *ratio))
    return found


def draw(results: dict[str, list[Result]], file: Path) -> None:
    found = bars(results)
    if not found:
        raise SystemExit("nothing that has a peer was measured; run sft, sampling or data first")
    example = next(one for name in ("sft", "sft-trl", "sampling", "data") for one in results.get(name, []))
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.42 * len(found)), layout="constrained")
    places = range(len(found))[::-1]
    middles = [bar[1] for bar in found]
    spread = [[bar[1] - bar[2] for bar in found], [bar[3] - bar[1] for bar in found]]
    axes.barh(places, middles, xerr=spread, color="#2a9d8f", ecolor="#555555", capsize=3)
    for place, (_, middle, _, largest) in zip(places, found, strict=True):
        axes.text(largest + 0.08, place, f"{middle:.1f} x", va="center")
    axes.axvline(1, color="#555555", linewidth=1, linestyle="--")
    axes.set_yticks(places, [bar[0] for bar in found])
    axes.set_xlim(0, max(bar[3] for bar in found) * 1.12)
    axes.set_xlabel("times as fast (median; lines: smallest to largest)")
    figure.suptitle(f"MinT, SmolLM2-135M, {example['processor']}, {example['cores']} cores, bf16: {example['bf16']}")
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}; all without one")
    parser.add_argument("--chart", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--image", type=Path, default=CHART)
    args = parser.parse_args()
    if unknown := set(args.names) - COMMANDS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    here = machine()
    name = re.sub(
        r"[^a-z0-9]+", "-", f"{here['processor'] or here['machine']} {here['cores']} cores {here['bf16']}".lower()
    )
    file = args.results / f"{name.strip('-')}.json"
    results: dict[str, list[Result]] = json.loads(file.read_text()) if file.is_file() else {}
    for chosen in [] if args.chart else args.names or COMMANDS:
        results[chosen] = measure(chosen)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.image)
    print(f"{file}\n{args.image}")


if __name__ == "__main__":
    main()
