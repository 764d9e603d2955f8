"""Settings of the engine: the model, its cache and the size of a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from coppice.errors import ConfigError
from coppice.scheduling.policy import FAIR, OrderName, PolicyName, read_weights
from coppice.settings import RoomConfig, cache_root, setting

DType = Literal["auto", "float32", "bfloat16"]
KVDType = Literal["auto", "int8"]
Speculate = Literal["off", "auto", "lookup", "suffix", "draft", "self"]
LaneChoice = Literal["one", "two", "auto"]
Verify = Literal["match", "chain", "mss", "swor"]
Quantization = Literal[
    "none",
    "int8",
    "int4",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int8-weight-only",
    "int4-weight-only",
    "int4-g32-weight-only",
    "int4-g64-weight-only",
    "int4-g128-weight-only",
]
"""``none``, or a name of `coppice.weights.names` (not imported here: it brings PyTorch)."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(RoomConfig):
    """What one engine loads and how much of the machine it may use.

    Raises:
        ConfigError: a value is of the wrong type or out of range, or two contradict.
    """

    ROOM: ClassVar[str] = "engine"

    model: str = setting(
        "bundled",
        "Model to load: 'bundled', a folder of safetensors, a GGUF file, or a hub id.",
    )
    adapter: str | None = setting(
        None,
        "Folder of a LoRA adapter (as PEFT writes it) that is added to the weights as they are "
        "read.",
    )
    dtype: DType = setting(
        "auto",
        "Precision of weights and KV pages; 'auto' loses nothing (float16 becomes float32).",
    )
    quantization: Quantization = setting(
        "none",
        "Round the weights as they are loaded, and multiply them with int8 rows, or with float "
        "rows ('-weight-only'); 'none' keeps what the checkpoint has.",
    )
    context_length: int | None = setting(
        None,
        "Longest prompt plus answer in tokens; none means the model's own limit.",
        minimum=16,
        maximum=1 << 24,
    )
    kv_cache_dtype: KVDType = setting(
        "auto",
        "How K and V are kept: 'auto' as the model computes, 'int8' in half the bytes of bfloat16 "
        "at a small cost in quality.",
    )
    kv_cache_mib: int = setting(
        256,
        "Memory for KV pages in MiB; it is reserved at start and touched as pages fill.",
        minimum=1,
        maximum=1 << 24,
    )
    page_size: int = setting(
        32,
        "Tokens in one KV page; a power of two.",
        minimum=16,
        maximum=256,
    )
    max_rows: int = setting(
        512,
        "Most rows (prompt and answer tokens together) in one step.",
        minimum=1,
        maximum=1 << 16,
    )
    prefill_chunk: int = setting(
        256,
        "Most prompt tokens of one sequence in one step, so that long prompts do not hold "
        "up answers.",
        minimum=1,
        maximum=1 << 16,
    )
    max_sequences: int = setting(
        64,
        "Most sequences that run at the same time; others wait.",
        minimum=1,
        maximum=1 << 14,
    )
    num_threads: int | None = setting(
        None,
        "Threads for the model; none means the cores this process may use.",
        minimum=1,
        maximum=1024,
    )
    lanes: LaneChoice = setting(
        "one",
        "'two' reads prompts beside the answers that are being written, each with threads of its "
        "own; 'one' does both in the same steps; 'auto' takes two from 4 threads on. No answer "
        "changes.",
    )
    prefix_cache: bool = setting(
        True,
        "Keep KV pages of finished prompts and reuse them for equal beginnings.",
    )
    kv_ram_mib: int = setting(
        0,
        "Memory in MiB for prefix pages the KV cache has no room for, beside 'kv_cache_mib'.",
        minimum=0,
        maximum=1 << 24,
    )
    kv_disk_dir: str | None = setting(
        None,
        "Folder for prefix pages on disk, where a restarted server finds them; none keeps none. "
        "They hold what users wrote, readable by this user only.",
    )
    kv_disk_mib: int = setting(
        4096,
        "Most MiB in 'kv_disk_dir'; the oldest pages go first.",
        minimum=1,
        maximum=1 << 32,
    )
    kv_disk_hours: float = setting(
        168.0,
        "Hours after which pages in 'kv_disk_dir' are deleted.",
        minimum=0.01,
        maximum=87600.0,
    )
    seed: int = setting(
        0,
        "Seed from which requests of this process that bring none draw theirs; servers draw anew.",
        minimum=0,
        maximum=2**63 - 1,
    )
    keep_packed: bool = setting(
        True,
        "Keep packed weights of all but small models in the cache folder: later starts read them "
        "instead of packing again.",
    )
    keep_packed_mib: int = setting(
        65536,
        "Most MiB of packed weights in the cache folder; beyond it those of the models that were "
        "not used for longest go.",
        minimum=0,
        maximum=1 << 32,
    )
    speculate: Speculate = setting(
        "off",
        "Guess ahead and verify several tokens in one step, without changing any answer: "
        "'lookup' repeats what followed the same tokens in the request, 'suffix' also what "
        "followed them in earlier answers, 'draft' asks a small model, 'self' the model's own "
        "'-weight-only' weights with int8 rows, 'auto' takes what pays.",
    )
    history_mib: int = setting(
        64,
        "Most memory for earlier answers that 'suffix' and 'auto' look through, in MiB; tenants "
        "are kept apart. 0 remembers none.",
        minimum=0,
        maximum=1 << 20,
    )
    keep_history: bool = setting(
        False,
        "Keep what 'history_mib' holds in the cache folder between starts. It contains what "
        "users were answered, readable by this user only.",
    )
    draft_model: str | None = setting(
        None,
        "Model that drafts for 'draft' and 'auto'; it must share the tokenizer. The bundled "
        "model brings its own.",
    )
    speculate_depth: int = setting(
        8,
        "Most tokens guessed ahead for one sequence.",
        minimum=1,
        maximum=64,
    )
    speculate_nodes: int = setting(
        24,
        "Most guesses verified for one sequence in one step, those on other branches counted.",
        minimum=1,
        maximum=4096,
    )
    verify: Verify = setting(
        "match",
        "How sampled answers keep to the model: 'match' keeps every token what it is without "
        "guessing; 'chain', 'mss' and 'swor' keep its distribution only, over a draft model's "
        "guesses.",
    )
    policy: PolicyName = setting(
        "fcfs",
        "Whose turn it is among tenants: 'fcfs' by order alone, 'fair' the one that has had "
        "least service, 'fair-predicted' the same with answers charged ahead, 'isolated' the same "
        "with steps kept free of tenants beyond their share, 'rpm' a limit a minute, "
        "'round-robin' in rounds.",
    )
    order: OrderName = setting(
        "shortest",
        "Whose turn it is inside a tenant: the 'shortest' prompt within a priority, each overtaken "
        "for 20 times its own reading at most; 'arrival' within a priority, 'aged' where waiting "
        "overcomes priority, earliest 'deadline' (ttft_s), or 'sessions' of agents that go on "
        "before new ones, which wait while KV pages are short; pages stay while tools run.",
    )
    tenant_weights: tuple[str, ...] = setting(
        (),
        "Shares of the fair policies as TENANT=WEIGHT; tenants not named have 1.",
    )
    tenant_limit: int = setting(
        30,
        "Admissions a tenant may have in a minute under policy rpm.",
        minimum=1,
        maximum=1 << 20,
    )
    priority_ageing_s: float = setting(
        30.0,
        "Seconds of waiting that make up for one level of priority under order aged.",
        minimum=0.001,
        maximum=86400.0,
    )
    cache_dir: str | None = setting(
        None,
        "Folder for what is worked out once for a model on a machine; none means "
        "coppice in the user's cache folder.",
    )
    usage_file: str | None = setting(
        None,
        "File that gets the usage of every tenant and key as JSON lines, each minute and at the "
        "end; totals since the start.",
    )
    stats_interval_s: float = setting(
        0.25,
        "Seconds between two reports of live figures from the engine.",
        minimum=0.01,
        maximum=60.0,
    )
    memory_reserve_mib: int = setting(
        64,
        "Memory the machine or its container must have left: below twice as much cached prefixes "
        "go, below it newcomers are refused. 0 looks at nothing.",
        minimum=0,
    )
    watchdog_s: float = setting(
        30.0,
        "Seconds one step may take before the engine writes its stacks to the log; 0 is off.",
        minimum=0.0,
        maximum=3600.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_rows <= self.max_sequences:
            raise ConfigError(
                f"max_rows must be greater than max_sequences ({self.max_sequences}), so that a "
                f"step has a row for every answer and one for a prompt; got {self.max_rows}.",
                param="max_rows",
            )
        if read_weights(self.tenant_weights) and self.policy not in FAIR:
            raise ConfigError(
                f"Policy {self.policy!r} knows no weights; set policy to fair or drop "
                "tenant_weights.",
                param="tenant_weights",
            )
        if not self.prefix_cache and (self.kv_ram_mib or self.kv_disk_dir is not None):
            raise ConfigError(
                "kv_ram_mib and kv_disk_dir keep prefixes; set prefix_cache too, or drop them.",
                param="prefix_cache",
            )
        if self.order == "sessions" and not self.prefix_cache:
            raise ConfigError(
                "Order 'sessions' keeps pages in the prefix cache; set prefix_cache too, or take "
                "another order.",
                param="order",
            )
        if self.page_size & (self.page_size - 1):
            raise ConfigError(
                f"page_size must be a power of two, got {self.page_size}.", param="page_size"
            )

    @property
    def cache_folder(self) -> Path:
        """``cache_dir``, or its default."""
        return cache_root() if self.cache_dir is None else Path(self.cache_dir).expanduser()
