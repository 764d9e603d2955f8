"""Facts about this machine and this installation, read without loading a model."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "coppice",
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "llguidance",
    "jinja2",
    "msgspec",
    "fastapi",
    "uvicorn",
    "pydantic",
    "huggingface_hub",
)
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")
_CGROUP = Path("/sys/fs/cgroup")


def machine_facts() -> dict[str, Any]:
    """Processor, cores and memory, as this process may use them."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _cpu_field("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cpu_features": cpu_features(),
        "cores_usable": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cores_quota": _cgroup_cores(),
        "memory_mib": _memory_mib("MemTotal"),
        "memory_available_mib": _memory_mib("MemAvailable"),
        "memory_limit_mib": _cgroup_memory_mib(),
    }


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that matter; absent ones say so."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_features() -> list[str]:
    """The instruction sets that kernels could use, of those this processor reports."""
    flags = set((_cpu_field("flags") or _cpu_field("Features") or "").split())
    return [name for name in _FEATURES if name in flags]


def _cpu_field(name: str) -> str | None:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _memory_mib(name: str) -> int | None:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) // 1024
    return None


def _cgroup_memory_mib() -> int | None:
    text = _read(_CGROUP / "memory.max").strip()
    return int(text) >> 20 if text.isdigit() else None


def _cgroup_cores() -> float | None:
    quota, _, period = _read(_CGROUP / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
