"""What the image holds, and that it can be run with nothing to write on but what it is given."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench.cold_start import measure
from tests.contract.runner_emulator import Runner

pytestmark = pytest.mark.docker

LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"
SCAN = Path(__file__).with_name("scan_for_secrets.py").read_text("utf-8")
START = "NAMES = "  # where its imports are done
# Put together here, so that no scanner takes this file for a leak.
PLANTED = {
    "/root/.netrc": "machine x login y",
    "/app/notes.txt": "hf_" + "aBcDeFgH" * 4 + "xy",
    "/etc/pip.conf": "[global]\nindex-url = https://user" + ":secret-word@example.org/simple\n",
    "/opt/x.pem": "-----BEGIN " + "PRIVATE KEY-----\n" + "QUJD" * 16,
}


def scan(image: str, first: str) -> tuple[int, str]:
    """Return exit code and findings of a scan in a container, in which `first` was run before."""
    command = ["docker", "run", "--rm", "-i", "--network", "none", "--entrypoint", "python3", image, "-"]
    done = subprocess.run(
        command, input=SCAN.replace(START, first + START), capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr[-2000:]
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def suspects(image: str) -> list[str]:
    """Return what a scan of the whole image finds after secrets were planted in the container that is scanned."""
    planted = "".join(f"Path({path!r}).write_text({text!r})\n" for path, text in PLANTED.items())
    code, found = scan(image, planted)
    assert code == 1
    return found.splitlines()


def test_the_image_holds_no_secret(suspects: list[str]) -> None:
    assert [line for line in suspects if not line.startswith(tuple(f"{path}: " for path in PLANTED))] == []


def test_a_secret_in_the_image_is_found(suspects: list[str]) -> None:
    assert [path for path in PLANTED if not any(line.startswith(f"{path}: ") for line in suspects)] == []


def test_the_layers_hold_no_secret_either(image: str) -> None:
    asked = (
        ["docker", "image", "inspect", image],
        ["docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", image],
    )
    texts = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in asked]
    environment = json.loads(texts[0])[0]["Config"]["Env"]

    assert [line for line in environment if "TOKEN" in line.upper() or "PASSWORD" in line.upper()] == []
    assert [text for text in texts if "hf_" in text.lower().replace("hf_hub_", "").replace("hf_home", "")] == []


def test_the_image_holds_every_locked_requirement_in_its_version(image: str) -> None:
    command = ["docker", "run", "--rm", "--entrypoint", "python", image, "-m", "pip", "list", "--format=freeze"]
    held = {
        canonicalize_name(one.name): one
        for one in map(Requirement, subprocess.check_output(command, text=True).split())
    }
    lines = (line.rstrip(" \\") for line in LOCK.read_text("utf-8").splitlines() if line[:1].isalnum())
    locked = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]

    assert len(locked) > 30
    assert [str(one) for one in locked if held[canonicalize_name(one.name)].specifier != one.specifier] == []


def test_a_start_is_measured_to_its_first_line_and_until_the_worker_is_ready(image: str) -> None:
    found = measure(image, runs=1)

    (start,) = found["starts"]
    assert 0 < start["first_line_s"] < start["ready_s"] < start["gone_s"]
    assert found["size_bytes"] >= sum(layer["size_bytes"] for layer in found["layers"]) > 0.9 * found["size_bytes"]
    assert {layer["step"] for layer in found["layers"]} >= {"torch", "transformers, peft and what they need"}


def test_a_read_only_root_is_enough(image: str, runner: Runner) -> None:
    mount = f"{runner.workspace}:/github/workspace"
    command = ["docker", "run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL"]
    command += ["--tmpfs", "/tmp"]  # noqa: S108 (of the container)
    command += ["--security-opt", "no-new-privileges", "-v", mount, image]
    flags = ["--adapter-path", "adapter", "--base-model", "base", "--mode", "verify", "--merged-path", "base"]

    done = subprocess.run(
        [*command, *flags, "--device", "cpu"], env=dict(os.environ), capture_output=True, text=True, check=False
    )

    # Judged to the end: the base is not a merge, and the report says so.
    assert done.returncode == 8, done.stdout + done.stderr
    assert (
        json.loads((runner.workspace / "lora-merge-report" / "report.json").read_text())["verdict"]["status"] == "FAIL"
    )
