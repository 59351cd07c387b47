"""One model on one sequence of token ids: decoders, encoders, encoder-decoders, with any head, as a matrix of outputs.

A language model gives logits over its vocabulary at every position; a head of a task gives labels, starts and ends, or
nothing but the body's hidden states. Two models of one class are compared on these matrices.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from runner.verify.models import quiet
from runner.verify.prompts import TokenSequence
from runner.verify.quality import relative

# What the heads of transformers call their outputs, in the order in which they are stacked.
_OUTPUTS = ("logits", "prediction_logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


def predicts_tokens(model: Any) -> bool:
    """Return whether the model's logits are over its vocabulary."""
    return model.get_output_embeddings() is not None


def generates(model: Any) -> bool:
    """Return whether the model can continue a text."""
    return bool(model.can_generate()) and predicts_tokens(model)


def has_decoder(model: Any) -> bool:
    """Return whether the model reads one text and writes another."""
    takes = inspect.signature(model.forward).parameters
    return bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in takes


def outputs_of(model: Any, sequence: TokenSequence) -> torch.Tensor:
    """Return what the model computes for one sequence: float32 on the CPU, shape (rows, width).

    Rows are positions where the model has an output for each, or one row for a label of the whole sequence.
    """
    ids = sequence.ids[None].to(next(model.parameters()).device)
    inputs: dict[str, Any] = {}
    if has_decoder(model):
        # Heads over the whole text sit on its end mark, which a random sequence need not have.
        end = getattr(model.config, "eos_token_id", None)
        inputs["decoder_input_ids"] = ids
        if isinstance(end, int):
            ids = torch.cat([ids[ids != end][None], torch.full_like(ids[:, :1], end)], dim=1)
            inputs["decoder_input_ids"] = ids
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    takes = inspect.signature(model.forward).parameters
    if "use_cache" in takes:
        inputs["use_cache"] = False
    with torch.no_grad(), quiet():
        output = model(**inputs)
    found = [output[name] for name in _OUTPUTS if isinstance(output.get(name), torch.Tensor)]
    return torch.cat([_rows(tensor) for tensor in found]).float().cpu()


def error_of(wanted: Sequence[torch.Tensor], found: torch.Tensor, number: int, *, is_language: bool) -> float:
    """Return how far one sequence's outputs are from the wanted ones, relative to the size of these.

    Logits over a vocabulary are compared per sequence, centred (`runner.verify.quality.relative`). Other outputs are
    compared as they are, relative to the root mean square over all sequences: one label may be near zero by chance.

    Args:
        wanted: outputs of the reference, by sequence.
        found: outputs of the other model on sequence `number`.
        number: which sequence.
        is_language: whether the outputs are logits over a vocabulary.
    """
    reference = wanted[number]
    if found.shape != reference.shape:
        return float("inf")
    if is_language:
        return relative(reference, found)
    off = float((found.double() - reference.double()).square().mean().sqrt())
    size = float(torch.cat([entry.double().flatten() for entry in wanted]).square().mean().sqrt())
    if off == 0.0:
        return 0.0
    return off / size if size > 0 else float("inf")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return one output of a batch of one as (rows, width); a score for each position is one row over positions."""
    inner = tensor[0]
    if inner.ndim == 0:
        return inner.view(1, 1)
    return inner[None] if inner.ndim == 1 else inner.reshape(-1, inner.shape[-1])
