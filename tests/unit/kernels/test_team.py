"""Teams: threads apart from the process's own, with the same results."""

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from coppice import kernels
from coppice.errors import ConfigError
from coppice.kernels.team import Team


@pytest.fixture(autouse=True)
def four_threads():
    if not kernels.native_available():
        pytest.skip("native kernels are not built (tools/build_native.sh)")
    kernels.set_num_threads(4)
    yield
    kernels.set_num_threads()


def product(seed=0):
    """Enough work for every thread of a team."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 512, generator=generator)
    weight = torch.randn(1024, 512, generator=generator)
    ops = kernels.get_ops()
    return ops.linear(x, ops.pack_linear(weight))


def test_teams_nest_and_are_left_in_turn():
    assert kernels.num_threads() == 4
    with Team(3):
        assert kernels.num_threads() == 3
        with Team(1):
            assert kernels.num_threads() == 1
        assert kernels.num_threads() == 3
    assert kernels.num_threads() == 4


def test_an_error_leaves_the_team():
    with pytest.raises(KeyError), Team(2):
        raise KeyError
    assert kernels.num_threads() == 4


def test_a_team_is_of_the_thread_that_entered():
    with Team(1), ThreadPoolExecutor(1) as other:
        assert other.submit(kernels.num_threads).result() == 4


def test_the_process_gets_its_threads_whoever_is_in_a_team():
    with Team(2):
        kernels.set_num_threads(2)
        assert kernels.num_threads() == 2
    assert kernels.num_threads() == 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_team(threads):
    want = product()
    with Team(threads):
        assert torch.equal(product(), want)


@pytest.mark.parametrize("shared", [True, False], ids=["one team", "a team each"])
def test_threads_in_teams_compute_at_the_same_time(shared):
    want = [product(seed) for seed in range(3)]
    one, together = Team(2), Barrier(3)

    def work(seed):
        with one if shared else Team(2):
            together.wait()
            return all(torch.equal(product(seed), want[seed]) for _ in range(30))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


def test_after_a_fork_the_child_computes_alone():
    ops, x = kernels.get_ops(), torch.randn(64, 512)
    packed = ops.pack_linear(torch.randn(1024, 512))
    want = ops.linear(x, packed).numpy().tobytes()
    with Team(3):
        ops.linear(x, packed)
        child = os.fork()
        if child == 0:  # PyTorch's own threads are gone: nothing of it that may want them
            os._exit(ops.linear(x, packed).numpy().tobytes() != want)
        assert os.waitpid(child, 0)[1] == 0


def test_a_team_needs_a_thread():
    with pytest.raises(ConfigError, match="at least 1"):
        Team(0)
