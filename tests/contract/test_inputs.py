from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from runner.protocol.combination import KINDS, MAJORITIES, PRUNING
from runner.protocol.errors import InputError, Problem
from runner.supervisor.inputs.former import REPORTED
from runner.supervisor.inputs.read import INPUTS, Inputs, RepoRef, given_secrets, parse, usage, wants_help

TOKEN = "hf_localtokenlocaltoken"
GOOD = {"adapter-path": "owner/adapter", "target-repo": "owner/merged", "tag": "v1.0.0", "hf-token": TOKEN}


def variables(values: Mapping[str, str]) -> dict[str, str]:
    return {f"INPUT_{name.upper()}": value for name, value in values.items()}


def read(values: Mapping[str, str] | None = None, argv: Sequence[str] = (), **environ: str) -> Inputs:
    return parse({**variables({**GOOD, **(values or {})}), **environ}, list(argv))


def problems_of(values: Mapping[str, str] | None = None, argv: Sequence[str] = (), **environ: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(values, argv, **environ)
    return [f"{problem.what} {problem.why} {problem.fix}" for problem in caught.value.problems]


def only_problem(values: Mapping[str, str] | None = None, argv: Sequence[str] = (), **environ: str) -> str:
    (problem,) = problems_of(values, argv, **environ)
    return problem


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "workspace"
    root.mkdir()
    monkeypatch.chdir(root)
    return root


def test_empty_means_the_default(workspace: Path) -> None:
    inputs = read(dict.fromkeys([spec.name for spec in INPUTS if spec.name not in GOOD], " "))

    assert (inputs.mode, inputs.dtype, inputs.device, inputs.on_existing_tag) == ("publish", "auto", "auto", "fail")
    assert (inputs.private, inputs.base, inputs.merged, inputs.work_dir, inputs.cache_dir) == (
        True,
        None,
        None,
        None,
        None,
    )
    assert inputs.report_dir == workspace / "lora-merge-report"
    assert inputs.verify_prompts == ()
    assert inputs.commit_message is None


def test_a_flag_beats_a_variable_and_a_variable_beats_the_default() -> None:
    inputs = read({"dtype": "float16", "device": "cpu"}, ["--dtype", "float32", "--tag=v2"])

    assert (inputs.dtype, inputs.device, inputs.tag) == ("float32", "cpu", "v2")


def test_an_empty_flag_is_not_given() -> None:
    assert read({"dtype": "float16"}, ["--dtype="]).dtype == "float16"


def test_reports_every_problem_at_once() -> None:
    problems = problems_of(
        {"adapter-path": "", "target-repo": "x", "mode": "publsh", "private": "yes", "dtype": "bf16", "tag": "main"},
        ["--devise", "cpu"],
    )

    assert len(problems) == 7
    for text in (
        "`--device`",
        "`adapter-path` is missing",
        "`target-repo`",
        "`publish`",
        "`private`",
        "bfloat16",
        "'main'",
    ):
        assert any(text in problem for problem in problems), text


def test_every_problem_has_what_why_and_fix() -> None:
    with pytest.raises(InputError) as caught:
        parse({}, ["x", "--nope", "--tag"])

    assert len(caught.value.problems) == 7
    assert all(problem.what and problem.why and problem.fix for problem in caught.value.problems)
    assert caught.value.exit_code == 2


def test_a_token_is_refused_as_a_flag_and_not_repeated() -> None:
    for argv in (["--hf-token", "hf_secretsecretsecretsecret"], ["--base-token=hf_secretsecretsecretsecret"]):
        problem = only_problem(argv=argv)

        assert "given as a flag" in problem
        assert "INPUT_" in problem
        assert "secretsecret" not in problem


@pytest.mark.parametrize(
    "argv",
    [["hf_secretsecretsecretsecret"], ["--hf_secretsecretsecretsecret"], ["--tag", "hf_secretsecretsecretsecret"]],
)
def test_a_token_in_the_wrong_place_is_not_repeated(argv: list[str]) -> None:
    problems = problems_of(argv=argv)

    assert "secretsecret" not in "".join(problems)


def test_tokens_come_from_the_environment_and_are_not_shown() -> None:
    inputs = read({"hf-token": ""}, HF_TOKEN=TOKEN)

    assert (inputs.hf_token, inputs.base_token) == (TOKEN, TOKEN)
    assert TOKEN not in repr(inputs) + str(inputs.public())
    assert read({"base-token": "hf_readreadread"}).secrets == (TOKEN, "hf_readreadread")
    assert read().hf_token == TOKEN


def test_the_input_beats_hf_token() -> None:
    assert read(HF_TOKEN="hf_otherotherother").hf_token == TOKEN


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "umläut"])
def test_refuses_what_is_no_token_without_repeating_it(token: str) -> None:
    problem = only_problem({"hf-token": token})

    assert "not a token" in problem
    assert token not in problem


def test_given_secrets_are_known_before_anything_is_checked() -> None:
    environ = {**variables({"hf-token": " two words ", "base-token": "b"}), "HF_TOKEN": "c"}

    assert given_secrets(environ) == ("b", "c", "two words")


@pytest.mark.parametrize(
    "argv, meant",
    [
        (["--adapter_path", "x"], "--adapter-path"),
        (["--adapter=x"], "--adapter-path"),
        (["--target-rep", "x"], "--target-repo"),
        (["--nothing-like-it", "x"], "--help"),
    ],
)
def test_an_unknown_flag_names_the_nearest(argv: list[str], meant: str) -> None:
    assert f"`{meant}`" in only_problem(argv=argv)


def test_refuses_flags_without_a_value_given_twice_and_positional_arguments() -> None:
    problems = problems_of(argv=["--tag", "--mode=plan", "--mode", "plan", "--device", "cpu", "extra"])

    assert "`--tag` has no value" in problems[0]
    assert "twice" in problems[1]
    assert "'extra'" in problems[2]


