"""Wrong values: each fault says which tensors hold what instead of the right thing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from bench.faults.scene import EMBEDDING, Scene, Values, read_tensor
from bench.faults.wholes import saved_ignored
from runner.files.layout import read_checkpoint
from runner.judge.diagnosis.quantised import fp8_rows, int8_rows, quantisers
from tests.judge.merges import TORCH

BITS = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}
FRACTION = {"BF16": 7, "F16": 10, "F32": 23}
Fault = Callable[[Scene], Values]


def times(factor: float) -> Fault:
    """The change times a factor, everywhere."""
    return lambda scene: ((name, scene.plain[name] + factor * scene.delta[name]) for name in scene.weights)


def not_applied(scene: Scene) -> Values:
    """Every tensor is the base's."""
    yield from ((name, scene.plain[name]) for name in scene.weights)
    yield from saved_ignored(scene)


def wrong_scaling_rule(scene: Scene) -> Values:
    """LoRA read as rsLoRA, or rsLoRA as LoRA."""
    root = math.sqrt(scene.config["r"])
    return times(1 / root if scene.config["use_rslora"] else root)(scene)


def twice_rounded_between(scene: Scene) -> Values:
    """Merged, saved, and merged once more."""
    dtype = TORCH[scene.output]
    for name in scene.weights:
        yield name, scene.exact(name).to(dtype).float() + scene.delta[name]


def skipped(chosen: Callable[[Scene], list[str]]) -> Fault:
    """Some tensors are the base's."""

    def skip(scene: Scene) -> Values:
        yield from ((name, scene.plain[name]) for name in chosen(scene))

    return skip


def main_tensor(scene: Scene) -> list[str]:
    """One tensor."""
    return [scene.main]


def main_layer(scene: Scene) -> list[str]:
    """One decoder layer."""
    return [name for name in scene.weights if _layer(name) == _layer(scene.main)]


def main_type(scene: Scene) -> list[str]:
    """All modules of one name."""
    return [name for name in scene.weights if name.split(".")[-2] == scene.main.split(".")[-2]]


def later_half(scene: Scene) -> list[str]:
    """The later half of the layers."""
    middle = (max(map(_layer, scene.weights)) + 1) // 2
    return [name for name in scene.weights if _layer(name) >= middle]


def rows_skipped(scene: Scene) -> Values:
    """The last half of one tensor's rows has no change, as when one of two ranks is lost."""
    value = scene.exact(scene.main).clone()
    half = len(value) // 2
    value[half:] = scene.plain[scene.main][half:]
    yield scene.main, value


def one_scaled(scene: Scene) -> Values:
    """The change of one tensor times 1.1."""
    yield scene.main, scene.plain[scene.main] + 1.1 * scene.delta[scene.main]


def change_through(dtype: torch.dtype) -> Fault:
    """The change is rounded before it is added."""
    return lambda scene: ((name, scene.plain[name] + scene.delta[name].to(dtype).float()) for name in scene.weights)


def sum_through(scene: Scene) -> Values:
    """The sum is rounded to another 16-bit format first."""
    dtype = torch.float16 if scene.output == "BF16" else torch.bfloat16
    return ((name, scene.exact(name).to(dtype)) for name in scene.weights)


def factors_through_bf16(scene: Scene) -> Values:
    """What PEFT does without `autocast_adapter_dtype`: factors, change and sum in bf16; DoRA's change is rounded."""
    tensors = load_file(scene.adapter / "adapter_model.safetensors")
    root = math.sqrt(scene.config["r"]) if scene.config["use_rslora"] else scene.config["r"]
    for name in scene.weights:
        halves = [tensors[f"base_model.model.{name.removesuffix('weight')}lora_{half}.weight"] for half in "AB"]
        a, b = (half.bfloat16().float() for half in halves)
        change = scene.delta[name] if scene.config["use_dora"] else scene.config["lora_alpha"] / root * (b @ a)
        yield name, scene.plain[name] + change.bfloat16().float()


def truncated(scene: Scene) -> Values:
    """Cut towards zero instead of rounded, as by dropping the low bits."""
    for name in scene.weights:
        exact = scene.plain[name].double() + scene.delta[name].double()
        near = exact.to(TORCH[scene.output])
        outward = near.double().abs() > exact.abs()
        bits = near.view(BITS[scene.output])
        yield name, torch.where(outward, bits - 1, bits).view(near.dtype)


def transposed(scene: Scene) -> Values:
    """The change of square matrices is added transposed."""
    for name in scene.weights:
        if scene.delta[name].shape[0] == scene.delta[name].shape[1]:
            yield name, scene.plain[name] + scene.delta[name].T


def tensors_swapped(scene: Scene) -> Values:
    """The matrices of two layers change places."""
    other = _neighbour(scene, scene.main)
    yield scene.main, scene.exact(other)
    yield other, scene.exact(scene.main)


