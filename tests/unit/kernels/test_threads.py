"""Counting usable cores from what the system says, on made-up file trees."""

import os

from coppice.kernels.threads import usable_cores


def system(root, siblings=None, cpu_max=None):
    for cpu in os.sched_getaffinity(0):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings or f"{cpu}\n")
    if cpu_max is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/cpu.max").write_text(cpu_max)
    return root


def test_every_core_counts_without_a_quota(tmp_path):
    assert usable_cores(system(tmp_path, cpu_max="max 100000")) == len(os.sched_getaffinity(0))


def test_hardware_threads_of_one_core_count_once(tmp_path):
    assert usable_cores(system(tmp_path, siblings="0-127\n")) == 1


def test_quota_caps_the_cores(tmp_path):
    assert usable_cores(system(tmp_path, cpu_max="100000 100000")) == 1


def test_fraction_of_a_core_is_one(tmp_path):
    assert usable_cores(system(tmp_path, cpu_max="5000 100000")) == 1


def test_unreadable_system_falls_back_to_affinity(tmp_path):
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
