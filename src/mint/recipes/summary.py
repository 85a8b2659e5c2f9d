"""What a recipe prints at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mint.chat import ConversionReport
from mint.recipes.evaluation import Evaluation, comparison


def print_summary(console: Console, report: ConversionReport, summary: Mapping[str, Any], out: Path) -> None:
    """What the user wants to know at the end, and what to type next."""
    console.print(f"\n[bold]training rows[/bold]\n{report}", highlight=False, soft_wrap=True)
    if summary["status"] == "finished":
        sample = summary["samples"][0] if summary["samples"] else None
        if sample is not None:
            console.print(f"\n[bold]{sample['prompt']}[/bold]")
            for when in ("before", "after"):
                console.print(f"[dim]{when}:[/dim]")
                console.print(sample[when], markup=False, highlight=False)
        console.print(f"\ntrain loss: {summary['first_train_loss']:.4f} -> {summary['last_train_loss']:.4f}")
        before, after = (Evaluation(**summary[f"evaluation_{when}"]) for when in ("before", "after"))
        console.print(comparison(before, after), highlight=False)
    else:
        console.print(f"\n[yellow]interrupted after step {summary['step']}; everything is saved[/yellow]")
    console.print(f"speed:      {summary['tokens_per_second']:.0f} tokens/s, "
                  f"waited for data {summary['wait_share']:.1%} of the time")  # fmt: skip
    console.print(f"checkpoint: {summary['checkpoint']}", soft_wrap=True)
    console.print(
        f"results:    {out}/ (loss.png, samples.md, metrics.jsonl, summary.json, config.json, data_certificate.json)",
        soft_wrap=True,
    )
    more = "" if summary["status"] == "interrupted" else f" --steps {2 * int(summary['step'])}"
    console.print(f"go on:      mint sft --resume {out}{more}", soft_wrap=True)
    console.print(f"talk to it: mint chat {out}", soft_wrap=True)
