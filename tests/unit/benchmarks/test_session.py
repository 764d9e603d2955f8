"""The conversation with a contender, with a small one."""

from __future__ import annotations

import sys
import time

import pytest

from benchmarks.peers.protocol import Job
from benchmarks.peers.session import PatienceError, PeerError, Session, UnableError

CONTENDER = """
import os, subprocess, sys, time
from benchmarks.peers.protocol import NotComparableError, serve

class Fake:
    def decode(self, batch):
        print("noise of a library")
        os.write(1, b"noise of a C library\\n")
        return 10.0 * batch
    def prefill(self):
        subprocess.run(["sleep", "60"])
    def verify(self, rows):
        raise NotComparableError("no such call")
    def facts(self):
        raise ValueError("broken on purpose")

def load(job):
    if job.form == "int4":
        raise NotComparableError("no int4")
    return Fake()

serve(load)
"""
COMMAND = [sys.executable, "-c", CONTENDER]


def job(form="bf16"):
    return Job("m", form, vocab_size=100, threads=1)


def test_figures_come_back_whatever_is_printed():
    with Session(COMMAND, job(), limit_s=30) as session:
        assert session.measure("decode1", limit_s=10) == 10.0
        assert session.measure("decode8", limit_s=10) == 80.0


def test_what_cannot_be_done_does_not_end_the_session():
    with Session(COMMAND, job(), limit_s=30) as session:
        with pytest.raises(UnableError, match="no such call"):
            session.measure("verify", limit_s=10)
        assert session.measure("decode1", limit_s=10) == 10.0


def test_a_format_that_is_not_there():
    with pytest.raises(UnableError, match="no int4"):
        Session(COMMAND, job("int4"), limit_s=30)


def test_patience_ends_the_contender_and_what_it_started():
    began = time.monotonic()
    with (
        pytest.raises(PatienceError, match="not done in"),
        Session(COMMAND, job(), limit_s=30) as session,
    ):
        session.measure("prefill", limit_s=0.5)
    assert time.monotonic() - began < 20  # nobody waited for the sleeping child


def test_a_crash_says_what_was_written_last():
    with (
        pytest.raises(PeerError, match="broken on purpose"),
        Session(COMMAND, job(), limit_s=30) as session,
    ):
        session.measure("facts", limit_s=10)
