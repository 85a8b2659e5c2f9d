"""`mint data`: what a chat set is for a model, before anything is trained on it."""

from __future__ import annotations

import typer

from mint.cli.data_check import check
from mint.cli.data_show import show

app = typer.Typer(no_args_is_help=True, help="Chat sets: check, show.")

app.command(
    epilog="Example: mint data check packaged --model SmolLM2-135M-Instruct --max-length auto\n\n"
    "Example: mint data check chats.jsonl --json certificate.json --max-loss 0.05"
)(check)
app.command(
    epilog="Example: mint data show packaged --model SmolLM2-135M-Instruct --rows 0,3,10-12\n\n"
    "Example: mint data show chats.jsonl --checkpoint out/sft --html page.html"
)(show)
