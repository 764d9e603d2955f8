"""PyTorch imported without the parts a server never calls, and with them when asked."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_what_the_engine_does_needs_none_of_what_was_left_out() -> None:
    left = run(
        "from coppice.engine.quick_torch import import_torch\n"
        "import_torch()\n"
        "from coppice.engine.config import EngineConfig\n"
        "from coppice.engine.engine import Engine\n"
        "from coppice.engine.loading import load_engine_model\n"
        "from coppice.engine.request import Request, SamplingParams\n"
        "config = EngineConfig(keep_packed=False)\n"
        "engine = Engine(load_engine_model(config), config)\n"
        "sampling = SamplingParams(max_tokens=4, temperature=0.8, logprobs=3)\n"
        "engine.submit(Request(id='a', prompt=[5, 6, 7], sampling=sampling))\n"
        "while engine.has_work: engine.step()\n"
        "import sys\n"
        "print(engine.outcomes['finished'], 'torch._decomp' in sys.modules)\n"
    )
    assert left == "1 False"


@pytest.mark.slow
def test_asking_for_a_part_gets_all_of_them() -> None:
    shown = run(
        "from coppice.engine.quick_torch import DEFERRED, import_torch\n"
        "import_torch()\n"
        "import torch, sys\n"
        "assert 'tensor' in repr(torch.ones(2))\n"
        "import torch.export, torch._dynamo\n"
        "assert torch.vmap(lambda x: x + 1)(torch.ones(3)).tolist() == [2, 2, 2]\n"
        "assert torch.vmap is torch.func.vmap and torch.cond is torch._higher_order_ops.cond\n"
        "assert torch.ones(2, device='meta').add(1).shape == (2,)\n"
        "torch.Generator()\n"
        "print(all(type(sys.modules[n]).__name__ == 'module' for n in DEFERRED))\n"
    )
    assert shown == "True"
