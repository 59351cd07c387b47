"""Put one prompt to models on the Hub, with plain transformers, in a process that cannot import PEFT."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from demo import DemoError


def forbid_peft() -> None:
    """Make every import of PEFT in this process fail, as if it was not installed.

    Raises:
        DemoError: PEFT can be imported all the same.
    """
    sys.modules["peft"] = None  # type: ignore[assignment]  # documented: the import system then raises
    try:
        importlib.import_module("peft")
    except ImportError:
        return
    raise DemoError("PEFT can still be imported, so loading would prove nothing")


def ask(repo_id: str, revision: str, prompt: str) -> dict[str, str]:
    """Load `repo_id` at `revision` as any user would, and answer greedily.

    Returns:
        `answer`, and `commit`: what the revision resolved to, by the folder of the client's cache that was loaded.
    """
    from huggingface_hub import hf_hub_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(repo_id, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision)
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    commit = Path(hf_hub_download(repo_id, "config.json", revision=revision)).parent.name
    return {"answer": " ".join(str(text).split()), "commit": commit}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; prints one JSON list, one answer for each model; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.ask", description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("models", nargs="+", metavar="OWNER/NAME@REVISION")
    options = parser.parse_args(arguments)
    forbid_peft()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pairs = (model.split("@") for model in options.models)
    print(json.dumps([ask(repo_id, revision, options.prompt) for repo_id, revision in pairs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
