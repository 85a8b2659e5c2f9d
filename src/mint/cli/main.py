"""The `mint` command. Heavy imports stand inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from mint import __version__
from mint.cli import data, models
from mint.cli.doctor import doctor
from mint.cli.export import export
from mint.cli.runs import checkpoints_app, runs_app
from mint.cli.sft import sft
from mint.cli.talk import chat, sample

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA on this machine.",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"mint {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA on this machine."""


app.command(epilog="Example: mint sft --offline --steps 30 --out out/first")(sft)
app.command(epilog="Example: mint chat out/first --compare")(chat)
app.command(epilog='Example: mint sample out/first "How do I boil an egg?" --temperature 0 --json')(sample)
app.command(epilog="Example: mint export out/first out/adapter")(export)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(checkpoints_app, name="checkpoints")
app.command(epilog="Example: mint doctor --model Qwen/Qwen3-0.6B; without any measuring: mint doctor --no-measure")(
    doctor
)

if __name__ == "__main__":
    app()
