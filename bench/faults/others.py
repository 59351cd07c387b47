"""Merges that others made of the real model and the strong adapter, judged and explained as they are.

PEFT in this process, by the paths that its options open; the peers of `bench.peers` by their own programs, where their
environments were set up. The folder is judged as it was written, with all that lies or lacks beside the weights.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.contestants import OURS, PEFT, contestants
from runner.judge.case import open_case
from runner.judge.judge import judge_merge

TIMEOUT_S = 600
Make = Callable[[Path, Path, Path], None]  # (base, out, adapter)


def judge_others(base: Path, adapter: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield what is said of each merge: maker, status, the layers that fail, diagnoses, evidence."""
    with tempfile.TemporaryDirectory(dir=scratch) as made, open_case(base, adapter, dtype="auto") as case:
        own = _with_base(adapter, base, Path(made) / "adapter")
        for maker, make in makers():
            out = Path(made) / "out"
            try:
                make(base, out, own)
            except (subprocess.SubprocessError, OSError, ValueError, RuntimeError) as error:
                print(f"{maker}: {str(error)[:300]}", flush=True)
                continue
            verdict = judge_merge(case, out, end_to_end=not any(out.glob("adapter_*")))
            said = [diagnosis.kind.value for diagnosis in verdict.diagnoses]
            print(f"{maker}: {verdict.status.value}; {', '.join(said)}", flush=True)
            yield {
                "maker": maker,
                "status": verdict.status.value,
                "failures": [f"{check.layer.value}: {check.detail}" for check in verdict.failures],
                "diagnoses": said,
                "evidence": [diagnosis.evidence for diagnosis in verdict.diagnoses],
            }
            shutil.rmtree(out)


def makers() -> Iterator[tuple[str, Make]]:
    """Yield those who merge, by name."""
    yield "PEFT, base in bf16", _by_peft()
    yield "PEFT, `safe_merge=True`", _by_peft(safe=True)
    yield "PEFT, `low_cpu_mem_usage=True`", _by_peft(low_cpu_mem_usage=True)
    yield "PEFT, `autocast_adapter_dtype=False`", _by_peft(autocast_adapter_dtype=False)
    for contestant in contestants():
        if contestant.merges and contestant.name not in (OURS, PEFT):

            def run(base: Path, out: Path, adapter: Path, one: Any = contestant) -> None:
                scratch = out.with_name("scratch")
                scratch.mkdir(exist_ok=True)
                subprocess.run(
                    one.arguments(base, out, adapter), env=one.environment(scratch), cwd=scratch, check=True,
                    capture_output=True, timeout=TIMEOUT_S,
                )  # fmt: skip

            yield contestant.name, run


def _by_peft(*, safe: bool = False, **options: Any) -> Make:
    def make(base: Path, out: Path, adapter: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
            merged = PeftModel.from_pretrained(model, adapter, **options).merge_and_unload(safe_merge=safe)
            merged.save_pretrained(out)
            AutoTokenizer.from_pretrained(base).save_pretrained(out)

    return make


def _with_base(adapter: Path, base: Path, out: Path) -> Path:
    """Return a copy of the adapter that names the base by its path, as the peers want it."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_bytes())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base.resolve())}))
    return out
