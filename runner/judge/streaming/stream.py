"""Several variants of one model through its layers side by side, with one layer of one variant in memory at a time.

The scheduler advances every run (one variant, one sequence) to its next stage, reads that stage's values from the
checkpoint once, lets all waiting runs of all variants that share the checkpoint through, and drops it. The forward is
transformers' own from end to end (`runner.judge.streaming.runs`), so masks, rotary angles, sliding windows, routers and
encoder-decoders are, too. Only the head is gone through by groups of sequences, because logits are large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from runner.judge.streaming.gang import forward_of, together
from runner.judge.streaming.models import quiet
from runner.judge.streaming.runs import Call, Run, stopping_at
from runner.judge.streaming.slots import Place, emptied, put
from runner.judge.streaming.stages import WHOLE, find_stages, is_below

GROUP_BYTES = 256 << 20  # of logits that exist at a time, over all variants; at least one sequence's
WAVE_TOKENS = 2048  # that go through the layers together; more make another wave, which reads the checkpoints again

Values = dict[str, torch.Tensor]
Key = tuple[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One set of weights for a model.

    Attributes:
        name: what its outputs are called.
        model: computes; parameters without values of their own.
        places: where values go, by key.
        change: makes the variant's values of the origin's, in place; None where they are the origin's.
    """

    name: str
    model: Any
    places: Mapping[str, Place]
    change: Callable[[Values], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A checkpoint, and the variants that are made of what it holds.

    Attributes:
        read: returns values by key, on a device, floats in float32.
        variants: in the order in which they compute; each changes what those before it left.
    """

    read: Callable[[Iterable[str], str], Values]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One computation that every variant, or each of some, does: a forward of one sequence, or a whole continuation.

    Attributes:
        compute: given the model.
        tokens: how many the model sees.
        variants: the names of those that do it; None for all.
    """

    compute: Callable[[Any], Any]
    tokens: int
    variants: frozenset[str] | None = None

    def is_for(self, name: str) -> bool:
        """Return whether the variant of that name does it."""
        return self.variants is None or name in self.variants


@dataclass(slots=True, kw_only=True)
class Stream:
    """The variants of one model.

    Attributes:
        origins: the checkpoints.
        device: "cpu" or "cuda": where stages compute.
        on_stage: told the share of the stages that all runs have passed, 0 to 1.
        whole: take the model as one stage.
        dtype: that floats compute in: torch.float32, or torch.float64 where rounding is to be told from a fault.
    """

    origins: tuple[Origin, ...]
    device: str
    on_stage: Callable[[float], None] | None = None
    whole: bool = False
    dtype: torch.dtype = torch.float32
    _stages: tuple[str, ...] = field(default=WHOLE, init=False)
    _span: tuple[float, float] = field(default=(0.0, 1.0), init=False)
    _draws: bool = field(default=False, init=False)  # at random, as Reformer does: each call alone, from its own seed
    _gang: ThreadPoolExecutor = field(init=False)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All variants."""
        return tuple(variant for origin in self.origins for variant in origin.variants)

    def results(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number of the task, what each variant computed), as they get done.

        Raises:
            Exception: what a computation raised.
        """
        waves = list(_waves(tasks))
        for turn, wave in enumerate(waves):
            told = 0
            self._span = (turn / len(waves), 1 / len(waves))
            try:
                for number, made in self._pass(wave, tasks):
                    told += 1
                    yield number, made
            except (RuntimeError, NotImplementedError, ValueError) as error:
                if told or self.whole or "meta" not in str(error):
                    raise
                # Its code uses a stage's parameters from outside of the stage.
                self.whole = True
                yield from self._pass(wave, tasks)

    def _pass(self, wave: Sequence[int], tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        models = list({id(variant.model): variant.model for variant in self.variants}.values())
        self._stages = WHOLE if self.whole else find_stages(models[0])
        threads = torch.get_num_threads()
        with (
            ExitStack() as stack,
            ThreadPoolExecutor(max_workers=len(wave) * len(self.variants)) as pool,
            ThreadPoolExecutor(max_workers=len(wave)) as self._gang,
        ):
            stack.enter_context(quiet())
            stack.enter_context(torch.no_grad())
            stack.callback(torch.set_num_threads, threads)
            stack.enter_context(torch.random.fork_rng(devices=[]))
            forwards = {}
            for variant in self.variants:
                stack.enter_context(emptied(variant.places, self.device, self.dtype))
            for model in models:
                outside = (module for path, module in model.named_modules() if not _is_inside(path, self._stages))
                stack.enter_context(on_device(outside, self.device))
                forwards[id(model)] = stack.enter_context(stopping_at(model, self._stages))
            runs = {
                (number, variant.name): Run(_bound(tasks[number], variant), pool)
                for number in wave
                for variant in self.variants
                if tasks[number].is_for(variant.name)
            }
            try:
                yield from self._advance(runs, forwards, tasks)
            finally:
                for run in runs.values():
                    run.abandon()

    def _advance(
        self, runs: dict[Key, Run], forwards: Mapping[int, Mapping[str, Callable[..., Any]]], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        threads = torch.get_num_threads()
        waiting = {key: _go_on(key, run) for key, run in runs.items()}
        torch.set_num_threads(threads)  # a run sets its own number, which MKL takes for everybody's
        order = list(dict.fromkeys(number for number, _ in runs))
        passed = 0
        while order:
            path = next((call.path for key in runs if (call := waiting.get(key)) is not None), None)
            if path is not None:
                chosen = self._chosen(path, [number for number in order if _waits(waiting, number, path)], tasks)
                self._through(path, chosen, runs, waiting, forwards)
                passed += 1
                if self.on_stage is not None:
                    start, width = self._span
                    self.on_stage(start + width * min(1.0, passed / len(self._stages)))
            for number in [number for number in order if all(call is None for call in _calls(waiting, number))]:
                order.remove(number)
                keys = [key for key in runs if key[0] == number]
                yield number, {name: runs[number, name].result() for _, name in keys}
                for key in keys:
                    del waiting[key]
                    del runs[key]

    def _through(
        self,
        path: str,
        chosen: Sequence[int],
        runs: Mapping[Key, Run],
        waiting: dict[Key, Call | None],
        forwards: Mapping[int, Mapping[str, Callable[..., Any]]],
    ) -> None:
        """Let the chosen tasks' runs that wait at `path` through it, origin by origin, variant by variant."""
        for origin in self.origins:
            names = [variant.name for variant in origin.variants]
            keys = [(number, name) for number in chosen for name in names if _is_at(waiting.get((number, name)), path)]
            if not keys:
                continue
            values = origin.read([key for key in origin.variants[0].places if is_below(key, path)], self.device)
            self._widen(values)
            for variant in origin.variants:
                if variant.change is not None:
                    variant.change(values)
                    self._widen(values)
                stage = variant.model.get_submodule(path)
                forward = forward_of(stage, forwards[id(variant.model)][path])
                with put(variant.places, values), on_device(stage.modules(), self.device, self.dtype):
                    here = [key for key in keys if key[1] == variant.name]
                    while here:
                        outputs = self._computed(forward, {key: waiting[key] for key in here})
                        for key, output in zip(here, outputs, strict=True):
                            waiting[key] = _go_on(key, runs[key], output)
                        here = [key for key in here if _is_at(waiting[key], path)]
            values.clear()  # before the next origin is read

    def _computed(self, forward: Callable[..., Any], calls: Mapping[Key, Call | None]) -> list[Any]:
        """Return what a stage makes of the calls that wait at it, of one variant."""
        bound = [_seeded(forward, key, call) for key, call in calls.items()]
        if len(bound) > 1 and not self._draws:
            outputs = together(bound, self._gang)
            drawn = torch.get_rng_state()
            torch.manual_seed(list(calls)[-1][0])
            self._draws = not torch.equal(drawn, torch.get_rng_state())
            if not self._draws:
                return outputs
        return [call() for call in bound]

    def _widen(self, values: Values) -> None:
        for key, value in values.items():
            if value.is_floating_point():
                values[key] = value.to(self.dtype)

    def _chosen(self, path: str, numbers: Sequence[int], tasks: Sequence[Task]) -> Sequence[int]:
        """Return which of the waiting tasks go on: all, or at the head as many as make `GROUP_BYTES` of logits."""
        width = self._width(path)
        if not width:
            return numbers
        chosen: list[int] = []
        room = GROUP_BYTES // (4 * width)
        for number in numbers:
            room -= tasks[number].tokens * sum(tasks[number].is_for(variant.name) for variant in self.variants)
            if chosen and room < 0:
                break
            chosen.append(number)
        return chosen

    def _width(self, path: str) -> int:
        """Return how many outputs the head has for a token, where `path` is the head or holds it; else 0."""
        model = self.variants[0].model
        head = model.get_output_embeddings()
        stage = model.get_submodule(path)
        if head is None or not any(inner is head for inner in stage.modules()):
            return 0
        return int(head.weight.shape[0])


def _waves(tasks: Sequence[Task]) -> Iterator[list[int]]:
    wave: list[int] = []
    tokens = 0
    for number, task in enumerate(tasks):
        if wave and tokens + task.tokens > WAVE_TOKENS:
            yield wave
            wave, tokens = [], 0
        wave.append(number)
        tokens += task.tokens
    if wave:
        yield wave


def _go_on(key: Key, run: Run, output: Any = None) -> Call | None:
    """Advance a run; what its model draws at random is the same in every variant, as Reformer does in evaluation."""
    torch.manual_seed(key[0])
    return run.advance(output)


def _seeded(forward: Callable[..., Any], key: Key, call: Call | None) -> Callable[[], Any]:
    assert call is not None  # noqa: S101  (it waits)
    if any(_is_empty(given) for given in (*call.args, *call.kwargs.values())):
        raise RuntimeError(f"{call.path} is given a tensor on the meta device")

    def compute() -> Any:
        torch.manual_seed(key[0])
        return forward(*call.args, **call.kwargs)

    return compute


def _bound(task: Task, variant: Variant) -> Callable[[], Any]:
    return lambda: task.compute(variant.model)


def _calls(waiting: Mapping[Key, Call | None], number: int) -> list[Call | None]:
    return [call for (task, _), call in waiting.items() if task == number]


def _waits(waiting: Mapping[Key, Call | None], number: int, path: str) -> bool:
    return any(_is_at(call, path) for call in _calls(waiting, number))


def _is_inside(path: str, stages: Sequence[str]) -> bool:
    return any(not stage or path == stage or path.startswith(f"{stage}.") for stage in stages)


def _is_empty(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and given.is_meta  # torch computes nonsense from some of these, silently


def _is_at(call: Call | None, path: str) -> bool:
    return call is not None and call.path == path


@contextmanager
def on_device(modules: Iterable[nn.Module], device: str, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Have the modules' own parameters and buffers that have values on `device` for as long as this lasts.

    Those in float32 are in `dtype`, too: the adapter's own, such as RandLoRA's shared bases.
    """
    parameters, buffers = [], []
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is None or parameter.is_meta:
                continue
            wanted = dtype if parameter.dtype == torch.float32 else parameter.dtype
            if (parameter.device.type, parameter.dtype) != (device, wanted):
                parameters.append((parameter, parameter.data))
                parameter.data = parameter.data.to(device, wanted)
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.is_meta:
                continue
            wanted = dtype if buffer.dtype == torch.float32 else buffer.dtype
            if (buffer.device.type, buffer.dtype) != (device, wanted):
                buffers.append((module, name, buffer))
                module._buffers[name] = buffer.to(device, wanted)
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
