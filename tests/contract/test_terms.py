"""The inputs on whose terms a merge is made and judged: rounding, tolerances, limits on quality."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.protocol.errors import Problem
from runner.protocol.limits import Limits
from runner.protocol.rounding import Rounding
from runner.supervisor.inputs.declared import INPUTS
from runner.supervisor.inputs.sources import collect
from tests.contract.test_inputs import only_problem, read, workspace  # noqa: F401  (a fixture)


def test_reads_the_rounding() -> None:
    assert read().rounding == Rounding()
    assert read({"rounding": "stochastic"}).rounding == Rounding(kind="stochastic", seed=0)
    assert read({"rounding": "stochastic", "rounding-seed": "7"}).public()["rounding-seed"] == "7"
    judged = read({"rounding": "stochastic", "mode": "verify", "merged-path": "owner/merged2"})
    assert judged.rounding == Rounding(kind="stochastic", seed=None)


@pytest.mark.parametrize(
    "values, text",
    [
        ({"rounding-seed": "1"}, "`rounding` is `nearest`"),
        ({"rounding": "stochastic", "dtype": "float32"}, "nothing is left to be rounded"),
        ({"rounding": "stochastic", "rounding-seed": "-1"}, "whole number"),
        ({"rounding": "stochastic", "rounding-seed": "1e3"}, "whole number"),
        ({"rounding": "stochastic", "rounding-seed": str(1 << 63)}, "whole number"),
        ({"rounding": "stochastik"}, "`stochastic`"),
    ],
)
def test_tells_what_is_wrong_with_the_rounding(values: dict[str, str], text: str) -> None:
    assert text in only_problem(values)


def test_reads_the_limits() -> None:
    limits = read(
        {
            "verify-tolerance": "end-to-end = 1e-3, semantics=1e-5",
            "quality-limits": "retention>=0.9\nkl-mean-nats <= 0.01",
        }
    ).limits

    assert [(found.layer, found.limit) for found in limits.tolerances] == [("end-to-end", 1e-3), ("semantics", 1e-5)]
    assert [found.text for found in limits.quality] == ["retention>=0.9", "kl-mean-nats<=0.01"]
    assert read().limits == Limits()
    assert read({"quality-limits": "retention>=0.9"}).public()["quality-limits"] == "retention>=0.9"
    assert "not-verified" in read({"allow": "not-verified"}).allow


@pytest.mark.parametrize(
    "values, text",
    [
        ({"verify-tolerance": "storage=1"}, "It takes: semantics, end-to-end"),
        ({"verify-tolerance": "end-to-end=0.5"}, "wrong merges pass"),
        ({"verify-tolerance": "end-to-end=1e-5"}, "loosened from 0.0001"),
        ({"verify-tolerance": "end-to-end=nan"}, "loosened from 0.0001"),
        ({"verify-tolerance": "end-to-end"}, "one number"),
        ({"verify-tolerance": "end-to-end=1e-3 end-to-end=1e-3"}, "twice"),
        ({"quality-limits": "retension>=0.9"}, "Did you mean `retention`"),
        ({"quality-limits": "retention<=0.9"}, "with `>=`"),
        ({"quality-limits": "retention>=much"}, "one number"),
        ({"quality-limits": "kl-mean-nats<=inf"}, "Write a number"),
        ({"quality-limits": "retention>=0.9", "mode": "plan"}, "Nothing is judged"),
        ({"allow": "not-verified", "mode": "plan"}, "Nothing is published"),
        ({"allow": "perhaps"}, "must be one of: pickle"),
        ({"allow": "peft=0.13, peft=0.21"}, "gives 'peft' twice"),
    ],
)
def test_tells_what_is_wrong_with_the_limits(values: dict[str, str], text: str) -> None:
    assert text in only_problem(values)


def test_reads_the_text_for_the_perplexity(workspace: Path) -> None:  # noqa: F811
    (workspace / "a.txt").write_text("\ufeffSome text.\n", "utf-8")
    (workspace / "empty.txt").write_text(" \n")
    (workspace / "bad.txt").write_bytes(b"\xff\xfe\x00")
    inputs = read({"eval-text": "a.txt", "quality-limits": "perplexity-ratio<=1.01"})
    assert inputs.evaluation.text == "Some text."
    assert inputs.public()["eval-text"] == len("Some text.")
    assert "Some text" not in repr(inputs)
    for values, text in (
        ({"eval-text": "none.txt"}, "cannot be read"),
        ({"eval-text": "bad.txt"}, "not UTF-8"),
        ({"eval-text": "empty.txt"}, "holds no text"),
        ({"eval-text": "a.txt", "mode": "plan"}, "Nothing is judged"),
        ({"quality-limits": "perplexity-ratio<=1.01"}, "`eval-text` is missing"),
    ):
        assert text in only_problem(values)


def test_reads_what_is_allowed() -> None:
    allow = read({"allow": "pickle, same-repo\npickle"}).allow
    assert allow.entries == ("pickle", "same-repo")
    assert "pickle" in allow
    assert "not-verified" not in allow
    assert allow.value("pickle") == ""
    assert allow.value("not-verified") is None
    assert read().allow.entries == ()


@pytest.mark.parametrize("name", ["pickle", "not-verified", "same-repo"])
def test_a_former_input_says_where_its_meaning_went(name: str) -> None:
    for told in (
        only_problem(argv=[f"--allow-{name}", "true"]),
        only_problem({f"allow-{name}": "true"}),
    ):
        assert f"`--allow {name}`" in told
    assert name in read(argv=["--allow", name]).allow


def test_a_former_input_is_refused_on_github_too_where_only_a_warning_would_tell_of_it() -> None:
    for told in (
        only_problem(argv=["--eval-tasks", "arc_easy"]),
        only_problem({"eval-tasks": "arc_easy"}),
        *(problem.what + problem.fix for problem in _problems_on_github({"eval-tasks": "arc_easy"})),
    ):
        assert "docs/verification.md" in told
    assert _problems_on_github({"eval-tasks": " "}) == []


def test_shards_are_always_sent_early_and_who_asks_otherwise_is_told() -> None:
    for told in (only_problem({"upload-early": "false"}), only_problem(argv=["--upload-early", "false"])):
        assert "nobody sees them before the verdict" in told


def _problems_on_github(values: dict[str, str]) -> list[Problem]:
    given = {f"INPUT_{name.upper()}": value for name, value in values.items()}
    return collect(INPUTS, given, [], in_github=True)[1]
