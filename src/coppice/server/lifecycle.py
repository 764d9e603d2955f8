"""Start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from coppice.engine.config import EngineConfig
from coppice.engine.memory import give_back, give_back_heap
from coppice.errors import ConfigError, CoppiceError
from coppice.server.admin import AdminSocket, build_admin
from coppice.server.admission import Admission
from coppice.server.app import build_app
from coppice.server.bodies import BodyBudget
from coppice.server.calls import Calls
from coppice.server.config import ServerConfig
from coppice.server.engine_client import AsyncEngine
from coppice.server.http_protocol import MAX_HEADER_BYTES, protocol_class
from coppice.server.journal import Journal
from coppice.server.keys import KeyRing
from coppice.server.ledger import Ledger
from coppice.server.metrics import Metrics
from coppice.server.recovery import recover
from coppice.server.resumable import Resumables
from coppice.server.services import Services
from coppice.server.supervisor import Supervisor
from coppice.server.text import TextService
from coppice.server.tokenizing import tokenizer_of

log = logging.getLogger("coppice.server")
UNSENT_BYTES = 16 << 10
"""What the system takes of a reply beyond what is under way; by itself it takes up to 4 MiB."""
CLOSE_GRACE_S = 5.0
REST_S = 0.5
"""Between two looks whether nobody asks for anything."""


def make_services(config: ServerConfig, keys: KeyRing, engine: AsyncEngine) -> Services:
    """The parts of a server around an engine."""
    metrics = Metrics(vllm_names=config.metrics_names == "vllm")
    services = Services(
        config=config,
        engine=engine,
        keys=keys,
        ledger=Ledger(),
        admission=Admission(config, engine),
        calls=Calls(metrics),
        metrics=metrics,
        bodies=BodyBudget(config.body_budget_bytes),
        streams=Resumables(
            Journal(Path(config.journal).expanduser()) if config.journal else None, config.resume_s
        ),
    )
    metrics.bind(services)
    return services


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: ours decide when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server process from start to exit.

    Args:
        config: where to listen and so on.
        keys: who may ask.
        engine: begun already, so that it loads while this module is imported.
        engine_config: names the model whose tokenizer is loaded beside the engine.
    """

    def __init__(
        self,
        config: ServerConfig,
        keys: KeyRing,
        engine: AsyncEngine,
        engine_config: EngineConfig,
    ) -> None:
        self._config = config
        self._engine_config = engine_config
        self.services = make_services(config, keys, engine)
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._forced = asyncio.Event()
        self._replacing: asyncio.Task[None] | None = None
        self._supervisor = Supervisor()

    async def run(self) -> int:
        """Serve until a signal; returns the exit code.

        Raises:
            CoppiceError: the model could not be loaded, or the address cannot be had.
        """
        admin: AdminSocket | None = None
        try:
            if self._config.admin_socket is not None:
                admin = AdminSocket(Path(self._config.admin_socket))
            listener = _listen(self._config)
        except ConfigError:
            if admin is not None:
                admin.close()
            self.services.engine.kill()
            raise
        http = _Http(self._uvicorn_config(build_app(self.services)))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        loop.add_signal_handler(signal.SIGUSR1, self._preempted)
        self._supervisor.begin()
        serving = asyncio.create_task(http.serve(sockets=[listener]), name="http")
        stats = asyncio.create_task(self._log_stats(), name="stats")
        resting = asyncio.create_task(self._give_back(), name="resting")
        try:
            async with self._administered(admin):
                if await self._load(listener):
                    await self._drain(await self._signals.get())
        finally:
            self.services.streams.freeze()  # what is ended from here on may go on elsewhere
            stats.cancel()
            resting.cancel()
            self._supervisor.close()
            if self._forced.is_set():
                self.services.engine.kill()
                http.force_exit = True
            http.should_exit = True
            await serving
            await self.services.engine.close(0.0 if self._forced.is_set() else CLOSE_GRACE_S)
            await self.services.streams.close()
            if self.services.text is not None:
                await self.services.text.close()
            _be_deaf(loop)
        return 0

    def _preempted(self) -> None:
        self._replacing = asyncio.create_task(self._replace(), name="replacing")

    async def _replace(self) -> None:
        """The engine's memory or place is taken away: another takes over within the notice."""
        try:
            took_s = await self.services.engine.replace(self._config.preempt_notice_s)
            log.warning("Another engine has taken over after %.2f s.", took_s)
        except CoppiceError as error:
            log.error("The engine was not replaced: %s", error.message)

    async def _load(self, listener: socket.socket) -> bool:
        """Load engine and tokenizer side by side; false when a signal came first."""
        loading = asyncio.ensure_future(self._load_both())
        stopping = asyncio.ensure_future(self._signals.get())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError, CoppiceError):
                await loading
            return False
        stopping.cancel()
        loading.result()
        gc.freeze()  # what start-up made stays: no collection needs to look at it again
        gc.enable()
        give_back()
        self._say_ready(listener)
        self._supervisor.ready(f"serves {self.services.model_name}")
        if self.services.text is not None:
            self.services.text.begin()
        return True

    async def _load_both(self) -> None:
        tokenizer_loaded = asyncio.get_running_loop().run_in_executor(
            None, tokenizer_of, self._engine_config
        )
        try:
            facts = await self.services.engine.ready()
        finally:
            await _settled(tokenizer_loaded)
        tokenizer = await tokenizer_loaded
        tokenizer.require_vocab(facts.vocab_size)
        text = TextService(tokenizer)
        await recover(self.services, text, facts)
        self.services.text = text

    def _say_ready(self, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        facts = self.services.engine.facts
        assert facts is not None
        print(
            f"coppice serves {self.services.model_name} at http://{shown}:{port}"
            f" ({facts.weight_format} weights, {facts.kernels}, {facts.num_pages} {facts.kv_format}"
            f" KV pages of {facts.page_size} tokens, speculation {self._engine_config.speculate})",
            flush=True,
        )

    async def _drain(self, first: int) -> None:
        """Announce, refuse, wait for running calls, end the rest; a second signal cuts short."""
        services, config = self.services, self._config
        second = asyncio.ensure_future(self._signals.get())
        services.phase = "announced"
        self._supervisor.stopping(config.drain_announce_s + config.drain_s + CLOSE_GRACE_S)
        if first == signal.SIGTERM:
            log.info("stopping: refusing work in %g s", config.drain_announce_s)
            await asyncio.wait({second}, timeout=config.drain_announce_s)
        services.phase = "closed"
        log.info("draining: %d calls run", len(services.calls))
        deadline = asyncio.get_running_loop().time() + config.drain_s
        while len(services.calls) and not second.done():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            await asyncio.wait({second}, timeout=min(0.05, left))
        if second.done():
            self._forced.set()
        second.cancel()
        services.streams.freeze()  # what is resumable ends in the next process
        services.engine.fail_all("The server is shutting down.")
        for _ in range(100):  # let the replies go out
            if not len(services.calls):
                break
            await asyncio.sleep(0.01)

    async def _log_stats(self) -> None:
        last = 0
        while True:
            await asyncio.sleep(self._config.stats_log_s)
            stats, ledger = self.services.engine.stats, self.services.ledger
            if stats is None or (stats.steps == last and not ledger.in_flight):
                continue
            last = stats.steps
            log.info(
                "running=%d waiting=%d pages=%d/%d cached_pages=%d generated=%d in_flight=%d "
                "outcomes=%s", stats.running, stats.waiting, stats.pages_used, stats.num_pages,
                stats.pages_cached, stats.generated_tokens, ledger.in_flight,
                ",".join(f"{name}:{count}" for name, count in ledger.outcomes.items()),
            )  # fmt: skip

    async def _give_back(self) -> None:
        """Memory that calls took and nobody holds, once after them, when it is quiet."""
        ledger, seen, given = self.services.ledger, 0, 0
        while True:
            await asyncio.sleep(REST_S)
            quiet, seen = not ledger.in_flight and ledger.accepted == seen, ledger.accepted
            if quiet and seen != given:
                given = seen
                give_back_heap()

    @contextlib.asynccontextmanager
    async def _administered(self, admin: AdminSocket | None) -> AsyncIterator[None]:
        """Serve the admin socket meanwhile."""
        if admin is None:
            yield
            return
        app = build_admin(self.services, lambda: self._signals.put_nowait(signal.SIGTERM))
        http = _Http(self._uvicorn_config(app))
        serving = asyncio.create_task(http.serve(sockets=[admin.listener]), name="admin")
        try:
            yield
        finally:
            http.should_exit = True
            await serving
            admin.close()

    def _uvicorn_config(self, app: FastAPI) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            http=protocol_class(self._config),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=int(CLOSE_GRACE_S),
            backlog=min(self._config.max_connections, 1024),
        )


def _be_deaf(loop: asyncio.AbstractEventLoop) -> None:
    """Signals that come while Python cleans up must not change the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        loop.remove_signal_handler(number)  # or closing the loop would, and let them kill
        signal.signal(number, signal.SIG_IGN)


async def _settled(future: Awaitable[object]) -> None:
    with contextlib.suppress(CoppiceError):
        await future


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # NOTE: the protocol must be named; asyncio sets TCP_NODELAY only where it is, and without
    # it every reply waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    try:
        listener.bind((config.host.strip("[]"), config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port} ({error.strerror}); choose another "
            "port, or 0 for a free one.",
            param="port",
        ) from error
    listener.setblocking(False)
    return listener
