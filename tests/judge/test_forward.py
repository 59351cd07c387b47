"""What a model is given and what it answers, as one matrix; and how far two such answers are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from runner.judge.forward import Errors, _rows, generates, has_decoder, outputs_of, predicts_tokens
from runner.judge.prompts import TokenSequence

SIZES: Mapping[str, Any] = {
    "vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
# Class → the fields of its config; whether it predicts tokens, generates, and has a decoder; the shape of its answer.
KINDS: Mapping[str, tuple[Mapping[str, Any], tuple[bool, bool, bool], tuple[int, int]]] = {
    "LlamaForCausalLM": (SIZES, (True, True, False), (5, 40)),
    "LlamaForSequenceClassification": ({**SIZES, "num_labels": 3, "pad_token_id": 0}, (False, False, False), (1, 3)),
    "BertForMaskedLM": (SIZES, (True, False, False), (5, 40)),
    "BertForQuestionAnswering": (SIZES, (False, False, False), (2, 5)),
    "T5ForConditionalGeneration": (
        {
            "vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "eos_token_id": 7,
            "decoder_start_token_id": 0,
        },
        (True, True, True), (4, 40),
    ),
    "WhisperForConditionalGeneration": (
        {
            "vocab_size": 40, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_mel_bins": 4,
            "max_source_positions": 6, "max_target_positions": 12, "eos_token_id": None, "pad_token_id": 0,
            "bos_token_id": 1, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        (True, False, True), (5, 40),
    ),
    "WhisperForAudioClassification": (
        {
            "vocab_size": 40, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_mel_bins": 4,
            "max_source_positions": 6, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        (False, False, False), (1, 3),
    ),
}  # fmt: skip
IDS = torch.tensor([5, 7, 6, 39, 7])


def _build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    found = getattr(transformers, kind)
    model: PreTrainedModel = found(found.config_class(**KINDS[kind][0]))
    return model.eval()


def _asked(model: PreTrainedModel) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what the model is given for `IDS`, and the answer."""
    given: dict[str, Any] = {}

    def see(_: torch.nn.Module, args: tuple[Any, ...], fields: dict[str, Any]) -> None:
        given.update(fields)

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        answer = outputs_of(model, TokenSequence(label="x", ids=IDS, is_text=False), "cpu")
    handle.remove()
    return given, answer


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_answers_with_a_matrix(kind: str) -> None:
    model = _build(kind)
    _, is_what, shape = KINDS[kind]
    assert (predicts_tokens(model), generates(model), has_decoder(model)) == is_what

    given, answer = _asked(model)

    assert (tuple(answer.shape), answer.dtype) == (shape, torch.float32)
    assert given.get("use_cache", False) is False
    with torch.no_grad():
        output = model(**given)
    wanted = [output[name] for name in ("logits", "start_logits", "end_logits") if name in output]
    assert torch.equal(answer, torch.cat([one[0].reshape(-1, answer.shape[-1]) for one in wanted]))


def test_a_model_of_text_sees_the_ids_and_all_of_them() -> None:
    given, _ = _asked(_build("LlamaForCausalLM"))
    assert given.keys() == {"input_ids", "attention_mask", "use_cache"}
    assert given["input_ids"].tolist() == [IDS.tolist()]
    assert given["attention_mask"].tolist() == [[1] * 5]


def test_a_decoder_writes_the_text_with_one_end_mark_at_its_end() -> None:
    given, _ = _asked(_build("T5ForConditionalGeneration"))
    assert given["input_ids"].tolist() == given["decoder_input_ids"].tolist() == [[5, 6, 39, 7]]
    given, _ = _asked(_build("WhisperForConditionalGeneration"))  # which has no end mark here
    assert given["decoder_input_ids"].tolist() == [IDS.tolist()]
    assert given["input_features"].shape == (1, 4, 12)
    assert "input_ids" not in given


@pytest.mark.parametrize(
    "shape, rows", [((1,), (1, 1)), ((1, 3), (1, 3)), ((1, 4, 3), (4, 3)), ((1, 2, 4, 3), (8, 3))], ids=str
)
def test_an_output_is_rows_of_the_last_dimension(shape: tuple[int, ...], rows: tuple[int, int]) -> None:
    values = torch.arange(math.prod(shape)).view(shape)
    assert torch.equal(_rows(values), values.view(rows))


