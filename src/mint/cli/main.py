"""The `mint` command. Heavy imports stand inside the commands."""

from __future__ import annotations

import typer

from mint.cli.export import export
from mint.cli.sft import sft

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA on this machine.",
)


@app.callback()
def main() -> None:
    """Fine-tune language models with LoRA on this machine."""


app.command(epilog="Example: mint sft --offline --steps 30 --out out/first")(sft)

app.command(epilog="Example: mint export tinker://RUN/weights/NAME out/adapter")(export)

if __name__ == "__main__":
    app()
