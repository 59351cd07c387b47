"""Wrong merges that look alike: each is told by its own name, and its neighbours are not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from runner.files.layout import INDEX_FILE, read_checkpoint
from runner.judge.case import Case, open_case
from runner.judge.diagnosis.quantised import int8_rows
from runner.judge.judge import judge, judge_merge
from runner.protocol.combination import Combination, Several
from runner.protocol.verdict import Cause, Status
from tests.judge.conftest import Maker
from tests.judge.faults import changed, rewrite
from tests.judge.merges import save_merge, write_merge
from tests.judge.tiny import lora, save_adapter, save_base

ALL = "all-linear"
Weights = dict[str, torch.Tensor]
Change = Callable[[PeftModel], None]


def _merged(base: Path, adapter: Path, change: Change = lambda _: None) -> Weights:
    """Return the state dict of PEFT's merge in float32, after `change` of the model that is merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        change(model)
        plain = model.merge_and_unload(safe_merge=False)
    return {key: value.detach().clone() for key, value in plain.state_dict().items()}


def _scaled(factor: float) -> Change:
    def change(model: PeftModel) -> None:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: factor * value for name, value in module.scaling.items()}

    return change


def _on(make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(model: PeftModel) -> None:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                weight = module.get_base_layer().weight
                weight.data = make(weight.data.double()).float()

    return change


def _scale(factor: float) -> Callable[[Path, Path], Weights]:
    return lambda base, adapter: _merged(base, adapter, _scaled(factor))


def _of_sum(base: Path, adapter: Path, make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Weights:
    """Return the merge with make(W, E) in every matrix that the adapter changes."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    made = _merged(base, adapter)
    touched = {key for key in made if not torch.equal(made[key], plain[key])}
    return {key: make(plain[key].double(), made[key].double()).float() if key in touched else made[key] for key in made}


def _twice(base: Path, adapter: Path) -> Weights:
    once = _merged(base, adapter)

    def change(model: PeftModel) -> None:
        for path, module in model.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer):
                module.get_base_layer().weight.data = once[f"{path}.weight"].clone()

    return _merged(base, adapter, change)


def _int8_base(base: Path, adapter: Path) -> Weights:
    return _merged(base, adapter, _on(int8_rows))


MULTIPLIED: Mapping[str, tuple[Callable[[Path, Path], Weights], Cause]] = {
    "twice": (_twice, Cause.TWICE),
    "negated inside": (_scale(-1.0), Cause.SIGN),
    "negated outside": (lambda base, adapter: _of_sum(base, adapter, lambda w, e: 2 * w - e), Cause.SIGN),
    "x 1.02": (_scale(1.02), Cause.SCALE),
    "x 0.5": (_scale(0.5), Cause.SCALE),
    "the sum x 1.1": (lambda base, adapter: _of_sum(base, adapter, lambda w, e: w + 1.1 * (e - w)), Cause.SCALE),
    "as rsLoRA": (_scale(8**0.5), Cause.LORA_AS_RSLORA),
    "on an int8 base": (_int8_base, Cause.QUANTISED_BASE),
    "saved at int8": (
        lambda base, adapter: _of_sum(base, adapter, lambda _, e: int8_rows(e)),
        Cause.QUANTISED_BASE,
    ),
}


@pytest.fixture(scope="module", params=["auto", "float32"])
def dora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the case of a DoRA adapter, its base, the adapter, and the dtype."""
    root = tmp_path_factory.mktemp("dora")
    base = save_base(root / "base", "llama")
    adapter = save_adapter(root / "adapter", base, lora(target_modules=ALL, use_dora=True, r=8), strength=0.3)
    with open_case(base, adapter, dtype=request.param) as case:
        yield case, base, adapter, request.param


@pytest.mark.parametrize("fault", MULTIPLIED)
def test_a_wrong_dora_merge_has_its_name(fault: str, dora: tuple[Case, Path, Path, str], tmp_path: Path) -> None:
    case, base, adapter, dtype = dora
    make, kind = MULTIPLIED[fault]
    wrong = write_merge(tmp_path / "wrong", base, make(base, adapter), dtype=dtype)

    verdict = judge_merge(case, wrong, end_to_end=False)

    assert verdict.status is Status.FAIL
    assert [found.kind for found in verdict.diagnoses] == [kind], verdict.diagnoses
    if kind is Cause.SCALE:
        wanted = {"x 1.02": 1.02, "x 0.5": 0.5, "the sum x 1.1": 1.1}[fault]
        assert verdict.diagnoses[0].factor == pytest.approx(wanted, rel=0.01)


def test_ia3_applied_twice_has_its_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    config = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    adapter = save_adapter(tmp_path / "adapter", base, config, strength=2.0)
    wrong = write_merge(tmp_path / "wrong", base, _twice(base, adapter))
    (found,) = judge(base=base, adapter=adapter, merged=wrong, dtype="auto").diagnoses
    assert found.kind is Cause.TWICE


@pytest.mark.parametrize("places, said", [((slice(None), slice(4, 9)), "5 of 48 columns"), ((5, slice(None)), "1 of ")])
def test_zeroed_columns_and_rows(
    right_merge: Maker, open_: Callable[..., Case], copy_of: Callable[[Path], Path], places: Any, said: str
) -> None:
    base, adapter, merged = right_merge("lora")
    damaged, name = copy_of(merged), next(name for name in changed(merged, base) if "q_proj" in name)
    rewrite(damaged, read_checkpoint(damaged).tensors[name].file, lambda ts: ts[name].__setitem__(places, 0.0))
    (found,) = judge_merge(open_(base, adapter), damaged, end_to_end=False).diagnoses
    assert (found.kind, found.tensors) == (Cause.ZEROED, (name,))
    assert said in found.evidence


def test_one_element_that_is_zero_is_not_called_zeroed(
    right_merge: Maker, open_: Callable[..., Case], copy_of: Callable[[Path], Path]
) -> None:
    base, adapter, merged = right_merge("lora")
    damaged, name = copy_of(merged), changed(merged, base)[0]
    rewrite(damaged, read_checkpoint(damaged).tensors[name].file, lambda ts: ts[name].view(-1)[7].fill_(0.0))
    kinds = {found.kind for found in judge_merge(open_(base, adapter), damaged, end_to_end=False).diagnoses}
    assert kinds <= {Cause.FEW_ELEMENTS, Cause.BIT_FLIP}


@pytest.mark.parametrize("rest", [{}, {"metadata": None}], ids=["none", "null"])
def test_an_index_without_metadata_is_named(
    right_merge: Maker, open_: Callable[..., Case], copy_of: Callable[[Path], Path], rest: dict[str, None]
) -> None:
    base, adapter, merged = right_merge("lora")
    damaged = copy_of(merged)
    index = json.loads((damaged / INDEX_FILE).read_bytes())
    (damaged / INDEX_FILE).write_text(json.dumps({"weight_map": index["weight_map"], **rest}))
    verdict = judge(base=base, adapter=adapter, merged=damaged, dtype="auto")
    assert verdict.status is Status.FAIL
    (found,) = verdict.diagnoses
    assert found.kind is Cause.INDEX
    assert "no object `metadata`" in found.evidence


def test_an_index_with_empty_metadata_loads_and_passes(right_merge: Maker, copy_of: Callable[[Path], Path]) -> None:
    base, adapter, merged = right_merge("lora")
    fine = copy_of(merged)
    index = json.loads((fine / INDEX_FILE).read_bytes())
    (fine / INDEX_FILE).write_text(json.dumps({**index, "metadata": {}}))
    assert judge(base=base, adapter=adapter, merged=fine, dtype="auto").status is Status.PASS


def test_another_base_is_not_said_where_untouched_tensors_are_right(
    right_merge: Maker, open_: Callable[..., Case], tmp_path: Path
) -> None:
    """Noise on the touched tensors only, before the merge: other weights, and nobody knows of what."""
    base, adapter, _ = right_merge("lora")
    torch.manual_seed(5)
    noisy = _merged(base, adapter, _on(lambda weight: weight + 0.01 * torch.randn_like(weight)))
    wrong = write_merge(tmp_path / "wrong", base, noisy)
    (found,) = judge_merge(open_(base, adapter), wrong, end_to_end=False).diagnoses
    assert (found.kind, found.is_certain) == (Cause.OTHER_WEIGHTS, False)


def test_another_base_is_a_guess_where_most_untouched_tensors_are_off(
    right_merge: Maker, open_: Callable[..., Case], tmp_path: Path
) -> None:
    base, adapter, _ = right_merge("lora")
    other = save_base(tmp_path / "other", "llama", seed=3)
    wrong = save_merge(tmp_path / "wrong", other, adapter)
    (found,) = judge_merge(open_(base, adapter), wrong, end_to_end=False).diagnoses
    assert (found.kind, found.is_certain) == (Cause.WRONG_BASE, False)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, Path]]:
    """Return a base and two adapters."""
    root = tmp_path_factory.mktemp("two")
    base = save_base(root / "base", "llama")
    made = [save_adapter(root / str(seed), base, lora(), strength=0.5, seed=seed) for seed in (1, 2)]
    return base, (made[0], made[1])


