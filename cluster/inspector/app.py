"""The inspector as a web application: which page answers which address."""

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from buffer.connection import BufferUnreachable, NotOurRedis, WrongPassword
from cluster.inspector.access import Gate
from cluster.inspector.curves import draw_curves
from cluster.inspector.pages import POLICY, environment_of, facts
from cluster.inspector.queries import BadQuery, parse_query
from cluster.inspector.sources import Gone, Sources, Target


def build_app(target: Target) -> FastAPI:
    """The application. Its handlers read files and Redis, so they run in threads."""
    app = FastAPI(title="amortize inspector", docs_url=None, redoc_url=None, openapi_url=None)
    sources = Sources(target)
    environment = environment_of(target.run)

    def page(
        request: Request, template: str, *, growing: bool = False, **context: Any
    ) -> HTMLResponse:
        """A template, filled; it refreshes itself while the run goes on or what it shows grows."""
        state = sources.state()
        live = growing or (state is not None and not state.ended)
        base = str(request.scope.get("root_path", "")).rstrip("/")
        text = environment.get_template(f"{template}.html").render(
            facts=facts(state), now=time.time(), base=base, live=live, **context
        )
        return HTMLResponse(text)

    @app.get("/")
    def table(request: Request) -> HTMLResponse:
        query = parse_query(request.query_params)
        listing = sources.catalogue.listing()
        found = sources.catalogue.page(listing, query)
        growing = listing.unread_prompts + found.unsearched > 0
        tasks = sorted({entry.task for entry in listing.entries})
        shown = {"page": found, "query": query, "listing": listing, "tasks": tasks}
        return page(request, "table", growing=growing, **shown)

    @app.get("/trajectory/{id}")
    def trajectory(request: Request, id: str) -> HTMLResponse:
        return page(request, "trajectory", detail=sources.detail(id))

    @app.get("/curves")
    def curves(request: Request) -> HTMLResponse:
        return page(request, "curves", curves=draw_curves(sources.metrics.rows()))

    def explain(kind: type[Exception] | int, status: int, title: str, text: str = "") -> None:
        """Answer such errors with a page that explains them."""

        def answer(request: Request, error: Exception) -> HTMLResponse:
            message = page(request, "message", title=title, text=text or str(error))
            message.status_code = status
            return message

        app.add_exception_handler(kind, answer)

    explain(BadQuery, 400, "This filter cannot be read")
    explain(404, 404, "No such page", "This address leads nowhere.")
    missing = "It is not in replay: a better one may have replaced it, or it was evicted."
    explain(Gone, 404, "No such trajectory", missing)
    for kind in (BufferUnreachable, WrongPassword, NotOurRedis):
        explain(kind, 503, "The run's Redis does not answer")
    app.add_middleware(Gate, token=target.token, policy=POLICY)
    return app
