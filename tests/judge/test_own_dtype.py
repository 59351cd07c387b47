"""`dtype: auto` of a merge that somebody else made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.files.layout import read_checkpoint
from runner.judge.judge import judge
from runner.judge.own_dtype import own_dtype
from runner.protocol.verdict import Status
from tests.judge.conftest import Maker
from tests.judge.faults import rewrite
from tests.judge.merges import edit_config


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_merge_in_another_dtype_is_judged_in_it(right_merge: Maker, dtype: str) -> None:
    base, adapter, merged = right_merge("lora", dtype)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto", made_here=False)
    assert verdict.status is Status.PASS
    assert f"`dtype: auto` was read as {dtype}" in verdict.checks[0].detail
    assert judge(base=base, adapter=adapter, merged=merged, dtype="auto").status is Status.FAIL


def test_a_folder_must_say_the_same_twice(right_merge: Maker, tmp_path: Path) -> None:
    import shutil

    base, _, merged = right_merge("lora", "float32")
    plain = read_checkpoint(base)
    assert own_dtype(plain, plain) == "auto"
    assert own_dtype(plain, read_checkpoint(merged)) == "float32"
    other = Path(shutil.copytree(merged, tmp_path / "other"))
    edit_config(other, text_config={"torch_dtype": "bfloat16"})
    assert own_dtype(plain, read_checkpoint(other)) == "auto"
    edit_config(other, text_config={"torch_dtype": "torch.float32"})
    assert own_dtype(plain, read_checkpoint(other)) == "float32"
    edit_config(other, dtype="bfloat16")
    assert own_dtype(plain, read_checkpoint(other)) == "auto"
    edit_config(other, dtype="float32")

    def one(tensors: dict[str, torch.Tensor]) -> None:
        name = min(tensors)
        tensors[name] = tensors[name].bfloat16()

    rewrite(other, read_checkpoint(other).files[0].name, one)
    assert own_dtype(plain, read_checkpoint(other)) == "auto"
