"""Opens mutated files: ``python -m tests.kits.fuzz KIND COUNT SEED``.

Sound files of the kind (see `tests.kits.fuzz_bases`) are mutated and loaded in turn, as deep
as a starting server loads them. Each mutation must load or be refused with an error that puts
the blame on the file. It may not end the process, take a minute, or take more memory than

    twice the bytes of the files that are read, and `ALLOWANCE_BYTES`.

A file which is larger in memory than that even as it is may take as much as it does then. That
is for what is expanded by design, the objects of a vocabulary and small matrices in blocks of a
few bits that become floats. It varies with what else is in the heap, so that it is measured
again, beside the mutation, before that is called wrong. Large files of weights are held to twice
their size. One file of each kind is so large that the allowance is small beside it; every
`LARGE_EVERY`-th mutation is of that one.

Memory is that of the whole process, whoever asks for it (Python, PyTorch, Rust, our kernels):
the peak of what is resident is read from the kernel and held against the bound, to which the
pages of a file that is mapped are added, being the file itself. A load that takes more is
repeated, and is wrong where it takes more each of `TRIES` times. And `RLIMIT_DATA` is lowered
before each load to what the process has and the bound and `RESERVED_BYTES`, so that asking for
more fails even where it would never be touched. ``--sanitized`` is for builds with sanitizers,
which take memory of their own: nothing is bounded then, and all that was packed is unpacked and
multiplied, too.

Exit status 0 says that all went so; else the last line names the mutation.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from coppice.errors import ConfigError, CoppiceError, RequestError
from coppice.kernels import native_available
from tests.kits.fuzz_bases import KINDS, Base

ALLOWANCE_BYTES = 1 << 20
"""For objects of the loader itself and what the C library and Python reserve at a time."""

RESERVED_BYTES = 2 << 20
"""What Python's and the C library's allocators may reserve ahead; it stays untouched."""

TRIES = 3
"""What a file makes its loader ask for it asks for every time; what the allocators reserve by
chance, once in some ten thousand loads, is not there when it is loaded again."""

LARGE_EVERY = 16
MOST_SECONDS = 60
PAGE_BYTES = mmap.PAGESIZE
INTERESTING = (
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b"1e999",
    b"-1",
    b"[[[[",
    b'"',
    b"\\ud800",
)


def mutate(data: bytes, rng: random.Random, head: int = 2048) -> bytes:
    """One to four edits: bytes, interesting values, cuts, repetitions; most in the head."""
    made = bytearray(data)
    head = min(len(made), head)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(head if rng.random() < 0.6 else len(made))
        kind = rng.randrange(5)
        if kind == 0:
            made[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            value = rng.choice(INTERESTING)
            made[at : at + len(value)] = value
        elif kind == 2:
            del made[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 3:
            made[at:at] = made[at : at + rng.choice((1, 8, 64))]
        elif rng.random() < 0.2:
            del made[at:]
        head = max(1, min(len(made), head))
        if not made:
            break
    return bytes(made)


class Memory:
    """What the process takes, as the kernel counts it."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: what is freed goes back
            self._libc.mallopt(option, 64 << 10)
        self._sizes = os.open("/proc/self/statm", os.O_RDONLY)
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self._before = 0

    def begin(self, bound: int | None, *, large: bool = True) -> None:
        """From now on at most ``bound`` bytes more can be had; the peak is forgotten.

        What is free already, or becomes so in between, would hide as much of the peak: it is
        given back first, all of it before a large file.
        """
        gc.collect()
        if large:
            self._libc.malloc_trim(0)
        os.pwrite(self._clear, b"5", 0)
        sizes = os.pread(self._sizes, 256, 0).split()
        self._before = int(sizes[1]) * PAGE_BYTES
        if bound is not None:
            most = int(sizes[5]) * PAGE_BYTES + bound
            resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))

    def end(self) -> int:
        """Most bytes that were resident since, beyond those at first."""
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
        status = os.pread(self._status, 8192, 0)
        peak = int(status.partition(b"VmHWM:")[2].split(maxsplit=1)[0]) << 10
        return max(peak - self._before, 0)


class Unmeasured(Memory):
    """Under a sanitizer, whose own memory would be measured."""

    def __init__(self) -> None:
        pass

    def begin(self, bound: int | None, *, large: bool = True) -> None:
        pass

    def end(self) -> int:
        return 0


@dataclass(slots=True)
class Target:
    """A sound file with all that is known of it."""

    base: Base
    original: bytes
    takes: int
    """Bytes of memory, where that is more than twice the file's; else 0."""


