"""A folder's tokenizer and chat template, in a process of their own: they are programs that anybody may have written.

A template can loop or double its text, a normalizer multiply it, a vocabulary make the tokenizers library panic. So
they run in a fork of this process (which costs no imports) that has a bound on its memory and, for each request, on its
processor time; what comes back is numbers and short texts, as JSON. Nothing of it can stop or crash the judge.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from runner.judge.streaming.models import first_line, quiet

MEMORY_BYTES = 2 << 30  # beside what the judge has
CPU_S: Mapping[str, int] = MappingProxyType({"open": 40, "encode": 5, "chat": 5, "decode": 5})
CHARACTERS_PER_S = 20_000  # of a text; any tokenizer was seen to read ten times as many
WALL_FACTOR = 40  # of the processor's time, on a machine that is busy with other things
MAX_TEXT = 10_000  # characters of a continuation
MAX_ADDED_TOKENS = 100_000
MAX_REPLY_BYTES = 64 << 20
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Words:
    """The tokenizer of a folder.

    Attributes:
        is_there: whether it could be loaded.
        has_template: whether it has a chat template.
        added: ids of the tokens beside the vocabulary proper.
        problem: what it did that a tokenizer does not do: it took too much time or memory, or crashed; "" for nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.is_there, self.has_template, self.problem = False, False, ""
        self.added: tuple[int, ...] = ()
        self._folder = folder
        self._child: _Child | None = None
        self._broken: set[str] = set()
        if any((folder / name).is_file() for name in FILES):
            self._open()

    def encode(self, text: str, most: int) -> tuple[list[int], int, int] | None:
        """Return the first `most` token ids of a text, how many it has, and the highest of all; None for no text."""
        return _numbers(self._ask("encode", CPU_S["encode"] + len(text) // CHARACTERS_PER_S, text=text, most=most))

    def chat(self, messages: Sequence[Mapping[str, Any]], most: int) -> tuple[list[int], int, int] | None:
        """Return the same of a chat in the model's template, with the start of an answer."""
        return _numbers(self._ask("chat", CPU_S["chat"], messages=list(messages), most=most))

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str] | None:
        """Return the texts of rows of ids, without special tokens; None where the tokenizer cannot."""
        found = self._ask("decode", CPU_S["decode"], rows=[list(row) for row in rows])
        return None if found is None else [str(text) for text in found]

    def close(self) -> None:
        """End the process; it is started again when it is asked again."""
        if self._child is not None:
            self._child.end()
        self._child = None

    def _open(self) -> None:
        found = self._ask("open", CPU_S["open"])
        if found is not None:
            self.is_there, self.has_template = True, bool(found["has_template"])
            self.added = tuple(int(number) for number in found["added"])

    def _ask(self, what: str, cpu_s: int, **given: Any) -> Any:
        """Return the answer, or None where there is none; a kind of request that broke the process is not repeated."""
        if {what, "open"} & self._broken:
            return None
        try:
            if self._child is None:
                self._child = _Child(self._folder)
                if what != "open":
                    self._child.ask({"do": "open", "cpu_s": CPU_S["open"]})
            reply = self._child.ask({"do": what, "cpu_s": cpu_s, **given})
        except (_BrokenError, OSError) as error:
            self._broken.add(what)
            self.problem = self.problem or f"the tokenizer {_DOES[what]}: {first_line(error)}"
            self.close()
            return None
        return reply.get("answer")


_DOES = {
    "open": "could not be loaded",
    "encode": "could not read a text",
    "chat": "could not put a chat into its template",
    "decode": "could not write a text",
}


def _numbers(answer: Any) -> tuple[list[int], int, int] | None:
    return None if answer is None else ([int(number) for number in answer[0]], int(answer[1]), int(answer[2]))


class _BrokenError(Exception):
    """The process died, or was ended."""


class _Child:
    """The process, and its two pipes."""

    def __init__(self, folder: Path) -> None:
        theirs, self._requests = os.pipe()
        self._replies, ours = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other threads are not there: none is needed
            self._pid = os.fork()
        if not self._pid:
            _serve(folder, theirs, ours)
        os.close(theirs)
        os.close(ours)
        self._pipes = (self._requests, self._replies)
        self.end = weakref.finalize(self, _end, self._pid, self._pipes)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply.

        Raises:
            _BrokenError, OSError: there is none.
        """
        line = json.dumps(request).encode() + b"\n"
        wait_s = WALL_FACTOR * request["cpu_s"]
        with contextlib.suppress(BrokenPipeError):  # it died; the reply will not come
            while line:
                line = line[os.write(self._requests, line) :]
        reply = b""
        while not reply.endswith(b"\n"):
            ready, _, _ = select.select([self._replies], [], [], wait_s)
            if not ready or len(reply) > MAX_REPLY_BYTES:
                raise _BrokenError(f"it took more than {wait_s} s")
            part = os.read(self._replies, 1 << 20)
            if not part:
                raise _BrokenError(self._death(request["cpu_s"]))
            reply += part
        found: dict[str, Any] = json.loads(reply)
        return found

    def _death(self, cpu_s: int) -> str:
        self.end.detach()
        for descriptor in self._pipes:
            os.close(descriptor)
        _, status = os.waitpid(self._pid, 0)  # its end of the pipe is closed, so it has ended, or is about to
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU:
            return f"it took more than {cpu_s} s"
        if code == _NO_MEMORY:
            return f"it took more than {MEMORY_BYTES >> 30} GiB of memory"
        return f"it crashed ({signal.Signals(-code).name})" if code < 0 else "it crashed"


def _end(pid: int, descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


_NO_MEMORY = 3
_CRASHED = 4


def _serve(folder: Path, requests: int, replies: int) -> NoReturn:
    """Answer requests until there are none; in the new process, which never leaves this function."""
    code = 0
    try:
        _confine(requests, replies)
        tokenizer: Any = None
        with os.fdopen(requests, "rb") as lines:
            for line in lines:
                request = json.loads(line)
                _limit_time(request["cpu_s"])
                if request["do"] == "open":
                    tokenizer, answer = _opened(folder)
                else:
                    answer = _answer(tokenizer, request)
                reply = json.dumps({"answer": answer}).encode() + b"\n"
                while reply:
                    reply = reply[os.write(replies, reply) :]
    except MemoryError:
        code = _NO_MEMORY
    except BaseException:  # noqa: BLE001  (the edge of a process; a panic of tokenizers is no `Exception`)
        code = _CRASHED
    os._exit(code)


def _confine(requests: int, replies: int) -> None:
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    low, high = sorted((requests, replies))
    for start, end in ((3, low), (low + 1, high), (high + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])):
        os.closerange(start, min(end, 1 << 16))
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # for the library, which asks the C library
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY_BYTES)
    _lower(resource.RLIMIT_CORE, 0)


def _lower(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limit_time(cpu_s: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + cpu_s)


def _opened(folder: Path) -> tuple[Any, dict[str, Any] | None]:
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        added = sorted(int(number) for number in tokenizer.get_added_vocab().values())
        return tokenizer, {"has_template": bool(tokenizer.chat_template), "added": added[-MAX_ADDED_TOKENS:]}
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (tokenizers raises that very class for a file that it cannot read)
        return None, None


def _answer(tokenizer: Any, request: Mapping[str, Any]) -> Any:
    try:
        if request["do"] == "decode":
            rows = request["rows"]
            return [str(tokenizer.decode(row, skip_special_tokens=True))[:MAX_TEXT] for row in rows]
        if request["do"] == "chat":
            text = tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            with quiet():  # it warns that a text is longer than the model takes
                ids = tokenizer(request["text"])["input_ids"]
        return [list(ids[: request["most"]]), len(ids), max(ids, default=-1)]
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (a template may raise what it likes)
        return None
