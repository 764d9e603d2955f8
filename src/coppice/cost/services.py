"""Which cores do a phase's work: the configurations of Sandwich, and their modelled time.

A `Service` is made from the topology tree by two transformations: *group* (the cores below
every part of one level work as one worker) and *remove* (every part of a level leaves some
of its children idle, the same number everywhere). Parts of a level are taken to be alike, so
which ones stay idle does not matter and the list stays short. Sandwich: see
docs/techniques.md; reconstructed from the paper's text, no code of it is public.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from coppice.cost.topology import LEVELS, Level, Part


@dataclass(frozen=True, slots=True)
class Service:
    """Cores in use, as workers.

    Attributes:
        workers: per worker the number of one hardware thread of each of its cores.
        kept: per level, children in use of each part of that level (as many as there are,
            where a part has fewer).
    """

    workers: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]

    @property
    def cores(self) -> tuple[int, ...]:
        """All cores in use, ascending."""
        return tuple(sorted(itertools.chain.from_iterable(self.workers)))


def services(tree: Part) -> list[Service]:
    """Every configuration of a machine, each once."""
    widest = [max(len(p.children) for p in tree.parts(level)) for level in LEVELS[:-1]]
    found: dict[tuple[tuple[int, ...], ...], Service] = {}
    for kept in itertools.product(*(range(1, n + 1) for n in widest)):
        pruned = _keep(tree, kept)
        for level in LEVELS:
            workers = tuple(
                tuple(core.cpus[0] for core in part.parts("core")) for part in pruned.parts(level)
            )
            found.setdefault(workers, Service(workers, kept))
    return list(found.values())


def _keep(part: Part, kept: tuple[int, ...]) -> Part:
    """The tree with at most ``kept[depth]`` children at each depth."""
    if not part.children:
        return part
    children = tuple(_keep(child, kept[1:]) for child in part.children[: kept[0]])
    cpus = tuple(sorted(cpu for child in children for cpu in child.cpus))
    return Part(part.level, children, cpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What parts of a machine can do, measured or from a data sheet.

    Attributes:
        core_flop_s: multiply rate of one core.
        read_bytes_s: most bytes per second that cross each level; ``core`` is one core alone.
        contention: share of a level's bandwidth lost when its readers ask for twice what it
            gives (extra readers only disturb each other's pages and queues).
        barrier_s: seconds a barrier costs per worker thread.
    """

    core_flop_s: float
    read_bytes_s: Mapping[Level, float]
    contention: float = 0.1
    barrier_s: float = 0.0


def read_rate(tree: Part, cores: frozenset[int], rates: Rates) -> float:
    """Bytes per second that some cores read together."""
    if tree.level == "core":
        return rates.read_bytes_s["core"] if cores & set(tree.cpus) else 0.0
    asked = sum(read_rate(child, cores, rates) for child in tree.children)
    limit = rates.read_bytes_s.get(tree.level, float("inf"))
    if asked <= limit:
        return asked
    return limit / (1.0 + rates.contention * (asked / limit - 1.0))


def step_seconds(
    tree: Part, service: Service, rates: Rates, *, read_bytes: float, flops: float, barriers: int
) -> float:
    """Modelled time of a step that reads and multiplies so much."""
    cores = frozenset(service.cores)
    reading = read_bytes / read_rate(tree, cores, rates)
    multiplying = flops / (rates.core_flop_s * len(cores))
    return max(reading, multiplying) + barriers * rates.barrier_s * len(cores)


def fastest(
    tree: Part, rates: Rates, *, read_bytes: float, flops: float, barriers: int = 0
) -> Service:
    """The configuration with the least modelled time; of equals the one with fewest cores."""

    def cost(service: Service) -> tuple[float, int, int]:
        seconds = step_seconds(
            tree, service, rates, read_bytes=read_bytes, flops=flops, barriers=barriers
        )
        return seconds, len(service.cores), len(service.workers)

    return min(services(tree), key=cost)
