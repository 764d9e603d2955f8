"""``coppice admin``: operate a running server through its admin socket."""

from __future__ import annotations

import http.client
import json
import socket
import sys
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import typer

from coppice.cli.options import Given, with_settings
from coppice.cli.remote import RemoteError
from coppice.errors import ConfigError
from coppice.server.config import ServerConfig

TIMEOUT_S = 600.0
"""An engine that is replaced loads its model first."""


class Action(StrEnum):
    """What can be asked of a server."""

    STATE = "state"
    DRAIN = "drain"
    CANCEL = "cancel"
    DUMP = "dump"
    REPLACE = "replace"


@with_settings(ServerConfig, only=["admin_socket"])
def admin(
    given: Given,
    action: Annotated[
        Action,
        typer.Argument(
            help="state: what runs. drain: as SIGTERM. cancel ID: end a request. "
            "dump: stacks of all threads. replace: another engine takes over."
        ),
    ],
    request_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Of a reply, or an X-Request-Id.")
    ] = None,
    notice_s: Annotated[
        float | None,
        typer.Option(help="replace: seconds until the old engine must go.", min=0, max=3600),
    ] = None,
) -> None:
    """Operate a running server; it must have been started with the same --admin-socket."""
    path = given.flags.get("admin_socket") or given.resolve(ServerConfig).config.admin_socket
    if not path:
        raise ConfigError("Name the server's socket with --admin-socket.", param="admin_socket")
    if (action is Action.CANCEL) != (request_id is not None):
        raise ConfigError("cancel takes the id of a request, and nothing else does.")
    verb = "GET" if action is Action.STATE else "POST"
    if notice_s is not None and action is not Action.REPLACE:
        raise ConfigError("Only replace takes --notice-s.")
    where = action.value
    if request_id is not None:
        where = f"requests/{quote(request_id, safe='')}/cancel"
    if notice_s is not None:
        where += f"?notice_s={notice_s}"
    reply = ask(str(path), verb, f"/admin/{where}")
    json.dump(reply, sys.stdout, indent=2)
    print()


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def ask(path: str, verb: str, where: str) -> Any:
    """The server's answer.

    Raises:
        RemoteError: nobody answers there, or the answer is an error.
    """
    connection = _Connection(path)
    try:
        connection.request(verb, where)
        reply = connection.getresponse()
        body = json.loads(reply.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RemoteError(f"No server answers at {path} ({error}); is it running?") from error
    finally:
        connection.close()
    if reply.status != http.client.OK:
        raise RemoteError(str(body.get("error", {}).get("message", reply.reason)))
    return body
