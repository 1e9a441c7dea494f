"""The application: every interface over one engine, behind one guard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..http import Pin
from ..image.addresses import public_address
from ..version import __version__
from . import anthropic, ollama, openai_chat, openai_responses
from .ask import Service
from .engine import Engine
from .errors import ApiError
from .guard import Guard
from .invalid import explain
from .media import Media
from .metrics import Metrics
from .settings import Settings
from .streams import service_of

PAGE = Path(__file__).with_name("page")
# The page's own files and nothing else; its pictures come from the user, as data or blobs.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self'; connect-src 'self'; manifest-src 'self'; "
    "worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def create_app(
    engine: Engine, settings: Settings | None = None, *, pin: Pin = public_address
) -> FastAPI:
    """The server's application; its engine is started and closed by whoever made it.

    Args:
        engine: what answers.
        settings: what is allowed.
        pin: chooses the address of each host of a remote image; by default a checked public one.
    """
    settings = settings or Settings()
    media, metrics = Media(settings, pin), Metrics(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        media.close()

    app = FastAPI(
        title="fastvlm-mlx",
        version=__version__,
        docs_url=None,  # it would load its scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = Service(engine, settings, media, metrics)
    for interface in (openai_chat, openai_responses, anthropic, ollama):
        app.include_router(interface.router)
    _add_health(app, engine, metrics, settings.stall_timeout)
    _add_page(app)
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_middleware(Guard, settings=settings, on_done=metrics.done)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return app


def _add_health(app: FastAPI, engine: Engine, metrics: Metrics, longest: float) -> None:
    """Whether the server works, whether it can take requests, and what it has done."""

    def status() -> str:
        if not engine.alive:
            return "dead"
        return "hung" if engine.step_seconds > longest else "ok"

    @app.get("/health", tags=["Server"])
    async def health() -> JSONResponse:
        found = status()
        return JSONResponse({"status": found, "model": engine.name}, 200 if found == "ok" else 503)

    @app.get("/ready", tags=["Server"])
    async def ready() -> JSONResponse:
        can = engine.ready and status() == "ok"
        state = {"ready": can, "queued": engine.queued, "running": engine.running}
        return JSONResponse(state, 200 if can else 503)

    @app.get("/metrics", tags=["Server"])
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    """The files of the page, found once: a request chooses among them and names no path."""
    files = {path.name: path for path in sorted(PAGE.glob("*")) if path.is_file()}

    @app.api_route("/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name], headers=PAGE_HEADERS)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        if "index.html" not in files:
            return JSONResponse({"name": "fastvlm-mlx", "version": __version__})
        return FileResponse(files["index.html"], headers=PAGE_HEADERS)


async def _refuse_invalid(http: Request, error: Exception) -> Response:
    """A body that is not what the interface takes: where, and what it should be."""
    assert isinstance(error, RequestValidationError)
    raise explain(error.errors())


async def _refuse_route(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {
        400: "The request's body can't be read as JSON.",
        404: "There is nothing at this address; GET /openapi.json lists what there is.",
        405: "This address takes another method; GET /openapi.json lists them.",
    }
    service_of(http)
    raise ApiError(error.status_code, said.get(error.status_code, "The request can't be served."))
