"""The folder of a recipe's run: what was asked for, what was measured, what came of it.

config.json     the options, as given and filled in; --resume reads them
metrics.jsonl   a line per training step and per evaluation, see `chat_sft`
loss.png        train loss and test NLL
samples.md      the same prompts before and after
summary.json    the results so far; its keys are described in docs/sft.md
data_certificate.json  what the data is for the model, see docs/chat-data.md
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mint.errors import InputError

CONFIG, METRICS, SUMMARY, PLOT, SAMPLES = "config.json", "metrics.jsonl", "summary.json", "loss.png", "samples.md"
CERTIFICATE = "data_certificate.json"


class RunFolder:
    """Files are replaced whole, so that a reader or an interruption never meets half of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def is_used(self) -> bool:
        """Whether a run saved something here."""
        return (self.path / SUMMARY).exists()

    def require_unused(self) -> None:
        """Raises InputError where the folder holds a run: its results are not written over."""
        if self.is_used:
            raise InputError(
                f"{self.path} already holds a run; go on with it (mint sft --resume {self.path}) or give another --out"
            )

    def create(self, config: dict[str, Any]) -> None:
        """Raises as `require_unused`."""
        self.require_unused()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(METRICS, "")
        self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        self._write(CONFIG, json.dumps(config, indent=2))

    def read_config(self) -> dict[str, Any]:
        return self._read(CONFIG)

    def read_summary(self) -> dict[str, Any]:
        return self._read(SUMMARY)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{self.path} holds no {name}: it is not the folder of a run that saved something"
            ) from None
        except ValueError as error:
            raise InputError(f"{self.path / name} is damaged: {error}") from None
        if not isinstance(found, dict):
            raise InputError(f"{self.path / name} is damaged: expected a JSON object")
        return found

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write(SUMMARY, json.dumps(summary, indent=2))

    def write_certificate(self, certificate: dict[str, Any]) -> None:
        self._write(CERTIFICATE, json.dumps(certificate, indent=2))

    def read_certificate(self) -> dict[str, Any] | None:
        """None where the folder holds none."""
        return self._read(CERTIFICATE) if (self.path / CERTIFICATE).exists() else None

    def append_metrics(self, row: dict[str, Any]) -> None:
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        text = (self.path / METRICS).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def forget_metrics_after(self, step: int) -> list[dict[str, Any]]:
        """Drop what was measured after the checkpoint that a run goes on from; returns the rest."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        self._write(METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def write_samples(self, samples: list[dict[str, str]]) -> None:
        parts = ["# The same prompts before and after\n"]
        parts += [
            f"## {sample['prompt']}\n\n### Before\n\n{sample['before']}\n\n### After\n\n{sample['after']}\n"
            for sample in samples
        ]
        self._write(SAMPLES, "\n".join(parts))

    def _write(self, name: str, text: str) -> None:
        fresh = self.path / f".{name}.new"
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, self.path / name)
