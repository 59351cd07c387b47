"""Several adapters in `adapter-path`, and the inputs that say how they become one."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.protocol.combination import KINDS, PRUNING, RANDOM, VOTING, Combination
from runner.supervisor.inputs.read import RepoRef
from tests.contract.test_inputs import only_problem, problems_of, read

TWO = "alice/one\nalice/two"


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "workspace"
    root.mkdir()
    monkeypatch.chdir(root)
    return root


def test_reads_references_and_weights_line_by_line(workspace: Path) -> None:
    (workspace / "mine" / "adapter").mkdir(parents=True)

    inputs = read(
        {"adapter-path": "\n alice/one@v1 0.75 \r\n\n mine/adapter\t-.5\nalice/three\n", "combination": "cat"}
    )

    assert inputs.adapters == (
        RepoRef(repo_id="alice/one", revision="v1"),
        RepoRef(path=workspace / "mine/adapter"),
        RepoRef(repo_id="alice/three"),
    )
    assert inputs.combination == Combination(kind="cat", weights=(0.75, -0.5, 1.0))
    assert inputs.public()["adapter-path"] == "alice/one@v1 0.75\nmine/adapter -0.5\nalice/three 1.0"


def test_a_line_that_is_a_folder_has_no_weight_in_its_name(workspace: Path) -> None:
    (workspace / "run 2").mkdir()

    assert read({"adapter-path": "run 2"}).adapters == (RepoRef(path=workspace / "run 2"),)
    assert read({"adapter-path": "run 2 2\na/b", "combination": "cat"}).combination == Combination(
        kind="cat", weights=(2.0, 1.0)
    )


def test_one_adapter_is_merged_as_before() -> None:
    inputs = read({"adapter-path": "alice/one\n"})

    assert inputs.adapters == (RepoRef(repo_id="alice/one"),)
    assert inputs.combination is None
    assert inputs.public()["adapter-path"] == "alice/one"


def test_several_adapters_without_a_combination_are_refused_with_the_choices() -> None:
    problem = only_problem({"adapter-path": TWO})

    assert "`combination` is missing" in problem
    assert "one after the other" in problem
    assert all(kind in problem for kind in KINDS)


def test_one_adapter_takes_no_weight_and_no_combination() -> None:
    problems = problems_of(
        {"adapter-path": "alice/one 0.5", "combination": "ties", "combination-density": "0.5", "combination-seed": "1"}
    )

    assert len(problems) == 4
    assert all("one adapter" in problem for problem in problems)


@pytest.mark.parametrize("weight", ["0", "-0.0", "nan", "inf", "1e999"])
def test_a_weight_is_finite_and_not_zero(weight: str) -> None:
    assert "weight" in only_problem({"adapter-path": f"alice/one {weight}\nalice/two", "combination": "cat"})


def test_an_adapter_is_named_once() -> None:
    assert "twice" in only_problem({"adapter-path": "alice/one 1\nalice/one 2\n", "combination": "cat"})


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_takes_its_options_and_no_others(kind: str) -> None:
    given = {"combination-density": "0.5", "combination-seed": "7", "combination-majority-sign": "frequency"}
    for_kind = {"combination-density": PRUNING, "combination-seed": RANDOM, "combination-majority-sign": VOTING}
    fitting = {name: value for name, value in given.items() if kind in for_kind[name]}

    inputs = read({"adapter-path": TWO, "combination": kind, **fitting})

    assert inputs.combination == Combination(
        kind=kind,
        weights=(1.0, 1.0),
        density=0.5 if kind in PRUNING else None,
        seed=7 if kind in RANDOM else None,
        majority_sign="frequency" if kind in VOTING else None,
    )
    for name in given.keys() - fitting.keys():
        problem = only_problem({"adapter-path": TWO, "combination": kind, **fitting, name: given[name]})
        assert f"`{name}` is given" in problem


def test_options_that_are_left_out() -> None:
    assert "`combination-density` is missing" in only_problem({"adapter-path": TWO, "combination": "ties"})
    wanted = read({"adapter-path": TWO, "combination": "dare_ties", "combination-density": "1"}).combination
    assert wanted is not None
    assert (wanted.density, wanted.seed, wanted.majority_sign) == (1.0, 0, "total")


@pytest.mark.parametrize(
    "name, value",
    [
        ("combination-density", "0"), ("combination-density", "1.5"), ("combination-density", "half"),
        ("combination-density", "nan"), ("combination-seed", "-1"), ("combination-seed", "1.5"),
        ("combination-seed", "99999999999999999999"), ("combination-majority-sign", "loudest"),
    ],
)  # fmt: skip
def test_options_that_are_not_of_their_form(name: str, value: str) -> None:
    good = {"adapter-path": TWO, "combination": "dare_ties", "combination-density": "0.5"}

    assert f"`{name}` is {value!r}" in only_problem({**good, name: value})


def test_every_problem_is_told_at_once() -> None:
    problems = problems_of(
        {"adapter-path": "./missing 0\nalice/two x\nalice/three", "combination": "dare_ties", "combination-seed": "x"}
    )

    assert len(problems) == 5
    for text in (
        "is missing",
        "weight 0",
        "neither a folder",
        "`combination-density` is missing",
        "`combination-seed`",
    ):
        assert any(text in problem for problem in problems), text


def test_nothing_is_published_over_any_of_the_adapters() -> None:
    problem = only_problem({"adapter-path": TWO, "combination": "cat", "target-repo": "alice/two"})

    assert "'alice/two'" in problem
