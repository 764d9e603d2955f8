"""The engine: the life of every request, one step at a time, in one thread.

Sentence by sentence: `submit` queues a request's sequences; `step` shows the planner a
snapshot, carries out its plan (victims leave, newcomers take pages, granted rows run),
appends the chosen tokens and reports them; whatever ends a sequence goes through `_end`,
which gives its pages back and counts its outcome once.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter

import msgspec

from coppice.cache.pool import KVPool
from coppice.cost import StepCost
from coppice.engine.arrivals import Arrivals
from coppice.engine.batch import PageTable
from coppice.engine.calibrate import curve_for
from coppice.engine.check import check_request
from coppice.engine.config import EngineConfig
from coppice.engine.endings import finish_reason, outcome, report
from coppice.engine.faults import Fault
from coppice.engine.flight import Flight, Walk
from coppice.engine.lanes import View, make_lanes
from coppice.engine.loading import EngineModel
from coppice.engine.messages import (
    CancelReason,
    FinishReason,
    ModelFacts,
    Output,
    Progress,
    StepStats,
    TokenLogprob,
)
from coppice.engine.metering import Meter
from coppice.engine.policies import policy_of, session_stats
from coppice.engine.request import Request
from coppice.engine.sequence import Sequence
from coppice.engine.speculate import load_draft, make_speculator, trees_for
from coppice.engine.step import StepRunner
from coppice.engine.tiering import make_pages, tier_stats
from coppice.errors import RequestError
from coppice.scheduling import (
    FlowQueues,
    Grant,
    Plan,
    Planner,
    Policy,
    Snapshot,
    StepPlanner,
)
from coppice.scheduling.sessions import Sessions
from coppice.speculation import DraftTree, Speculator

MAX_STEP_S = 0.25
"""Bound on a step, so that cancels, deadlines and arrivals act within two of them."""


class Engine:
    """Continuous batching over one model.

    Args:
        model: the loaded model and its tokenizer facts.
        config: sizes and switches.
        planner: who gets rows; a `StepPlanner` when omitted.
        policy: in whose turn; by ``config.policy`` when omitted.
        speculator: who guesses ahead; by ``config.speculate`` when omitted.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        model: EngineModel,
        config: EngineConfig,
        *,
        planner: Planner | None = None,
        policy: Policy | None = None,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.config = config
        self.clock = clock
        layout = model.decoder.kv_layout(config.page_size).stored_as(config.kv_cache_dtype)
        self._layout = layout
        draft = None if speculator is not None else load_draft(config, model)
        page_bytes = layout.page_bytes
        if draft is not None:  # which keeps K and V of the same tokens in pages of its own
            page_bytes += draft.decoder.kv_layout(config.page_size).page_bytes
        num_pages = max(1, (config.kv_cache_mib << 20) // page_bytes)
        self.num_pages = num_pages
        self.context_length = min(
            config.context_length or model.facts.context_length,
            model.facts.context_length,
            num_pages * config.page_size,
        )
        pool = KVPool(layout, num_pages)
        self.pages = make_pages(config, model, pool)
        max_pages = -(-self.context_length // config.page_size) + 1
        self._table = PageTable(config.max_sequences, max_pages)
        runner_of = partial(
            StepRunner, pool=pool, pages=self.pages, table=self._table, max_rows=config.max_rows
        )
        self._requests: dict[str, list[Sequence]] = {}
        self._held_back: dict[str, list[Progress]] = {}
        self._running: list[Sequence] = []
        self._deadlines: list[tuple[float, str]] = []
        self.cost = StepCost(curve_for(config, model))
        self.lanes = make_lanes(
            config, model.decoder, runner_of, cost=self.cost, pages=self.pages, clock=clock
        )
        self._runner = self.lanes.runner
        self._planner = planner or StepPlanner(self.cost)
        self.policy = policy or policy_of(config, num_pages, self.cost)
        self._arrivals = Arrivals(model, self.context_length, self.policy.order, clock)
        self.sessions: Sessions[Sequence] = Sessions(
            self.pages, config.page_size, self.policy.admission, self.policy.retention
        )
        self.pages.pins.victims = lambda pinned: self.sessions.victims(self.clock(), pinned)
        self._waiting = FlowQueues(self.policy.flows)
        self.waiting_for = ""
        """Why the first in turn was not admitted by the last plan; empty when none waits."""
        self._speculator = speculator or make_speculator(config, model, self.cost, num_pages, draft)
        if self._speculator is not None:
            self._speculator.share(self._runner)
        self._totals: Counter[str] = Counter()
        self._seconds = {"step": 0.0, "draft": 0.0}
        self.outcomes: Counter[str] = Counter()
        self.meter = Meter()

    # -- what the outside calls ------------------------------------------------------------

    def facts(self) -> ModelFacts:
        """The model's facts with this engine's sizes."""
        return msgspec.structs.replace(
            self.model.facts,
            context_length=self.context_length,
            num_pages=self.num_pages,
            kv_format=str(self._layout.dtype).removeprefix("torch."),
            knows_sessions=self.sessions.matter,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything now; sessions outside the window wait for `attend`."""
        return bool(self._running or self._waiting)

    def submit(self, request: Request, progress: Iterable[Progress] = ()) -> None:
        """Accept a request, or take over one that another engine process left unfinished.

        Args:
            request: ``deadline_s`` counts from now.
            progress: the choices still open, each to go on behind its tokens as if it had
                always run here; all choices from the start when empty.

        Raises:
            ContextOverflowError: the prompt leaves no room for an answer.
            GrammarError: the constraint does not compile.
            RequestError: an id is in use, or a token id is out of the vocabulary.
        """
        self._check(request)
        first, *later = progress or map(Progress, range(request.sampling.n))
        sequence = self._arrivals.sequence(request, first)
        self._requests[request.id] = [sequence]
        if later:
            self._held_back[request.id] = later
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (self.clock() + request.deadline_s, request.id))
        self._enqueue(sequence)

    def cancel(
        self, request_id: str, reason: CancelReason = "cancelled", index: int | None = None
    ) -> list[Output]:
        """End a request or one of its choices; an id that has ended already is no error."""
        outputs: list[Output] = []
        ended = list(self._requests.get(request_id, ()))
        if index is None or all(sequence.index != index for sequence in ended):
            ended.extend(self._release_held_back(request_id, enqueue=index is not None))
        for sequence in ended:
            if index is None or sequence.index == index:
                self._end(sequence, reason, outputs)
        return outputs

    def park(self, request_id: str, on: bool) -> None:
        """Hold a request whose reader does not keep up, or let it go on.

        A parked sequence gives its pages back; going on, it recomputes them like after a
        preemption, so its tokens do not change. Cancels and deadlines still reach it, the
        latter as soon as anything steps.
        """
        for sequence in self._requests.get(request_id, ()):
            if sequence.finish_reason is not None or sequence.parked == on:
                continue
            sequence.parked = on
            if sequence.slot >= 0:  # still, though it may have been parked, where it is in flight
                self._stop_running(sequence)
            elif not on:
                self._enqueue(sequence)
            elif self.sessions.outside.pop(sequence.arrival, None) is None:
                self._waiting.remove(sequence)

    def attend(self) -> list[Output]:
        """What time alone brings: deadlines pass, sessions are given up, others come in."""
        now = self.clock()
        outputs = self._expire(now)
        for sequence in self.sessions.let_in(now, idle=not self.has_work):
            self._waiting.push(sequence)
        return outputs

    def step(self) -> list[Output]:
        """Plan, run and commit one step: the flights that end in it."""
        began = self.clock()
        outputs = self.attend()
        landed = []
        for flight in self.lanes.flights(self._plan, self._speculate):
            self._commit(flight, outputs)
            landed.append(flight)
        took = self.clock() - began
        self.lanes.spent(took)
        self.meter.step(took)
        for flight in landed:
            self.meter.flight(flight.ran, flight.share_s, self.cost)
        self._totals["steps"] += 1
        self._seconds["step"] += took
        return outputs

    def stats(self) -> StepStats:
        """Gauges and totals for metrics and admission."""
        per_row = self.cost.per_row_s
        allocator = self.pages.allocator
        outside = "no place for another session" if self.sessions.outside else ""
        return StepStats(
            running=len(self._running),
            waiting=len(self._waiting) + len(self.sessions.outside),
            waiting_tokens=self._waiting.num_tokens,
            pages_used=self.num_pages - allocator.num_available,
            pages_cached=allocator.num_idle,
            num_pages=self.num_pages,
            steps=self._totals["steps"],
            rows=self._totals["rows"],
            prompt_tokens=self._totals["prompt_tokens"],
            generated_tokens=self._totals["generated_tokens"],
            prefix_queried_tokens=self.pages.queried_tokens,
            prefix_hit_tokens=self.pages.hit_tokens,
            preemptions=self._totals["preemptions"],
            model_s=self.lanes.waited_s,
            other_s=self._seconds["step"] - self._seconds["draft"] - self.lanes.waited_s,
            prefill_rate_tok_s=1.0 / per_row if per_row else 0.0,
            outcomes=dict(self.outcomes),
            draft_s=self._seconds["draft"],
            tree=self._runner.shown,
            tiers=tier_stats(self.pages.tiers),
            **({} if self._speculator is None else self._speculator.figures()),
            usage=self.meter.usage,
            waiting_for=self.waiting_for if self._waiting else outside,
            sessions=session_stats(self.sessions, self.pages),
        )

    @property
    def speculated(self) -> Mapping[str, int]:
        """Draft tokens ``drafted`` and ``accepted``, also by proposer; ``faults``."""
        return {} if self._speculator is None else self._speculator.totals

    def close(self) -> None:
        """The last call: what is kept between starts is written."""
        self.lanes.close()
        self.pages.close()
        if self._speculator is not None:
            self._speculator.close()

    def check_pages(self) -> None:
        """Verify page conservation (`PageAllocator.check`)."""
        self.pages.check(iter(self._running))

    # -- a request's beginning -------------------------------------------------------------

    def _check(self, request: Request) -> None:
        if request.id in self._requests:
            raise RequestError(f"Request id {request.id!r} is in use; choose another.")
        check_request(
            request,
            context_length=self.context_length,
            vocab_size=self.model.facts.vocab_size,
            proposers=[] if self._speculator is None else self._speculator.names,
        )

    def _release_held_back(self, request_id: str, *, enqueue: bool) -> list[Sequence]:
        """Create the choices that waited for the first one's prompt to be cached."""
        held_back = self._held_back.pop(request_id, None)
        if held_back is None:
            return []
        sequences = self._requests[request_id]
        request = sequences[0].request
        new = [self._arrivals.sequence(request, progress) for progress in held_back]
        sequences.extend(new)
        if enqueue:
            for sequence in new:
                self._enqueue(sequence)
        return new

    def _enqueue(self, sequence: Sequence) -> None:
        """To the tenants' queues; the first turn of a session may have to wait before."""
        if self.sessions.arrive(sequence, self.clock()):
            self._waiting.push(sequence)

    # -- a step ----------------------------------------------------------------------------

    def _snapshot(self, now: float) -> Snapshot:
        config = self.config
        return Snapshot(
            running=self._running,
            waiting=self._waiting,
            now=now,
            num_available=self.pages.allocator.num_available,
            page_size=config.page_size,
            max_rows=max(
                self.cost.rows_within(MAX_STEP_S, config.max_rows), config.max_sequences + 1
            ),
            max_sequences=config.max_sequences,
            prefill_chunk=config.prefill_chunk,
            kept=self.sessions.kept(self._waiting, now),
        )

    def _plan(self, view: View) -> list[Grant]:
        """Plan from what ``view`` shows and carry it out, but for the rows it grants."""
        now = self.clock()
        shown = view(self._snapshot(now))
        plan = self._planner.plan(shown)
        self._carry_out(plan, now)
        if shown.waiting:
            self.waiting_for = plan.why
        self.meter.hold(self._running)
        if not plan.admit:
            return plan.grants
        return [g for g in plan.grants if g.sequence.num_pages]  # some found no pages after all

    def _carry_out(self, plan: Plan, now: float) -> None:
        flows = self.policy.flows
        for sequence in plan.preempt:
            assert isinstance(sequence, Sequence)
            self._stop_running(sequence)
            self._waiting.push(sequence)
            self._totals["preemptions"] += 1
        self.pages.begin_step()
        for sequence in plan.admit:
            assert isinstance(sequence, Sequence)
            attached = self.pages.attach(sequence)
            if attached == "full":
                break
            if attached == "coming":  # those behind it need not wait for its disk
                continue
            self._waiting.remove(sequence)
            self.sessions.entered(sequence)
            self._table.take_slot(sequence)
            insort(self._running, sequence, key=_rank)
            if not sequence.scheduled_s:
                sequence.scheduled_s = now
                sequence.cached_tokens = min(sequence.num_computed, sequence.num_prompt)
                flows.charge(sequence, "admitted", sequence.num_prompt, now)
        for sequence in plan.overtaken:
            assert isinstance(sequence, Sequence)
            sequence.overtaken += 1

    def _commit(self, flight: Flight, outputs: list[Output]) -> None:
        """A flight has landed: its rows count, and who left meanwhile gives pages back."""
        for sequence, *_ in flight.ran:
            if sequence.parked or sequence.finish_reason is not None:
                self._stop_running(sequence)
        flight.runner.take(flight, partial(self._accept, outputs))
        self._finish_walks(flight.walks, outputs)
        if flight.share == 1.0 and flight.num_rows:  # beside another it says nothing of steps
            took = self.clock() - flight.began_s
            self.cost.observe(flight.num_rows, took)
            if self._speculator is not None:
                trees = sum(ran.guesses > 0 for ran in flight.ran)
                self._speculator.step_took(flight.num_rows, trees, took)
        self._totals["rows"] += flight.num_rows
        self._totals["generated_tokens"] += flight.num_chosen

    def _stop_running(self, sequence: Sequence) -> None:
        """Its pages and its place are free; of one in flight, when that has landed."""
        if self.lanes.holds(sequence):
            return
        self._running.remove(sequence)
        self._table.free_slot(sequence)
        self.pages.release(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence.arrival)

    def _speculate(self, grants: list[Grant]) -> dict[int, DraftTree]:
        """Trees for the sequences that decode, within the rows the plan left."""
        if self._speculator is None:
            return {}
        began = self.clock()
        most = self.cost.rows_within(MAX_STEP_S, self.config.max_rows)
        trees = trees_for(
            self._speculator, self._running, grants, self.cost, now=began, most_rows=most
        )
        self._seconds["draft"] += self.clock() - began
        return trees

    def _finish_walks(self, walks: list[Walk], outputs: list[Output]) -> None:
        """Report what sequences that go on were given, and learn from their trees."""
        for walk in walks:
            if walk.tree is not None and self._speculator is not None:
                self._speculator.observe(walk.sequence.arrival, walk.tree, len(walk.path))
            if walk.sequence.finish_reason is None:
                outputs.append(report(walk.sequence))
            elif walk.tree is not None and self._speculator is not None:
                self._speculator.forget(walk.sequence.arrival)  # observing it began it anew

    def _accept(
        self,
        outputs: list[Output],
        sequence: Sequence,
        token: int,
        logprob: TokenLogprob | None,
        fault: Fault | None,
    ) -> bool:
        """See `Accept`; reports what ended."""
        if fault is not None:
            sequence.error = fault
            self._end(sequence, "failed", outputs)
            return False
        sequence.tokens.append(token)
        sequence.sampler.accept(token)
        if logprob is not None:
            sequence.logprobs.append(logprob)
        self.policy.flows.charge(sequence, "generated", 1, self.clock())
        self.meter.accepted(sequence, first=not sequence.first_token_s)
        if not sequence.first_token_s:
            sequence.first_token_s, sequence.first_tokens = self.clock(), len(sequence.tokens)
            self._totals["prompt_tokens"] += len(sequence.request.prompt)
            self._release_held_back(sequence.request.id, enqueue=True)
        reason = finish_reason(sequence, token)
        if reason is not None:
            self._end(sequence, reason, outputs)
        return reason is None

    def _expire(self, now: float) -> list[Output]:
        outputs: list[Output] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            outputs.extend(self.cancel(request_id, "expired"))
        return outputs

    # -- a request's end -------------------------------------------------------------------

    def _end(self, sequence: Sequence, reason: FinishReason, outputs: list[Output]) -> None:
        """The one way out: pages back, last report, outcome counted."""
        if sequence.finish_reason is not None:
            return
        now = self.clock()
        sequence.finish_reason = reason
        self.policy.flows.charge(sequence, "ended", 0, now)
        self.meter.ended(sequence, now)
        if reason in ("stop", "length"):
            self.sessions.pause(sequence, sequence.request.session_tool, now)
        else:
            self.sessions.cancelled(sequence, now)
        if self._speculator is not None and sequence.speculate != "off":
            self._speculator.learn(sequence, len(sequence.request.prompt))
        if sequence.slot >= 0:
            self._stop_running(sequence)
        elif sequence in self._waiting:  # not so while parked, or never queued
            self._waiting.remove(sequence)
        outputs.append(report(sequence))
        self._release_held_back(sequence.request.id, enqueue=True)  # they wait for its prompt
        siblings = self._requests[sequence.request.id]
        if all(s.finish_reason is not None for s in siblings):
            del self._requests[sequence.request.id]
            self.outcomes[outcome(siblings)] += 1


_rank = attrgetter("rank")
