"""One model on one sequence of token ids: decoders, encoders, encoder-decoders, with any head, as a matrix of outputs.

A language model gives logits over its vocabulary at every position; a head of a task gives labels, starts and ends, or
nothing but the body's hidden states. Two models of one class are compared on these matrices.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from runner.judge.distances import relative
from runner.judge.media import read_media
from runner.judge.prompts import TokenSequence

# What the heads of transformers call their outputs, in the order in which they are stacked.
_OUTPUTS = ("logits", "prediction_logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


def predicts_tokens(model: Any) -> bool:
    """Return whether the model's logits are over its vocabulary."""
    return model.get_output_embeddings() is not None


def generates(model: Any) -> bool:
    """Return whether the model can continue a text."""
    return bool(model.can_generate()) and predicts_tokens(model) and model.main_input_name == "input_ids"


def has_decoder(model: Any) -> bool:
    """Return whether the model reads one text and writes another."""
    takes = inspect.signature(model.forward).parameters
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in takes


def outputs_of(model: Any, sequence: TokenSequence, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return what the model computes for one sequence: float32 on the CPU, shape (rows, width).

    A speech model writes the sequence to sounds that are random; a model that reads no text at all is given sounds or
    pictures, others for each sequence, in `dtype`, which is what the model computes in.

    Rows are positions where the model has an output for each, or one row for a label of the whole sequence.
    """
    ids = sequence.ids[None].to(device)
    inputs: dict[str, Any] = {}
    if has_decoder(model):
        # Heads over the whole text sit on its end mark, which a random sequence need not have.
        end = getattr(model.config, "eos_token_id", None)
        inputs["decoder_input_ids"] = ids
        if isinstance(end, int):
            ids = torch.cat([ids[ids != end][None], torch.full_like(ids[:, :1], end)], dim=1)
            inputs["decoder_input_ids"] = ids
    media = read_media(model, seed=int(sequence.ids.sum()))
    if media:
        inputs |= {name: values.to(device, dtype) for name, values in media.items()}
    else:
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    takes = inspect.signature(model.forward).parameters
    if "use_cache" in takes:
        inputs["use_cache"] = False
    output = model(**inputs)
    found = [output[name] for name in _OUTPUTS if isinstance(output.get(name), torch.Tensor)]
    return torch.cat([_rows(tensor) for tensor in found]).float().cpu()


def without_common_nan(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return outputs by variant, with zero where every variant has NaN.

    Rows of a head that no token needs may hold NaN in the base, and then in every right merge of it. A NaN that one of
    them has alone stays one.
    """
    width = min(output.shape[-1] for output in outputs.values())  # a head that was resized has more
    if not all(bool(output.isnan().any()) for output in outputs.values()):
        return dict(outputs)
    common = torch.stack([output[:, :width].isnan() for output in outputs.values()]).all(dim=0)
    return {
        name: output.masked_fill(pad(common, (0, output.shape[-1] - width)), 0.0) for name, output in outputs.items()
    }


@dataclass(slots=True, kw_only=True)
class Errors:
    """How far one model's outputs are from a reference's, relative to the size of these, by sequence.

    Logits over a vocabulary are compared per sequence, centred (`runner.judge.distances.relative`). Other outputs are
    compared as they are, relative to the root mean square over all sequences: one label may be near zero by chance.

    Attributes:
        is_language: whether the outputs are logits over a vocabulary.
    """

    is_language: bool
    _off: list[tuple[float, str]] = field(default_factory=list)
    _squares: float = 0.0
    _count: int = 0

    def add(self, wanted: torch.Tensor, found: torch.Tensor, label: str) -> None:
        """Count one sequence: outputs of the reference and of the other model."""
        self._off.append((self._distance(wanted, found), label))
        if not self.is_language:
            self._squares += float(wanted.double().square().sum())
            self._count += wanted.numel()

    def between(self, low: float, high: float) -> list[int]:
        """Return the places, in the order of adding, of the sequences whose relative error is in (low, high]."""
        return [place for place, (off, _) in enumerate(self._off) if low < self._relative(off) <= high]

    def replace(self, place: int, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """Take other outputs for the sequence that was added at that place."""
        self._off[place] = (self._distance(wanted, found), self._off[place][1])

    def worst(self) -> tuple[float, str]:
        """Return the largest relative error, and its sequence's label; a NaN is the worst there is."""
        worst, where = 0.0, ""
        for off, label in self._off:
            error = self._relative(off)
            if not math.isnan(worst) and not error <= worst:
                worst, where = error, label
        return worst, where

    def _distance(self, wanted: torch.Tensor, found: torch.Tensor) -> float:
        if found.shape != wanted.shape:
            return math.inf
        if self.is_language:
            return relative(wanted, found)
        return float((found.double() - wanted.double()).square().mean().sqrt())

    def _relative(self, off: float) -> float:
        if self.is_language or off == 0.0 or not math.isfinite(off):
            return off
        size = (self._squares / self._count) ** 0.5
        return off / size if size > 0 else math.inf


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return one output of a batch of one as (rows, width); a score for each position is one row over positions."""
    inner = tensor[0]
    if inner.ndim == 0:
        return inner.view(1, 1)
    return inner[None] if inner.ndim == 1 else inner.reshape(-1, inner.shape[-1])
