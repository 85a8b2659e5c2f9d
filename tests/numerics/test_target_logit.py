"""In bf16 torch's target logit is a float32 number: dropping that stays within the contract's bounds, so it is shown here."""

from __future__ import annotations

from pathlib import Path

import torch

from mint.engine.lora import Segment
from mint.engine.models.head import Head, Targets
from tests.support.engine import drain, open_backend

ROWS = 40


def test_the_logit_of_a_target_is_not_rounded(tiny_model: str) -> None:
    """Against float64: the rounded logits of all other tokens, the exact one of the target."""
    decoder = open_backend(Path(tiny_model), "bfloat16", kernels="torch")._trainer.decoder
    unembed_VD = decoder.weights.unembed.weight_OI
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        row_TD = torch.randn(ROWS, unembed_VD.shape[1], generator=generator)
        logit_TV = row_TD @ unembed_VD.float().t()
        normed_TD = (
            row_TD * 12 / logit_TV.amax(-1, keepdim=True)
        ).bfloat16()  # likeliest logits near 12: steps of 1/16
        token_P = (normed_TD.float() @ unembed_VD.float().t()).topk(5).indices[:, 4]
        targets = Targets(torch.arange(ROWS), torch.arange(ROWS), token_P)
        got_P = drain(Head(decoder).score(normed_TD, targets, Segment(0, ROWS, None)))
        rounded_TV = (normed_TD @ unembed_VD.t()).double()
        exact_P = (normed_TD.double() * unembed_VD.double()[token_P]).sum(-1)
        mixed_TV = rounded_TV.scatter(1, token_P[:, None], exact_P[:, None])
        expected_P = mixed_TV.log_softmax(-1)[torch.arange(ROWS), token_P]
        all_rounded_P = rounded_TV.log_softmax(-1)[torch.arange(ROWS), token_P]
    assert (got_P - expected_P).abs().max() < 1e-5
    assert (all_rounded_P - expected_P).abs().max() > 1e-3  # what the test tells apart
