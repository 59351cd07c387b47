"""action-types.yml: the types of the action's inputs and outputs, for generators of typed workflows.

Written by `python -m tools.tables` from `runner.supervisor.inputs.sources.INPUTS` and `action.yml`; never by hand.

Source: the format of github-actions-typing (https://github.com/typesafegithub/github-actions-typing).
"""

from __future__ import annotations

from typing import Any

import yaml

from runner.protocol.verdict import Status
from runner.supervisor.inputs.declared import INPUTS, InputSpec

HEAD = (
    "# Types of the inputs and outputs, in the format of github-actions-typing. Written by `make fix`; do not edit.\n"
)
BOOLEANS = ("true", "false")
# What `action.yml` cannot say: an output is text for the runner, whatever it holds.
OUTPUTS: dict[str, dict[str, Any]] = {
    "verified": {"type": "enum", "allowed-values": [*BOOLEANS, "skipped"]},
    "status": {"type": "enum", "allowed-values": [status.value for status in Status]},
    "storage-violations": {"type": "integer"},
    **{
        name: {"type": "float"}
        for name in ("retention", "kl-mean-nats", "max-probe-error", "end-to-end-error", "effect")
    },
}


def render_types(outputs: list[str]) -> str:
    """Return the text of action-types.yml for all inputs of the code and these outputs."""
    document = {
        "inputs": {spec.name: input_type(spec) for spec in INPUTS},
        "outputs": {name: dict(OUTPUTS.get(name, {"type": "string"})) for name in outputs},
    }
    return HEAD + yaml.safe_dump(document, sort_keys=False, width=120)


def input_type(spec: InputSpec) -> dict[str, Any]:
    """Return the type of one input."""
    if spec.choices:
        return {"type": "enum", "allowed-values": list(spec.choices)}
    if spec.default in BOOLEANS:
        return {"type": "boolean"}
    return {"type": "string"}
