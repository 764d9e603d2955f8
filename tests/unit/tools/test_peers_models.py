"""The compared models are made once, and anew when what they are made of changes."""

from __future__ import annotations

import json

from tools import make_model
from tools.peers import models, places


def test_a_changed_shape_is_made_anew_with_all_its_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ROOT", tmp_path)
    said = []
    folder = models.make_checkpoint("toy-llama", said.append)
    quantized = places.gguf("toy-llama", "q8_0")
    quantized.write_text("")
    assert models.make_checkpoint("toy-llama", said.append) == folder
    assert said == ["write the checkpoint"]
    assert quantized.exists()
    changed = {**make_model.SHAPES["toy-llama"], "hidden_size": 128}
    monkeypatch.setitem(make_model.SHAPES, "toy-llama", changed)
    models.make_checkpoint("toy-llama", said.append)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 128
    assert not quantized.exists()


def test_without_peers_only_the_checkpoint_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ROOT", tmp_path)
    assert list(models.prepare("bundled")) == []
    assert (places.checkpoint("bundled") / "model.safetensors").exists()
    assert not list(tmp_path.rglob("*.gguf"))