def layers_shifted(scene: Scene) -> Values:
    """Every matrix stands one layer too early."""
    for name in scene.weights:
        yield name, scene.exact(_neighbour(scene, name))


def changes_shifted(scene: Scene) -> Values:
    """Every change is added one layer too early."""
    for name in scene.weights:
        yield name, scene.plain[name] + scene.delta[_neighbour(scene, name)]


def rows_swapped(scene: Scene) -> Values:
    """Two rows of one matrix change places."""
    value = scene.exact(scene.main).clone()
    value[[1, 7]] = value[[7, 1]]
    yield scene.main, value


def rows_permuted(scene: Scene) -> Values:
    """The rows of one matrix are interleaved, as between two conventions of rotary positions."""
    value = scene.exact(scene.main)
    yield scene.main, value.view(2, len(value) // 2, -1).transpose(0, 1).reshape(value.shape)


def rare_rows_shifted(scene: Scene) -> Values:
    """Fifty rows of the embedding stand one place too late."""
    value = scene.exact(EMBEDDING).clone()
    first = len(value) - 60
    value[first + 1 : first + 51] = scene.exact(EMBEDDING)[first : first + 50]
    yield EMBEDDING, value


def embedding_rolled(scene: Scene) -> Values:
    """All rows of the embedding stand one place too late."""
    yield EMBEDDING, scene.exact(EMBEDDING).roll(1, dims=0)


def zeroed(rows: float) -> Fault:
    """The last share of one matrix's rows is zero."""

    def zeroed_rows(scene: Scene) -> Values:
        value = scene.exact(scene.main).clone()
        value[int(len(value) * (1 - rows)) :] = 0
        yield scene.main, value

    return zeroed_rows


def planted(number: float) -> Fault:
    """One element of a matrix is another number."""

    def plant(scene: Scene) -> Values:
        value = scene.exact(scene.main).clone()
        value.view(-1)[value.numel() // 3] = number
        yield scene.main, value

    return plant


def flipped(bit: str, *, touched: bool = True) -> Fault:
    """One bit of one element is flipped: "fraction", "exponent", "top" (of the exponent), "sign" or "last"."""

    def flip(scene: Scene) -> Values:
        right = read_checkpoint(scene.right)
        name = scene.main if touched else "model.layers.0.mlp.gate_proj.weight"
        if not touched and name in scene.delta:
            name = "model.layers.1.input_layernorm.weight"
        size = 8 * BITS[scene.output].itemsize
        fraction = FRACTION[scene.output]
        # A float32 computation cannot tell the lowest bits: a bit of the fraction that is worth more than its noise.
        place = {"fraction": fraction - 5, "exponent": fraction, "top": size - 2, "sign": size - 1, "last": 0}[bit]
        value = read_tensor(right, name).clone()
        bits = value.view(BITS[scene.output]).view(-1)
        mask = 1 << place
        bits[bits.numel() // 2] ^= mask - (1 << size) if place == size - 1 else mask
        yield name, value

    return flip


def several_bits(scene: Scene) -> Values:
    """Three elements of one matrix are overwritten."""
    value = scene.exact(scene.main).clone()
    value.view(-1)[[10, 500, 900]] *= 1.37
    yield scene.main, value


def quantised(name: str, *, adds: bool = True) -> Fault:
    """The base (or, without `adds`, the sum) was quantised, in every matrix that the adapter changes."""

    def fault(scene: Scene) -> Values:
        for tensor in scene.weights:
            plain = scene.plain[tensor].double()
            change = scene.delta[tensor].double()
            quantise = _quantiser(name, plain.shape[-1])
            yield tensor, quantise(plain) + change if adds else quantise(plain + change)

    return fault


def _quantiser(name: str, width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    if name in ("int8", "fp8"):
        return int8_rows if name == "int8" else fp8_rows
    found = dict(quantisers(width))
    return next((quantise for label, quantise in found.items() if label.startswith(name)), int8_rows)


def other_base(size: float) -> Fault:
    """Every matrix of the base is another one: noise of `size` standard deviations."""

    def fault(scene: Scene) -> Values:
        generator = torch.Generator().manual_seed(7)
        for name in sorted(read_checkpoint(scene.right).tensors):
            value = scene.exact(name)
            yield name, value + size * value.std() * torch.randn(value.shape, generator=generator)

    return fault


def other_adapter(scene: Scene) -> Values:
    """The change is another one of the same rank and size."""
    generator = torch.Generator().manual_seed(11)
    for name in scene.weights:
        rows, columns = scene.delta[name].shape
        change = torch.randn(rows, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
        yield name, scene.plain[name] + change * (scene.delta[name].norm() / change.norm())


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _neighbour(scene: Scene, name: str) -> str:
    """Return the same matrix one layer later; of the last layer, the first one's."""
    layers = sorted({_layer(other) for other in scene.weights})
    later = layers[(layers.index(_layer(name)) + 1) % len(layers)]
    return ".".join(str(later) if part == str(_layer(name)) else part for part in name.split("."))
