r"""How merged values are rounded to the output dtype: to the nearest, or up or down by chance. Plain data, no torch.

The chance is a function of the seed, the tensor's stored name and the element's index, and of nothing else, so the
bytes depend neither on blocks nor on threads, and anybody can compute them again:

    key  = the first 8 bytes of sha256("<seed>\n<stored name>"), little endian
    z    = key + (index // 2 + 1) · 0x9E3779B97F4A7C15            modulo 2^64
    z    = (z xor z >> 30) · 0xBF58476D1CE4E5B9, (z xor z >> 27) · 0x94D049BB133111EB, z xor z >> 31
    draw = the lower 32 bits of z for an even index, the upper ones for an odd index
    r    = (draw >> 8) · 2^-24, so 0 <= r < 1

Where the base stores both sides of a tie (equal, and its config says that they are one), both take the name of the side
that the model owns, in Llama that of `embed_tokens`: so they stay equal where the tie holds.

With |E| = (n + f) units in the last place, n whole and 0 <= f < 1, the stored magnitude is n + 1 units where
f + r >= 1, else n. So it is one of the two neighbours of E, and E on average. Only tensors that the adapter changes are
rounded by chance, and only to 16 bits: the merge computes in float32.

The mixing is SplitMix64's (Steele, Lea, Flood, 2014) over a counter. `runner.worker.merge.stochastic` is the merge's
code of it, `runner.judge.numbers.stochastic` the judge's.
"""

from __future__ import annotations

from dataclasses import dataclass

NEAREST = "nearest"
STOCHASTIC = "stochastic"
KINDS = (NEAREST, STOCHASTIC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How merged values are rounded.

    Attributes:
        kind: one of `KINDS`.
        seed: of the stochastic kind, at least 0. None for the nearest; and for a merge to be judged of which only
            is known that it was rounded up or down somehow.
    """

    kind: str = NEAREST
    seed: int | None = None

    @property
    def is_stochastic(self) -> bool:
        """Whether chance decides between the two neighbours."""
        return self.kind == STOCHASTIC

    @property
    def text(self) -> str:
        """In one line, for people."""
        if not self.is_stochastic:
            return self.kind
        return f"{self.kind} (seed {self.seed})" if self.seed is not None else f"{self.kind} (any seed)"
