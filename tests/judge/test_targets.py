"""What a merged folder must hold: which side of a tie, in which dtype, changed or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from runner.files.layout import read_checkpoint
from runner.judge.case import open_case
from runner.judge.expected.targets import Targets
from runner.protocol.rounding import STOCHASTIC, Rounding
from tests.judge.conftest import Maker
from tests.judge.faults import rewrite
from tests.judge.tiny import lora, save_adapter
from tests.parity import heads, models
from tests.parity.heads import Trained

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _targets(base: Path, adapter: Path, dtype: str = "auto", rounding: Rounding | None = None) -> Targets:
    with open_case(base, adapter, dtype=dtype, rounding=rounding) as case:
        return case.targets


@pytest.mark.parametrize(
    "variant, is_required, is_optional, changed",
    [
        ("lora", True, False, {EMBED: False, HEAD: False}),  # not tied
        ("tied_untouched", False, True, {EMBED: False, HEAD: False}),
        ("tied_head", True, False, {EMBED: False, HEAD: True}),
        ("tied_embedding", True, False, {EMBED: True, HEAD: False}),
        ("tied_saved_together", False, True, {EMBED: True, HEAD: True}),
        ("tied_saved_both", True, False, {EMBED: True, HEAD: True}),
    ],
)
def test_both_sides_of_a_tie_are_stored_where_the_adapter_unties_them(
    right_merge: Maker, variant: str, is_required: bool, is_optional: bool, changed: dict[str, bool]
) -> None:
    base, adapter, merged = right_merge(variant)
    targets = _targets(base, adapter)
    assert (HEAD in targets.required, HEAD in targets.optional) == (is_required, is_optional)
    assert targets.untied == ((HEAD,) if is_required and variant != "lora" else ())
    assert (targets.unmapped, dict(targets.twins)) == ((), {})
    every = {**targets.required, **targets.optional}
    assert {name: every[name].is_touched for name in changed} == changed
    held = read_checkpoint(merged).tensors
    assert targets.required.keys() == held.keys()
    assert all((held[name].shape, held[name].dtype) == (one.shape, one.dtype) for name, one in targets.required.items())
    assert {one.stored for one in targets.touched} == {n for n, one in targets.required.items() if one.is_touched}


@pytest.fixture
def stored_twice(bases: dict[str, Path], tmp_path: Path) -> Callable[[float], Path]:
    """Return a base that is tied by its config and stores both sides, the second one off by a number."""

    def make(off: float) -> Path:
        base = Path(shutil.copytree(bases["tied"], tmp_path / "base"))
        file = read_checkpoint(base).tensors[EMBED].file

        def add(tensors: dict[str, torch.Tensor]) -> None:
            tensors[HEAD] = tensors[EMBED] + off

        rewrite(base, file, add)
        return base

    return make


def _adapter(folder: Path, base: Path, config: LoraConfig) -> Path:
    return save_adapter(folder / "adapter", base, config)


@pytest.mark.parametrize("off", [0.0, 1.0])
@pytest.mark.parametrize("module, changed", [("q_proj", ()), ("lm_head", (HEAD,)), ("embed_tokens", (EMBED,))], ids=str)
def test_a_tie_of_which_both_sides_are_stored(
    stored_twice: Callable[[float], Path],
    bases: dict[str, Path],
    tmp_path: Path,
    off: float,
    module: str,
    changed: tuple[str, ...],
) -> None:
    adapter = _adapter(tmp_path, bases["tied"], lora(target_modules=[module]))
    base = stored_twice(off)
    rounding = Rounding(kind=STOCHASTIC, seed=2)
    targets = _targets(base, adapter, rounding=rounding)
    is_tied = off == 0.0
    assert {EMBED, HEAD} <= targets.required.keys()
    assert dict(targets.optional) == {}
    assert targets.untied == ((HEAD,) if is_tied and changed else ())
    assert dict(targets.twins) == ({HEAD: EMBED} if is_tied else {})
    assert tuple(name for name in (HEAD, EMBED) if targets.required[name].is_touched) == changed
    for name in (EMBED, HEAD):
        drawn = targets.chance(targets.required[name])
        assert (drawn is not None) is (name in changed)
        assert drawn is None or (drawn.name, drawn.seed) == (EMBED if is_tied else name, 2)


@pytest.mark.parametrize("dtype, stored", [("auto", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_floats_are_stored_in_the_dtype_that_was_asked_for_and_nothing_else_is(
    bases: dict[str, Path], tmp_path: Path, dtype: str, stored: str
) -> None:
    adapter = _adapter(tmp_path, bases["llama"], lora(target_modules=["q_proj"]))
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    file = read_checkpoint(base).tensors["model.norm.weight"].file
    rewrite(base, file, lambda tensors: tensors.update(counts=torch.arange(3)))
    targets = _targets(base, adapter, dtype)
    assert targets.required["counts"].dtype == "I64"
    assert not targets.required["counts"].is_touched
    assert {one.dtype for name, one in targets.required.items() if name != "counts"} == {stored}
    assert len(targets.touched) == 2


@pytest.mark.parametrize("module, changed", [("q_proj", ()), ("embed_tokens", (EMBED,))])
def test_a_base_that_stores_a_tie_under_the_name_of_its_head(
    bases: dict[str, Path], tmp_path: Path, module: str, changed: tuple[str, ...]
) -> None:
    adapter = _adapter(tmp_path, bases["tied"], lora(target_modules=[module]))
    base = Path(shutil.copytree(bases["tied"], tmp_path / "base"))
    file = read_checkpoint(base).tensors[EMBED].file
    rewrite(base, file, lambda tensors: tensors.update({HEAD: tensors.pop(EMBED)}))
    targets = _targets(base, adapter)
    assert HEAD in targets.required
    assert (EMBED in targets.required, EMBED in targets.optional) == (bool(changed), not changed)
    assert targets.untied == ((EMBED,) if changed else ())
    every = {**targets.required, **targets.optional}
    assert tuple(name for name in (HEAD, EMBED) if every[name].is_touched) == changed
    assert every[EMBED].base == every[HEAD].base


def test_a_head_that_only_the_adapter_has_and_the_base_own_head(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16)
    trained = Trained(task="SEQ_CLS", labels=3, options={"target_modules": ["q_proj"]})
    adapter = heads.save_adapter(base, tmp_path / "adapter", trained)
    rounding = Rounding(kind=STOCHASTIC, seed=2)
    targets = _targets(base, adapter, "float16", rounding)
    score = targets.required["score.weight"]
    assert (score.dtype, score.shape, score.base, score.is_touched) == ("F16", (3, 48), None, True)
    assert targets.chance(score) is not None
    assert {target.stored for target in targets.touched} == {
        "score.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    }  # fmt: skip
    held = read_checkpoint(base).tensors.keys()
    assert targets.required.keys() == held - {HEAD} | {"score.weight"}
    assert not targets.optional
