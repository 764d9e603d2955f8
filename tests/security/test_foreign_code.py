"""Nothing that comes from outside is ever run: not from the wire, a checkpoint, a template,
an answer, and by no line of our own that could run it.
"""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coppice.engine.cell_jobs import decode_job, decode_reply, decode_setup
from coppice.engine.messages import decode_from_engine, decode_to_engine
from coppice.engine.tool_parser import HERMES, ArgumentsDelta, ContentDelta, ToolCallParser
from coppice.errors import CheckpointError, TemplateError, UnsupportedModelError
from coppice.models.adapter import Adapter
from coppice.models.checkpoint import open_folder
from coppice.models.template import render_chat
from tests.kits.models import SMALL
from tests.kits.server import ServerProcess
from tools.check_bans import SOURCE, check_text

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / SOURCE).rglob("*.py"))
SAY = [{"role": "user", "content": "hi"}]
RUN = "__import__('builtins').__setattr__('exploded', 1)"


class Explosive:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, (RUN,)


@pytest.fixture(autouse=True)
def nothing_explodes() -> Iterator[None]:
    yield
    exploded = builtins.__dict__.pop("exploded", 0)
    assert not exploded, "foreign code was run"


def test_it_would_be_noticed() -> None:
    for run in (lambda: pickle.loads(pickle.dumps(Explosive())), lambda: eval(RUN)):
        run()
        assert builtins.__dict__.pop("exploded") == 1


def test_a_pickle_on_an_internal_socket_runs_no_code() -> None:
    bomb = pickle.dumps(Explosive())
    for decode in (decode_to_engine, decode_from_engine, decode_setup, decode_reply):
        with pytest.raises(msgspec.DecodeError):
            decode(bomb)
    with pytest.raises(msgspec.DecodeError):
        decode_job(bytes(8) + bomb)


def test_a_pickle_in_a_request_runs_no_code(server: ServerProcess) -> None:
    bomb = pickle.dumps(Explosive())
    with server.http() as http:
        for kind, status in (("application/json", 400), ("application/octet-stream", 415)):
            reply = http.post("/v1/completions", content=bomb, headers={"Content-Type": kind})
            assert reply.status_code == status
        assert "exploded" not in http.get("/v1/coppice/info").text


def test_no_source_file_can_run_what_it_reads() -> None:
    """Nothing evaluates, unpickles or loads PyTorch's own checkpoint format."""
    assert len(SOURCES) > 100
    for path in SOURCES:
        place = str(path.relative_to(ROOT))
        assert not list(check_text(place, path.read_text())), place


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import dill.source",
        "from pickle import Unpickler as U", "def f():\n    import cloudpickle",
        "import torch\ntorch.load('x')", "import torch as t\nf = t.load",
        "from torch import load", "from torch import load as read", "import torch.serialization",
        "from torch.serialization import load", "from torch import serialization as s\ns.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)", "from numpy import load",
        "eval(x)", "exec(x)", "map(eval, x)", "__import__(x)", "from builtins import eval as run",
        "import builtins\nbuiltins.exec(x)", "import runpy", "import marshal",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module\nimport_module('pickle')",
        "import os\nos.system(x)", "from os import popen", "import yaml\nyaml.unsafe_load(x)",
    ],
)  # fmt: skip
def test_a_source_file_that_could_would_be_found(text: str) -> None:
    assert list(check_text("src/coppice/engine/new.py", text))


def test_a_source_file_that_only_looks_so_is_not() -> None:
    text = "import re, json, torch\nre.compile(x)\nmodel.eval()\njson.load(f)\ntorch.loads"
    assert not list(check_text("src/coppice/engine/new.py", text))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_checkpoint_of_pickles_is_refused_unopened(tmp_path: Path, name: str) -> None:
    shutil.copy(Path(SMALL) / "config.json", tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(UnsupportedModelError, match=f"pickled weights .{name}"):
        open_folder(tmp_path)


def test_an_adapter_of_pickles_is_refused_unopened(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        Adapter(tmp_path)


def test_a_checkpoint_cannot_bring_its_own_code(tmp_path: Path) -> None:
    """One that loads and answers, with code beside it, served from its own folder."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(SMALL, folder)
    own = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change(folder / "config.json", auto_map=own, trust_remote_code=True)
    own = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="Evil")
    trap = f"with open({str(ran)!r}, 'a') as file: file.write(__name__ + ' ')\nclass Evil: ...\n"
    others = ("modeling_llama", "torch", "numpy", "json", "tokenizers", "msgspec", "coppice")
    for name in ("evil", *others):
        (folder / f"{name}.py").write_text(trap)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(trap)
    made = ServerProcess(folder, cwd=folder, engine={"kv_cache_mib": 16})
    with made as server, server.http() as http:
        reply = http.post("/v1/completions", json={"prompt": "The sea", "max_tokens": 8})
    assert reply.status_code == 200 and reply.json()["choices"][0]["text"], reply.text
    assert not ran.exists(), ran.read_text()
    subprocess.run([sys.executable, "-c", "import evil"], cwd=folder, check=True)
    assert ran.read_text() == "evil ", "it would have been noticed"


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_template_reaches_no_python_object() -> None:
    for text in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ (messages|attr('__class__')).__base__ }}",
    ):
        with pytest.raises(TemplateError):
            render_chat(text, SAY)


def test_a_template_of_a_request_is_not_rendered(server: ServerProcess) -> None:
    body = {"messages": SAY, "max_tokens": 2, "chat_template": "{{ 7 * 7 }}"}
    with server.http() as http:
        for path in ("/v1/chat/completions", "/v1/chat/completions/render"):
            reply = http.post(path, json=body)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == "chat_template"


def test_a_message_of_a_request_is_no_template(server: ServerProcess) -> None:
    text = "{{ 7 * 7 }}{% set x = 1 %}"
    with server.http() as http:
        said = http.post("/v1/chat/completions/render",
                         json={"messages": [{"role": "user", "content": text}]})  # fmt: skip
    assert text in said.json()["prompt"]


def test_a_call_the_model_writes_is_read_and_never_run() -> None:
    for written in (RUN, f'{{"x": {RUN}}}', f"{{'x': {RUN}}}", f'{{"x": "{RUN}"}}'):
        parser = ToolCallParser(HERMES, frozenset({"f"}))
        events = parser.push(f"{HERMES.opening}f{HERMES.middle}{written}{HERMES.closing}")
        events = [*events, *parser.finish()]
        said = "".join(e.text for e in events if isinstance(e, ArgumentsDelta | ContentDelta))
        assert RUN in said
