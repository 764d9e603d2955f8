"""The two models that ship inside the package are whole, small and consistent."""

import json
import struct
from pathlib import Path

import pytest

BUNDLED = Path(__file__).resolve().parents[3] / "src" / "coppice" / "models" / "bundled"
NAMES = ("target", "draft")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
LIMIT_BYTES = 24 * 2**20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEXT = "def f(x):\n        return x + 12  # naïve “q” 東京 🌳\r\n\n\tÉt\u0301é \x00 ok"


def header(name: str) -> dict[str, dict]:
    """Return the tensor table of one checkpoint, read without torch."""
    with (BUNDLED / name / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(size))
    table.pop("__metadata__", None)
    return table


def expected_shapes(config: dict) -> dict[str, list[int]]:
    """Return tensor names and shapes that follow from ``config.json``."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "self_attn.q_proj": [query, hidden],
        "self_attn.k_proj": [key, hidden],
        "self_attn.v_proj": [key, hidden],
        "self_attn.o_proj": [hidden, query],
        "mlp.gate_proj": [middle, hidden],
        "mlp.up_proj": [middle, hidden],
        "mlp.down_proj": [hidden, middle],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    shapes = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{k}.weight": v for k, v in layer.items()}
    return shapes


@pytest.fixture(scope="module")
def tokenizer():
    """Load the shared tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(BUNDLED / "target" / "tokenizer.json"))


@pytest.fixture(scope="module")
def template():
    """Compile the chat template the way checkpoints are usually rendered."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    config = json.loads((BUNDLED / "target" / "tokenizer_config.json").read_text("utf-8"))
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(config["chat_template"])


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_complete(name):
    assert sorted(p.name for p in (BUNDLED / name).iterdir()) == sorted(FILES)


def test_both_folders_fit_the_budget():
    size = sum(p.stat().st_size for name in NAMES for p in (BUNDLED / name).iterdir())
    assert size <= LIMIT_BYTES


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers_are_the_same_bytes(file):
    assert (BUNDLED / "target" / file).read_bytes() == (BUNDLED / "draft" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_tensors_follow_the_config(name):
    config = json.loads((BUNDLED / name / "config.json").read_text("utf-8"))
    everything = header(name)
    table = {k: v for k, v in everything.items() if not k.endswith("_scale")}
    assert {k: v["shape"] for k, v in table.items()} == expected_shapes(config)
    codes = {k for k, v in table.items() if v["dtype"] != "BF16"}
    assert codes == {k.removesuffix("_scale") for k in everything if k.endswith("_scale")}
    assert bool(codes) == (name == "draft")  # which is kept in int8
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True


def test_special_tokens_lead_the_vocabulary(tokenizer):
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == 4096


def test_text_round_trips(tokenizer):
    ids = tokenizer.encode(TEXT).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT


def test_every_byte_has_a_token(tokenizer):
    single = [t for t in tokenizer.get_vocab() if len(t) == 1]
    assert len(single) == 256


def test_indentation_is_one_token(tokenizer):
    assert len(tokenizer.encode("        return").ids) == 2


def test_conversation_renders_as_chatml(template):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tool_calls_render_as_json_objects(template):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
    ]
    text = template.render(messages=messages, tools=[tool], add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n# Tools\n")
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n' in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_recorded_template_source_is_current():
    recipe = BUNDLED.parents[3] / "recipes" / "bundled" / "chat_template.jinja"
    config = json.loads((BUNDLED / "draft" / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == recipe.read_text("utf-8")
