"""The whole action as a process, against the local Hub, on tiny real models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from peft import LoraConfig

from tests.acceptance.warmth import Warmth
from tests.hub.server import LocalHub
from tests.parity import models
from tools.schema import strict

ROOT = Path(__file__).resolve().parents[3]
TARGET = "alice/merged"
SCHEMA = strict(json.loads((ROOT / "docs" / "report.schema.json").read_bytes()))


@dataclass(frozen=True)
class Result:
    """How the action ended."""

    code: int
    log: str
    report: Mapping[str, Any]

    @property
    def outputs(self) -> Mapping[str, str]:
        """What the action gave to the steps after it."""
        return self.report["outputs"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Action:
    """Runs `python entrypoint.py` as a user would.

    Attributes:
        hub: where everything goes.
        token: what the action is given.
        folder: where it runs.
        warmth: makes its worker a fork of a process that has its libraries imported; nothing else is different.
    """

    hub: LocalHub
    token: str
    folder: Path
    warmth: Warmth

    def run(self, *flags: str, token: str | None = None, environ: Mapping[str, str] | None = None) -> Result:
        """Run the action with these flags (and a report folder of its own) and return how it ended."""
        report_dir = self.folder / "report"
        (report_dir / "report.json").unlink(missing_ok=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "INPUT_", "GITHUB_"))}
        env |= (
            self.hub.env(token or self.token) | {"CUDA_VISIBLE_DEVICES": ""} | self.warmth.environ | dict(environ or {})
        )
        done = subprocess.run(
            [sys.executable, str(ROOT / "entrypoint.py"), "--report-dir", str(report_dir), *flags],
            cwd=self.folder, env=env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        path = report_dir / "report.json"
        report = json.loads(path.read_text()) if path.exists() else {}
        if report:  # whatever the mode and however it ended
            jsonschema.validate(report, SCHEMA)
        return Result(code=done.returncode, log=done.stdout + done.stderr, report=report)

    def publish(self, base: Path, adapter: Path, *flags: str, tag: str = "v1.0.0", **options: Any) -> Result:
        """Publish a merge of two folders to `TARGET`."""
        return self.run(
            "--adapter-path", str(adapter), "--base-model", str(base), "--target-repo", TARGET, "--tag", tag,
            *flags, **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub.start(tmp_path_factory.mktemp("hub")) as running:
        running.add_user("alice")
        running.add_user("bob")
        yield running


@pytest.fixture
def action(hub: LocalHub, warmth: Warmth, tmp_path: Path) -> Action:
    return Action(hub=hub, token=hub.add_token("alice", role="write"), folder=tmp_path, warmth=warmth)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    return models.save_base(models.llama(tied=False), folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    return models.save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora", config)
