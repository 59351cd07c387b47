"""GitHub's runner, as far as a container action can tell: folders, variables, the docker command, what is read after.

    runner = Runner(tmp_path)
    (runner.workspace / "adapter")...
    result = runner.run({"adapter-path": "adapter"}, Event.release("v1.0.0"))

The step runs in a container exactly as the runner starts it, or as a process without one (same variables, host
paths). Differences, each needed on a test machine: `--network host`, because test servers listen on loopback; and
the socket that is mounted is the one of the engine in use.

Anything that GitHub would drop, fail or leak raises ContractViolation, so that no test can overlook it.
Source: actions/runner v2.336.0, ContainerActionHandler.cs, DockerCommandManager.cs, ContainerInfo.cs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from tests.contract.runner_end import cancel, kill, remove_container
from tests.contract.runner_event import Event
from tests.contract.runner_grammar import MAX_SUMMARY_BYTES, Annotation, InvalidFile, Log, parse_entries

__all__ = ["ID_TOKEN", "ROOT", "RUNTIME_TOKEN", "ContractViolation", "Event", "RunResult", "Runner"]

ROOT = Path(__file__).resolve().parents[2]
RUNTIME_TOKEN = "runtime-token-3f1c8a52e7d94b06"
ID_TOKEN = "id-token-request-77b0c2e19d5f4a83"
SECRET_VARIABLES = ("INPUT_HF-TOKEN", "INPUT_BASE-TOKEN", "INPUT_SIGNING-KEY", "HF_TOKEN")
FILES = ("OUTPUT", "STATE", "STEP_SUMMARY", "ENV", "PATH")
_PREFIXES = {
    "OUTPUT": "set_output_",
    "STATE": "save_state_",
    "STEP_SUMMARY": "step_summary_",
    "ENV": "set_env_",
    "PATH": "add_path_",
}


class ContractViolation(AssertionError):
    """The action did something that GitHub would drop, fail or leak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What is left of a step, secrets hidden as the runner hides them."""

    exit_code: int
    log: str
    outputs: dict[str, str]
    state: dict[str, str]
    summary: str
    annotations: tuple[Annotation, ...]
    cancelled_s: float | None = None  # from the first signal until the step was gone

    def annotations_of(self, kind: str) -> list[Annotation]:
        return [annotation for annotation in self.annotations if annotation.kind == kind]


class Runner:
    """A self-hosted runner with one checked-out repository."""

    def __init__(self, root: Path, *, repository: str = "octo-org/models", action: Path = ROOT) -> None:
        name = repository.partition("/")[2]
        self.repository = repository
        self.work = root / "_work"
        self.workspace = self.work / name / name
        self.temp = self.work / "_temp"
        self.home = self.temp / "_github_home"
        self.workflow = self.temp / "_github_workflow"
        self.file_commands = self.temp / "_runner_file_commands"
        for folder in (self.workspace, self.home, self.workflow, self.file_commands):
            folder.mkdir(parents=True, exist_ok=True)
        self.action = action
        self.metadata: dict[str, Any] = yaml.safe_load((action / "action.yml").read_text())

    def run(
        self,
        inputs: Mapping[str, str],
        event: Event,
        *,
        executor: Literal["process", "docker"] = "process",
        image: str | None = None,
        env: Mapping[str, str] | None = None,
        program: Path | None = None,
        cancel_when: str | None = None,
        kill_when: str | None = None,
        timeout_s: float = 600,
        post_of: RunResult | None = None,
    ) -> RunResult:
        """Run the step, or the action's post step after it.

        Args:
            inputs: `with:` of the step; those of `action.yml` that are absent get their default.
            event: what started the workflow.
            executor: in a container of `image`, or as a process of this machine.
            image: needed for docker.
            env: `env:` of the job.
            program: run instead of the action's entrypoint, by a process.
            cancel_when: the run is cancelled once a line of the log holds this text.
            kill_when: the same for SIGKILL to the step itself, as the kernel does when memory runs out.
            timeout_s: then the run is cancelled too.
            post_of: run the post step of the step that ended so.

        Raises:
            ContractViolation: GitHub would have dropped, failed or leaked something.
        """
        files = self._make_files()
        variables = self._variables(inputs, event, files, env or {})
        entrypoint = "entrypoint"
        if post_of is not None:
            entrypoint = "post-entrypoint"
            variables |= {f"STATE_{name}": value for name, value in post_of.state.items()}
        secrets = {variables[name] for name in SECRET_VARIABLES if variables.get(name)}
        log = Log(secrets=secrets | {RUNTIME_TOKEN, ID_TOKEN})
        log.violations += [
            f"the action has no input {name!r}" for name in inputs.keys() - self.metadata["inputs"].keys()
        ]
        name = f"emulated_{uuid.uuid4().hex[:12]}"
        if executor == "docker":
            assert image, "executor docker needs an image"
            command, process_env = self._docker(name, image, variables, entrypoint)
        else:
            command = [sys.executable, str(program or self._program(entrypoint))]
            process_env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **variables}
        try:
            end = partial(kill, name if executor == "docker" else None) if kill_when else cancel
            exit_code, cancelled_s = self._watch(command, process_env, log, cancel_when or kill_when, timeout_s, end)
        finally:
            if executor == "docker" and remove_container(name):
                log.violations.append("the container outlived the step")
        return replace(self._collect(exit_code, log, files, secrets), cancelled_s=cancelled_s)

    def _make_files(self) -> dict[str, Path]:
        suffix = str(uuid.uuid4())
        files = {name: self.file_commands / f"{_PREFIXES[name]}{suffix}" for name in FILES}
        for file in files.values():
            file.touch()
        return files

    def _variables(
        self, inputs: Mapping[str, str], event: Event, files: Mapping[str, Path], env: Mapping[str, str]
    ) -> dict[str, str]:
        declared = {name: str(spec.get("default", "")) for name, spec in self.metadata["inputs"].items()}
        event_path = self.workflow / "event.json"
        event_path.write_bytes(event.content)
        # The order is the runner's: what comes later wins.
        return {
            **env,
            **{f"INPUT_{name.replace(' ', '_').upper()}": value for name, value in {**declared, **inputs}.items()},
            "HOME": str(self.home),
            **{f"GITHUB_{name}": value for name, value in event.variables().items()},
            "GITHUB_EVENT_PATH": str(event_path),
            "GITHUB_REPOSITORY": self.repository,
            "GITHUB_REPOSITORY_OWNER": self.repository.partition("/")[0],
            "GITHUB_WORKSPACE": str(self.workspace),
            **{f"GITHUB_{name}": str(path) for name, path in files.items()},
            "RUNNER_ARCH": "X64",
            "RUNNER_ENVIRONMENT": "self-hosted",
            "RUNNER_NAME": "gpu-1",
            "RUNNER_OS": "Linux",
            "RUNNER_TEMP": str(self.temp),
            "RUNNER_TOOL_CACHE": str(self.work / "_tool"),
            "RUNNER_WORKSPACE": str(self.workspace.parent),
            "CI": "true",
            "ACTIONS_RUNTIME_URL": "https://pipelines.invalid/",
            "ACTIONS_RUNTIME_TOKEN": RUNTIME_TOKEN,
            "ACTIONS_RESULTS_URL": "https://results.invalid/",
            "ACTIONS_CACHE_URL": "https://cache.invalid/",
            "ACTIONS_ID_TOKEN_REQUEST_URL": "https://pipelines.invalid/id?x=1",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": ID_TOKEN,
        }

    def _program(self, entrypoint: str) -> Path:
        return self.action / Path(self.metadata["runs"][entrypoint]).relative_to("/app")

    def _mounts(self) -> dict[str, str]:
        return {
            str(self.temp): "/github/runner_temp",
            str(self.home): "/github/home",
            str(self.workflow): "/github/workflow",
            str(self.file_commands): "/github/file_commands",
            str(self.workspace): "/github/workspace",
        }

    def _docker(
        self, name: str, image: str, variables: Mapping[str, str], entrypoint: str
    ) -> tuple[list[str], dict[str, str]]:
        mounts = self._mounts()
        translated = {key: _translate(value, mounts) for key, value in variables.items()}
        command = ["docker", "run", "--name", name, "--label", "emulated", "--workdir", "/github/workspace", "--rm"]
        for key in translated:
            command += ["-e", key]
        command += ["--entrypoint", self.metadata["runs"][entrypoint], "--network", "host"]
        socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
        if Path(socket).is_socket():  # an engine in another place has none to mount
            mounts = {socket: "/var/run/docker.sock", **mounts}
        for host, inside in mounts.items():
            command += ["-v", f"{host}:{inside}"]
        # Only names are on the command line; the values are in the environment of docker's own program.
        return [*command, image], {**os.environ, **translated}

    def _watch(
        self,
        command: list[str],
        env: Mapping[str, str],
        log: Log,
        when: str | None,
        timeout_s: float,
        end: Callable[[subprocess.Popen[bytes]], float],
    ) -> tuple[int, float | None]:
        # Its output goes to a file, so that a full pipe can never stop the step.
        output = self.temp / f"output_{uuid.uuid4().hex}"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                command, env=dict(env), cwd=self.workspace, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
        try:
            waited_s, is_cancelled = 0.0, False
            while process.poll() is None and not is_cancelled:
                try:
                    process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    waited_s += 0.1
                text = output.read_text(errors="replace") if when else ""
                is_cancelled = waited_s > timeout_s or bool(when and when in text)
            cancelled_s = end(process) if process.poll() is None else None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.read(output.read_text(errors="replace"))
        log.finish(is_killed=process.returncode in (137, -9))
        output.unlink()
        return process.returncode, cancelled_s

    def _collect(self, exit_code: int, log: Log, files: Mapping[str, Path], secrets: set[str]) -> RunResult:
        violations = log.violations
        texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        entries: dict[str, dict[str, str]] = {}
        for name in ("OUTPUT", "STATE"):
            try:
                entries[name] = parse_entries(texts[name])
            except InvalidFile as error:
                violations.append(f"GITHUB_{name}: {error}")
        if len(texts["STEP_SUMMARY"].encode()) > MAX_SUMMARY_BYTES:
            violations.append("the summary is above 1 MiB, so the whole of it is dropped")
        violations += [f"GITHUB_{name} was written" for name in ("ENV", "PATH") if texts[name]]
        outputs = entries.get("OUTPUT", {})
        violations += [
            f"the action has no output {name!r}" for name in outputs.keys() - self.metadata["outputs"].keys()
        ]
        violations += [
            f"output {name!r} holds a secret, so it is skipped"
            for name in outputs
            if log.hide(outputs[name]) != outputs[name]
        ]
        said = {"the log": "\n".join(log.raw_lines), "the summary": texts["STEP_SUMMARY"], "the state": texts["STATE"]}
        for place, text in said.items():
            violations += [
                f"a secret is in {place}" for secret in {*secrets, RUNTIME_TOKEN, ID_TOKEN} if secret in text
            ]
        if violations:
            raise ContractViolation("\n".join([*violations, "--- log", *log.lines[-60:]]))
        return RunResult(
            exit_code=exit_code,
            log="\n".join(log.lines),
            outputs=outputs,
            state=entries.get("STATE", {}),
            summary=log.hide(texts["STEP_SUMMARY"]),
            annotations=tuple(log.annotations),
        )


def _translate(value: str, mounts: Mapping[str, str]) -> str:
    """Return `value` with a host folder at its very beginning replaced by where that is mounted."""
    for host in sorted(mounts, key=len, reverse=True):
        if value == host or value.startswith(f"{host}/"):
            return mounts[host] + value[len(host) :]
    return value
