"""Fixtures: the native operators under each instruction set this machine runs."""

import pytest

from coppice import kernels


def pytest_generate_tests(metafunc):
    if "native" in metafunc.fixturenames:
        best, *others = kernels.available_isas() or ["none"]
        # On every change: the best everywhere, the others where bits are compared.
        bits = any(word in metafunc.function.__name__ for word in ("same", "agree", "change"))
        marks = [] if bits else [pytest.mark.slow]
        sets = [best, *(pytest.param(name, marks=marks) for name in others)]
        metafunc.parametrize("native", sets, indirect=True)


@pytest.fixture
def native(request):
    """`NativeOps` on one instruction set; the best one is restored afterwards."""
    if request.param == "none":
        pytest.skip("native kernels are not built (tools/build_native.sh)")
    ops = kernels.get_ops(prefer="native")
    kernels.set_isa(request.param)
    yield ops
    kernels.set_isa(kernels.available_isas()[0])


@pytest.fixture(params=["reference", "native"])
def any_ops(request):
    """Both implementations, native on the best instruction set."""
    if request.param == "native" and not kernels.native_available():
        pytest.skip("native kernels are not built (tools/build_native.sh)")
    return kernels.get_ops(prefer=request.param)
