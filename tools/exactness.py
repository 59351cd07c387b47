"""How far merged elements are from the exact result, and how far PEFT's own path is: measured, case by case.

The exact result E is PEFT's merge in float64, of the base loaded in float32 and the adapter as stored. An element is
counted when it differs from E by more than 0.5 + 2^-10 units in the last place of the output dtype, which is bfloat16
as in the base. Beside ours stands PEFT's default: `from_pretrained(dtype=bfloat16)`, `merge_and_unload()`,
`save_pretrained`. What a method derives while it is attached (principal parts, projections) is derived in float32 in
both, as PEFT does.

The bound that always holds is on the excess over half an ulp: it is at most `excess` · 2^-24 · (|W| + |E − W|), a few
roundings of float32 in what was summed. Where W and its change nearly cancel, that can be more than 2^-10 ulp of the
small result: those are the elements that are counted.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from runner.judge.numbers.tensors import ulp
from tests.parity import models, oracle
from tests.parity.pipeline import run_merge

LIMIT_ULP = 0.5 + 2.0**-10
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One case.

    Attributes:
        elements: in the tensors that the adapter changes.
        ours: how many of ours are beyond the limit.
        ours_worst: distance of the worst of ours from E, in ulp.
        excess: what the worst of ours has beyond half an ulp, in 2^-24 · (|W| + |E − W|).
        peft: how many of PEFT's default path are.
        peft_worst: distance of the worst of them, in ulp.
    """

    elements: int
    ours: int
    ours_worst: float
    excess: float
    peft: int
    peft_worst: float


def measure(build: Callable[[], PreTrainedModel], config: PeftConfig, *, unties: bool = False) -> Measured:
    """Return how exact the merge of a random adapter of `config` into a bfloat16 base is.

    Args:
        build: returns the base.
        config: of the adapter.
        unties: whether the right merge undoes the base's tie; the references load the base untied then.
    """
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(scratch)
        base = models.save_base(build(), root / "base", dtype=torch.bfloat16, shard="1GB")
        adapter = models.save_adapter(base, root / "adapter", config)
        _, merged = run_merge(base, adapter, root / "merged")
        return compare(base, adapter, merged.root, root, unties=unties)


def compare(base: Path, adapter: Path, merged: Path, scratch: Path, *, unties: bool = False) -> Measured:
    """Return how exact `merged` is; `base` is stored in bfloat16, and the references are written below `scratch`."""
    torch.set_num_threads(1)
    before, ours = oracle.read_folder(base), oracle.read_folder(merged)
    exact = _peft_merge(base, adapter, scratch / "exact", torch.float32, unties=unties)
    plain = _peft_merge(base, adapter, scratch / "plain", torch.bfloat16, unties=unties)
    touched = [name for name, tensor in exact.items() if name not in before or _differs(tensor, before[name])]
    own, peft = (_distances(exact, found, touched) for found in (ours, plain))
    return Measured(
        elements=own.numel(),
        ours=int((own > LIMIT_ULP).sum()),
        ours_worst=round(float(own.max()), 4),
        excess=round(max(_excess(exact[name], ours[name], before.get(name)) for name in touched), 2),
        peft=int((peft > LIMIT_ULP).sum()),
        peft_worst=float(f"{float(peft.max()):.3g}"),
    )


def _distances(exact: Tensors, found: Tensors, touched: list[str]) -> torch.Tensor:
    """Return |found − E| in ulp of bfloat16, for all elements of the touched tensors, as one vector."""
    parts = [(found[name].double() - exact[name]).abs() / ulp(exact[name], "BF16") for name in touched]
    return torch.cat([part.flatten() for part in parts])


def _excess(exact: torch.Tensor, found: torch.Tensor, base: torch.Tensor | None) -> float:
    exact = exact.double()
    start = base.double() if base is not None and base.shape == exact.shape else torch.zeros_like(exact)
    beyond = (found.double() - exact).abs() - 0.5 * ulp(exact, "BF16")
    summed = (start.abs() + (exact - start).abs()).clamp(min=2.0**-126)
    return max(float((beyond / summed).max()) * 2.0**24, 0.0)


def _peft_merge(base: Path, adapter: Path, folder: Path, dtype: torch.dtype, *, unties: bool) -> Tensors:
    """Return PEFT's merge as transformers saves it: in float64 for a float32 base, else in the base's dtype."""
    model: Any = oracle.load(base, dtype=dtype)
    if unties:
        weight = model.get_input_embeddings().weight
        model.get_output_embeddings().weight = torch.nn.Parameter(weight.detach().clone())
        model.config.tie_word_embeddings = False
    peft_model = PeftModel.from_pretrained(model, adapter)
    if dtype is torch.float32:
        peft_model = peft_model.double()
    peft_model.merge_and_unload(safe_merge=False).save_pretrained(folder)
    return oracle.read_folder(folder)


def _differs(exact: torch.Tensor, base: torch.Tensor) -> bool:
    return exact.shape != base.shape or not torch.equal(exact.double(), base.double())
