"""The `mint` command. Heavy imports stand inside the commands."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mint.cli.export import export
from mint.errors import MintError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fine-tune language models with LoRA on this machine."
)


@app.callback()
def main() -> None:
    """Fine-tune language models with LoRA on this machine."""


@app.command(epilog="Example: mint sft --steps 30 --out out/sft")
def sft(
    model: Annotated[str, typer.Option(help="A packaged model, a hub id or a folder.")] = "SmolLM2-135M-Instruct",
    train: Annotated[Path | None, typer.Option(help="JSON Lines file with 'messages' a line; needs --test.")] = None,
    test: Annotated[Path | None, typer.Option(help="Held-out conversations in the same form.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Constant learning rate.")] = 5e-4,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a conversation; answers beyond are left out.")
    ] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the adapter and of the order of the data.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for loss.png, samples.md, metrics.jsonl, summary.json.")] = Path(
        "out/sft"
    ),
) -> None:
    """Chat fine-tuning: train, evaluate, plot, sample, save, resume. Without files: the packaged chat set."""
    from rich.console import Console
    from rich.logging import RichHandler

    from mint.data import load_demo, load_jsonl
    from mint.recipes.chat_sft import ChatSftConfig, chat_sft

    console = Console()
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("mint").setLevel(logging.INFO)
    config = ChatSftConfig(
        base_model=model,
        num_steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        rank=rank,
        max_length=max_length,
        seed=seed,
        out=out,
    )
    try:
        if (train is None) != (test is None):
            raise typer.BadParameter("give --train and --test together")
        data = load_demo() if train is None or test is None else (load_jsonl(train), load_jsonl(test))
        chat_sft(config, *data, console=console)
    except MintError as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise typer.Exit(1) from None


app.command(epilog="Example: mint export tinker://RUN/weights/NAME out/adapter")(export)

if __name__ == "__main__":
    app()
