"""Where a run is: groups in a workflow, one line now and then in a log, whether there is news or not."""

from __future__ import annotations

import io
import time

import pytest

from runner.events import Progress
from runner.github import GitHub
from runner.progress import Showing, progress_line
from tests.contract.runner_grammar import Log


def event(done: float, total: float = 1e9, doing: str = "model-00001.safetensors") -> Progress:
    return Progress(phase="merge", done=done, total=total, doing=doing)


def wait_for(out: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in out.getvalue():
        assert time.monotonic() < deadline, out.getvalue()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "last, elapsed_s, line",
    [
        (None, 31.0, "merge: 31 s so far"),
        (event(0), 3.0, "merge: 3 s so far"),
        (event(2.5e8), 10.0, "merge: 25 %, 25 MB/s, about 30 s left (model-00001.safetensors)"),
        (event(0.5, total=1.0, doing="storage"), 8.0, "merge: 50 %, about 8 s left (storage)"),
        (event(2e9), 10.0, "merge: 100 %, 200 MB/s, about 0 s left (model-00001.safetensors)"),
    ],
)
def test_a_line_says_share_rate_and_rest(last: Progress | None, elapsed_s: float, line: str) -> None:
    assert progress_line("merge", last, elapsed_s) == line


def test_a_plain_log_names_each_phase_and_goes_on_without_news() -> None:
    out = io.StringIO()

    with Showing(GitHub({}, out), every_s=0.05) as showing:
        showing.begin("merge")
        showing.advance(event(5e8))
        wait_for(out, "merge: 50 %")
        showing.begin("verify")
        wait_for(out, "verify: 0 s so far\nverify: 0 s so far")

    assert out.getvalue().startswith("Merge …\nmerge: 50 %")
    assert "\r" not in out.getvalue()
    said = out.getvalue()
    time.sleep(0.2)
    assert out.getvalue() == said


def test_a_quick_phase_says_nothing_more() -> None:
    out = io.StringIO()

    with Showing(GitHub({}, out)) as showing:
        for phase in ("plan", "merge"):
            showing.begin(phase)
            showing.advance(event(1e9))

    assert out.getvalue() == "Plan …\nMerge …\n"


def test_a_workflow_folds_each_phase_and_closes_the_last_whatever_happens() -> None:
    out = io.StringIO()

    def run() -> None:
        with Showing(GitHub({"GITHUB_ACTIONS": "true"}, out)) as showing:
            showing.begin("plan")
            showing.begin("merge")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run()

    assert out.getvalue() == "::group::Plan\n::endgroup::\n::group::Merge\n::endgroup::\n"
    log = Log(secrets=set())
    log.read(out.getvalue())
    log.finish()
    assert log.violations == []
