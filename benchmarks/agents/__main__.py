"""``python -m benchmarks.agents [--quick] [--part simulated|live]``: sessions of recorded agents.

See `benchmarks.agents.simulated` and `benchmarks.agents.live`; both parts when none is named.
With ``--quick`` one seed of three in the simulator, one round of three on the engine.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.agents import live, simulated
from benchmarks.report import Report

PARTS = {"simulated": simulated.measure, "live": live.measure}


def main() -> int:
    """Run the parts, print and keep what came of them."""
    parser = argparse.ArgumentParser(prog="benchmarks.agents", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    args = parser.parse_args()
    parts = args.part or list(PARTS)
    report = Report(
        "agents" if len(parts) == len(PARTS) else f"agents-{'-'.join(parts)}",
        ["sessions", "KV", "load", "rule", "mean s", "p95 s", "sessions/s", "KV found"],
    )
    for part in parts:
        PARTS[part](report, quick=args.quick)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
