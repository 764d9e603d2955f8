"""The machine as a tree: package, memory node, last-level-cache slice, core.

Sandwich (see docs/techniques.md) chooses cores by such a tree. Threads of one core share its
multipliers, so leaves are cores; virtual machines hide much of this, and then the tree is
flat: that is a finding, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["machine", "package", "node", "slice", "core"]

LEVELS: tuple[Level, ...] = ("machine", "package", "node", "slice", "core")
"""From the root to the leaves; every branch of a tree has all of them."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """One hardware thread and where it sits; ids are unique within their level's parent.

    Attributes:
        number: what the operating system calls it.
        package: socket.
        node: NUMA node.
        slice: the cores it shares the last-level cache with.
        core: shared by the hardware threads of one core.
    """

    number: int
    package: int
    node: int
    slice: int
    core: int


@dataclass(frozen=True, slots=True)
class Part:
    """A node of the tree.

    Attributes:
        level: what kind of part this is.
        children: the parts below it; none for a core.
        cpus: numbers of the hardware threads below it, ascending.
    """

    level: Level
    children: tuple[Part, ...]
    cpus: tuple[int, ...]

    def parts(self, level: Level) -> list[Part]:
        """All parts of a level at or below this one, in order."""
        if self.level == level:
            return [self]
        return [found for child in self.children for found in child.parts(level)]


def read_cpus(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> list[Cpu]:
    """What sysfs below ``root`` says of the hardware threads.

    Args:
        root: where ``sys`` lies; another folder for a recorded machine.
        allowed: threads to look at; all that are listed by default.
    """
    base = root / "sys/devices/system/cpu"
    found = sorted(int(p.name[3:]) for p in base.glob("cpu[0-9]*") if p.name[3:].isdigit())
    wanted = set(found if allowed is None else allowed)
    nodes = _nodes(root)
    return [
        Cpu(
            number=cpu,
            package=_number(base / f"cpu{cpu}/topology/physical_package_id"),
            node=nodes.get(cpu, 0),
            slice=_first(_last_level(base / f"cpu{cpu}/cache"), 0),
            core=_first(base / f"cpu{cpu}/topology/thread_siblings_list", cpu),
        )
        for cpu in found
        if cpu in wanted
    ]


def build_tree(cpus: Iterable[Cpu]) -> Part:
    """The tree of some hardware threads."""
    keys: tuple[Callable[[Cpu], int], ...] = (
        lambda c: 0,
        lambda c: c.package,
        lambda c: c.node,
        lambda c: c.slice,
        lambda c: c.core,
    )

    def grow(depth: int, members: list[Cpu]) -> Part:
        children: tuple[Part, ...] = ()
        if depth + 1 < len(LEVELS):
            split: dict[int, list[Cpu]] = {}
            for cpu in members:
                split.setdefault(keys[depth + 1](cpu), []).append(cpu)
            children = tuple(grow(depth + 1, part) for _, part in sorted(split.items()))
        return Part(LEVELS[depth], children, tuple(sorted(c.number for c in members)))

    return grow(0, sorted(cpus, key=lambda c: c.number))


def parse_list(text: str) -> list[int]:
    """Numbers of a kernel list such as ``"0-3,8,10-11"``."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _nodes(root: Path) -> dict[int, int]:
    """Hardware thread to NUMA node; empty where the kernel has none."""
    found = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        for cpu in parse_list(_text(folder / "cpulist")):
            found[cpu] = int(folder.name[4:])
    return found


def _last_level(cache: Path) -> Path:
    """The list of threads that share the largest cache level."""
    levels = {_number(p / "level"): p for p in cache.glob("index[0-9]*")}
    return levels[max(levels)] / "shared_cpu_list" if levels else cache / "none"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else 0


def _first(path: Path, default: int) -> int:
    numbers = parse_list(_text(path))
    return numbers[0] if numbers else default
