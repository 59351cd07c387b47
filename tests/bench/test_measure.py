"""The measuring itself: known memory, known bytes, known ends."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.measure import Failure, Limits, Run, measure

LIMITS = Limits(wall_s=60, anonymous_bytes=2_000_000_000)
MEGABYTE = 1_000_000


def python(program: str, *, folder: Path, limits: Limits = LIMITS) -> Run | Failure:
    return measure([sys.executable, "-c", program], folder=folder, limits=limits)


def test_memory_of_a_child_of_the_command_is_seen(tmp_path: Path) -> None:
    child = "import time; held = b'x' * 200_000_000; time.sleep(0.3)"

    run = python(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)", folder=tmp_path
    )

    assert isinstance(run, Run)
    assert 200 * MEGABYTE < run.anonymous_bytes < 260 * MEGABYTE
    assert run.resident_bytes > run.anonymous_bytes
    assert run.wall_s > 0.3


def test_a_mapped_file_is_resident_and_not_anonymous(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(100 * MEGABYTE))
    program = (
        "import mmap, time; file = open('weights', 'rb')\n"
        "view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "sum(view[at] for at in range(0, len(view), 4096)); time.sleep(0.3)"
    )

    run = python(program, folder=tmp_path)

    assert isinstance(run, Run)
    assert run.resident_bytes > 100 * MEGABYTE
    assert run.anonymous_bytes < 60 * MEGABYTE


def test_bytes_of_command_and_child_are_counted_once_it_has_ended(tmp_path: Path) -> None:
    child = "open('b', 'wb').write(bytes(30_000_000))"
    program = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])\n"
        "open('a', 'wb').write(bytes(20_000_000))"
    )

    run = python(program, folder=tmp_path)

    assert isinstance(run, Run)
    assert 50 * MEGABYTE <= run.written_bytes < 51 * MEGABYTE


def test_the_measurer_own_memory_is_not_the_command_s(tmp_path: Path) -> None:
    held = b"x" * (100 * MEGABYTE)

    run = measure(["true"], folder=tmp_path, limits=LIMITS)

    assert isinstance(run, Run)
    assert run.resident_bytes < len(held)


def test_time_after_imports_is_found_between_other_lines(tmp_path: Path) -> None:
    run = python("print('loading'); print('{\"after_imports_s\": 1.5}'); print('done')", folder=tmp_path)

    assert isinstance(run, Run)
    assert run.after_imports_s == 1.5


def test_a_command_that_fails_has_a_reason_and_no_time(tmp_path: Path) -> None:
    found = python("raise SystemExit('no such model')", folder=tmp_path)

    assert found == Failure(why="exit code 1", output="no such model\n")


def test_a_command_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    found = python("import time; time.sleep(60)", folder=tmp_path, limits=Limits(wall_s=0.5, anonymous_bytes=10**9))

    assert isinstance(found, Failure)
    assert found.why == "stopped after 0.5 s"


def test_a_command_that_takes_too_much_memory_is_stopped(tmp_path: Path) -> None:
    limits = Limits(wall_s=60, anonymous_bytes=100 * MEGABYTE)

    found = python("import time; held = b'x' * 200_000_000; time.sleep(60)", folder=tmp_path, limits=limits)

    assert isinstance(found, Failure)
    assert found.why == "stopped at 0.1 GB of anonymous memory"
