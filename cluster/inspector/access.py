"""Access control: requests to this machine's loopback that carry the run's token pass.

A page of any other site can make a browser send requests to 127.0.0.1, even under a name of its
own (DNS rebinding): so the Host header must name the loopback, and the token, which such a page
cannot know, must come with every request.
"""

import hmac
import re
import secrets
from pathlib import Path
from urllib.parse import urlencode

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from buffer.folder import write_private
from cluster.reports.html_page import escaped

COOKIE = "amortize-inspector"
TOKEN_PARAMETER = "token"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
NO_TOKEN = (
    "This inspector wants its token. Open the address that 'amortize inspect' printed. The token is"
    " also in the file inspector-token of the run's folder; a program may send it as"
    " 'Authorization: Bearer TOKEN'.\n"
)
_WRONG_TOKEN = "This is not the token of this inspector.\n"
_WRONG_HOST = "This inspector answers to 127.0.0.1 and localhost only.\n"
_ONLY_READS = "This inspector only shows things: it answers GET and HEAD.\n"


def keep_token(folder: Path) -> str:
    """The token of a run: what an earlier inspector left in its folder, else a new one."""
    path = folder / "inspector-token"
    if path.is_file() and path.stat().st_mode & 0o077 == 0:
        token = path.read_text(encoding="utf-8", errors="replace")
        if _TOKEN.fullmatch(token):
            return token
    token = secrets.token_urlsafe(32)
    write_private(path, token)
    return token


def is_loopback(host: str) -> bool:
    """Whether a Host header names this machine's loopback, with any port."""
    return _LOOPBACK.fullmatch(host) is not None


class Gate(BaseHTTPMiddleware):
    """Passes a request to `app`, or answers it with the reason for the refusal.

    A token in the address is taken once: it moves into a cookie that no script can read and that
    no other site can make the browser send. `policy` is the content policy of all answers.
    """

    def __init__(self, app: ASGIApp, *, token: str, policy: str) -> None:
        super().__init__(app)
        self._token = token
        self._headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Answer one request."""
        answer = self._refusal_or_welcome(request) or await call_next(request)
        answer.headers.update(self._headers)
        return answer

    def _refusal_or_welcome(self, request: Request) -> Response | None:
        """None for a request that may pass."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not is_loopback(hosts[0]):
            return PlainTextResponse(_WRONG_HOST, status_code=421)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse(_ONLY_READS, status_code=405, headers={"Allow": "GET, HEAD"})
        in_address = request.query_params.get(TOKEN_PARAMETER)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        in_header = bearer if scheme.lower() == "bearer" else None
        places = (in_address, in_header, request.cookies.get(COOKIE))
        offered = next((token for token in places if token is not None), None)
        if offered is None:
            return PlainTextResponse(NO_TOKEN, status_code=401)
        ours = self._token.encode()
        if not hmac.compare_digest(offered.encode("utf-8", "surrogateescape"), ours):
            return PlainTextResponse(_WRONG_TOKEN, status_code=403)
        return None if in_address is None else self._welcome(request)

    def _welcome(self, request: Request) -> Response:
        """Sets the cookie, and goes on to the same address without the token.

        By a page and not by a redirect: where a link on another site was followed here, the
        browser would leave the cookie out of a redirected request.
        """
        rest = [(k, v) for k, v in request.query_params.multi_items() if k != TOKEN_PARAMETER]
        target = escaped(request.url.path + (f"?{urlencode(rest)}" if rest else ""))
        response = HTMLResponse(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Inspector</title>'
            f'<meta http-equiv="refresh" content="0; url={target}">'
            f'<p><a href="{target}">Go on to the inspector</a></p></html>'
        )
        place = request.scope.get("root_path") or "/"
        response.set_cookie(COOKIE, self._token, path=place, httponly=True, samesite="strict")
        return response
