"""The chat script on a tiny model: its numbers are the model's, and a checkpoint goes on where it was saved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mint.chat import convert_conversations
from tests.examples.load import example
from tests.support.clients import Embedded

chat_sft = example("chat_sft")

HELD_OUT = 4
WORDS = ("tea", "rain", "a long walk", "bread", "the sea", "chess", "moss", "a good book")


def rows() -> list[list[dict[str, str]]]:
    """20 short conversations with answers in one form."""
    return [
        [
            {"role": "user", "content": f"Question {i}: what do you think of {WORDS[i % 8]}?"},
            {"role": "assistant", "content": f"I like {WORDS[i % 8]}, and so will you."},
        ]
        for i in range(20)
    ]


@pytest.fixture
def options(tmp_path: Path, tiny_model: str) -> list[str]:
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows()))
    given = [
        "--model",
        tiny_model,
        "--data",
        str(data),
        "--held-out",
        str(HELD_OUT),
        "--out",
        str(tmp_path / "a" / "b"),
    ]
    return [*given, "--batch-size", "3", "--learning-rate", "1e-2", "--max-length", "200", "--max-tokens", "8"]


def losses(text: str, *, resumed: bool) -> list[tuple[int, float]]:
    end = r"  \(resumed\)" if resumed else ""
    return [
        (int(step), float(loss))
        for step, loss in re.findall(rf"^step +(\d+)  loss (\d+\.\d{{4}}){end}$", text, re.MULTILINE)
    ]


def held_out_nll(text: str, when: str) -> float:
    found = re.search(rf"^held-out NLL {when}: (\d+\.\d{{4}})$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def transformers_nll(model: str) -> float:
    """Nats per trained token of the held-out rows, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    datums, _ = convert_conversations(rows()[-HELD_OUT:], AutoTokenizer.from_pretrained(model), 200)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    total = weight = 0.0
    for datum in datums:
        with torch.no_grad():
            logits = reference(torch.tensor([datum.model_input.to_ints()])).logits[0]
        targets, weights = (datum.loss_fn_inputs[name].to_torch() for name in ("target_tokens", "weights"))
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        total -= float((chosen * weights).sum())
        weight += float(weights.sum())
    return total / weight


def test_it_measures_trains_and_plots(
    world: Embedded, options: list[str], tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_sft.main([*options, "--steps", "8"])
    text = capsys.readouterr().out
    assert held_out_nll(text, "before") == pytest.approx(transformers_nll(tiny_model), abs=2e-4)
    assert held_out_nll(text, "after") < held_out_nll(text, "before") - 1
    assert [step for step, _ in losses(text, resumed=False)] == list(range(8))
    assert re.search(r"^to train on\nrows +16$", text, re.MULTILINE)
    assert re.search(rf"^held out\nrows +{HELD_OUT}$", text, re.MULTILINE)
    assert text.count(chat_sft.QUESTION) == 2
    assert (tmp_path / "a" / "b" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_resumed_steps_are_those_that_would_have_come_next(
    world: Embedded, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first needs weights and cursor (a new epoch begins: 5 x 3 of 16 rows), the second the optimizer too."""
    chat_sft.main([*options, "--steps", "5"])
    resumed = losses(capsys.readouterr().out, resumed=True)
    chat_sft.main([*options, "--steps", "7"])
    straight = losses(capsys.readouterr().out, resumed=False)
    assert resumed == straight[5:]
    assert len({loss for _, loss in straight}) == 7  # no batch is mistaken for another
