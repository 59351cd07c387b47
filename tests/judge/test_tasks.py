"""Tasks of lm-eval on both models, where that package is installed; without it, the reason is told."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from runner.judge.judge import judge
from runner.judge.quality.tasks import check_tasks, run_tasks
from runner.protocol.errors import InputError, Problem, rebuild
from runner.protocol.figures import TaskScore
from runner.protocol.limits import Evaluation, Limits, QualityLimit
from runner.protocol.verdict import Layer, Outcome, Status
from tests.judge.conftest import Maker

IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None
TASK = """\
task: continue_it
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["{{{{right}}}}", "{{{{wrong}}}}"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    data = tmp_path / "data.jsonl"
    lines = [{"text": f"Count {n},", "right": f" {n + 1}", "wrong": f" {n - 1}"} for n in range(12)]
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    path = tmp_path / "continue.yaml"
    path.write_text(TASK.format(data=data))
    return path


def test_a_drop_is_a_loss_whichever_way_a_metric_counts() -> None:
    assert TaskScore(task="t", metric="acc", unmerged=0.75, merged=0.5, higher_is_better=True).drop == 0.25
    assert TaskScore(task="t", metric="ppl", unmerged=4.0, merged=5.0, higher_is_better=False).drop == 1.0


def test_what_cannot_be_run_is_told_and_is_no_pass(right_merge: Maker) -> None:
    base, adapter, merged = right_merge("lora")
    verdict = judge(
        base=base, adapter=adapter, merged=merged, dtype="auto", evaluation=Evaluation(tasks=("no_such_task",)),
        limits=Limits(quality=(QualityLimit(figure="task-drop", limit=0.1),)),
    )  # fmt: skip
    assert verdict.status is Status.NOT_VERIFIED
    (check,) = [check for check in verdict.checks if check.name == "your tasks were run"]
    assert (check.layer, check.outcome) == (Layer.QUALITY, Outcome.WARN)
    assert "lm-eval could not run them" in check.detail


@pytest.mark.skipif(not IS_INSTALLED, reason="lm-eval is not installed")
def test_a_local_task_is_run_on_both_models(right_merge: Maker, task: Path) -> None:
    base, adapter, merged = right_merge("lora")
    scores, reason = run_tasks((str(task),), base=base, adapter=adapter, merged=merged, device="cpu")
    assert reason == ""
    assert [(score.task, score.metric, score.higher_is_better) for score in scores] == [("continue_it", "acc", True)]
    assert 0 <= scores[0].unmerged <= 1
    assert abs(scores[0].drop) <= 2 / 12


@pytest.mark.skipif(not IS_INSTALLED, reason="lm-eval is not installed")
def test_what_cannot_be_run_is_refused_before_the_merge(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    check_tasks((str(task),))
    broken = tmp_path / "broken" / "broken.yaml"
    broken.parent.mkdir()
    broken.write_text(TASK.format(data=tmp_path / "absent.jsonl").replace("continue_it", "broken_it"))

    with pytest.raises(InputError, match=r"knows no task 'helaswag' .*hellaswag.*'broken_it' cannot be loaded"):
        check_tasks(("helaswag", str(broken), str(task)))


def test_a_file_that_defines_no_task_is_refused_before_the_merge(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("- a list")
    with pytest.raises(InputError, match=r"broken\.yaml has no `task`"):
        check_tasks((str(tmp_path / "broken.yaml"),))


def test_a_worker_that_refuses_an_input_ends_the_run_as_an_input_error() -> None:
    error = InputError([Problem(what="w", why="y", fix="f")])
    told = rebuild(type(error).__name__, error.problem)
    assert (type(told), told.exit_code, told.problems) == (InputError, 2, error.problems)
