"""The socket between front end and engine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from coppice.server.engine_process import EngineProcess

LOOK = """
import os, socket, stat, sys
path, found = sys.argv[3], sys.argv[1]
modes = [stat.S_IMODE(os.stat(each).st_mode) for each in (os.path.dirname(path), path)]
open(found, "w").write(" ".join(map(oct, modes)))
with socket.socket(socket.AF_UNIX) as line:
    line.connect(path)
"""


def test_nobody_else_can_reach_the_engine(tmp_path: Path) -> None:
    found = tmp_path / "modes"

    async def play() -> int:
        process = await EngineProcess.spawn([sys.executable, "-c", LOOK, str(found)])
        return await process.close()

    assert asyncio.run(play()) == 0
    assert found.read_text() == "0o700 0o600"
