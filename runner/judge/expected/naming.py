"""Adapters that are not named as PEFT names them in this model, as folders that are.

The names come from `runner.architecture.adapter_names`, transformers' own renamings and the halves of a model among
them, which whoever merged has used, too. What keeps that honest: a name that no module takes fails in PEFT, each tensor
must be in PEFT's model with the values of the file, and modules and end to end are judged by what that model computes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from runner.architecture.adapter_names import Naming, name_adapter
from runner.files.layout import build_header, read_tensor_file
from runner.judge.expected.recipe import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, read_adapter_header

BLOCK_BYTES = 16 << 20


@contextmanager
def as_peft_names(adapter: Path, model: PreTrainedModel) -> Iterator[Path]:
    """Give the adapter's folder, or one with the same tensors under the names that they have in `model`.

    Args:
        adapter: the folder.
        model: of the base's class, without an adapter; may be on the meta device.

    Raises:
        BrokenAdapter: config or weights cannot be read.
        AdapterMismatch, UnsupportedAdapter: see `name_adapter`.
    """
    config = read_adapter_config(adapter)
    naming = name_adapter(model, config, read_adapter_header(adapter))
    if naming.is_native:
        yield adapter
        return
    with tempfile.TemporaryDirectory(prefix="lora-merge-") as made:
        folder = Path(made)
        for path in adapter.iterdir():
            if path.is_file() and path.name not in (CONFIG_FILE, WEIGHTS_FILE):
                (folder / path.name).symlink_to(path.resolve())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **naming.config}))
        _write(adapter, folder, naming)
        yield folder


def _write(adapter: Path, folder: Path, naming: Naming) -> None:
    file = read_tensor_file(adapter, WEIGHTS_FILE)
    header = build_header(
        ((naming.names[tensor.name], tensor.dtype, tensor.shape) for tensor in file.tensors), file.metadata
    )
    with (adapter / WEIGHTS_FILE).open("rb") as source, (folder / WEIGHTS_FILE).open("wb") as target:
        target.write(header)
        source.seek(len(file.header))
        while block := source.read(BLOCK_BYTES):
            target.write(block)
