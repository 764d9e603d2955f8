"""The page on metrics names what a server shows."""

from __future__ import annotations

import re
from pathlib import Path

from tests.kits.server import ServerProcess

PAGE = Path(__file__).parents[2] / "docs/howto/metrics.md"


def test_the_page_names_every_metric_and_no_other(tmp_path: Path) -> None:
    engine = {"kv_cache_mib": 64, "kv_ram_mib": 16, "kv_disk_dir": str(tmp_path / "kv")}
    journal = {"journal": str(tmp_path / "journal")}
    with (
        ServerProcess("bundled", start_timeout_s=90, engine=engine, server=journal) as server,
        server.http() as http,
    ):
        http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4}).raise_for_status()
        server.wait_idle()
        text = http.get("/metrics").text
    shown = set(re.findall(r"^# HELP (coppice_\w+)", text, re.M))
    shown = {name for name in shown if not name.endswith("_created")}
    assert shown == set(re.findall(r"`(coppice_\w+)", PAGE.read_text()))
