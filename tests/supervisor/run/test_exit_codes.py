"""Every exit code of the action is provoked in a real run; and what it says is in docs/troubleshooting.md."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.contract.test_troubleshooting import CODES
from tests.hub.faults import FOREVER, Kind
from tests.supervisor.run.conftest import ROOT, TARGET, Action
from tools.messages import Message, read_messages
from tools.troubleshooting import SPECIAL

Run = Callable[[Action, Path, Path], tuple[int, str]]


def _run(action: Action, *flags: str) -> tuple[int, str]:
    """Return the exit code and what the first problem says; "" where there is none."""
    ended = action.run(*flags)
    if not ended.report:  # inputs that cannot be used name no folder for it either
        return ended.code, ended.log.partition("error: ")[2].partition("\n")[0]
    problems = ended.report["problems"]
    return ended.code, problems[0]["what"] if problems else ""


def _plan(action: Action, base: Path | str, adapter: Path, flags: Sequence[str] = ()) -> tuple[int, str]:
    return _run(action, "--mode", "plan", "--adapter-path", str(adapter), "--base-model", str(base), *flags)


def _publish(action: Action, base: Path, adapter: Path, *more: str, flags: Sequence[str] = ()) -> tuple[int, str]:
    models = ("--adapter-path", str(adapter), "--base-model", str(base))
    return _run(action, *models, "--target-repo", TARGET, "--tag", "v7", *more, *flags)


def _cut(adapter: Path, folder: Path) -> Path:
    """Return a copy of the adapter whose weights end too early."""
    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


def _without_index(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


def _damaged_on_the_hub(action: Action, base: Path, adapter: Path) -> tuple[int, str]:
    action.hub.fail("commit", Kind.DAMAGED, file="config.json")
    return _publish(action, base, adapter)


def _stuck(action: Action, base: Path, adapter: Path) -> tuple[int, str]:
    action.hub.fail("whoami", Kind.SLOW, delay_s=30, times=FOREVER)
    return _publish(action, base, adapter, "--phase-timeout-minutes", "0.02")


def _cancelled(action: Action, base: Path, adapter: Path) -> tuple[int, str]:
    action.hub.fail("whoami", Kind.SLOW, delay_s=30, times=FOREVER)
    return _started(
        action, ROOT, base, adapter, "--target-repo", TARGET, "--tag", "v7", when=lambda p: p.send_signal(signal.SIGINT)
    )


def _with_a_bug(action: Action, base: Path, adapter: Path) -> tuple[int, str]:
    copy = action.folder / "checkout"
    shutil.copytree(ROOT / "runner", copy / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "entrypoint.py", copy)
    with (copy / "runner" / "supervisor" / "work.py").open("a") as source:
        source.write("\n\ndef work_folder(*_):\n    raise ZeroDivisionError\n")
    return _started(action, copy, base, adapter, "--mode", "plan")


def _started(
    action: Action,
    root: Path,
    base: Path,
    adapter: Path,
    *flags: str,
    when: Callable[[subprocess.Popen[str]], None] | None = None,
) -> tuple[int, str]:
    """Run the action of a checkout; call `when` once it speaks of its first phase."""
    report = action.folder / "report"
    process = subprocess.Popen(
        [
            sys.executable, str(root / "entrypoint.py"), "--adapter-path", str(adapter), "--base-model", str(base),
            "--device", "cpu", "--report-dir", str(report), *flags,
        ],
        cwd=action.folder, env=os.environ | action.hub.env(action.token), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if when is not None and line.startswith("Preflight"):
            when(process)
            when = None
    process.wait(timeout=60)
    process.stdout.close()
    return process.returncode, json.loads((report / "report.json").read_text())["problems"][0]["what"]


def _cut_off(action: Action, base: Path, adapter: Path) -> tuple[int, str]:
    return _plan(action, base, _cut(adapter, action.folder / "cut"))


def _without_tensors(action: Action, base: Path, adapter: Path) -> tuple[int, str]:
    return _plan(action, _without_index(base, action.folder / "bare"), adapter)


def _on_a_small_disk(action: Action, base: Path, adapter: Path) -> tuple[int, str]:
    disk = action.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        return _publish(action, base, adapter, "--work-dir", str(disk))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _never_applied(action: Action, base: Path, adapter: Path) -> tuple[int, str]:
    return _run(
        action, "--mode", "verify", "--adapter-path", str(adapter), "--base-model", str(base),
        "--merged-path", str(base),
    )  # fmt: skip


ENDINGS: dict[int, Run] = {
    0: _plan,
    1: partial(_plan, flags=("--work-dir", "/proc/nowhere")),
    2: partial(_publish, flags=("--dtype", "bf16")),
    3: lambda action, _, adapter: _plan(action, "alice/nowhere", adapter),
    4: _cut_off,
    5: _without_tensors,
    6: _on_a_small_disk,
    7: partial(_plan, flags=("--device", "cuda")),
    8: _never_applied,
    9: _damaged_on_the_hub,
    10: _stuck,
    70: _with_a_bug,
    130: _cancelled,
}


def test_every_documented_exit_code_is_provoked_here() -> None:
    assert sorted(ENDINGS) == sorted({0, *CODES})


@pytest.mark.parametrize("code", ENDINGS)
def test_the_action_ends_with(code: int, action: Action, base: Path, adapter: Path) -> None:
    try:
        ended, what = ENDINGS[code](action, base, adapter)
    finally:
        action.hub.heal()

    assert ended == code, what
    if code not in (0, 8):  # these end with a result
        special = [Message(family="", what=row[0], why="", fix="") for row in SPECIAL.get(code, ("", ()))[1]]
        assert [message for message in (*read_messages(), *special) if message.matches(what)], what
    assert bool(what) == (code not in (0, 8))
