"""Settings of the HTTP process."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import ClassVar, Literal

from coppice.errors import ConfigError
from coppice.settings import RoomConfig, setting

PING_MIN_S, PING_MAX_S = 0.05, 300.0


@dataclass(frozen=True, kw_only=True)
class ServerConfig(RoomConfig):
    """Where to listen, who may ask, and how much at once.

    Raises:
        ConfigError: a value is out of range, or the server would be reachable from other
            machines without a key.
    """

    ROOM: ClassVar[str] = "server"

    host: str = setting("127.0.0.1", "Address to listen on; anything but loopback needs a key.")
    port: int = setting(8000, "Port to listen on; 0 picks a free one.", minimum=0, maximum=65535)
    served_name: str | None = setting(None, "Model name clients see; default: the model's own.")
    api_key: str | None = setting(None, "One key that clients must send.", secret=True)
    api_keys_file: str | None = setting(None, "JSON file of named, hashed keys.")
    allowed_hosts: tuple[str, ...] = setting(
        (), "Host names accepted in the Host header besides the address listened on."
    )
    strict_fields: bool = setting(False, "Answer 400 to unknown fields instead of warning.")
    metrics_names: Literal["coppice", "vllm"] = setting(
        "coppice", "Metric names; vllm adds the vLLM-compatible alias set."
    )
    max_in_flight: int = setting(256, "Sequences admitted at once.", minimum=1)
    max_waiting_s: float = setting(
        30.0, "Prompt work that may wait, in seconds of measured prefill.", minimum=0.1
    )
    overload_wait_s: float = setting(
        0.3, "Wait for a first token, beyond twice what reading its prompt takes, that is borne "
        "for two seconds; after that newcomers are refused while anybody waits longer. 0 bears "
        "any wait.", minimum=0.0,
    )  # fmt: skip
    pages_overcommit: float = setting(
        8.0, "KV pages that may be promised, as a multiple of the pages there are.", minimum=1.0
    )
    request_timeout_s: float = setting(
        600.0, "Longest life of a request; deadline_s may only shorten it.", minimum=0.1
    )
    max_body_bytes: int = setting(8 << 20, "Largest request body.", minimum=1024)
    body_budget_bytes: int = setting(
        12 << 20, "Bytes that bodies over 64 KiB may take together; more are refused.",
        minimum=1024,
    )  # fmt: skip
    body_timeout_s: float = setting(30.0, "Time for a body to arrive.", minimum=0.1)
    header_timeout_s: float = setting(10.0, "Time for the headers to arrive.", minimum=0.1)
    max_connections: int = setting(1024, "Open connections.", minimum=1)
    connections_per_key: int = setting(64, "Requests at once per API key.", minimum=1)
    slow_reader_s: float = setting(
        60.0, "How long a stream's reader may stand still before its request is cancelled.",
        minimum=0.1,
    )  # fmt: skip
    journal: str | None = setting(
        None, "Folder of the journal; with it streams can be taken up by their id, even after the "
        "server process died.",
    )  # fmt: skip
    resume_s: float = setting(
        60.0, "How long a resumable stream runs on without its client.", minimum=0.1
    )
    ping_s: float = setting(
        15.0, "Silence after which a stream gets a comment, so that proxies keep it open.",
        minimum=PING_MIN_S, maximum=PING_MAX_S,
    )  # fmt: skip
    engine_hang_s: float = setting(
        60.0, "Silence after which the engine process is ended and started again; 0 is never.",
        minimum=0.0,
    )  # fmt: skip
    preempt_notice_s: float = setting(
        30.0, "Notice that SIGUSR1 gives: within it another engine process takes over.",
        minimum=0.0,
    )  # fmt: skip
    dump_dir: str | None = setting(
        None, "Folder for crash dumps: what was in an engine that died, without its text."
    )
    dump_text: bool = setting(
        False, "Let crash dumps hold prompts, tokens, stop strings and schemas."
    )
    admin_socket: str | None = setting(
        None, "Unix socket (mode 0600) for those who operate the server; see coppice admin."
    )
    drain_announce_s: float = setting(
        5.0, "After SIGTERM: time of further acceptance while balancers notice.", minimum=0.0
    )
    drain_s: float = setting(60.0, "After that: time running requests get to end.", minimum=0.0)
    stats_log_s: float = setting(10.0, "Interval of the statistics line in the log.", minimum=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_loopback(self.host) and not (self.api_key or self.api_keys_file):
            raise ConfigError(
                f"Listening on {self.host} lets other machines in: set api_key or "
                "api_keys_file, or use host 127.0.0.1.",
                param="host",
            )
        if self.body_budget_bytes < self.max_body_bytes:
            raise ConfigError(
                f"body_budget_bytes ({self.body_budget_bytes}) must hold one body of "
                f"max_body_bytes ({self.max_body_bytes}); raise the one or lower the other.",
                param="body_budget_bytes",
            )
        if self.api_key is not None and len(self.api_key) < 8:  # noqa: PLR2004
            raise ConfigError("api_key must have at least 8 characters.", param="api_key")


def is_loopback(host: str) -> bool:
    """True when only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
