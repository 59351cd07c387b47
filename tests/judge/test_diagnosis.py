"""Every kind of bad merge is named rightly: a sample on tiny models; `python -m bench.faults` does it on a real one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.faults.kinds import KINDS
from bench.faults.scene import Scene, set_scene
from runner.judge.case import Case, open_case
from runner.judge.diagnosis.quantised import nf4_levels
from runner.judge.expected.elements import RightBlocks
from runner.judge.judge import judge, judge_merge
from runner.protocol.verdict import Cause, Layer, Outcome, Status, Verdict
from tests.judge.merges import edit_config, save_merge, write_merge
from tests.judge.tiny import lora, save_adapter, save_base, tokenizer

ALL = "all-linear"
WHOLE = ["embed_tokens", "lm_head"]
ROWS = 322  # two tokens more than the base has


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A right merge, what it is made of, and the judge's case of it."""

    scene: Scene
    case: Case
    blocks: RightBlocks


# name → (kind of base, fields of the adapter's config, its strength, the dtype)
STAGES: dict[str, tuple[str, dict[str, Any], float, str]] = {
    "strong": ("llama", {"target_modules": ALL}, 0.5, "auto"),
    "weak": ("llama", {"target_modules": ALL}, 0.02, "auto"),
    "float16": ("tied", {"target_modules": ALL}, 0.1, "float16"),
    "float32": ("llama", {"target_modules": ALL, "use_rslora": True}, 0.05, "float32"),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True}, 0.3, "auto"),
    "saved": (
        "tied",
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj", "o_proj"]},
        0.5,
        "",
    ),
}
SAMPLE = [
    (stage, kind)
    for stage in STAGES
    for kind, how in KINDS.items()
    if (not how.only or stage in how.only)
    and (STAGES[stage][3] or "auto") in how.dtypes
    # Files and configuration are judged alike whatever the adapter: once is enough, but for what only that one has.
    and (stage == "strong" or how.change is None or how.only)
]


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Stage]]:
    """Return what sets a stage; each is set once."""
    made: dict[str, Stage] = {}
    with ExitStack() as stack:

        def give(name: str) -> Stage:
            if name not in made:
                kind, fields, strength, dtype = STAGES[name]
                root = tmp_path_factory.mktemp(name)
                rows = None if dtype else ROWS
                base = save_base(root / "base", kind)
                adapter = save_adapter(root / "adapter", base, lora(**fields), strength=strength, rows=rows)
                right = save_merge(root / "right", base, adapter, dtype=dtype or "auto", rows=rows)
                if rows is not None:
                    larger = tokenizer()
                    larger.add_tokens(["<a>", "<b>"])
                    larger.save_pretrained(adapter)
                    larger.save_pretrained(right)
                case = stack.enter_context(open_case(base, adapter, dtype=dtype or "auto"))
                made[name] = Stage(scene=set_scene(base, adapter, right, dtype or "auto"), case=case, blocks={})
            return made[name]

        yield give


@pytest.mark.parametrize("name", STAGES)
def test_a_right_merge_is_diagnosed_with_nothing(stages: Callable[[str], Stage], name: str) -> None:
    stage = stages(name)
    verdict = judge_merge(stage.case, stage.scene.right, right=stage.blocks)
    assert verdict.passed, verdict.failures
    assert verdict.diagnoses == ()
    again = judge_merge(stage.case, stage.scene.right, right=stage.blocks)  # from the remembered blocks
    assert [check for check in again.checks if check.layer is Layer.STORAGE] == [
        check for check in verdict.checks if check.layer is Layer.STORAGE
    ]


@pytest.mark.parametrize("name, kind", SAMPLE, ids=[f"{name}: {kind}" for name, kind in SAMPLE])
def test_a_bad_merge_is_caught_and_named(stages: Callable[[str], Stage], tmp_path: Path, name: str, kind: str) -> None:
    stage, how = stages(name), KINDS[kind]
    differs = how.make(stage.scene, tmp_path / "bad")
    verdict = judge_merge(stage.case, tmp_path / "bad", end_to_end=False, right=stage.blocks)
    if not differs:  # a weak change times 1.02 may be rounded to the same bytes: then it is the right merge
        assert verdict.status is Status.NOT_VERIFIED
        return
    assert verdict.status is Status.FAIL
    found = {diagnosis.kind for diagnosis in verdict.diagnoses}
    assert found & set(how.says), verdict.diagnoses
    assert found <= {*how.says, *how.allows}, verdict.diagnoses


def test_without_the_models_nothing_passes(stages: Callable[[str], Stage]) -> None:
    stage = stages("strong")
    verdict = judge_merge(stage.case, stage.scene.right, end_to_end=False)
    assert verdict.status is Status.NOT_VERIFIED
    assert verdict.diagnoses == ()


@pytest.mark.parametrize("factor", [0.25, 0.98, 1.02, 3.0])
@pytest.mark.parametrize("name", ["strong", "weak", "float32"])
def test_a_wrong_factor_is_estimated(stages: Callable[[str], Stage], tmp_path: Path, name: str, factor: float) -> None:
    from bench.faults.scene import patch
    from bench.faults.values import times

    stage = stages(name)
    patch(stage.scene, tmp_path / "bad", times(factor)(stage.scene))
    verdict = judge_merge(stage.case, tmp_path / "bad", end_to_end=False, right=stage.blocks)
    assert [diagnosis.kind for diagnosis in verdict.diagnoses] == [Cause.SCALE]
    assert verdict.diagnoses[0].factor == pytest.approx(factor, rel=0.02 if name == "weak" else 0.002)


