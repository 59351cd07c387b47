"""The inputs about the machine: executor, GPUs, memory, minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.protocol.errors import InputError
from runner.supervisor.inputs.gpus import Gpus
from runner.supervisor.inputs.read import Inputs, parse


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)


def read(**given: str) -> Inputs:
    variables = {f"INPUT_{name.upper().replace('_', '-')}": value for name, value in given.items()}
    return parse({"INPUT_ADAPTER-PATH": "adapter", "INPUT_MODE": "plan", **variables}, [])


@pytest.mark.usefixtures("adapter")
def test_defaults_leave_the_choice_to_the_action() -> None:
    machine = read().machine

    assert (machine.executor, machine.gpus, machine.min_free_vram_bytes) == ("auto", Gpus(), 0)
    assert (machine.gpu_wait_s, machine.phase_timeout_s) == (1800, 330 * 60)


@pytest.mark.usefixtures("adapter")
def test_what_is_given_is_read_and_shown() -> None:
    inputs = read(
        executor="docker", gpus="0,2", min_free_vram="20GB", gpu_wait_timeout="0", phase_timeout_minutes="1.5"
    )

    machine = inputs.machine
    assert (machine.executor, machine.gpus) == ("docker", Gpus(devices=("0", "2")))
    assert (machine.min_free_vram_bytes, machine.gpu_wait_s, machine.phase_timeout_s) == (20 * 10**9, 0, 90)
    shown = inputs.public()
    assert (shown["gpus"], shown["min-free-vram"]) == ("device=0,2", "20000000000B")
    assert (shown["gpu-wait-timeout"], shown["phase-timeout-minutes"]) == ("0", "1.5")


@pytest.mark.usefixtures("adapter")
def test_a_phase_has_no_limit_where_that_is_said() -> None:
    inputs = read(phase_timeout_minutes="0")

    assert inputs.machine.phase_timeout_s is None
    assert inputs.public()["phase-timeout-minutes"] == "0"


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"executor": "podman"}, "`executor` is 'podman'"),
        ({"gpus": "first"}, "`gpus` is 'first'"),
        ({"gpus": "0"}, "`gpus` is '0'"),
        ({"min_free_vram": "20"}, "`min-free-vram` is '20'"),
        ({"gpu_wait_timeout": "soon"}, "`gpu-wait-timeout` is 'soon'"),
        ({"phase_timeout_minutes": "-1"}, "`phase-timeout-minutes` is '-1'"),
        ({"phase_timeout_minutes": "nan"}, "`phase-timeout-minutes` is 'nan'"),
        ({"gpus": "none", "device": "cuda"}, "`device` is cuda, but `gpus` is none"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, str], text: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**given)

    assert [problem for problem in caught.value.problems if text in problem.what]
