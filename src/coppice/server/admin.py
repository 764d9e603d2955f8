"""The admin socket: what operates a server, for whoever may open the socket's file.

A Unix socket of mode 0600 is the key: nothing of this is on the public port, whatever keys
there are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware import Middleware

from coppice.errors import ConfigError, NotFoundError
from coppice.server.calls import REQUEST_ID, Call
from coppice.server.errors import install_handlers
from coppice.server.guard import RequestIds
from coppice.server.limits import BodyLimits
from coppice.server.services import Services, services_of

router = APIRouter(prefix="/admin")


def build_admin(services: Services, stop: Callable[[], None]) -> FastAPI:
    """The application on the admin socket.

    Args:
        services: the server's.
        stop: as SIGTERM does: the first time drain, the second time stop now.
    """
    app = FastAPI(
        title="Coppice, admin socket",
        openapi_url=None,
        middleware=[
            Middleware(RequestIds, metrics=services.metrics),
            Middleware(BodyLimits, config=services.config),
        ],
    )
    app.state.services = services
    app.state.stop = stop
    install_handlers(app)
    app.include_router(router)
    return app


@router.get("/state")
async def state(request: Request) -> Response:
    """The server, its engine, and every call in flight, without anybody's text."""
    services = services_of(request)
    engine = services.engine
    return JSONResponse(
        {
            "state": services.state,
            "phase": services.phase,
            "uptime_s": time.monotonic() - services.started,
            "engine": {
                "state": engine.state,
                "pid": engine.pid,
                "restarts": engine.restarts,
                "silent_ticks": engine.silence.ticks,
                "requests": len(engine.live),
            },
            "cells": services.text.cells() if services.text is not None else {},
            "outcomes": {"in_flight": services.ledger.in_flight, **services.ledger.outcomes},
            "calls": [_call(call) for call in services.calls.live()],
        }
    )


@router.post("/drain")
async def drain(request: Request) -> Response:
    """What the first SIGTERM does; asked for again, what the second does."""
    request.app.state.stop()
    return JSONResponse({"state": "draining"})


@router.post("/requests/{request_id}/cancel")
async def cancel(request_id: str, request: Request) -> Response:
    """End calls of this id, whoever sent them."""
    valid = REQUEST_ID.fullmatch(request_id)
    count = services_of(request).calls.cancel(request_id, None) if valid else 0
    if not count:
        raise NotFoundError("No request of that id is running.", param="request_id")
    return JSONResponse({"id": request_id, "cancelled": count})


@router.post("/replace")
async def replace(
    request: Request, notice_s: Annotated[float | None, Query(ge=0, le=3600)] = None
) -> Response:
    """Another engine process takes this one's place within the notice; requests go on in it."""
    services = services_of(request)
    notice_s = services.config.preempt_notice_s if notice_s is None else notice_s
    took_s = await services.engine.replace(notice_s)
    return JSONResponse({"pid": services.engine.pid, "took_s": took_s})


@router.post("/dump")
async def dump(request: Request) -> Response:
    """Stacks: this process's in the reply, the engine's in the log."""
    told = services_of(request).engine.dump_stacks()
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        stacks = file.read().decode(errors="replace")
    return JSONResponse({"stacks": stacks.splitlines(), "engine_stacks_in_log": told})


def _call(call: Call) -> dict[str, Any]:
    generation = call.generation
    return {
        "id": call.id,
        "request_id": call.request_id,
        "route": call.route,
        "key": call.key.name,
        "tenant": call.key.tenant,
        "age_s": round(time.monotonic() - call.arrived, 3),
        "prompt_tokens": generation.prompt_tokens if generation else None,
        "completion_tokens": generation.completion_tokens if generation else None,
    }


class AdminSocket:
    """The socket's file: made for its owner only, gone when closed.

    Args:
        path: where; a socket nobody listens on any more is replaced.

    Raises:
        ConfigError: somebody listens there, or something else is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        _remove_stale(path)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.listener.bind(str(path))
            path.chmod(0o600)
            # NOTE: before listen() nobody can connect, so nobody can before chmod().
            self.listener.listen(16)
        except OSError as error:
            self.listener.close()
            raise _refusal(path, error.strerror or str(error)) from error
        self.listener.setblocking(False)
        self._inode = path.stat().st_ino

    def close(self) -> None:
        """Take the file away, if it is still ours."""
        self.listener.close()
        with contextlib.suppress(OSError):
            if self._path.lstat().st_ino == self._inode:
                os.unlink(self._path)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from error
    if not stat.S_ISSOCK(mode):
        raise _refusal(path, "there is something else than a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.settimeout(1.0)
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _refusal(path, error.strerror or str(error)) from error
        else:
            raise _refusal(path, "another server listens there")


def _refusal(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"Cannot listen on the admin socket {path}: {why}; choose another path.",
        param="admin_socket",
    )
