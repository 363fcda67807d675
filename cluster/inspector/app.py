"""The inspector as a web application: which page answers which address."""

from typing import Annotated, Any

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
    """The prefix of every address of the inspector."""
    return str(request.scope.get("root_path", "")).rstrip("/")


Base = Annotated[str, Depends(base_of)]


def build_app(sources: Sources, *, token: str) -> FastAPI:
    """The application. Its handlers read files and Redis, so they run in threads.

    Args:
        token: without which nothing is shown.
    """
    app = FastAPI(title="amortize inspector", docs_url=None, redoc_url=None, openapi_url=None)
    pages = Pages(sources.directory.name)

    def page(template: str, base: str, *, growing: bool = False, **context: Any) -> str:
        state = sources.state()
        live = growing or (state is not None and state.phase in _LIVE)
        return pages.render(template, state=state, base=base, live=live, **context)

    @app.get("/", response_class=HTMLResponse)
    def table(request: Request, base: Base) -> str:
        query = parse_query(request.query_params)
        listing = sources.catalogue.listing()
        found = sources.catalogue.page(listing, query)
        tasks = sorted({entry.task for entry in listing.entries})
        return page(
            "table",
            base,
            growing=listing.unread_prompts + found.unsearched > 0,
            page=found,
            query=query,
            listing=listing,
            tasks=tasks,
        )

    @app.get("/trajectory/{id}", response_class=HTMLResponse)
    def trajectory(id: str, base: Base) -> str:
        return page("trajectory", base, detail=sources.detail(id))

    @app.get("/curves", response_class=HTMLResponse)
    def curves(base: Base) -> str:
        return page("curves", base, curves=draw_curves(sources.metrics.rows()))

    explain_errors(app, sources, pages)
    app.add_middleware(Gate, token=token, policy=POLICY)
    return app


def explain_errors(app: FastAPI, sources: Sources, pages: Pages) -> None:
    """Answer errors with a page that explains them."""

    def explain(kind: type[Exception] | int, status: int, title: str, text: str = "") -> None:
        def answer(request: Request, error: Exception) -> HTMLResponse:
            content = pages.render(
                "message",
                state=sources.state(),
                base=base_of(request),
                live=False,
                title=title,
                text=text or str(error),
            )
            return HTMLResponse(content, status_code=status)

        app.add_exception_handler(kind, answer)

    explain(BadQuery, 400, "This filter cannot be read")
    explain(404, 404, "No such page", "This address leads nowhere.")
    missing = "It is not in replay: a better one may have replaced it, or it was evicted."
    explain(Gone, 404, "No such trajectory", missing)
    for kind in (BufferUnreachable, WrongPassword, NotOurRedis):
        explain(kind, 503, "The run's Redis does not answer")
