"""The topology tree and the configurations made from it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice.cost.services import Rates, fastest, services, step_seconds
from coppice.cost.topology import LEVELS, Cpu, Part, build_tree, parse_list, read_cpus

MACHINES = json.loads((Path(__file__).parent / "machines.json").read_text())


def machine(name: str) -> list[Cpu]:
    """The threads of a described machine."""
    kind = MACHINES[name]
    cpus, number = [], itertools.count()
    shape = itertools.product(*(range(kind[k]) for k in ("packages", "nodes", "slices", "cores")))
    for core, (package, node, slice_, _) in enumerate(shape):
        for _ in range(kind["threads"]):
            cpus.append(Cpu(next(number), package, package * 64 + node, (node * 64 + slice_), core))
    return cpus


def write_sysfs(root: Path, cpus: list[Cpu]) -> None:
    """The files of the kernel that say the same as ``cpus``."""

    def numbers(like: list[Cpu]) -> str:
        return ",".join(str(c.number) for c in like)

    for cpu in cpus:
        home = root / f"sys/devices/system/cpu/cpu{cpu.number}"
        place = (cpu.package, cpu.node, cpu.slice)
        files = {
            "topology/physical_package_id": str(cpu.package),
            "topology/thread_siblings_list": numbers([c for c in cpus if c.core == cpu.core]),
            "cache/index0/level": "1",
            "cache/index0/shared_cpu_list": str(cpu.number),
            "cache/index3/level": "3",
            "cache/index3/shared_cpu_list": numbers(
                [c for c in cpus if (c.package, c.node, c.slice) == place]
            ),
        }
        for name, text in files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text + "\n")
    for node in {c.node for c in cpus}:
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(numbers([c for c in cpus if c.node == node]) + "\n")


def shape(part: Part) -> object:
    """A tree's form without names."""
    return [shape(child) for child in part.children] or part.cpus


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_a_described_machine_is_read_from_sysfs(name: str, tmp_path: Path) -> None:
    kind, cpus = MACHINES[name], machine(name)
    write_sysfs(tmp_path, cpus)
    tree = build_tree(read_cpus(tmp_path))
    assert shape(tree) == shape(build_tree(cpus))
    counts = [len(tree.parts(level)) for level in LEVELS]
    widths = [kind[k] for k in ("packages", "nodes", "slices", "cores")]
    assert counts == [1, *itertools.accumulate(widths, int.__mul__)]
    assert len(tree.cpus) == counts[-1] * kind["threads"]


def test_affinity_prunes_the_tree(tmp_path: Path) -> None:
    write_sysfs(tmp_path, machine("two sockets, slices of 8"))
    tree = build_tree(read_cpus(tmp_path, allowed=[0, 1, 8, 32]))
    assert [len(tree.parts(level)) for level in LEVELS] == [1, 2, 2, 3, 4]


def test_this_machine_has_a_tree() -> None:
    tree = build_tree(read_cpus(allowed=os.sched_getaffinity(0)))
    assert set(tree.cpus) == os.sched_getaffinity(0)


def test_lists_of_the_kernel() -> None:
    assert parse_list("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    assert parse_list("") == []


def small_trees() -> Iterator[Part]:
    """Uniform trees of up to eight cores."""
    for packages, nodes, slices, cores in itertools.product((1, 2), (1, 2), (1, 2, 4), (1, 2, 4)):
        if packages * nodes * slices * cores <= 8:
            places = itertools.product(range(packages), range(nodes), range(slices), range(cores))
            yield build_tree(
                Cpu(i, p, p * 8 + n, n * 8 + s, i) for i, (p, n, s, _) in enumerate(places)
            )


def profile(part: Part, cores: frozenset[int]) -> object:
    """Cores in use up to symmetry, or None where alike parts are treated unlike."""
    if part.level == "core":
        return bool(cores & set(part.cpus))
    below = [profile(child, cores) for child in part.children]
    used = [p for p in below if p is not False]
    if not used:
        return False
    if None in used or any(p != used[0] for p in used):
        return None
    return (len(used), used[0])


def test_enumeration_is_brute_force_up_to_symmetry() -> None:
    for tree in small_trees():
        all_cores = [part.cpus[0] for part in tree.parts("core")]
        subsets = itertools.chain.from_iterable(
            itertools.combinations(all_cores, n) for n in range(1, len(all_cores) + 1)
        )
        wanted = {profile(tree, frozenset(s)) for s in subsets} - {None}
        found = [profile(tree, frozenset(s.cores)) for s in services(tree)]
        assert set(found) == wanted
        assert len({s.workers for s in services(tree)}) == len(services(tree))


def test_workers_share_out_the_cores() -> None:
    tree = build_tree(machine("two sockets, slices of 8"))
    for service in services(tree):
        flat = [core for worker in service.workers for core in worker]
        assert sorted(flat) == list(service.cores)
        assert len(set(flat)) == len(flat)


def test_decode_takes_no_more_cores_than_prefill() -> None:
    """Reading saturates a slice before its cores run out, multiplying does not."""
    rates = Rates(
        core_flop_s=1e11,
        read_bytes_s={"core": 20e9, "slice": 50e9, "node": 120e9, "package": 200e9},
        barrier_s=1e-7,
    )
    for name in MACHINES:
        tree = build_tree(machine(name))
        decode = fastest(tree, rates, read_bytes=1e9, flops=2e9, barriers=150)
        prefill = fastest(tree, rates, read_bytes=1e9, flops=5e11, barriers=150)
        assert len(decode.cores) <= len(prefill.cores) == len(tree.parts("core"))
        if MACHINES[name]["cores"] > 2:
            assert len(decode.cores) < len(prefill.cores)
        best = min(
            step_seconds(tree, s, rates, read_bytes=1e9, flops=2e9, barriers=150)
            for s in services(tree)
        )
        chosen = step_seconds(tree, decode, rates, read_bytes=1e9, flops=2e9, barriers=150)
        assert chosen == best
