"""Names, tags and events from strangers are refused, or harmless wherever they are written."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from runner.protocol.errors import InputError
from runner.protocol.syntax import repo_id_problem, tag_problem
from runner.supervisor.documents.card import make_card
from runner.supervisor.documents.inherited import Inherited
from runner.supervisor.github.commands import GitHub
from runner.supervisor.github.event import read_event
from runner.supervisor.inputs.read import parse
from tests.contract.hostile import HOSTILE, facts_of, split, wrong_in
from tests.contract.runner_grammar import Log


@settings(deadline=None, max_examples=300)
@given(name=HOSTILE | st.from_regex(r"[A-Za-z0-9_.-]{1,12}/[A-Za-z0-9_.-]{1,12}", fullmatch=True))
@example(name="a/b\n")
@example(name="a/b`")
def test_a_repository_name_is_refused_or_harmless_everywhere(name: str) -> None:
    if repo_id_problem(name) is not None:
        return
    data, body = split(make_card(replace(facts_of(Inherited(), "x", "y"), repo_id=name)).decode())

    assert wrong_in(body) == []
    assert shlex.quote(name) == name
    assert f'from_pretrained("{name}"' in body
    assert data["library_name"] == "transformers"


TAG_LIKE = st.text(st.sampled_from("abv019./-_+`'\"$;&|<>()#!@{}=,%\u00df\u4e2d"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(tag=HOSTILE | TAG_LIKE)
@example(tag="v1`")
@example(tag="```")
@example(tag="v1'$(id)'")
@example(tag='v1"')
@example(tag="</code>")
def test_a_tag_is_refused_or_harmless_everywhere(tag: str) -> None:
    if tag_problem(tag) is not None:
        return
    named = subprocess.run(["git", "check-ref-format", f"refs/tags/{tag}"], check=False)
    assert named.returncode == 0, "git refuses a tag that we take"
    facts = replace(facts_of(Inherited(), "x", "y"), tag=tag)

    _, body = split(make_card(facts).decode())

    assert wrong_in(body) == []
    (python, shell) = re.findall(r"^```(?:python|sh)\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    said: dict[str, str] = {}
    code = [line for line in python.splitlines() if "from_pretrained" in line]
    exec("\n".join(code), {"AutoModelForCausalLM": _Loads(said), "AutoTokenizer": _Loads(said)})  # noqa: S102
    assert said["revision"] == tag
    words = shlex.split(shell.splitlines()[0])
    assert words[words.index("--revision") + 1] == tag
    assert len(words) == 7


class _Loads:
    """Notes what it is told to load."""

    def __init__(self, said: dict[str, str]) -> None:
        self._said = said

    def from_pretrained(self, repo_id: str, *, revision: str) -> None:
        self._said |= {"repo_id": repo_id, "revision": revision}


FIELDS = st.sampled_from(["release", "tag_name", "draft", "action", "workflow_run", "event", "ref"]) | HOSTILE
PAYLOADS = st.recursive(
    st.none() | st.booleans() | st.integers() | HOSTILE,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(FIELDS, inner, max_size=4)),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(
    payload=PAYLOADS.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
    name=st.sampled_from(["release", "push", "workflow_run", "pull_request", "schedule"]) | HOSTILE,
    ref=HOSTILE,
)
@example(payload=b'{"release": {"tag_name": "v1\\n::set-output name=x::y"}}', name="release", ref="v1")
@example(payload=b"[" * 100_000, name="release", ref="v1")
def test_an_event_is_read_or_refused_and_its_text_never_becomes_a_command(payload: bytes, name: str, ref: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "event.json"
        path.write_bytes(payload)
        environ = {
            "GITHUB_ACTIONS": "true", "GITHUB_EVENT_NAME": name, "GITHUB_EVENT_PATH": str(path),
            "GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": ref, "GITHUB_WORKSPACE": folder,
            "INPUT_ADAPTER-PATH": "acme/adapter", "INPUT_TARGET-REPO": "acme/model", "INPUT_HF-TOKEN": "hf_x",
        }  # fmt: skip
        event = read_event(environ)
        said = io.StringIO()
        github = GitHub(environ, said)
        try:
            inputs = parse(environ, [], event_tag=event.tag, event_problems=event.problems)
        except InputError as error:
            for problem in error.problems:
                github.error(problem)
        else:
            assert tag_problem(inputs.tag or "") is None
            github.info(f"The tag is {inputs.tag}.")
    log = Log()
    log.read(said.getvalue())
    log.finish()
    assert log.violations == []
    assert {annotation.kind for annotation in log.annotations} <= {"error"}
