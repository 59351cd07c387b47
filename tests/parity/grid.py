"""PEFT's own test grid, as a program: the models of its test modules times its methods, each merged and judged.

`python -m tests.parity.grid [--only PATTERN] [--json FILE]` prints a line for each cell that is not merged, and counts:
merged (judged PASS, and the folder computes what PEFT's unmerged model computes), refused (by a named error, or failed
because PEFT's own merge computes something else), NOT_VERIFIED, and wrong: a traceback, a right merge that fails, or a
folder that computes something else. It ends with 1 for any wrong. Everything is in one process; models are random, and
built from configs.

What PEFT tests on models that transformers has no checkpoint of (its custom networks) is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers.utils import logging as chatter

from runner.judge.forward import outputs_of
from runner.judge.judge import judge
from runner.judge.prompts import Purpose, TokenSequence
from runner.judge.quality import continuations
from runner.protocol.errors import RunnerError
from runner.protocol.verdict import Outcome, Status
from tests.parity import models, oracle
from tests.parity.grid_cells import Model, cells
from tests.parity.pipeline import run_merge

MERGED, REFUSED, NOT_VERIFIED, WRONG = "merged", "refused", "NOT_VERIFIED", "wrong"
LIMIT = 1e-3  # of the size of the outputs: float32 in two orders of operations, through a whole model


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What became of one model with one method; `said` is why, where it is not merged."""

    model: str
    method: str
    outcome: str
    said: str
    seconds: float


def save_model(model: Model, folder: Path) -> Path:
    """Write the model as a float32 checkpoint of random weights and return its folder."""
    model_class = getattr(transformers, model.name)
    torch.manual_seed(7)
    made = model_class(model_class.config_class(**model.fields))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return models.save_base(made.eval(), folder, dtype=torch.float32, shard="1GB")


def run(model: Model, method: str, config: PeftConfig, base: Path, folder: Path) -> Cell:
    """Merge and judge one cell below an empty folder.

    An adapter that PEFT itself cannot make or save on this model is no cell: what PEFT raises is raised.
    """
    adapter = models.save_adapter(base, folder / "adapter", copy.deepcopy(config))
    start = time.monotonic()
    try:
        outcome, said = _outcome(base, adapter, folder / "merged")
    except RunnerError as error:
        outcome, said = REFUSED, f"{type(error).__name__}: {error.problem.what}"
    except Exception as error:  # noqa: BLE001  (a traceback is what the grid looks for)
        outcome, said = WRONG, f"{type(error).__name__}: {error}"
    return Cell(
        model=model.name, method=method, outcome=outcome, said=said[:300], seconds=round(time.monotonic() - start, 2)
    )


def _outcome(base: Path, adapter: Path, merged: Path) -> tuple[str, str]:
    run_merge(base, adapter, merged)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    if verdict.status is Status.FAIL and (own := distance_of_peft(base, adapter)) > LIMIT:
        return REFUSED, f"PEFT's own merge is {own:.2g} off its unmerged model; the judge fails it"
    if verdict.status is Status.FAIL:
        return WRONG, f"a right merge fails: {verdict.failures[0].name}: {verdict.failures[0].detail}"
    off = distance(base, adapter, merged)
    if not off <= LIMIT:
        return WRONG, f"its outputs are {off:.2g} off those of PEFT's unmerged model, and it is judged {verdict.status}"
    if verdict.status is Status.NOT_VERIFIED:
        skipped = next(check for check in verdict.checks if check.outcome is Outcome.SKIPPED)
        return NOT_VERIFIED, f"{skipped.name}: {skipped.detail}"
    return MERGED, ""


def distance(base: Path, adapter: Path, merged: Path) -> float:
    """Return how far the merged folder's outputs are from those of PEFT's unmerged model, both in float32."""
    return _distance(_unmerged(base, adapter).get_base_model(), oracle.load(merged))


def distance_of_peft(base: Path, adapter: Path) -> float:
    """Return the same of what PEFT's own merge computes."""
    return _distance(_unmerged(base, adapter).get_base_model(), _unmerged(base, adapter).merge_and_unload())


def _unmerged(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(oracle.load(base), adapter)


def _distance(reference: Any, other: Any) -> float:
    ids = torch.randint(3, 30, (24,), generator=torch.Generator().manual_seed(1))
    sequence = TokenSequence(label="grid", ids=ids, purpose=Purpose.COMPARISON, is_text=False)
    made = []
    with torch.no_grad():
        for model in (reference, other):
            torch.manual_seed(0)
            made.append(outputs_of(model.eval(), sequence, "cpu").double())
    return float((made[0] - made[1]).norm() / made[0].norm())


def run_all(only: str = "", tell: Callable[[Cell], None] = lambda _: None) -> list[Cell]:
    """Return what became of every cell whose name holds `only`."""
    found: list[Cell] = []
    with tempfile.TemporaryDirectory(prefix="grid-") as root:
        bases: dict[str, Path] = {}
        for model, method, config in cells():
            if only not in f"{model.name}, {method}":
                continue
            if model.name not in bases:
                bases[model.name] = save_model(model, Path(root) / model.name)
            folder = Path(root) / "cell"
            folder.mkdir()
            try:
                found.append(run(model, method, config, bases[model.name], folder))
                tell(found[-1])
            except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError) as error:
                logging.getLogger(__name__).error("No cell, PEFT: %s, %s: %s", model.name, method, str(error)[:120])
            finally:
                shutil.rmtree(folder)
    return found


def quieted() -> None:
    """Keep libraries' words out of the list, and the judge's continuations short."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    torch.set_num_threads(1)
    continuations.NEW_TOKENS = continuations.FEWEST_TOKENS


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the grid; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="run the cells whose name holds this")
    parser.add_argument("--json", type=Path, help="write all cells there")
    options = parser.parse_args()
    quieted()

    def tell(cell: Cell) -> None:
        if cell.outcome != MERGED:
            say(f"{cell.outcome}: {cell.model}, {cell.method}: {cell.said}")

    start = time.monotonic()
    found = run_all(options.only, tell)
    counts = Counter(cell.outcome for cell in found)
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in found], indent=1))
    told = ", ".join(f"{counts[name]} {name}" for name in (MERGED, REFUSED, NOT_VERIFIED, WRONG))
    say(f"{len(found)} cells: {told}; {time.monotonic() - start:.0f} s")
    return 1 if counts[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