def _combined(base: Path, paths: tuple[Path, Path], kind: str, weights: tuple[float, float]) -> Weights:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, paths[0], adapter_name="a")
        model.load_adapter(paths[1], adapter_name="b")
        model.add_weighted_adapter(["a", "b"], list(weights), "both", combination_type=kind)
        model.set_adapter("both")
        merged = model.merge_and_unload(safe_merge=False)
    return {key: value.detach().clone() for key, value in merged.state_dict().items()}


COMBINED: Mapping[str, tuple[tuple[float, float], Cause, str]] = {
    "the first left out": ((0.0, 0.4), Cause.PART_LEFT_OUT, "adapter 1 of 2"),
    "the second left out": ((0.7, 0.0), Cause.PART_LEFT_OUT, "adapter 2 of 2"),
    "the second reweighted": ((0.7, 0.5), Cause.PART_REWEIGHTED, "adapter 2 of 2 has weight 0.5 instead of 0.4"),
    "both by 2": ((1.4, 0.8), Cause.TWICE, "factor"),
    "both by 1.1": ((0.77, 0.44), Cause.SCALE, "factor"),
}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_an_adapter_of_several_that_is_left_out_or_reweighted_has_its_name(
    two: tuple[Path, tuple[Path, Path]], kind: str, dtype: str, tmp_path: Path
) -> None:
    base, paths = two
    several = Several(paths=paths, combination=Combination(kind=kind, weights=(0.7, 0.4)))
    with open_case(base, several, dtype=dtype) as case:
        for fault, (weights, cause, said) in COMBINED.items():
            made = _merged(base, paths[weights[0] == 0.0], _scaled(max(weights))) if 0.0 in weights else None
            made = made or _combined(base, paths, kind, weights)
            wrong = write_merge(tmp_path / fault, base, made, dtype=dtype)
            (found,) = judge_merge(case, wrong, end_to_end=False).diagnoses
            assert found.kind is cause, (fault, found)
            assert said in found.evidence


def test_a_factor_that_means_two_things_is_no_certain_name(
    right_merge: Maker, open_: Callable[..., Case], tmp_path: Path
) -> None:
    """With r = 4, alpha/√r is twice alpha/r."""
    base, adapter, _ = right_merge("lora")
    wrong = write_merge(tmp_path / "wrong", base, _scale(2.0)(base, adapter))
    (found,) = judge_merge(open_(base, adapter), wrong, end_to_end=False).diagnoses
    assert (found.kind, found.is_certain) == (Cause.TWICE, False)
    assert "applied twice. Or: That is alpha/√r where LoRA means alpha/r." in found.evidence
