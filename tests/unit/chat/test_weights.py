"""What is trained by choice: everything, or what the messages say of themselves."""

from __future__ import annotations

import pytest
from tests.unit.chat.conversations import TWO_TURNS, all_tokens, all_weights, template_ids, trained_runs
from tests.unit.chat.test_families import renderer_of
from tests.unit.chat.tiny_tokenizers import ALL_FAMILIES, tokenizer_of

from mint.chat import conversation_to_datums
from mint.errors import DataError

some_families = pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3", "gemma3_pieces", "phi3"])


@some_families
def test_all_trains_each_token_of_the_template_up_to_the_last_end_of_turn(name: str) -> None:
    tokenizer = tokenizer_of(name)
    (datum,) = conversation_to_datums(
        [*TWO_TURNS, {"role": "user", "content": "Bye"}], renderer_of(name, False), 2048, "all"
    )
    whole = template_ids(tokenizer, TWO_TURNS)
    end = tokenizer.convert_tokens_to_ids(ALL_FAMILIES[name].end_of_turn)
    last = len(whole) - 1 - whole[::-1].index(end)
    assert all_tokens(datum) == whole[: last + 1]
    assert all_weights(datum) == [0.0] + [1.0] * last  # nothing predicts the first


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_all_ends_with_the_end_of_a_turn_in_every_family(name: str) -> None:
    """Also where the template writes none, since the next turn's header ends a turn (GLM)."""
    (datum,) = conversation_to_datums(TWO_TURNS, renderer_of(name, False), 4096, "all")
    end = tokenizer_of(name).convert_tokens_to_ids(ALL_FAMILIES[name].end_of_turn)
    assert (all_tokens(datum)[-1], all_weights(datum)[-1]) == (end, 1.0)
    assert end in renderer_of(name, False).stop_token_ids


@some_families
@pytest.mark.parametrize("own", [{"train": False}, {"weight": 0}])
def test_an_answer_with_weight_0_is_history_only(name: str, own: dict[str, object]) -> None:
    renderer = renderer_of(name, False)
    asked, first, again, second = TWO_TURNS
    (datum,) = conversation_to_datums([asked, {**first, **own}, again, second], renderer, 2048)
    (*_, whole) = conversation_to_datums(TWO_TURNS, renderer, 2048)
    assert all_tokens(datum) == all_tokens(whole)
    (run,) = trained_runs(all_tokens(datum), all_weights(datum))
    assert run == trained_runs(all_tokens(whole), all_weights(whole))[-1]


@some_families
def test_a_weight_is_the_loss_weight_of_each_token_of_the_answer(name: str) -> None:
    renderer = renderer_of(name, False)
    plain = conversation_to_datums(TWO_TURNS, renderer, 2048)
    asked, first, again, second = TWO_TURNS
    weighted = conversation_to_datums([asked, first, again, {**second, "weight": 2.5}], renderer, 2048)
    assert [all_tokens(datum) for datum in weighted] == [all_tokens(datum) for datum in plain]
    (*_, last), (*_, unweighted) = weighted, plain
    (*_, run) = trained_runs(all_tokens(unweighted), all_weights(unweighted))
    assert all_weights(last) == [*all_weights(unweighted)[: -len(run)], *[2.5] * len(run)]


def test_an_earlier_answer_may_be_chosen_beside_the_last() -> None:
    renderer = renderer_of("smollm2", False)
    asked, first, again, second = TWO_TURNS
    messages = [asked, {**first, "train": True}, again, second]
    assert conversation_to_datums(messages, renderer, 2048, "last_assistant") == conversation_to_datums(
        TWO_TURNS, renderer, 2048
    )


@pytest.mark.parametrize("own", [{"train": False}, {"weight": 0.5}])
def test_a_message_with_a_weight_of_its_own_is_refused_where_all_is_trained(own: dict[str, object]) -> None:
    messages = [TWO_TURNS[0], {**TWO_TURNS[1], **own}, *TWO_TURNS[2:]]
    with pytest.raises(DataError, match=r"\[bad_weight\] message 1 has its own weight 0.*use train_on='all_assistant'"):
        conversation_to_datums(messages, renderer_of("smollm2", False), 2048, "all")
