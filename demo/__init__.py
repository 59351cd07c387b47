"""The demo: a real small model, a real adapter, a Hub on this machine, and the main job between them.

- `demo.smollm2` builds the base checkpoint, `demo.train` made the committed adapters,
- `demo.run` is `make demo`, `demo.ask` loads what it released in a process that cannot import PEFT.
"""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on; the text is one line that says why and what to do."""
