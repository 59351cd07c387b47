"""The variants that are compared: base, unmerged, merged, and the merged model with E in it, none of them in memory.

Two checkpoints are behind them, and each is read once for all its variants (`runner.judge.streaming.stream`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from runner.judge.expected.filling import Filling
from runner.judge.expected.unmerged import Unmerged
from runner.judge.streaming.loader import Loaded
from runner.judge.streaming.slots import places_of
from runner.judge.streaming.stream import Origin, Values, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What the variants are made of.

    Attributes:
        unmerged: the base, plain and with the adapter on it.
        loaded: the merged folder.
        filling: E in the merged folder's model.
        device: "cpu" or "cuda": where they compute.
    """

    unmerged: Unmerged
    loaded: Loaded
    filling: Filling
    device: str

    @property
    def base(self) -> Origin:
        """The variants "base", plain, and "unmerged", with the adapter on it."""
        plain = self.unmerged.base.model
        return Origin(
            read=self.unmerged.base_values,
            variants=(
                Variant(name="base", model=plain, places=places_of(plain)),
                Variant(name="unmerged", model=self._reference, places=self.unmerged.places, change=self._attach),
            ),
        )

    def merged(self, *changes: str) -> Origin:
        """The variant "merged", and those that `Filling` makes of it: "exact" with E, "rounded" with round(E)."""
        model = self.loaded.model
        plain = Variant(name="merged", model=model, places=places_of(model))
        fills = {"exact": self.filling.exact, "rounded": self.filling.rounded}
        return Origin(
            read=self.loaded.read,
            variants=(plain, *(replace(plain, name=name, change=fills[name]) for name in changes)),
        )

    @property
    def alone(self) -> tuple[Origin, ...]:
        """The variants "base", "unmerged" and "merged", each with an origin of its own."""
        base = self.base
        plain, _ = base.variants
        attached = Variant(name="unmerged", model=self._reference, places=self.unmerged.places)
        return (
            replace(base, variants=(plain,)),
            Origin(read=self.unmerged.values, variants=(attached,)),
            self.merged(),
        )

    @property
    def _reference(self) -> object:
        return self.unmerged.model.get_base_model()

    def _attach(self, values: Values) -> None:
        changed = [key for key in values if key not in self.unmerged.on_disk]
        values.update(self.unmerged.values(changed, self.device))
