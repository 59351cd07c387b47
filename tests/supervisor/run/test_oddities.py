"""Runs on a machine that is not as it should be: no GPU where one is asked for, a broken worker or Python."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from runner.supervisor.check_gpu import check_gpu
from runner.supervisor.github.commands import GitHub
from tests.supervisor.run.conftest import ROOT, TARGET, Action


def test_without_a_gpu_cuda_is_refused_and_so_is_the_check_of_one(
    action: Action, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--adapter-path", str(adapter), "--base-model", str(base), "--mode", "plan", "--device", "cuda")

    result = action.run(*flags, "--executor", "inline")

    assert result.code == 7, result.log
    assert "`device` is cuda, but there is no GPU" in result.report["problems"][0]["what"]
    # As where device files are there and the driver does not work: the worker starts, and torch finds nothing.
    monkeypatch.setattr("runner.supervisor.launch.start.sees_gpu", lambda _environ: True)
    out = io.StringIO()
    environ = {**os.environ, **action.warmth.environ, "CUDA_VISIBLE_DEVICES": ""}
    monkeypatch.setattr(sys, "executable", action.warmth.environ["LORA_TEST_PYTHON"])
    assert check_gpu(environ, GitHub({}, out)) == 7
    assert "There is no GPU to compute on" in out.getvalue()


BROKEN = """
import os, sys
{fault}
sys.path.remove(os.path.dirname(__file__))
del sys.modules["sitecustomize"]
try:
    import sitecustomize  # the next one on the path
except ImportError:
    pass
"""
# A worker that says that it is ready, and ends well without a word more; and a Python whose folders fail oddly.
SILENT = f"""
if "runner.worker.main" in sys.orig_argv:
    sys.path.append({str(ROOT)!r})
    from runner.protocol.events import Problem, Ready, encode
    none = Problem(what="no GPU", why="", fix="")
    print(encode(Ready(versions={{}}, cuda_device=None, cuda_problem=none)), end="", flush=True)
    os._exit(0)
"""
ODD = """
import tempfile
tempfile.mkdtemp = None
"""


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [(SILENT, 9, "The worker ended without a verdict."), (ODD, 70, "An error that nobody foresaw: TypeError")],
    ids=["silent", "odd"],
)
def test_what_should_not_happen_is_named_and_publishes_nothing(
    fault: str, code: int, said: str, action: Action, base: Path, adapter: Path
) -> None:
    site = action.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BROKEN.format(fault=fault))
    environ = {"PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))}

    result = action.publish(base, adapter, tag=f"v{code}", environ=environ)

    assert result.code == code, result.log
    assert said in result.log
    repo = action.hub.repo(TARGET)
    assert repo is None or f"v{code}" not in repo.tags
