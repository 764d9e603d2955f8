"""Runs `coppice.server.run` in a process of its own, with settings as JSON."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from coppice.engine.config import EngineConfig
from coppice.server import ServerConfig, run


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--fake", help="options of the fake engine; absent: the real one")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    server = json.loads(args.server)
    server["allowed_hosts"] = tuple(server.get("allowed_hosts", ()))
    command = None
    if args.fake is not None:
        command = (sys.executable, "-m", "tests.kits.fake_engine", "--options", args.fake)
    try:
        config = ServerConfig(**server)
    except Exception as error:
        print(f"{getattr(error, 'code', 'bug')}: {error}", file=sys.stderr)
        return 2
    code = run(config, EngineConfig(**json.loads(args.engine)), engine_command=command)
    print("torch loaded" if "torch" in sys.modules else "no torch", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
