"""The README's two pictures, from one real run of what `make sft` runs: the terminal and the loss curve."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from mint.cli.sft import OFFLINE
from mint.recipes.chat_sft import ChatSftConfig, chat_sft

IMAGES = Path(__file__).parents[1] / "docs" / "images"
FOLDER = Path("out/first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=IMAGES)
    args = parser.parse_args()
    console = Console(record=True, force_terminal=True, width=104, emoji=False)
    console.print("[bold]$ mint sft --offline --out out/first --eval-every 10[/bold]")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / FOLDER
        chat_sft(ChatSftConfig(**{**OFFLINE, "eval_every": 10}), out, console)
        args.images.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "loss.png", args.images / "loss.png")
        text = console.export_svg(title="MinT").replace(str(out), str(FOLDER))
    (args.images / "terminal.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