# ---- how far apart


def _errors(*pairs: tuple[list[float], list[float]], is_language: bool = False) -> Errors:
    errors = Errors(is_language=is_language)
    for number, (wanted, found) in enumerate(pairs):
        errors.add(torch.tensor([wanted]), torch.tensor([found]), f"text {number}")
    return errors


def test_the_worst_sequence_is_named_and_equal_ones_have_no_error() -> None:
    assert _errors(([1.0, -1.0], [1.0, -1.0]), is_language=True).worst() == (0.0, "")
    found = _errors(
        ([1.0, -1.0], [1.0, -1.0]), ([1.0, -1.0], [1.5, -1.5]), ([2.0, -2.0], [2.5, -2.5]), is_language=True
    )
    assert found.worst() == (0.5, "text 1")
    assert Errors(is_language=True).worst() == (0.0, "")
    tie = _errors(([1.0, -1.0], [1.5, -1.5]), ([2.0, -2.0], [3.0, -3.0]), is_language=True)
    assert tie.worst() == (0.5, "text 0")


def test_a_constant_added_to_all_logits_is_no_error_and_one_added_to_labels_is() -> None:
    pair = ([1.0, -1.0], [4.0, 2.0])
    assert _errors(pair, is_language=True).worst()[0] == 0.0
    assert _errors(pair).worst()[0] == 3.0


@pytest.mark.parametrize("is_language", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_is_worse_than_anything(place: int, is_language: bool) -> None:
    pairs = [([1.0, -1.0], [1.0, -1.0]), ([1.0, -1.0], [9.0, -9.0]), ([1.0, -1.0], [2.0, -2.0])]
    pairs.insert(place, ([1.0, -1.0], [math.nan, -1.0]))
    worst, label = _errors(*pairs, is_language=is_language).worst()
    assert math.isnan(worst)
    assert label == f"text {place}"


@pytest.mark.parametrize("is_language", [True, False])
def test_answers_of_another_shape_are_infinitely_far_apart(is_language: bool) -> None:
    errors = _errors(([1.0, -1.0], [1.0]), is_language=is_language)
    assert errors.worst() == (math.inf, "text 0")


def test_a_label_is_held_against_the_size_of_all_labels() -> None:
    errors = _errors(([1.0], [1.5]), ([7.0], [7.0]))  # root mean square 5, by chance a small one first
    assert errors.worst() == (0.5 / 5, "text 0")
    assert _errors(([1.0], [2.0]), ([7.0], [7.0])).worst() == (0.2, "text 0")
    assert _errors(([0.1, 0.1], [0.2, 0.1]), ([0.3, 0.3], [0.3, 0.3])).worst()[0] == pytest.approx(
        math.sqrt(0.01 / 2) / math.sqrt(0.05)
    )
    assert _errors(([0.0], [0.0])).worst() == (0.0, "")
    assert _errors(([0.0], [0.5])).worst() == (math.inf, "text 0")


def test_doubt_is_above_the_lower_bound_and_up_to_the_upper_one() -> None:
    pairs = [([1.0, -1.0], [1.0 + off, -1.0 - off]) for off in (0.0, 0.25, 0.5, 0.75, math.nan)]
    for is_language in (True, False):
        errors = _errors(*pairs, is_language=is_language)
        assert errors.between(0.25, 0.5) == [2]
        assert errors.between(0.125, 0.75) == [1, 2, 3]
        errors.replace(2, torch.tensor([[1.0, -1.0]]), torch.tensor([[1.25, -1.25]]))
        assert errors.between(0.25, 0.5) == []
        errors.replace(4, torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, -3.0]]))
        assert errors.worst() == (2.0, "text 4")


def test_logits_that_are_all_the_same_have_no_room_for_an_error() -> None:
    flat = torch.full((2, 5), 3.0)
    errors = Errors(is_language=True)
    errors.add(flat, flat + 1.0, "shifted, which changes no probability")
    assert errors.worst() == (0.0, "")
    errors.add(flat, flat + torch.arange(5), "other")
    assert errors.worst() == (math.inf, "other")