def test_ignored_patterns_are_told_from_a_wrong_scale(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    patterns = {"alpha_pattern": {"v_proj": 3, "q_proj": 5}}
    adapter = save_adapter(tmp_path / "adapter", base, lora(**patterns))
    plain = save_adapter(tmp_path / "plain", base, lora(**patterns))
    edit = plain / "adapter_config.json"
    edit.write_text(edit.read_text().replace('"v_proj": 3', '"none": 3').replace('"q_proj": 5', '"nothing": 5'))
    merged = save_merge(tmp_path / "merged", base, plain)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert [diagnosis.kind for diagnosis in verdict.diagnoses] == [Cause.PATTERN_IGNORED]


def test_a_fault_that_only_the_models_show_is_told_as_unexplained(stages: Callable[[str], Stage]) -> None:
    stage = stages("strong")
    checks = judge_merge(stage.case, stage.scene.right, end_to_end=False).checks
    from runner.files.layout import read_checkpoint
    from runner.judge.diagnosis.report import diagnose
    from runner.judge.storage import Storage
    from runner.protocol.verdict import Check

    odd = Check(layer=Layer.END_TO_END, name="it computes the same", outcome=Outcome.FAIL, detail="Off by 3.")
    (found,) = diagnose(stage.case, read_checkpoint(stage.scene.right), Storage(), [*checks, odd])
    assert found.kind is Cause.UNEXPLAINED
    assert "Off by 3." in found.evidence


def test_the_base_tokenizer_does_not_know_added_tokens(stages: Callable[[str], Stage], tmp_path: Path) -> None:
    stage = stages("saved")
    KINDS["base's tokenizer with added tokens"].make(stage.scene, tmp_path / "bad")
    verdict = judge_merge(stage.case, tmp_path / "bad", end_to_end=False, right=stage.blocks)
    assert any("do not know what the adapter's adds" in check.detail for check in verdict.failures)


def test_nf4_has_its_sixteen_levels() -> None:
    levels = nf4_levels()
    assert len(levels) == 16
    assert levels[7] == 0
    assert (float(levels[0]), float(levels[15])) == (-1.0, 1.0)
    assert float(levels[8]) == pytest.approx(0.0796, abs=1e-3)
    assert float(levels[6]) == pytest.approx(-0.0911, abs=1e-3)


def _by_peft(base: Path, adapter: Path, out: Path, *, safe: bool = False, **options: Any) -> Verdict:
    """Merge as a user of PEFT does, in the base's bf16, and judge the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter, **options).merge_and_unload(safe_merge=safe).save_pretrained(out)
    for path in (*base.glob("tokenizer*"), *base.glob("*.jinja")):
        shutil.copyfile(path, out / path.name)
    return judge(base=base, adapter=adapter, merged=out, dtype="auto")


def test_a_merge_by_pefts_own_default_path_passes(stages: Callable[[str], Stage], tmp_path: Path) -> None:
    scene = stages("strong").scene
    verdict = _by_peft(scene.base, scene.adapter, tmp_path / "merged")
    assert verdict.status is Status.PASS, verdict.failures


@pytest.mark.parametrize(
    "options, said",
    [
        ({"autocast_adapter_dtype": False}, "factors in bf16"),
        ({"low_cpu_mem_usage": True}, "factors in bf16"),
        ({"safe": True}, "rounded to bf16 before it was added"),  # PEFT casts the change, to look for NaN in the sum
    ],
    ids=str,
)
def test_a_merge_in_pefts_16_bit_paths_is_named(
    stages: Callable[[str], Stage], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    scene = stages("strong").scene
    verdict = _by_peft(scene.base, scene.adapter, tmp_path / "merged", **options)
    assert [diagnosis.kind for diagnosis in verdict.diagnoses] == [Cause.ROUNDED_TWICE], verdict.diagnoses
    assert said in verdict.diagnoses[0].evidence


def test_dora_in_pefts_16_bit_path_is_named(stages: Callable[[str], Stage], tmp_path: Path) -> None:
    scene = stages("dora").scene
    verdict = _by_peft(scene.base, scene.adapter, tmp_path / "merged", autocast_adapter_dtype=False)
    assert [diagnosis.kind for diagnosis in verdict.diagnoses] == [Cause.ROUNDED_TWICE], verdict.diagnoses


def test_a_merge_onto_a_tied_head_that_leaks_is_named(tmp_path: Path) -> None:
    from tests.judge.merges import merged_weights

    base = save_base(tmp_path / "base", "tied")
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["lm_head", "v_proj"]))
    weights = merged_weights(base, adapter)
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
    leaked = write_merge(tmp_path / "leaked", base, weights)
    edit_config(leaked, tie_word_embeddings=True)
    kinds = [found.kind for found in judge(base=base, adapter=adapter, merged=leaked, dtype="auto").diagnoses]
    assert Cause.HEAD_LOST in kinds
    assert Cause.HEAD_IS_EMBEDDING in kinds
