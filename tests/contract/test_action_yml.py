"""action.yml, the code behind it, and the image agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.supervisor.inputs.read import INPUTS
from runner.supervisor.report.files import Report

ROOT = Path(__file__).resolve().parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_inputs_are_those_of_the_code() -> None:
    assert list(ACTION["inputs"]) == [spec.name for spec in INPUTS]


@pytest.mark.parametrize("spec", INPUTS, ids=lambda spec: spec.name)
def test_defaults_and_needs_are_those_of_the_code(spec: Any) -> None:
    declared = ACTION["inputs"][spec.name]

    assert declared.get("default", "") == spec.default
    assert declared["required"] is spec.required
    assert all(f"`{choice}`" in declared["description"] for choice in spec.choices)


def test_outputs_are_those_of_the_code() -> None:
    assert list(ACTION["outputs"]) == list(Report(inputs_public={}, versions={}).outputs())


def test_everything_is_described() -> None:
    for entry in [*ACTION["inputs"].values(), *ACTION["outputs"].values()]:
        assert entry["description"].strip().endswith((".", "`)."))
    assert ACTION["description"]
    assert ACTION["branding"].keys() == {"icon", "color"}


def test_runs_by_an_absolute_path_without_arguments() -> None:
    assert ACTION["runs"] == {
        "using": "docker",
        "image": "Dockerfile",
        "entrypoint": "/app/entrypoint.py",
        "post-entrypoint": "/app/cleanup.py",
    }
    assert 'ENTRYPOINT ["/app/entrypoint.py"]' in DOCKERFILE


@pytest.mark.parametrize("name", ["entrypoint.py", "cleanup.py"])
def test_an_entrypoint_can_be_executed_and_is_short(name: str) -> None:
    entrypoint = ROOT / name

    assert os.access(entrypoint, os.X_OK)
    assert entrypoint.read_text().startswith("#!/usr/bin/env python3\n")
    assert len(entrypoint.read_text().splitlines()) <= 12


def test_the_dockerfile_needs_no_buildkit_and_no_user() -> None:
    lines = [line.strip() for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]

    assert not [
        line for line in lines if "<<" in line or "--mount" in line or "--link" in line or line.startswith("USER")
    ]
    assert not DOCKERFILE.startswith("# syntax")
    assert lines.index("COPY runner ./runner") > lines.index("COPY requirements.lock ./")


def test_the_build_context_holds_everything_that_is_copied() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in DOCKERFILE.splitlines() if line.startswith("COPY ") for source in line.split()[1:-1]}

    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_the_action_keeps_the_schema_of_github() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-actions", "action.yml"]

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout + result.stderr
