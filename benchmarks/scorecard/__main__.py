"""``python -m benchmarks.scorecard``: passes out of 60, Coppice and llama.cpp in one run."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from benchmarks.report import Goal, Report
from benchmarks.scorecard import answers, doors, faults, inputs
from benchmarks.scorecard.check import CHECKS, Check
from benchmarks.scorecard.subjects import (
    KEY,
    Coppice,
    LlamaCpp,
    NotStartedError,
    Running,
    Subject,
    VllmCpu,
)

ROOMS = (answers, inputs, doors, faults)  # importing them registers their checks
LEAST, MORE = 57, 20


def main() -> int:
    """Ask every server every question."""
    parser = argparse.ArgumentParser(prog="benchmarks.scorecard")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    everyone: list[Subject] = [Coppice(), LlamaCpp(), VllmCpu()]
    names = [subject.name for subject in everyone]
    parser.add_argument("--subject", choices=names, action="append", help="only these servers")
    args = parser.parse_args()
    checks = [check for check in CHECKS if args.only in f"{check.group}: {check.name}"]
    subjects = [s for s in everyone if s.name in (args.subject or names)]
    report = Report("scorecard", ["check", *(subject.name for subject in subjects)])
    found: dict[str, dict[str, str]] = {}
    for subject in subjects:
        why, found[subject.name] = subject.absent(), {}
        try:
            if not why:
                found[subject.name] = judge(subject, checks)
        except NotStartedError as error:
            why = str(error)
        if why:
            print(f"{subject.name}: {why}")
    for check in checks:
        verdicts = [found[s.name].get(check.name, "not asked") or "pass" for s in subjects]
        report.rows.append([f"{check.group}: {check.name}", *verdicts])
    passes = {
        name: sum(not why for why in verdicts.values())
        for name, verdicts in found.items()
        if verdicts
    }
    report.rows.append(
        [f"passes out of {len(checks)}", *(str(passes.get(s.name, "-")) for s in subjects)]
    )
    report.metrics = {"checks": len(checks), "passes": passes, "failures": {
        name: {check: why for check, why in verdicts.items() if why}
        for name, verdicts in found.items()
    }}  # fmt: skip
    if not args.only and {"coppice", "llama.cpp"} <= set(args.subject or names):
        report.goals = _goals(passes)
    return report.finish()


def judge(subject: Subject, checks: list[Check]) -> dict[str, str]:
    """Why each check failed, or an empty text.

    Raises:
        NotStartedError: it did not start, at first or for a later check.
    """
    verdicts: dict[str, str] = {}
    log = Path(tempfile.mkstemp(prefix=f"scorecard-{subject.name}-", suffix=".log")[1])
    for key in (None, KEY):
        quiet = [check for check in checks if not check.fresh and check.key == bool(key)]
        with contextlib.ExitStack() as stack:
            server: Running | None = None
            for check in quiet:
                if server is None or not server.works():
                    stack.close()
                    server = stack.enter_context(Running(subject, key, log))
                verdicts[check.name] = ask(check, server)
    for check in checks:
        if check.fresh:
            with Running(subject, None, log) as server:
                verdicts[check.name] = ask(check, server)
    return verdicts


def ask(check: Check, server: Running) -> str:
    """Why a check failed, or an empty text. What it trips over counts as a failure."""
    try:
        check.ask(server)
    except Exception as error:
        why = str(error) if isinstance(error, AssertionError) else repr(error)
        print(f"{server.subject.name}: {check.group}: {check.name}: {why[:200]}", flush=True)
        return why[:200]
    return ""


def _goals(passes: dict[str, int]) -> list[Goal]:
    ours, theirs = passes.get("coppice", 0), passes.get("llama.cpp")
    goals = [Goal.at_least("scorecard.passes", ours, LEAST)]
    if theirs is None:
        why = "llama-server is not built, or does not start"
        return [*goals, Goal.unmeasured("scorecard.more_than_llama_cpp", f">= {MORE}", why)]
    return [*goals, Goal.at_least("scorecard.more_than_llama_cpp", ours - theirs, MORE)]


if __name__ == "__main__":
    raise SystemExit(main())
