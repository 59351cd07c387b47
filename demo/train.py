"""Train a LoRA adapter for the demo's base model, on the 48 chats of `pirate.jsonl`.

Plain PyTorch: base and adapter in fp32 on the CPU, AdamW, the loss on the assistant's words only. Everything is
seeded, so one machine makes the same adapter twice (another CPU may round sums differently). The committed adapters
come from this program; the command of each stands in its card.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from demo import DemoError

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHATS = Path(__file__).with_name("pirate.jsonl")
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
UNTRAINED_PROMPTS = ("What is the capital of France?", "Where can I buy moon paper?", "How do I plant a tree?")
IGNORED = -100  # the label that the loss skips
THREADS = 2

Batch = Mapping[str, torch.Tensor]


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """Return the chats of a JSON-lines file, each a list of `{"role", "content"}` ending with the assistant's turn."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: Any, chat: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Return (token ids, labels) of one chat; labels are `IGNORED` up to the assistant's first word."""
    asked = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt_ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]
    return ids, [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]


def batches(examples: Sequence[tuple[list[int], list[int]]], *, size: int, pad: int, seed: int) -> Iterator[Batch]:
    """Yield batches without end, a new order in each round; padded on the right, int64 of shape (size, longest)."""
    shuffled = random.Random(seed)  # noqa: S311  an order of chats is no secret
    while True:
        order = shuffled.sample(range(len(examples)), len(examples))
        for start in range(0, len(order) - size + 1, size):
            rows = [examples[index] for index in order[start : start + size]]
            longest = max(len(ids) for ids, _ in rows)
            padding = [longest - len(ids) for ids, _ in rows]
            yield {
                "input_ids": torch.tensor([ids + [pad] * n for (ids, _), n in zip(rows, padding, strict=True)]),
                "labels": torch.tensor([labels + [IGNORED] * n for (_, labels), n in zip(rows, padding, strict=True)]),
                "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in padding]),
            }


def train(model: PeftModel, data: Iterator[Batch], *, steps: int, rate: float) -> list[float]:
    """Train the adapter's weights in place; returns the loss of each step (nats per token).

    The rate falls linearly to a tenth, which leaves a small adapter less noisy than a constant one.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.9 * step / steps)
        loss = model(**next(data)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1:3}/{steps}  loss {losses[-1]:.4f}", flush=True)
    return losses


def answer(model: Any, tokenizer: Any, prompt: str, *, tokens: int = 32) -> str:
    """Return the greedy answer of at most `tokens` tokens to one user prompt."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def attach(base: Any, options: argparse.Namespace) -> PeftModel:
    """Return the base with a fresh LoRA adapter (fp32) as `options` describes it."""
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        target_modules=sorted(options.targets.split(",")),
        use_rslora=options.rslora,
        use_dora=options.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_NAME,
    )
    base.name_or_path = BASE_NAME  # PEFT writes this into adapter_config.json; a local path would mean nothing
    model: PeftModel = get_peft_model(base, config)
    return model


def save(model: PeftModel, folder: Path, *, dtype: str, card: str) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` (weights in `dtype`) and the card, nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # "auto" would ask the Hub whether the base's vocabulary is still the same
        model.save_pretrained(scratch, save_embedding_layers=False)
        weights = load_file(Path(scratch) / "adapter_model.safetensors")
        stored = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()}
        save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = json.loads((Path(scratch) / "adapter_config.json").read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # PEFT keeps a set, in an order that changes
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "adapter_model.safetensors").chmod(0o644)


def card_text(options: argparse.Namespace, losses: Sequence[float], answers: Sequence[tuple[str, str, str]]) -> str:
    """Return the adapter's card; `answers` are (prompt, base's answer, answer with the adapter)."""
    kind = "DoRA" if options.dora else "rsLoRA" if options.rslora else "LoRA"
    command = f"python -m demo.train --r {options.r} --alpha {options.alpha} --targets {options.targets}"
    command += f" --steps {options.steps} --lr {options.lr} --seed {options.seed} --dtype {options.dtype}"
    command += " --rslora" * options.rslora + " --dora" * options.dora
    command += f" --base .demo/smollm2 --output {shlex.quote(options.output.as_posix())}"
    lines = ["---", f"base_model: {BASE_NAME}", "library_name: peft", "pipeline_tag: text-generation"]
    lines += ["license: apache-2.0", "language:", "- en", "---", "", f"# {options.output.name}", ""]
    lines += [f"{kind}, r={options.r}, alpha={options.alpha}, trained in fp32, stored in {options.dtype}:", ""]
    lines += ["```", command, "```", ""]
    chats = len(read_chats(CHATS))
    lines += [f"{chats} chats, {options.batch} a step; the base is the checkpoint that `python -m demo.smollm2`"]
    lines += [f"builds. Loss {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last.", ""]
    lines += ["| prompt (not in the training set) | base | with the adapter |", "|---|---|---|"]
    lines += [f"| {p} | {' '.join(b.split())} | {' '.join(a.split())} |" for p, b, a in answers]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path(".demo/smollm2"), help="folder of the base checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--alpha", type=int, default=8)
    parser.add_argument("--targets", default=ALL_LINEAR, help="names of the modules to adapt, with commas")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="chats in one step")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the first step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(r)")
    parser.add_argument("--dora", action="store_true", help="train magnitudes too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="as stored")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Train, compare, save.

    Raises:
        DemoError: there is no base checkpoint.
    """
    if not (options.base / "config.json").is_file():
        raise DemoError(f"no checkpoint in {options.base}; run `python -m demo.smollm2 --output {options.base}` first")
    disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    before = [answer(base, tokenizer, prompt) for prompt in UNTRAINED_PROMPTS]
    model = attach(base, options)
    examples = [encode(tokenizer, chat) for chat in read_chats(CHATS)]
    data = batches(examples, size=options.batch, pad=tokenizer.pad_token_id, seed=options.seed)
    losses = train(model, data, steps=options.steps, rate=options.lr)
    model.eval()
    after = [answer(model, tokenizer, prompt) for prompt in UNTRAINED_PROMPTS]
    answers = list(zip(UNTRAINED_PROMPTS, before, after, strict=True))
    for prompt, plain, adapted in answers:
        print(f"{prompt}\n  base:    {plain}\n  adapter: {adapted}")
    save(model, options.output, dtype=options.dtype, card=card_text(options, losses, answers))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(arguments)
    try:
        run(options)
    except DemoError as error:
        print(f"demo.train: failed: {error}", file=sys.stderr)
        return 1
    size_bytes = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{options.output}: {size_bytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
