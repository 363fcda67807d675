"""The inspector as a web application: what it opens of a run, which page has which address."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from buffer.browser import ReplayBrowser
from buffer.connection import BufferUnreachable, NotOurRedis, WrongPassword, connect
from cluster.config.schema import RunConfig
from cluster.inspector.access import Gate
from cluster.inspector.catalogue import Catalogue
from cluster.inspector.curves import RowsByStep, draw_curves
from cluster.inspector.detail import Gone, read_detail
from cluster.inspector.pages import POLICY, environment_of
from cluster.inspector.queries import BadQuery, parse_query
from cluster.reports.score_table import after_title, pairs, rows
from cluster.run.directory import RunDirectory, read_scores
from lm.hub import load_tokenizer

# A person waits for a page, not a run: short.
_REDIS_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Run, buffer and token that a process on this machine shows a run with."""

    config: RunConfig
    run: str
    root: Path  # of all runs
    buffer_url: str
    buffer_password: str | None = field(repr=False)
    token: str = field(repr=False)


def build_app(target: Target) -> FastAPI:
    """The application. Its handlers read files and Redis, so they run in threads.

    Raises:
        BufferUnreachable, WrongPassword, NotOurRedis: about the run's Redis.
        ModelNotFound, ModelUnusable: about its tokenizer.
    """
    app = FastAPI(title="amortize inspector", docs_url=None, redoc_url=None, openapi_url=None)
    directory = RunDirectory(target.run, root=target.root)
    decode = load_tokenizer(target.config.lm).decode
    password, timeout_s = target.buffer_password, _REDIS_TIMEOUT_S
    client = connect(target.buffer_url, password=password, timeout_s=timeout_s)
    browser = ReplayBrowser(client, run=target.run)
    catalogue = Catalogue(browser, decode)
    recorded = RowsByStep(directory.metrics_file)
    environment = environment_of(target.run)

    def page(
        request: Request, template: str, *, growing: bool = False, **context: Any
    ) -> HTMLResponse:
        """A template, filled; it refreshes itself while the run goes on or what it shows grows."""
        state = directory.state()
        live = growing or (state is not None and not state.ended)
        base = str(request.scope.get("root_path", "")).rstrip("/")
        text = environment.get_template(f"{template}.html").render(
            state=state, now=time.time(), base=base, live=live, **context
        )
        return HTMLResponse(text)

    @app.get("/")
    def table(request: Request) -> HTMLResponse:
        query = parse_query(request.query_params)
        listing = catalogue.listing()
        found = catalogue.page(listing, query)
        growing = listing.unread_prompts + found.unsearched > 0
        tasks = sorted({entry.task for entry in listing.entries})
        shown = {"page": found, "query": query, "listing": listing, "tasks": tasks}
        return page(request, "table", growing=growing, **shown)

    @app.get("/trajectory/{id}")
    def trajectory(request: Request, id: str) -> HTMLResponse:
        state, version = directory.state(), catalogue.listing().stats.version
        t = target.config.learner.reward_temperature.at(0 if state is None else state.step)
        detail = read_detail(browser, id, decode, temperature=t, version=version)
        return page(request, "trajectory", detail=detail)

    @app.get("/held-out")
    def held_out(request: Request) -> HTMLResponse:
        known = read_scores(directory, lambda _: None)
        both = known.before, known.after
        after = after_title(known.after)
        return page(request, "held_out", rows=rows(*both), pairs=pairs(*both), after=after)

    @app.get("/curves")
    def curves(request: Request) -> HTMLResponse:
        return page(request, "curves", curves=draw_curves(recorded.rows()))

    _explain_errors(app, page)
    app.add_middleware(Gate, token=target.token, policy=POLICY)
    return app


def _explain_errors(app: FastAPI, page: Callable[..., HTMLResponse]) -> None:
    def explain(kind: type[Exception] | int, status: int, title: str, text: str = "") -> None:
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
