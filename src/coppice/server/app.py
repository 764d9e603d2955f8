"""The application: routes, middleware and the OpenAPI document."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

import coppice
from coppice.server.document import install_document
from coppice.server.early import EarlyRefusal
from coppice.server.errors import install_handlers
from coppice.server.guard import Guard, RequestIds
from coppice.server.limits import BodyLimits
from coppice.server.routes import (
    chat,
    completions,
    health,
    models,
    operate,
    resume,
    sessions,
    text,
)
from coppice.server.services import Services

PAGE_FOLDER = Path(__file__).parent / "page"
PAGE_PREFIX = "/page/"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def build_app(services: Services) -> FastAPI:
    """The ASGI application over these services."""
    page = PAGE_FOLDER if (PAGE_FOLDER / "index.html").is_file() else None
    app = FastAPI(
        title="Coppice",
        version=coppice.__version__,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        middleware=[
            Middleware(RequestIds, metrics=services.metrics),
            Middleware(
                Guard,
                config=services.config,
                keys=services.keys,
                public_prefix=PAGE_PREFIX if page else None,
            ),
            Middleware(EarlyRefusal, services=services),
            Middleware(BodyLimits, config=services.config),
        ],
    )
    app.state.services = services
    install_handlers(app)
    for room in (chat, completions, models, text, health, operate, resume, sessions):
        app.include_router(room.router)
    install_document(app, services)
    if page is not None:
        _mount_page(app, page)
    return app


class _PageFiles(StaticFiles):
    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers.update(PAGE_HEADERS)
        return response


def _mount_page(app: FastAPI, folder: Path) -> None:
    """``index.html`` at ``/`` and the folder's files under ``/page/``."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(folder / "index.html", headers=PAGE_HEADERS)

    app.mount(PAGE_PREFIX.rstrip("/"), _PageFiles(directory=folder), name="page")
