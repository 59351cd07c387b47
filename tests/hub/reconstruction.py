"""Which chunks of which xorbs a range of a file needs, and which bytes of the xorbs these are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tests.hub.shards import Term
from tests.hub.xorbs import Chunk

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Neighbouring chunks of a xorb, and where they lie in it; both ends are not included."""

    chunks: Span
    bytes: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """All parts of one xorb, in their order."""

    xorb: str
    parts: tuple[Part, ...]


def reconstruct(
    terms: Iterable[Term], chunks_of: Callable[[str], Sequence[Chunk]], *, start: int, end: int
) -> tuple[int, list[Term], list[Fetch]]:
    """Return how a range of a file is put together.

    Args:
        terms: of the whole file.
        chunks_of: gives the chunks of a xorb.
        start: first byte of the range.
        end: first byte after it.

    Returns:
        How many bytes to skip in the first term, the terms (cut to whole chunks), and what to fetch for them.
    """
    kept: list[Term] = []
    wanted: dict[str, set[int]] = {}
    skip = at = 0
    for term in terms:
        chunks = chunks_of(term.xorb)
        inside: list[int] = []
        for number in range(term.start, term.end):
            size = chunks[number].size_bytes
            if at < end and at + size > start:
                if not kept and not inside:
                    skip = max(0, start - at)
                inside.append(number)
            at += size
        if inside:
            size_bytes = sum(chunks[number].size_bytes for number in inside)
            kept.append(Term(xorb=term.xorb, start=inside[0], end=inside[-1] + 1, size_bytes=size_bytes))
            wanted.setdefault(term.xorb, set()).update(inside)
    fetches = [Fetch(xorb=xorb, parts=_parts(sorted(numbers), chunks_of(xorb))) for xorb, numbers in wanted.items()]
    return skip, kept, fetches


def _parts(numbers: Sequence[int], chunks: Sequence[Chunk]) -> tuple[Part, ...]:
    spans: list[Span] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1] = (spans[-1][0], number + 1)
        else:
            spans.append((number, number + 1))
    return tuple(Part(chunks=(first, last), bytes=(chunks[first].start, chunks[last - 1].end)) for first, last in spans)