def test_a_misspelt_variable_is_told_outside_github_only(workspace: Path) -> None:
    assert "INPUT_BASE-MODEL" in only_problem(INPUT_BASE_MODEL="a/b")
    assert "INPUT_DTYPE" in only_problem(INPUT_dtype="float32")
    assert read(INPUT_METHOD="fcitx", INPUT_ENTRYPOINT="x", INPUT_ARGS="y").mode == "publish"
    assert read(INPUT_BASE_MODEL="a/b", GITHUB_ACTIONS="true", GITHUB_WORKSPACE=str(workspace)).base is None


@pytest.mark.parametrize("value", ["a\tb", "a\nb", "a\x00b", "a\x1b[31mb", "a\u202eb", "a\udcffb"])
@pytest.mark.parametrize("name", ["base-model", "target-repo", "tag", "report-dir"])
def test_refuses_control_characters_in_a_line(name: str, value: str) -> None:
    assert f"`{name}` holds" in only_problem({name: value})


@pytest.mark.parametrize(
    "value, expected", [("true", True), ("True", True), ("TRUE", True), ("false", False), ("FALSE", False)]
)
def test_reads_booleans_as_yaml_does(value: str, expected: bool) -> None:
    assert read({"private": value}).private is expected


@pytest.mark.parametrize("value", ["yes", "1", "tRUE", "on", "no"])
def test_refuses_other_booleans(value: str) -> None:
    assert f"`private` is {value!r}" in only_problem({"private": value})


def test_every_choice_is_taken_and_another_refused() -> None:
    several = {"adapter-path": "a/b\na/c"}
    needs: dict[str, dict[str, str]] = {
        "verify": {"merged-path": "a/m"},
        **{kind: {**several, "combination-density": "0.5" if kind in PRUNING else ""} for kind in KINDS},
        **{sign: {**several, "combination": "ties", "combination-density": "1"} for sign in MAJORITIES},
    }
    for spec in INPUTS:
        for choice in spec.choices:
            assert read({**needs.get(choice, {}), spec.name: choice}).public()[spec.name] == choice
        if spec.choices:
            context = needs.get(spec.choices[0], {})
            assert f"`{spec.name}` is 'nope'" in only_problem({**context, spec.name: "nope"})


def test_the_base_revision_goes_with_the_base_model(workspace: Path) -> None:
    (workspace / "base").mkdir()

    assert read({"base-model": "a/b", "base-revision": "v1"}).base == RepoRef(repo_id="a/b", revision="v1")
    assert read({"base-model": "a/b@v1", "base-revision": "v1"}).base == RepoRef(repo_id="a/b", revision="v1")
    assert read({"base-revision": "v1"}).base_revision == "v1"
    assert "Remove one" in only_problem({"base-model": "a/b@v2", "base-revision": "v1"})
    assert "local folder" in only_problem({"base-model": "./base", "base-revision": "v1"})
    assert "not a revision" in only_problem({"base-model": "a/b", "base-revision": "a..b"})


def test_publishing_needs_repository_token_and_tag() -> None:
    problems = problems_of({"target-repo": "", "hf-token": "", "tag": ""})

    assert [problem.split("`")[1] for problem in problems] == ["target-repo", "hf-token", "tag"]


def test_plan_and_verify_need_neither(workspace: Path) -> None:
    nothing = {"target-repo": "", "hf-token": "", "tag": ""}

    assert read({**nothing, "mode": "plan"}).hf_token is None
    assert read({**nothing, "mode": "verify", "merged-path": "a/m@v1"}).merged == RepoRef(repo_id="a/m", revision="v1")


def test_merged_path_belongs_to_verify() -> None:
    assert "`merged-path` is missing" in only_problem({"mode": "verify"})
    assert "Only `mode: verify`" in only_problem({"mode": "plan", "merged-path": "a/m"})
    assert "Only `mode: verify`" in only_problem({"merged-path": "a/m"})


def test_refuses_to_publish_over_the_adapter_or_the_base() -> None:
    assert "`adapter-path` are both" in only_problem({"target-repo": "Owner/Adapter"})
    assert "`base-model` are both" in only_problem({"base-model": "owner/merged@v1"})


def test_the_event_gives_the_tag_and_may_refuse() -> None:
    environ = variables({**GOOD, "tag": ""})
    refusal = Problem(what="no", why="no", fix="no")

    assert parse(environ, [], event_tag="v7").tag == "v7"
    assert parse(variables(GOOD), [], event_tag="v7").tag == "v1.0.0"
    assert parse({**environ, "INPUT_MODE": "plan"}, [], event_problems=[refusal]).tag is None
    with pytest.raises(InputError) as caught:
        parse(environ, [], event_tag="deadbeef", event_problems=[refusal])
    assert [problem.what for problem in caught.value.problems][1:] == ["no"]
    assert "'deadbeef'" in caught.value.problems[0].what


def test_public_holds_every_input_that_is_no_secret() -> None:
    public = read().public()

    assert [name for name in public if name not in REPORTED] == [spec.name for spec in INPUTS if not spec.secret]
    assert [public[name] for name in REPORTED] == ["", True]
    json.dumps(public)


def test_help_tells_every_input() -> None:
    text = usage()

    assert all((spec.variable if spec.secret else f"--{spec.name} ") in text for spec in INPUTS)
    assert "--hf-token" not in text
    assert wants_help(["--tag", "x", "--help"])
    assert not wants_help(["--tag", "x"])


def test_a_commit_message_may_have_lines() -> None:
    assert read({"commit-message": "one\n\ntwo\n"}).commit_message == "one\n\ntwo"
