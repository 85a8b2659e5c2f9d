"""Evaluation measures against formulas in float64 written out here, and on a model against transformers."""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch

import mint
from mint import types
from mint.chat import conversation_to_datums
from mint.data.rendered_hash import rendered_hash
from mint.errors import InputError
from mint.recipes import Evaluation, evaluation_set, mean_nll, measure
from mint.recipes.evaluation import comparison

LETTERS = {1: "a", 2: "é", 3: "字", 4: "<end>", 5: "bc"}  # 1, 2, 3, 0 (special) and 2 bytes


class Letters:
    """A tokenizer whose ids stand for LETTERS."""

    def decode(self, token_ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(LETTERS[token] for token in token_ids if token != 4)


def datum(inputs, targets, weights):
    return types.Datum(
        model_input=types.ModelInput.from_ints(inputs), loss_fn_inputs={"target_tokens": targets, "weights": weights}
    )


def output(*logprobs):
    return types.ForwardBackwardOutput(
        loss_fn_output_type="scalar",
        loss_fn_outputs=[{"logprobs": types.TensorData(row, "float32")} for row in logprobs],
        metrics={},
    )


# a row of two datums, as where a template rewrites its history, and a row of one
FIRST = datum([9, 9, 1, 2], [9, 1, 2, 4], [0, 1, 1, 1])
SECOND = datum([9, 5], [5, 4], [1, 1])
THIRD = datum([9, 3, 9, 9, 1], [3, 4, 9, 1, 4], [2, 0.5, 0, 1, 1])
ROWS = [[FIRST, SECOND], [THIRD]]
LOGPROBS = [-8.0, -1.0, -2.0, -0.5], [-0.25, -0.125], [-3.0, -0.5, -9.0, -1.5, -0.75]


def measured():
    return measure(output(*LOGPROBS), evaluation_set(ROWS, Letters()))


def test_nll_is_the_weighted_mean_over_all_trained_tokens():
    first = 1 + 2 + 0.5 + 0.25 + 0.125
    second = 2 * 3 + 0.5 * 0.5 + 1.5 + 0.75
    assert measured().nll == (first + second) / (5 + 4.5)
    assert measured().perplexity == math.exp((first + second) / 9.5)


def test_row_mean_counts_a_row_once_however_many_datums_and_tokens_it_has():
    first, second = (1 + 2 + 0.5 + 0.25 + 0.125) / 5, (2 * 3 + 0.5 * 0.5 + 1.5 + 0.75) / 4.5
    assert measured().row_mean_nll == (first + second) / 2
    of_three = (1 + 2 + 0.5) / 3 + (0.25 + 0.125) / 2 + second  # were a datum a row
    assert measured().row_mean_nll != of_three / 3


def test_bits_per_byte_count_every_trained_token_once_and_the_bytes_of_text_alone():
    nats = (1 + 2 + 0.5) + (0.25 + 0.125) + (3 + 0.5 + 1.5 + 0.75)  # ends of turns too
    num_bytes = (1 + 2) + 2 + (3 + 1)
    assert num_bytes == len("aé".encode()) + len(b"bc") + len("字a".encode())
    found = measured()
    assert found.bytes == num_bytes
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-15)


def test_counts():
    assert (measured().rows, measured().tokens) == (2, 3 + 2 + 4)


def test_a_uniform_model_over_bytes_has_eight_bits_per_byte():
    """What the measure is called after: one token a byte, each of probability 1/256."""
    row = datum([9, 1, 1], [1, 1, 1], [1, 1, 1])
    found = measure(output([-math.log(256)] * 3), evaluation_set([[row]], Letters()))
    assert found.bits_per_byte == pytest.approx(8, rel=1e-6)
    assert found.perplexity == pytest.approx(256, rel=1e-6)


