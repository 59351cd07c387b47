"""E in the place of what a folder holds: un-rounded it is the unmerged model's, rounded it is the right merge's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from runner.judge.case import Case
from runner.judge.expected.filling import Filling, Values
from runner.judge.streaming.loader import Loaded, load_folder
from tests.judge.conftest import Maker, Opener
from tests.judge.merges import merged_weights
from tests.parity import models, oracle
from tests.parity.pipeline import run_merge

AT_TIES = 5  # elements of a merge computed in float32 that may be rounded the other way than E


def _filling(case: Case, folder: Path) -> tuple[Filling, Loaded]:
    loaded = load_folder(folder)
    return Filling(loaded, case.sources, case.targets), loaded


def _read(loaded: Loaded) -> Values:
    return loaded.read(loaded.model.state_dict())


def _same(left: Values, right: Values) -> set[str]:
    assert left.keys() == right.keys()
    assert {value.dtype for value in left.values()} == {torch.float32}
    return {key for key in left if torch.equal(left[key], right[key])}


def _apart(left: Values, right: Values) -> int:
    """Return how many elements differ."""
    return sum(int((left[key] != right[key]).sum()) for key in left.keys() | right.keys())


def _filled(filling: Filling, loaded: Loaded) -> tuple[Values, Values]:
    """Return what a folder loads as, with E and with round(E) in it."""
    exact, rounded = _read(loaded), _read(loaded)
    filling.exact(exact)
    filling.rounded(rounded)
    return exact, rounded


@pytest.mark.parametrize(
    "variant",
    ["lora", "bias_all", "conv1d", "saved_modules", "dora", "tied_untouched", "tied_both", "tied_head"],
)
def test_the_base_becomes_the_merge(right_merge: Maker, open_: Opener, variant: str) -> None:
    base, adapter, merged = right_merge(variant)
    case = open_(base, adapter)
    plain = load_folder(base)
    if case.targets.untied:  # the base has no place for the other side; the merge has, and is damaged instead
        plain = load_folder(merged)
    filling = Filling(plain, case.sources, case.targets)
    assert (filling.misplaced, filling.differs) == ("", False)

    exact, rounded = _filled(filling, plain)

    assert filling.differs is not bool(case.targets.untied)
    wanted = _read(load_folder(merged))
    assert _apart(rounded, wanted) <= AT_TIES
    unrounded = merged_weights(base, adapter)
    for key, value in exact.items():
        torch.testing.assert_close(value, unrounded[key], rtol=1e-5, atol=1e-6)
    moved = exact.keys() - _same(exact, wanted)
    assert moved
    assert moved <= set(case.sources.keys) | {"lm_head.weight"}


@pytest.mark.parametrize("variant", ["lora", "conv1d", "dora", "tied_untouched"])
def test_a_right_merge_is_left_as_it_is(right_merge: Maker, open_: Opener, variant: str) -> None:
    base, adapter, merged = right_merge(variant)
    filling, loaded = _filling(open_(base, adapter), merged)
    before = _read(loaded)

    _, rounded = _filled(filling, loaded)

    assert filling.differs is False
    assert _same(rounded, before) == before.keys()


def test_one_wrong_element_is_put_right_and_told(right_merge: Maker, open_: Opener) -> None:
    base, adapter, merged = right_merge("lora")
    filling, loaded = _filling(open_(base, adapter), merged)
    right, values = _read(loaded), _read(loaded)
    key = "model.layers.1.mlp.down_proj.weight"
    values[key] = values[key].clone()
    values[key][3, 5] *= 1.25

    filling.rounded(values)

    assert filling.differs is True
    assert _same(values, right) == right.keys()
    filling.rounded(values)
    assert filling.differs is True  # it was, somewhere


def test_a_stage_is_filled_with_what_is_its_own(right_merge: Maker, open_: Opener) -> None:
    base, adapter, merged = right_merge("lora")
    filling, loaded = _filling(open_(base, adapter), base)
    keys = [key for key in loaded.model.state_dict() if key.startswith("model.layers.1.")]
    values = loaded.read(keys)
    filling.rounded(values)
    assert values.keys() == set(keys)
    assert _same(values, load_folder(merged).read(keys)) == set(keys)


def test_a_cast_alone_is_undone(right_merge: Maker, open_: Opener) -> None:
    base, adapter, _ = right_merge("lora")
    _, _, merged = right_merge("lora", "float16")
    case = open_(base, adapter, "float16")
    filling, loaded = _filling(case, merged)

    exact, rounded = _filled(filling, loaded)

    assert filling.differs is False
    before, plain = _read(loaded), _read(load_folder(base))
    assert _same(rounded, before) == before.keys()
    untouched = exact.keys() - set(case.sources.keys)
    assert untouched
    assert untouched <= _same(exact, plain)
    assert not untouched <= _same(before, plain)  # the cast lost something


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, str], tuple[Path, Path, Path]]:
    """Return (base, adapter, merged) of a Mixtral, whose experts are stored one by one and computed as stacks."""
    root = tmp_path_factory.mktemp("experts")
    base = models.save_base(models.mixtral(), root / "base", dtype=torch.bfloat16)

    def make(touched: bool, dtype: str) -> tuple[Path, Path, Path]:
        fields = {"target_parameters": BOTH, "target_modules": []} if touched else {"target_modules": ["q_proj"]}
        folder = root / f"{touched} {dtype}"
        if not folder.exists():
            config = LoraConfig(r=8, lora_alpha=8, task_type="CAUSAL_LM", **fields)
            adapter = models.save_adapter(base, folder / "adapter", config)
            run_merge(base, adapter, folder / "merged", dtype=dtype)
        return base, folder / "adapter", folder / "merged"

    return make


@pytest.mark.parametrize("touched", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_stacks_of_experts_become_the_merge(
    experts: Callable[[bool, str], tuple[Path, Path, Path]], open_: Opener, touched: bool, dtype: str
) -> None:
    base, adapter, merged = experts(touched, dtype)
    case = open_(base, adapter, dtype)
    stacks = {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in BOTH}
    filling, loaded = _filling(case, merged)
    exact, rounded = _filled(filling, loaded)
    before, plain = _read(loaded), _read(load_folder(base))

    assert (filling.misplaced, filling.differs) == ("", False)
    assert stacks <= exact.keys()
    assert _same(rounded, before) == before.keys()
    if touched:
        assert not stacks & _same(exact, before)
        stored = oracle.peft_merge_of_fused(base, adapter)
        unrounded = case.sources.fused.join(case.sources.computed[0], stored)
        for key, value in unrounded.items():
            torch.testing.assert_close(exact[key], value, rtol=1e-5, atol=1e-6)
        wrong, other = _filling(case, base)
        values = _read(other)
        wrong.exact(dict(values))
        wrong.rounded(values)
        assert wrong.differs is True
        if dtype == "auto":
            assert _apart(values, before) <= AT_TIES
    else:
        assert stacks <= _same(exact, plain)
        assert stacks <= _same(before, plain) or dtype == "float16"


def test_what_has_no_place_is_named_once(right_merge: Maker, open_: Opener, tmp_path: Path) -> None:
    base, adapter, merged = right_merge("lora")
    case = open_(base, adapter)
    target = case.targets.required["model.layers.0.mlp.up_proj.weight"]
    for name, shape in (("model.layers.0.mlp.up_proj.weight", (96, 47)), ("model.layers.1.mlp.up_proj.weight", (1,))):
        odd = replace(case.targets, required={**case.targets.required, name: replace(target, stored=name, shape=shape)})
        assert Filling(load_folder(merged), case.sources, odd).misplaced == name
    lost = {name: replace(target, key=f"{target.key}.lost", stored=name) for name in ("first.weight", "second.weight")}
    assert Filling(load_folder(merged), case.sources, replace(case.targets, required=lost)).misplaced == "first.weight"
