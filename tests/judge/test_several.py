"""Several adapters: right merges of every kind pass, and a merge of another combination fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runner.judge.case import open_case
from runner.judge.expected.combined import as_one
from runner.judge.judge import judge, judge_merge
from runner.protocol.combination import KINDS, RANDOM, Several
from runner.protocol.errors import UnsupportedAdapter
from runner.protocol.verdict import Layer, Outcome, Status
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.judge.tiny import lora, save_adapter, save_base
from tests.parity.several import combination

ALL = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def pair(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return (
        save_adapter(root / "first", bases["llama"], lora(target_modules=ALL), seed=1),
        save_adapter(root / "second", bases["llama"], lora(target_modules=ALL, lora_alpha=16), seed=2),
    )


def made(base: Path, several: Several, into: Path, dtype: str = "auto") -> Path:
    """Return the folder of a right merge of `several`."""
    return merge(prepare(base, *several.paths, dtype=dtype, combination=several.combination), into=into).root


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_passes_a_right_merge(
    kind: str, dtype: str, bases: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    several = Several(paths=pair, combination=combination(kind, 0.7, -0.4))
    merged = made(bases["llama"], several, tmp_path / "merged", dtype)

    verdict = judge(base=bases["llama"], adapter=several, merged=merged, dtype=dtype)

    assert verdict.failures == ()
    assert verdict.passed
    assert not any(check.outcome is Outcome.SKIPPED for check in verdict.checks)
    assert any("the combination" in check.name for check in verdict.checks) == (kind in ("linear", "cat"))
    assert verdict.modules


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize(
    "variant, first, second",
    [
        ("llama", {"r": 2, "use_rslora": True}, {"r": 6, "target_modules": "all-linear"}),
        ("llama", {"r": 1}, {"r": 1}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, {"target_modules": ["embed_tokens"]}),
        ("tied", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"target_modules": ["c_attn", "c_proj"]}),
        ("qwen2", {"target_modules": ["q_proj"]}, {"layers_to_transform": [1]}),
    ],
)
def test_passes_adapters_of_other_shapes(
    kind: str,
    variant: str,
    first: dict[str, object],
    second: dict[str, object],
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    base = bases[variant]
    paths = tuple(
        save_adapter(tmp_path / str(number), base, lora(**fields), seed=number)
        for number, fields in enumerate((first, second))
    )
    several = Several(paths=paths, combination=combination(kind, 1.0, 0.5))

    verdict = judge(base=base, adapter=several, merged=made(base, several, tmp_path / "merged"), dtype="auto")

    assert verdict.failures == ()
    assert verdict.passed


def _faults(kind: str, pair: tuple[Path, Path]) -> dict[str, Several]:
    right = combination(kind, 0.7, -0.4)
    faults = {
        "a weight is 2 % off": Several(paths=pair, combination=replace(right, weights=(0.7 * 1.02, -0.4))),
        "a sign is wrong": Several(paths=pair, combination=replace(right, weights=(0.7, 0.4))),
        "the adapters are swapped": Several(paths=pair[::-1], combination=right),
        "another kind": Several(paths=pair, combination=combination("svd" if kind == "cat" else "cat", 0.7, -0.4)),
    }
    if right.density is not None:
        faults["another density"] = Several(paths=pair, combination=replace(right, density=0.7))
    if kind in RANDOM:
        faults["another seed"] = Several(paths=pair, combination=replace(right, seed=6))
    return faults


@pytest.mark.parametrize("kind, fault", [(kind, fault) for kind in KINDS for fault in _faults(kind, (Path(), Path()))])
def test_fails_a_merge_of_another_combination(
    kind: str, fault: str, bases: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    merged = made(bases["llama"], _faults(kind, pair)[fault], tmp_path / "merged")

    told = Several(paths=pair, combination=combination(kind, 0.7, -0.4))
    with open_case(bases["llama"], told, dtype="auto") as case:
        verdict = judge_merge(case, merged, end_to_end=False)  # the files alone fail it

    assert verdict.status is Status.FAIL
    assert any(check.layer is Layer.STORAGE for check in verdict.failures)


@pytest.mark.parametrize("missing", [0, 1])
def test_fails_a_merge_of_one_of_them(
    missing: int, bases: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    merged = merge(prepare(bases["llama"], pair[1 - missing], dtype="auto"), into=tmp_path / "merged").root

    verdict = judge(
        base=bases["llama"],
        adapter=Several(paths=pair, combination=combination("cat", 1.0, 1.0)),
        merged=merged,
        dtype="auto",
    )

    assert verdict.status is Status.FAIL


def test_the_order_does_not_matter_where_it_does_not(
    bases: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    right = Several(paths=pair, combination=combination("cat", 0.7, -0.4))
    other = Several(paths=pair[::-1], combination=combination("cat", -0.4, 0.7))

    merged = made(bases["llama"], other, tmp_path / "merged")

    assert judge(base=bases["llama"], adapter=right, merged=merged, dtype="auto").passed


def test_the_closed_form_is_held_against_peft(
    bases: dict[str, Path], pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.judge.expected import recipe

    right = recipe.scaling_of
    monkeypatch.setattr(recipe, "scaling_of", lambda module, config: 1.001 * right(module, config))

    for kind in ("cat", "linear"):
        several = Several(paths=pair, combination=combination(kind, 0.7, -0.4))
        with as_one(several, bases["llama"]) as one:
            (check,) = one.checks
        assert check.outcome is Outcome.FAIL
        assert check.value == pytest.approx(1e-3, rel=0.5)


def test_refuses_what_no_combination_keeps(bases: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", bases["llama"], lora(modules_to_save=["lm_head"]))

    with (
        pytest.raises(UnsupportedAdapter, match="lm_head"),
        as_one(Several(paths=(pair[0], other), combination=combination("cat", 1.0, 1.0)), bases["llama"]),
    ):
        pass


def test_passes_in_every_stored_dtype(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float16, torch.float32)):
        base = save_base(tmp_path / f"base{number}", "llama", dtype=dtype)
        paths = tuple(
            save_adapter(tmp_path / f"{number}{seed}", base, lora(), seed=seed, dtype=torch.bfloat16) for seed in (1, 2)
        )
        several = Several(paths=paths, combination=combination("linear", 1.0, 1.0))

        verdict = judge(base=base, adapter=several, merged=made(base, several, tmp_path / f"m{number}"), dtype="auto")

        assert verdict.failures == ()
        assert verdict.passed
