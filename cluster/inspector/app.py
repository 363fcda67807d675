"""The inspector as a web application: addresses, and which page each of them is."""

from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse

from buffer.connection import BufferUnreachable, NotOurRedis, WrongPassword
from cluster.inspector.access import Gate
from cluster.inspector.curves import draw_curves
from cluster.inspector.pages import POLICY, Pages
from cluster.inspector.queries import BadQuery, parse_query
from cluster.inspector.sources import Gone, Sources

_LIVE = ("starting", "evaluating", "training", "stopping")


def base_of(request: Request) -> str:
    """What every address of the inspector begins with."""
    return str(request.scope.get("root_path", "")).rstrip("/")


Base = Annotated[str, Depends(base_of)]


def build_app(sources: Sources, *, token: str) -> FastAPI:
    """The application. Its handlers read files and Redis, so they run in threads.

    Args:
        token: without which nothing is shown.
    """
    app = FastAPI(title="amortize inspector", docs_url=None, redoc_url=None, openapi_url=None)
    pages = Pages(sources.directory.name)

    def is_live() -> bool:
        state = sources.state()
        return state is not None and state.phase in _LIVE

    @app.get("/", response_class=HTMLResponse)
    def table(request: Request, base: Base) -> str:
        query = parse_query(request.query_params)
        listing = sources.catalogue.listing()
        page = sources.catalogue.page(listing, query)
        return pages.table(
            page,
            query,
            listing,
            tasks=sorted({entry.task for entry in listing.entries}),
            state=sources.state(),
            base=base,
            live=is_live() or listing.unread_prompts + page.unsearched > 0,
        )

    @app.get("/trajectory/{id}", response_class=HTMLResponse)
    def trajectory(id: str, base: Base) -> str:
        detail = sources.detail(id)
        return pages.trajectory(detail, state=sources.state(), base=base, live=is_live())

    @app.get("/curves", response_class=HTMLResponse)
    def curves(base: Base) -> str:
        drawn = draw_curves(sources.metrics.rows())
        return pages.curves(drawn, state=sources.state(), base=base, live=is_live())

    explain_errors(app, sources, pages)
    app.add_middleware(Gate, token=token, policy=POLICY)
    return app


def explain_errors(app: FastAPI, sources: Sources, pages: Pages) -> None:
    """Pages for what can go wrong."""

    def page(request: Request, status: int, title: str, text: str) -> HTMLResponse:
        state = sources.state()
        content = pages.message(title, text, state=state, base=base_of(request))
        return HTMLResponse(content, status_code=status)

    def bad_query(request: Request, error: Exception) -> HTMLResponse:
        return page(request, 400, "This filter cannot be read", str(error))

    def gone(request: Request, error: Exception) -> HTMLResponse:
        return page(
            request,
            404,
            "No such trajectory",
            "It is not in replay: a better one may have replaced it, or it was evicted.",
        )

    def unreachable(request: Request, error: Exception) -> HTMLResponse:
        return page(request, 503, "The run's Redis does not answer", str(error))

    def unknown(request: Request, error: Exception) -> HTMLResponse:
        return page(request, 404, "No such page", "This address leads nowhere.")

    app.add_exception_handler(BadQuery, bad_query)
    app.add_exception_handler(Gone, gone)
    for kind in (BufferUnreachable, WrongPassword, NotOurRedis):
        app.add_exception_handler(kind, unreachable)
    app.add_exception_handler(404, unknown)
