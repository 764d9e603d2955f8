"""The ban checker finds each banned thing where it is banned, and only there."""

from __future__ import annotations

import pytest

from tools.check_bans import check_text

ENGINE = "src/coppice/engine/loop.py"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "import torch\ntorch.jit.load('x')",
        "import os\nos.environ['A']",
        "import os\nos.environ.get('A')",
        "from os import environ",
        "import os\nos.getenv('A')",
        "import asyncio",
        "import asyncio.subprocess",
        "import transformers",
        "from transformers import AutoModel",
        "import httpx",
        "import urllib.request",
        "from urllib import request",
        "eval('1')",
        "exec('1')",
    ],
)
def test_banned_in_the_engine(text: str) -> None:
    assert list(check_text(ENGINE, text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.no_grad()",
        "import os\nos.cpu_count()",
        "import re\nre.compile('x')",
        "model.eval()",
        "import urllib.parse",
        "def load(x): ...\nload('x')",
        "loader.load('x')",
    ],
)
def test_not_banned_in_the_engine(text: str) -> None:
    assert not list(check_text(ENGINE, text))


def test_rooms_that_may() -> None:
    assert not list(check_text("src/coppice/server/app.py", "import asyncio"))
    assert not list(check_text("src/coppice/cli/chat.py", "import urllib.request"))
    assert not list(check_text("src/coppice/settings/resolve.py", "import os\nos.environ"))
    assert list(check_text("src/coppice/cli/chat.py", "import asyncio"))
    assert list(check_text("src/coppice/server/app.py", "import pickle"))