class Fuzz:
    """Loads mutations of one kind of file.

    Args:
        kind: one of `KINDS`.
        folder: for the files.
        memory: how memory is bounded.
        unpack: whether what was packed is unpacked again.

    Attributes:
        opened, refused: mutations.
        most: memory that a mutation of a large file took, over the size of the files read.
        sound: the same of the file as it was.
    """

    def __init__(self, kind: str, folder: Path, memory: Memory, *, unpack: bool) -> None:
        self._memory = memory
        self.opened = self.refused = 0
        self.most = self.sound = 0.0
        targets = [self._target(base) for base in KINDS[kind](folder, unpack)]
        self._small = [target for target in targets if not target.base.large]
        self._large = [target for target in targets if target.base.large]
        gc.freeze()

    def _target(self, base: Base) -> Target:
        """A file as it is loads, and what is loaded once for all is loaded then."""
        original = base.path.read_bytes()
        takes = [self._sound_takes(base, original) for _ in range(3)]
        most = max(takes[1:])
        size = len(original) + base.beside
        if base.large:
            self.sound = max(self.sound, most / size)
        allowed = (3 if base.mapped else 2) * size
        return Target(base, original, most if most > allowed else 0)

    def _sound_takes(self, base: Base, original: bytes) -> int:
        base.path.write_bytes(original)
        self._memory.begin(None, large=base.large)
        base.load()
        return self._memory.end()

    def try_one(self, number: int, seed: int) -> str | None:
        """Load a mutation; what is wrong with the loader, if anything."""
        turn = self._large if number % LARGE_EVERY == LARGE_EVERY - 1 and self._large else None
        targets = turn or self._small or self._large
        target = targets[number % len(targets)]
        base = target.base
        data = mutate(target.original, random.Random(seed * 1_000_003 + number), base.head)
        size = len(data) + base.beside
        for _ in range(TRIES):
            bound = max(2 * size, target.takes) + ALLOWANCE_BYTES
            base.path.write_bytes(data)
            opened, wrong, used = self._load(base, bound + target.takes + RESERVED_BYTES)
            if wrong is not None or used <= bound + base.mapped * len(data):
                break
            if target.takes:
                target.takes = max(target.takes, self._sound_takes(base, target.original))
        else:
            wrong = "took too much"
        self.opened += opened
        self.refused += not opened
        if wrong is not None:
            at = f"{base.path.parent.name}/{base.path.name}"
            return f"{at}: {used:,} bytes for {size:,} (bound {bound:,}); {wrong}"
        if base.large:
            self.most = max(self.most, used / (len(target.original) + base.beside))
        return None

    def _load(self, base: Base, most_bytes: int) -> tuple[bool, str | None, int]:
        """Whether it opened, what is wrong, and the bytes it took."""
        opened, wrong = False, None
        self._memory.begin(most_bytes, large=base.large)
        try:
            base.load()
            opened = True
        except CoppiceError as error:
            wrong = unlawful(error)
        except BaseException as error:
            wrong = "".join(traceback.format_exception(error))
        return opened, wrong, self._memory.end()


def unlawful(error: CoppiceError) -> str | None:
    """What is wrong about a refusal: it blames us, or hides that memory ran out."""
    if not isinstance(error, ConfigError | RequestError):
        return f"no refusal of a file: {error!r}"
    causes: list[BaseException] = [error]
    for cause in causes:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return f"asked for too much, and it was called {error!r}"
        causes += [e for e in (cause.__cause__, cause.__context__) if e and e not in causes]
    return None


def run(args: argparse.Namespace, reached: mmap.mmap) -> int:
    """Try them all; the number of the mutation at hand is left in ``reached``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        memory = Unmeasured() if args.sanitized else Memory()
        fuzz = Fuzz(args.kind, Path(name), memory, unpack=args.sanitized)
        for number in range(args.count):
            reached[:8] = number.to_bytes(8, "little")
            signal.alarm(MOST_SECONDS)
            wrong = fuzz.try_one(number, args.seed)
            if wrong is not None:
                print(wrong)
                return 1
    said = f"{args.kind}: {args.count} mutations, {fuzz.opened} opened, {fuzz.refused} refused"
    if not args.sanitized:
        said += f"; memory at most {fuzz.most:.2f} of the file's size ({fuzz.sound:.2f} unmutated)"
    print(said)
    return 0 if 0 < fuzz.opened < args.count else 2


def main() -> int:
    """Run in a process of its own, which may die."""
    parser = argparse.ArgumentParser(
        prog="tests.kits.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("count", type=int, help="mutations")
    parser.add_argument("seed", type=int)
    parser.add_argument("--sanitized", action="store_true", help="memory is not bounded")
    args = parser.parse_args()
    if args.sanitized and not has_sanitizer():
        parser.error("these kernels were built without sanitizers; see tools/test_sanitized.sh")
    os.environ["RUST_BACKTRACE"] = "0"  # a panic's stack would be looked up in MiBs of symbols
    reached = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        code = 3
        try:
            code = run(args, reached)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        number = int.from_bytes(reached[:8], "little")
        print(f"{args.kind} mutation {number} of seed {args.seed}: {how}", flush=True)
    return abs(code)


def has_sanitizer() -> bool:
    """Whether the kernels that are loaded were built with an address sanitizer."""
    if not native_available():
        return False
    from coppice.kernels import _native

    return b"__asan_" in Path(_native.__file__).read_bytes()


if __name__ == "__main__":
    raise SystemExit(main())
