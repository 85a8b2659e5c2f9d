"""The README's two pictures, from one real run of what `make sft` runs: the terminal and the loss curve."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from mint.cli.sft import OFFLINE
from mint.recipes.chat_sft import chat_sft
from mint.recipes.config import ChatSftConfig

IMAGES = Path(__file__).parents[1] / "docs" / "images"
FOLDER = Path("out/first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=IMAGES)
    args = parser.parse_args()
    # not a terminal: a recorded bar would show all its states at once
    console = Console(record=True, force_terminal=False, width=104, emoji=False, highlight=False)
    console.print("[bold]$ mint sft --offline --out out/first --eval-every 10[/bold]")
    images = args.images.resolve()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        chat_sft(ChatSftConfig(**{**OFFLINE, "eval_every": 10}), FOLDER, console)
        images.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(FOLDER / "loss.png", images / "loss.png")
    (images / "terminal.svg").write_text(console.export_svg(title="MinT"), encoding="utf-8")


if __name__ == "__main__":
    main()
