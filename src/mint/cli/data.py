"""`mint data`: what a chat set is for a model, before anything is trained on it."""

from __future__ import annotations

import typer

from mint.cli.data_check import check

app = typer.Typer(no_args_is_help=True, help="Chat sets: check.")

app.command(
    epilog="Example: mint data check packaged --model SmolLM2-135M-Instruct --max-length auto\n\n"
    "Example: mint data check chats.jsonl --json certificate.json --max-loss 0.05"
)(check)
