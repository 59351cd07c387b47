"""How a run ends that does not end well: crash, time, cancellation while stuck, full disks; each is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hub.faults import FOREVER, Kind
from tests.supervisor.run.conftest import ROOT, TARGET, Action


def start(action: Action, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), "--report-dir", str(action.folder / "report"), *flags],
        cwd=action.folder, env=os.environ | action.hub.env(action.token), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    log = ""
    for line in process.stdout:
        log += line
        if text in line:
            return log
    raise AssertionError(f"never said {text!r}:\n{log}")


def worker_of(process: subprocess.Popen[str]) -> int:
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(worker)


def what(action: Action) -> str:
    report = json.loads((action.folder / "report" / "report.json").read_text())
    return str(report["problems"][0]["what"])


@pytest.fixture
def hub_base(action: Action, base: Path) -> Iterator[str]:
    """Return the name of a base on the Hub; what is injected is forgotten afterwards."""
    repo_id = f"alice/base-{action.folder.name[-40:]}"
    action.hub.add_model(repo_id, base)
    yield repo_id
    action.hub.heal()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a maker of file systems of a given size."""
    made: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False)
        if mounted.returncode:
            pytest.skip("a small file system cannot be mounted here")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no room in the file system of `folder`."""
    descriptor = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(descriptor, bytes(4096)):
            pass
    except OSError:
        os.close(descriptor)


def flags(base: object, adapter: Path) -> list[str]:
    return [
        "--adapter-path",
        str(adapter),
        "--base-model",
        str(base),
        "--target-repo",
        TARGET,
        "--tag",
        "v9",
        "--device",
        "cpu",
    ]


def test_a_crash_is_named_with_its_signal_and_its_line(action: Action, base: Path, adapter: Path) -> None:
    process = start(action, *flags(base, adapter))
    log = read_until(process, "Plan")

    os.kill(worker_of(process), signal.SIGSEGV)
    log += process.communicate(timeout=60)[0]

    assert process.returncode == 7, log
    assert "The worker crashed (signal SIGSEGV)" in log
    assert "Fatal Python error: Segmentation fault" in log
    assert action.hub.repo(TARGET) is None


def test_a_phase_that_takes_too_long_is_ended(action: Action, hub_base: str, adapter: Path) -> None:
    action.hub.fail("resolve", Kind.SLOW, delay_s=60, times=FOREVER, where="safetensors")
    started = time.monotonic()

    result = action.run(*flags(hub_base, adapter), "--phase-timeout-minutes", "0.1")

    assert result.code == 10, result.log
    assert "The phase `download` took longer than 0.1 minutes" in result.log
    assert "Nothing was published" in result.log
    assert time.monotonic() - started < 40
    assert result.report["problems"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cancelled_run_ends_in_time_though_a_download_is_stuck(
    number: signal.Signals, action: Action, hub_base: str, adapter: Path
) -> None:
    action.hub.fail("resolve", Kind.SLOW, delay_s=60, times=FOREVER, where="safetensors")
    process = start(action, *flags(hub_base, adapter))
    log = read_until(process, "Download")
    time.sleep(0.5)
    worker = worker_of(process)

    process.send_signal(number)
    started = time.monotonic()
    while Path(f"/proc/{worker}").exists() and time.monotonic() - started < 10:
        time.sleep(0.02)
    worker_s = time.monotonic() - started
    log += process.communicate(timeout=60)[0]

    assert process.returncode == 130, log
    assert worker_s < 4
    assert time.monotonic() - started < 7.5  # then the runner would send SIGTERM, and kill its `docker run` soon
    assert "in the phase `download`" in what(action)


def test_a_disk_too_small_for_the_download_is_told_before_it(
    action: Action, hub_base: str, adapter: Path, small_disk: Callable[[str], Path]
) -> None:
    cache = small_disk("64k")

    result = action.run(*flags(hub_base, adapter), "--cache-dir", str(cache))

    assert result.code == 6, result.log
    assert "There is not enough room" in result.log
    assert f"the base in {str(cache)!r}" in result.log
    assert "Download" not in result.log


def test_folders_on_one_disk_are_counted_together(
    action: Action, hub_base: str, base: Path, adapter: Path, small_disk: Callable[[str], Path]
) -> None:
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    disk = small_disk(str(weights * 3 // 2))  # enough for each, not for both

    result = action.run(*flags(hub_base, adapter), "--cache-dir", str(disk / "c"), "--work-dir", str(disk / "w"))

    assert result.code == 6, result.log
    assert "the base in" in result.log
    assert "the merged model in" in result.log


def test_a_disk_that_fills_up_in_the_download_is_named(
    action: Action, hub_base: str, adapter: Path, small_disk: Callable[[str], Path]
) -> None:
    cache = small_disk("200m")
    action.hub.fail("resolve", Kind.SLOW, delay_s=2, times=FOREVER, where="safetensors")
    process = start(action, *flags(hub_base, adapter), "--cache-dir", str(cache))
    log = read_until(process, "Download")

    fill(cache)
    log += process.communicate(timeout=120)[0]

    assert process.returncode == 6, log
    assert "disk is full" in log


def test_a_work_folder_that_fills_up_is_named_and_nothing_is_published(
    action: Action, base: Path, adapter: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("200m")
    process = start(action, *flags(base, adapter), "--work-dir", str(disk))
    log = read_until(process, "Download")

    fill(disk)
    log += process.communicate(timeout=120)[0]

    assert process.returncode == 6, log
    assert action.hub.repo(TARGET) is None


def test_a_report_that_finds_no_room_is_an_error_and_the_rest_is_told(
    action: Action, base: Path, adapter: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("64k")
    fill(disk)

    result = replace(action, folder=disk).run(
        "--adapter-path", str(adapter), "--base-model", str(base), "--mode", "plan", "--device", "cpu"
    )

    assert result.code == 6, result.log
    assert "A disk is full" in result.log
    assert "verified: skipped" in result.log  # the outputs are given all the same
    assert "Plan:" in result.log


def test_what_comes_from_the_cache_is_counted(action: Action, base: Path, adapter: Path) -> None:
    adapter_id = f"alice/adapter-{action.folder.name[-40:]}"
    action.hub.add_model(adapter_id, adapter)
    cache = action.folder / "cache"
    arguments = ("--adapter-path", adapter_id, "--base-model", str(base), "--mode", "plan", "--device", "cpu")
    size = sum(path.stat().st_size for path in adapter.iterdir() if path.name != ".gitattributes")

    first = action.run(*arguments, "--cache-dir", str(cache)).outputs
    second = action.run(*arguments, "--cache-dir", str(cache)).outputs
    local = action.run("--adapter-path", str(adapter), *arguments[2:]).outputs

    assert (first["cache-hit"], first["cache-hit-bytes"]) == ("false", "0")
    assert 0 < int(first["cache-miss-bytes"]) <= size
    assert (second["cache-hit"], second["cache-miss-bytes"]) == ("true", "0")
    assert second["cache-hit-bytes"] == first["cache-miss-bytes"]
    assert (local["cache-hit"], local["cache-hit-bytes"]) == ("", "")


def test_two_jobs_fill_one_cache_at_the_same_time(action: Action, base: Path, adapter: Path) -> None:
    adapter_id = f"alice/adapter-{action.folder.name[-40:]}"
    action.hub.add_model(adapter_id, adapter)
    arguments = ("--adapter-path", adapter_id, "--base-model", str(base), "--mode", "plan", "--device", "cpu")

    both = [start(action, *arguments, "--cache-dir", str(action.folder / "cache")) for _ in range(2)]
    logs = [process.communicate(timeout=120)[0] for process in both]

    assert [process.returncode for process in both] == [0, 0], logs
    shutil.rmtree(action.folder / "cache")