def test_a_character_of_several_tokens_is_whole(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answer = "Grüße 🙂 naïve"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    held_out = evaluation_set([conversation_to_datums(messages, tokenizer, 200)], tokenizer)
    assert held_out.bytes == len(answer.encode())


def test_an_nll_too_large_for_an_exponential_has_an_infinite_perplexity():
    found = measure(output([-1e30]), evaluation_set([[datum([9], [1], [1])]], Letters()))
    assert found.perplexity == math.inf and found.nll == pytest.approx(1e30)


def test_text_of_no_bytes_has_infinitely_many_bits_per_byte():
    found = measure(output([-1.0]), evaluation_set([[datum([9], [4], [1])]], Letters()))
    assert (found.bytes, found.bits_per_byte) == (0, math.inf)


def test_mean_nll_is_the_weighted_mean():
    assert mean_nll(output(*LOGPROBS), [FIRST, SECOND, THIRD]) == measured().nll
    assert mean_nll(output([-1.0, -3.0]), [datum([9, 9], [1, 1], [0.25, 0.75])]) == 2.5


def test_sums_are_in_float64():
    """A million small numbers in float32 lose digits."""
    n = 1_000_000
    row = datum([1] * n, [1] * n, [1.0] * n)
    assert mean_nll(output([-0.1] * n), [row]) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(InputError, match="the output is of 2 datums, but 3 were given; give those that were passed to"):
        mean_nll(output(*LOGPROBS[:2]), [FIRST, SECOND, THIRD])
    with pytest.raises(InputError, match="the output is of 4 datums, but 3 were given"):
        measure(output(*LOGPROBS, [-1.0]), evaluation_set(ROWS, Letters()))
    with pytest.raises(InputError, match="mean_nll: the weights of these datums add up to 0"):
        mean_nll(output([-1.0]), [datum([9], [1], [0])])
    with pytest.raises(InputError, match="evaluation_set: no rows; give at least one"):
        evaluation_set([], Letters())
    for empty in ([], [datum([9], [1], [0])]):
        with pytest.raises(InputError, match="evaluation_set: row 1 has no trained token; leave it out"):
            evaluation_set([[FIRST], empty], Letters())


def test_rendered_hash_is_the_documented_one():
    raw = b""
    for row, n in ((FIRST, 4), (SECOND, 2), (THIRD, 5)):
        targets, weights = (row.loss_fn_inputs[name].tolist() for name in ("target_tokens", "weights"))
        raw += struct.pack(f"<q{n}q{n}q{n}f", n, *row.model_input.to_ints(), *targets, *weights)
    assert rendered_hash([FIRST, SECOND, THIRD]) == hashlib.sha256(raw).hexdigest()
    assert measured().rendered_hash == hashlib.sha256(raw).hexdigest()


def test_rendered_hash_tells_every_change_apart():
    changed = [
        [FIRST, SECOND],
        [SECOND, FIRST],
        [SECOND],
        [FIRST, datum([9, 5], [5, 4], [0, 1])],
        [FIRST, datum([9, 5], [4, 4], [1, 1])],
        [FIRST, datum([8, 5], [5, 4], [1, 1])],
        [datum([*FIRST.model_input.to_ints(), 9, 5], [9, 1, 2, 4, 5, 4], [0, 1, 1, 1, 1, 1])],
    ]
    assert len({rendered_hash(datums) for datums in changed}) == len(changed)
    assert rendered_hash(iter([FIRST, SECOND])) == rendered_hash([FIRST, SECOND])


def test_comparison_shows_both_or_says_why_not():
    before = Evaluation(2.0, 2.5, 7.38906, 3.0, 4, 1234, 99, "a")
    after = Evaluation(1.0, 1.5, 2.71828, 1.25, 4, 1234, 99, "a")
    assert comparison(before, after).splitlines() == [
        "test NLL:      2.0000 -> 1.0000  (4 held-out rows, 1,234 trained tokens)",
        "mean of rows:  2.5000 -> 1.5000",
        "perplexity:    7.3891 -> 2.7183",
        "bits per byte: 3.0000 -> 1.2500",
    ]
    other = Evaluation(1.0, 1.5, 2.71828, 1.25, 4, 1234, 99, "b")
    lines = comparison(before, other).splitlines()
    assert lines[0] == "test NLL:      1.0000  (4 held-out rows, 1,234 trained tokens)"
    assert lines[-1] == "before training other tokens were measured, so there is nothing to compare these numbers with"


def test_on_a_model_all_measures_are_those_of_transformers(tiny_model, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("MINT_DTYPE", "float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answers = [["Fine, thank you.", "Grüße!"], ["No."]]
    conversations = [
        [message for text in row for message in ({"role": "user", "content": "So?"}, {"role": "assistant", "content": text})]
        for row in answers
    ]  # fmt: skip
    rows = [conversation_to_datums(messages, tokenizer, 300) for messages in conversations]
    held_out = evaluation_set(rows, tokenizer)
    with mint.ServiceClient() as service:
        client = service.create_lora_training_client(tiny_model, rank=2, seed=0)
        found = measure(client.forward(held_out.datums).result(), held_out)

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    row_nlls = []
    for row in rows:
        nlls = []
        for made in row:
            with torch.no_grad():
                logprobs = model(torch.tensor([made.model_input.to_ints()])).logits[0].log_softmax(-1).numpy()
            targets, weights = (made.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "weights"))
            nlls += [-logprobs[i, targets[i]] for i in np.flatnonzero(weights)]
        row_nlls.append(np.array(nlls))
    every = np.concatenate(row_nlls)
    num_bytes = sum(len(text.encode()) for row in answers for text in row)
    assert (found.rows, found.tokens, found.bytes) == (2, len(every), num_bytes)
    assert found.nll == pytest.approx(every.mean(), rel=1e-5)
    assert found.row_mean_nll == pytest.approx(np.mean([nlls.mean() for nlls in row_nlls]), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(every.mean()), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(every.sum() / np.log(2) / num_bytes, rel=1e-5)
