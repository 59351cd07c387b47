"""Tasks of lm-eval (the Language Model Evaluation Harness), run on the unmerged and on the merged model, in float32.

The package is no dependency: `eval-tasks` is refused before any work where it is not installed. The worker has no
network, so a task must have its data on this machine: a YAML file of the workspace that reads a local file, or a data
set that the image holds. `check_tasks` refuses any other before the merge, not after it.

Both models are whole in memory, one after the other. A task's score is compared, metric by metric; `task-drop`, of
`quality-limits`, is the largest loss of any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from runner.judge.quality.native import free_bytes
from runner.judge.streaming.models import LOAD_ERRORS, first_line, load_model, quiet
from runner.protocol.errors import InputError, Problem
from runner.protocol.figures import TaskScore

_BATCH = 8
_BYTES_OF_PARAMETER = 6  # float32 weights, and room for what they compute


def check_tasks(tasks: Sequence[str]) -> None:
    """Return if lm-eval knows every task, and has its data on this machine.

    Args:
        tasks: as for `run_tasks`.

    Raises:
        InputError: it does not; the text names all tasks that cannot be run.
    """
    with quiet():
        try:
            names, manager = _names(tasks), _manager(tasks)
            known = list(manager.all_tasks)
            wrong = [_unknown(name, known) for name in names if name not in known]
            wrong += [_unloadable(name, manager) for name in names if name in known]
        except LOAD_ERRORS as error:
            wrong = [first_line(error)]
    told = "; ".join(filter(None, wrong))
    if told:
        raise InputError(
            [
                Problem(
                    what=f"`eval-tasks` cannot be run: {told}.",
                    why="lm-eval was asked before the merge. The worker has no network, so a task and its data must be "
                    "in the image, or in the workspace.",
                    fix="Correct the name (`lm-eval ls tasks` lists them), put the data into the image, or name a YAML "
                    "file whose task reads a file of the workspace.",
                )
            ]
        )


def run_tasks(
    tasks: Sequence[str], *, base: Path, adapter: Path, merged: Path, device: str
) -> tuple[tuple[TaskScore, ...], str]:
    """Return the scores of the tasks, and why there are none; "" where there are.

    Args:
        tasks: names that lm-eval knows, and paths of YAML files that define one.
        base: folder of the base.
        adapter: folder of the adapter.
        merged: folder of the merge.
        device: "cpu" or "cuda".
    """
    elements = sum(path.stat().st_size for path in merged.glob("*.safetensors")) // 2
    if _BYTES_OF_PARAMETER * elements > free_bytes(device):
        return (), f"two models of up to {4 * elements / 1e9:.1f} GB do not fit into memory, one after the other"
    try:
        with quiet():
            unmerged = PeftModel.from_pretrained(load_model(base), str(adapter)).eval()
        ours = _scores(unmerged, merged, tasks, device)
        del unmerged
        theirs = _scores(load_model(merged), merged, tasks, device)
    except LOAD_ERRORS as error:
        return (), f"lm-eval could not run them: {first_line(error)}"
    scores = tuple(_compared(ours, theirs))
    return scores, "" if scores else "they gave no score"


def _scores(model: Any, tokenizer: Path, tasks: Sequence[str], device: str) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    names, manager = _names(tasks), _manager(tasks)
    with quiet():
        words = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True, trust_remote_code=False)
        wrapped = HFLM(pretrained=model.to(device), tokenizer=words, batch_size=_BATCH, device=device)
        result = simple_evaluate(
            model=wrapped, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False, random_seed=0,
            numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
        )  # fmt: skip
    return dict(result or {})


def _files(tasks: Sequence[str]) -> list[Path]:
    return [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]


def _names(tasks: Sequence[str]) -> list[str]:
    """Return what the tasks are called; raises one of LOAD_ERRORS for a file that defines none."""
    names = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    for file in _files(tasks):
        try:
            names.append(str(yaml.safe_load(file.read_text("utf-8"))["task"]))
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(f"{file.name} has no `task`: {first_line(error)}") from error
    return names


def _manager(tasks: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=sorted({str(file.parent) for file in _files(tasks)}) or None)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3)
    return f"lm-eval knows no task {name!r}" + (f" (but {', '.join(near)})" if near else "")


def _unloadable(name: str, manager: Any) -> str:
    """Return why a task that is known cannot be loaded with its data; "" where it can."""
    try:
        getattr(manager, "load", manager.load_task_or_group)([name])
    except LOAD_ERRORS as error:
        return f"{name!r} cannot be loaded ({first_line(error)})"
    return ""


def _compared(unmerged: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, found in sorted(unmerged.get("results", {}).items()):
        better = unmerged.get("higher_is_better", {}).get(task, {})
        for key, value in sorted(found.items()):
            metric = key.partition(",")[0]
            other = merged["results"][task].get(key)
            if metric not in better or not isinstance(value, int | float) or not isinstance(other, int | float):
                continue  # a standard error, a label
            yield TaskScore(
                task=task, metric=key.replace(",none", ""), unmerged=float(value), merged=float(other),
                higher_is_better=bool(better[metric]),
            )  # fmt: skip
