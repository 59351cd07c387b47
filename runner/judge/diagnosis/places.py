"""Are the right values in the wrong place? Rows moved, zeroed or left out, tensors swapped, the change transposed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from runner.judge.diagnosis.elements import FEW
from runner.judge.diagnosis.sample import Reading, Sample, Suspect, sample_rows, share, single_rows
from runner.judge.expected.elements import Stored
from runner.judge.expected.exact import Exact
from runner.judge.numbers.tensors import round_to, row_blocks, same_bits
from runner.protocol.verdict import Cause

MAX_ROWS = 16  # wrong rows that are looked for elsewhere in their tensor
MAX_SQUARE = 1 << 24  # elements of a square matrix that is transposed
ALIKE = 0.995  # cosine of two rows that are the same but for the change and rounding
UNLIKE = 0.9


def read_zeroed(suspect: Suspect, sample: Sample) -> Reading | None:
    """Return the reading "zeros", or None: whole rows, whole columns, or more elements than chance hits."""
    if not bool(sample.bad.any()) or bool((sample.found[sample.bad] != 0).any()):
        return None
    rows, columns = sample.bad.any(dim=1), sample.bad.any(dim=0)
    if not bool((sample.found[rows] != 0).any()):
        count, of = suspect.comparison.bad_row_count, suspect.exact.shape[0] if suspect.exact.shape else 1
        note = f"{count} of {of} rows are all zeros"
    elif len(sample.found) > 1 and not bool((sample.found[:, columns] != 0).any()):
        note = f"{int(columns.sum())} of {len(columns)} columns are all zeros"
    elif suspect.comparison.violations > FEW:
        note = f"{suspect.comparison.violations} elements are zeros, and nothing else is off"
    else:
        return None
    return Reading(kind=Cause.ZEROED, tensor=suspect.name, note=note)


def read_rows_skipped(suspect: Suspect, sample: Sample) -> Reading | None:
    """Return the reading "these rows are still the base's, others have the change", or None."""
    rows = sample.bad.any(dim=1).nonzero().flatten().tolist()
    if sample.base is None or len(rows) < 2:
        return None
    # All rows between: in a weak change that is only too small, right elements stand between the wrong ones.
    part = slice(rows[0], rows[-1] + 1)
    plain = round_to(sample.base[part], sample.dtype)
    if not bool(same_bits(plain, sample.stored[part], sample.dtype).all()):
        return None
    first, count = suspect.comparison.bad_rows[0], suspect.comparison.bad_row_count
    note = f"{count} rows from row {first} on are the base's, the others have the change"
    return Reading(kind=Cause.ROWS_SKIPPED, tensor=suspect.name, note=note)


def read_transposed(suspect: Suspect, sample: Sample) -> Reading | None:
    """Return the reading "the change was added transposed", or None; square matrices only."""
    shape, base = suspect.exact.shape, suspect.target.same_shape_base
    if base is None or len(shape) != 2 or shape[0] != shape[1] or shape[0] * shape[1] > MAX_SQUARE:
        return None
    whole = suspect.exact.rows(0, shape[0]) - base.rows(0, shape[0]).double()
    if sample.base is not None and sample.explains(sample.base + whole.T[slice(*sample.rows)]):
        note = "The elements are W + (ΔW)ᵀ"
        return Reading(kind=Cause.TRANSPOSED, tensor=suspect.name, note=note)
    return None


def read_moved(suspect: Suspect) -> Reading | None:
    """Return the reading "rows stand at other places", or None."""
    rows = _far_rows(suspect)
    if not rows:
        return None
    places = _find_rows(suspect.exact, single_rows(suspect, rows))
    pairs = [(row, place) for row, place in zip(rows, places, strict=True) if place is not None and place != row]
    if len(pairs) < max(1, round(0.8 * len(rows))):
        return None
    count = suspect.comparison.bad_row_count
    shifts = {row - place for row, place in pairs}
    row, place = pairs[0]
    if all((place, row) in pairs for row, place in pairs):
        note = f"Rows change places, {row} and {place} among {count}"
    elif len(shifts) == 1:
        note = f"{count} rows are shifted by {shifts.pop():+d}"
    else:
        note = f"{count} rows are in another order: row {row} holds what row {place} must hold"
    return Reading(kind=Cause.ROWS_MOVED, tensor=suspect.name, note=note)


def _far_rows(suspect: Suspect) -> list[int]:
    """Return wrong rows that are unlike what they must be."""
    if len(suspect.exact.shape) < 2 or suspect.exact.shape[0] < 2:
        return []
    bad = suspect.comparison.bad_rows
    chosen = bad[:: max(1, len(bad) // MAX_ROWS)][:MAX_ROWS]
    far = []
    for row in chosen:
        sample = sample_rows(suspect, row, row + 1)
        if bool(sample.found.isfinite().all()) and _cosine(sample.found, sample.exact) < UNLIKE:
            far.append(row)
    return far


def _find_rows(exact: Exact, wanted: torch.Tensor) -> list[int | None]:
    """Return at which row of E each row stands, or None."""
    wanted = torch.nn.functional.normalize(wanted.float(), dim=1)
    best = torch.full((len(wanted),), -1.0)
    place = torch.zeros(len(wanted), dtype=torch.int64)
    for start, stop in row_blocks(exact.shape):
        rows = torch.nn.functional.normalize(exact.rows(start, stop).flatten(1).float(), dim=1)
        found, where = (wanted @ rows.T).max(dim=1)
        place = torch.where(found > best, where + start, place)
        best = torch.maximum(found, best)
    return [int(row) if score > ALIKE else None for row, score in zip(place, best, strict=True)]


def read_swapped(suspect: Suspect, sample: Sample, others: Iterable[tuple[str, Stored]]) -> Reading | None:
    """Return the reading "this is another tensor's content", or None.

    Args:
        suspect: the tensor.
        sample: of it.
        others: base tensors of the same shape, by the stored name of what is made from them.
    """
    if len(sample.found) == 0 or _cosine(sample.found, sample.exact) >= UNLIKE:
        return None
    row = sample.rows[0]
    mine = sample.found[:1]
    for name, base in others:
        if name != suspect.name and _cosine(base.rows(row, row + 1).double().view(1, -1), mine) > UNLIKE:
            note = f"It holds the weights of {name}"
            return Reading(kind=Cause.SWAPPED, tensor=suspect.name, note=note)
    return None


def read_twin(suspect: Suspect, twins: Iterator[tuple[str, Exact]]) -> Reading | None:
    """Return the reading "head and embedding were mixed up", or None.

    Args:
        suspect: the tensor.
        twins: the other side of each tie that the base has: its name, and its E or its W.
    """
    for name, exact in twins:
        if exact.shape == suspect.exact.shape and holds(suspect, exact):
            note = f"It holds what {name} must hold"
            return Reading(kind=Cause.HEAD_IS_EMBEDDING, tensor=suspect.name, note=note)
    return None


def holds(suspect: Suspect, exact: Exact) -> bool:
    """Return whether the suspect's rows are these, rounded, as many as there are of them; all of them are read."""
    dtype = suspect.found.info.dtype
    for start, stop in row_blocks(exact.shape):
        wanted = round_to(exact.rows(start, stop), dtype)
        same = same_bits(wanted, suspect.found.rows(start, stop).view(wanted.shape), dtype)
        if share(same) < ALIKE:
            return False
    return True


def _cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    left, right = left.flatten(), right.flatten()
    size = float(left.norm() * right.norm())
    return float(left @ right) / size if size > 0 else 0.0
