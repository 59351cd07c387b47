"""The record of what provokes which refusal finds a refusal without a test, and is made from what really happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools.messages import ROOT, sites
from tools.refusals import HOOK, IN_CONTAINERS, OPEN, problems, read

SOURCE = """
from runner.protocol.errors import BrokenAdapter, InputError, Problem

def read(path, form):
    if not path:
        raise BrokenAdapter("No path.", why="w", fix="f")
    if path == "a":
        raise _odd("a")
    form.add(f"{path} is bad.", why="w", fix="f")
    raise _odd("b")

def _odd(what) -> InputError:
    return InputError([Problem(what=what, why="w", fix="f")])
"""


def _tree(root: Path, source: str) -> Path:
    (root / "runner").mkdir(parents=True)
    (root / "runner" / "x.py").write_text(source)
    return root


def test_a_place_that_refuses_is_found_and_a_shared_one_is_found_at_its_callers(tmp_path: Path) -> None:
    found = sites(_tree(tmp_path, SOURCE))

    assert [(site.key, site.first, site.family) for site in found] == [
        ("runner/x::read::BrokenAdapter", 6, "BrokenAdapter"),
        ("runner/x::read::_odd", 8, "InputError"),
        ("runner/x::read::add", 9, "input"),
        ("runner/x::read::_odd::2", 10, "InputError"),
    ]


def test_a_refusal_without_a_test_and_a_test_that_is_gone_are_found(tmp_path: Path) -> None:
    found = sites(_tree(tmp_path, SOURCE))
    here = "tests/tools/test_refusals.py::test_a_refusal_without_a_test_and_a_test_that_is_gone_are_found"
    tested = {site.key: here for site in found}
    assert problems(found, tested, ()) == []

    first, second, *_ = tested
    del tested[first]
    assert "no test is known" in problems(found, tested, ())[0]
    assert problems(found, tested, [first]) == []
    assert "its test is gone" in problems(found, tested | {second: here + "x"}, [first])[0]
    assert "has a test now" in problems(found, tested, [first, second])[0]
    assert "a refusal is gone" in problems(found, tested | {"runner/x::gone::add": here}, [first])[0]


def test_the_record_names_a_test_for_every_refusal() -> None:
    assert problems(sites(), {**read(), **IN_CONTAINERS}, OPEN) == []


def test_an_error_in_another_process_is_seen_with_its_callers(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(root=str(ROOT), log=str(log)))
    program = "from pathlib import Path; from runner.files.layout import read_checkpoint; read_checkpoint(Path('x'))"

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, check=False
    )

    assert b"BrokenCheckpoint" in done.stderr
    seen = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    told = next(site for site in sites() if site.key == "runner/files/absent::_nothing::BrokenCheckpoint")
    assert any(told.holds(file, line) for file, line in seen)
