"""The same arrivals into llama.cpp's own server, which knows no tenants: for contrast."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence

from benchmarks.workloads.azure import text_tokens
from coppice.engine.config import EngineConfig
from coppice.scheduling.record import Answer, Record
from coppice.scheduling.virtual import VirtualSequence
from tools.peers import places

VOCAB = 4096
LONGEST = 2048


def replay_llama(sequences: Sequence[VirtualSequence], config: EngineConfig) -> Record:
    """Stream every request when it is due.

    Raises:
        FileNotFoundError: the server or the model's GGUF file was not made
            (``make peers``, ``python -m tools.peers --server``).
    """
    tool, file = places.llama_tool("llama-server"), places.gguf("bundled", "bf16")
    for path in (tool, file):
        if not path.exists():
            raise FileNotFoundError(f"{path.name} is not there; run tools.peers with --server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slots = config.max_sequences
    command = [tool, "-m", file, "--port", str(port), "-np", str(slots), "-t", "2"]
    command += ["-c", str(slots * LONGEST // 2), "--no-webui", "-cb"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port)
        return asyncio.run(_play(port, sequences))
    finally:
        server.terminate()
        server.wait()


def _wait(port: int) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise FileNotFoundError("llama-server did not come up")


async def _play(port: int, sequences: Sequence[VirtualSequence]) -> Record:
    record = Record(last_arrival_s=max(s.submitted_s for s in sequences))
    began = time.monotonic()
    await asyncio.gather(*(_one(port, s, began, record) for s in sequences))
    record.seconds = time.monotonic() - began
    return record


async def _one(port: int, s: VirtualSequence, began: float, record: Record) -> None:
    await asyncio.sleep(max(0.0, s.submitted_s - (time.monotonic() - began)))
    record.accounts.ask(s.tenant, s.submitted_s, s.num_prompt, s.num_answer)
    body = json.dumps(
        {
            "prompt": text_tokens(s.num_prompt, VOCAB, 1 + s.arrival),
            "n_predict": s.num_answer,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
            "stream": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    first = tokens = 0.0
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic() - began
        event = json.loads(line[6:])
        if event.get("stop"):
            break
        if not first:
            first = now
            record.accounts.read(s.tenant, now, s.num_prompt)
        tokens += 1
        record.accounts.wrote(s.tenant, now)
    writer.close()
    ended = time.monotonic() - began
    record.answers.append(
        Answer(s.tenant, s.submitted_s, first, ended, s.num_prompt, int(tokens), tokens > 0)
    )
