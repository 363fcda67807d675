"""The real application over a real Redis: who gets in, what is shown, what stays text."""

import os
import re
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
from fastapi import FastAPI
from starlette.testclient import TestClient

from buffer.browser import ReplayBrowser, Tally
from buffer.connection import connect
from buffer.endpoint import free_port
from buffer.replay import ReplayBuffer
from buffer.server import RedisServer
from cluster.config.project import UserError
from cluster.inspector.access import COOKIE, is_loopback, keep_token
from cluster.inspector.app import Target, build_app
from cluster.inspector.catalogue import Catalogue, Listing
from cluster.inspector.pages import POLICY
from cluster.inspector.queries import Query
from cluster.inspector.rows import Row
from cluster.inspector.serve import (
    HOST,
    InspectorGone,
    Place,
    answers,
    prefix,
    served_here,
)
from cluster.run.directory import RunDirectory
from tests.inspector_toy import (
    HOSTILE,
    TOKENIZER,
    config_of,
    filled,
    make_run,
    spelled,
    sums,
)

BASE = prefix("demo")
HERE = "http://127.0.0.1:8000"


def target_of(directory: RunDirectory, server: RedisServer) -> Target:
    return Target(
        config=config_of(directory),
        run=directory.name,
        root=directory.path.parent,
        buffer_url=server.url,
        buffer_password=server.password,
        token=keep_token(directory.path),
    )


def application(directory: RunDirectory, server: RedisServer) -> FastAPI:
    """As it is mounted when it is served."""
    target = target_of(directory, server)
    outer = FastAPI()
    outer.mount(prefix(target.run), build_app(target))
    return outer


def signed_in(app: FastAPI, directory: RunDirectory) -> TestClient:
    headers = {"Authorization": f"Bearer {keep_token(directory.path)}"}
    return TestClient(app, base_url=HERE, headers=headers)


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RunDirectory, RedisServer, ReplayBuffer]]:
    directory = make_run(tmp_path_factory.mktemp("runs"))
    with filled(directory, sums(120)) as (server, buffer):
        yield directory, server, buffer


@pytest.fixture(scope="module")
def directory(running: tuple[RunDirectory, RedisServer, ReplayBuffer]) -> RunDirectory:
    return running[0]


@pytest.fixture(scope="module")
def app(running: tuple[RunDirectory, RedisServer, ReplayBuffer]) -> FastAPI:
    return application(running[0], running[1])


@pytest.fixture
def client(app: FastAPI, directory: RunDirectory) -> TestClient:
    return signed_in(app, directory)


class Elements(HTMLParser):
    """The elements of a page, as a browser makes them, and the text outside style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not (self.tags and self.tags[-1][0] in ("style", "script")):
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [
            value or "" for _, attrs in self.tags for key, value in attrs.items() if key == name
        ]

    def ids(self) -> list[str]:
        """Trajectories that are linked to."""
        places = (
            re.search(r"/trajectory/([0-9a-f]{32})$", place) for place in self.attributes("href")
        )
        return [place[1] for place in places if place]


# --- who gets in


def test_without_the_token_nothing_is_shown(app: FastAPI) -> None:
    stranger = TestClient(app, base_url=HERE)
    for path in ("/", "/curves", f"/trajectory/{'0' * 32}", "/nowhere", "/?search=x"):
        answer = stranger.get(BASE + path)
        assert answer.status_code == 401, path
        assert "wants its token" in answer.text and "demo" not in answer.text
        assert "text/plain" in answer.headers["content-type"]


@pytest.mark.parametrize(
    "wrong", ["", "x", "x" * 43, "\u00e9", "'; --", "%00", "None", "*"], ids=range(8)
)
def test_a_wrong_token_is_refused_wherever_it_comes_from(
    app: FastAPI, directory: RunDirectory, wrong: str
) -> None:
    stranger = TestClient(app, base_url=HERE)
    assert stranger.get(f"{BASE}/", params={"token": wrong}).status_code == 403
    header = [(b"authorization", f"Bearer {wrong}".encode())]
    assert stranger.get(f"{BASE}/", headers=header).status_code == 403
    assert (
        stranger.get(f"{BASE}/", headers={"Cookie": f"{COOKIE}=x{len(wrong)}"}).status_code == 403
    )
    almost = keep_token(directory.path)[:-1]
    assert stranger.get(f"{BASE}/", params={"token": almost}).status_code == 403


def test_the_token_moves_from_the_address_into_a_cookie(
    app: FastAPI, directory: RunDirectory
) -> None:
    browser = TestClient(app, base_url=HERE)
    token = keep_token(directory.path)
    welcome = browser.get(f"{BASE}/", params={"token": token, "search": "a&b", "tool": "yes"})
    assert welcome.status_code == 200 and token not in welcome.text
    assert Elements(welcome.text).attributes("href") == [f"{BASE}/?search=a%26b&tool=yes"]
    cookie = welcome.headers["set-cookie"]
    assert {part.strip().lower() for part in cookie.split(";")[1:]} == {
        "httponly",
        "samesite=strict",
        f"path={BASE}",
    }
    table = browser.get(f"{BASE}/?tool=yes")
    assert table.status_code == 200 and token not in table.text
    assert '<table class="cards">' in table.text


def test_the_token_is_kept_private_and_stays_the_same(tmp_path: Path) -> None:
    token = keep_token(tmp_path)
    path = tmp_path / "inspector-token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert keep_token(tmp_path) == token and len(token) == 43
    path.chmod(0o644)
    assert keep_token(tmp_path) != token, "others could have read it"
    path.write_text("short")
    os.chmod(path, 0o600)
    assert len(keep_token(tmp_path)) == 43


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("localhost:1", True),
        ("LOCALHOST", True),
        ("[::1]:8000", True),
        ("", False),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("evil.example:127.0.0.1", False),
        ("127.0.0.1@evil.example", False),
        ("localhost:8000:8000", False),
        ("127.0.0.1 ", False),
        ("0.0.0.0:8000", False),
    ],
)
def test_only_the_loopback_is_answered(client: TestClient, host: str, ours: bool) -> None:
    assert is_loopback(host) is ours
    answer = client.get(f"{BASE}/curves", headers={"Host": host})
    assert answer.status_code == (200 if ours else 421)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_there_is_nothing_to_change(client: TestClient, method: str) -> None:
    assert client.request(method, f"{BASE}/").status_code == 405


def test_every_answer_forbids_what_the_page_does_not_need(client: TestClient, app: FastAPI) -> None:
    answers = [
        client.get(f"{BASE}/"),
        client.get(f"{BASE}/nowhere"),
        client.get(f"{BASE}/?page=0"),
        TestClient(app, base_url=HERE).get(f"{BASE}/"),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 400, 401]
    for answer in answers:
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
    assert "unsafe" not in POLICY and "default-src 'none'" in POLICY


# --- what is shown


def test_filters_of_the_address_reach_the_table(
    client: TestClient, directory: RunDirectory
) -> None:
    page = client.get(f"{BASE}/", params={"correct": "yes", "version_min": "9", "sort": "reward"})
    found = Elements(page.text).ids()
    expected = [t for t in sums(120) if t.correct and t.policy_version >= 9]
    assert found == [
        t.id for t in sorted(expected, key=lambda t: -t.terminal_log_reward) if t.id in found
    ]
    assert len(found) == len(expected) and f"<b>{len(expected)}</b> of 120 match" in page.text


def test_the_pages_of_the_table_are_linked(client: TestClient) -> None:
    seen: list[str] = []
    place = f"{BASE}/?sort=reward"
    while place:
        page = Elements(client.get(place).text)
        seen += page.ids()
        following = [attrs["href"] for tag, attrs in page.tags if attrs.get("rel") == "next"]
        place = following[0] or "" if following else ""
    assert len(seen) == len(set(seen)) == 120


def test_a_trajectory_is_shown_with_its_lineage_and_its_group(
    client: TestClient, running: tuple[RunDirectory, RedisServer, ReplayBuffer]
) -> None:
    buffer = running[2]
    shown = sums(120)[17]
    buffer.add([shown, shown])
    page = client.get(f"{BASE}/trajectory/{shown.id}")
    text = re.sub(r"\s+", " ", Elements(page.text).text)
    for expected in (
        "Question: 3 + 2 = ? Answer:",
        ". The answer is 5.",
        "verdict–",
        "actoractor-1",
        "version6, 0 ago",
        "on policy, temperature 1",
        "came again twice",
        "drawn from replaynever",
        "replaced0 near-duplicates",
        f"id{shown.id}",
    ):
        assert expected.replace(" ", "") in text.replace(" ", ""), expected
    assert re.search(r"<mark[^>]*> 5</mark>", page.text), "the tool's text is marked"
    assert page.text.count("<svg") == 4
    group = [t.id for t in sums(120) if t.prompt_key == shown.prompt_key]
    assert len(group) == 3 and set(Elements(page.text).ids()) == set(group)


def test_the_curves_are_shown(client: TestClient) -> None:
    page = client.get(f"{BASE}/curves")
    assert page.text.count("<svg") == 4
    assert "policy/version" in page.text and "log reward" in page.text


def test_held_out_prompts_are_shown_before_training_and_after_it(client: TestClient) -> None:
    page = client.get(f"{BASE}/held-out")
    assert HOSTILE[0] not in page.text, "what a model writes stays text"
    at = page.text.index('id="pairs"')
    base = (escape(HOSTILE[0]), "→ no answer", "wrong")
    for words in ("after step 120", "Question: 1 + 1 + 3", *base, "1 + 1 = 2", "→ 5", "right"):
        at = page.text.index(words, at)  # one behind the other, the base's before the policy's


def test_what_is_not_there_is_said(client: TestClient) -> None:
    for place, status, words in (
        (f"/trajectory/{'0' * 32}", 404, "not in replay"),
        ("/trajectory/..%2f..%2fetc", 404, "nowhere"),
        ("/nowhere", 404, "nowhere"),
        ("/?reward_min=much", 400, "reward_min"),
        ("/?search=nothing-of-that-kind", 200, "Nothing matches"),
    ):
        answer = client.get(BASE + place)
        assert (answer.status_code, words in answer.text) == (status, True), place


def test_looking_at_every_page_writes_nothing(
    running: tuple[RunDirectory, RedisServer, ReplayBuffer], client: TestClient
) -> None:
    server = running[1]
    with connect(server.url, password=server.password, timeout_s=5.0) as direct:
        before = contents(direct)
        first = Elements(client.get(f"{BASE}/").text).ids()[0]
        for place in (f"trajectory/{first}", "curves", "held-out"):
            client.get(f"{BASE}/{place}")
        assert contents(direct) == before


def contents(client: redis.Redis) -> dict[Any, Any]:
    keys: Any = client.keys("*")
    return {key: client.dump(key) for key in keys}


# --- what stays text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_on_every_page(tmp_path: Path, text: str) -> None:
    directory = make_run(tmp_path)
    writes = spelled(
        f"Q {text}",
        [(f" {text}", False), (f" T{text}", True), (" end", False)],
        answer=f"A {text}",
        task=f"task {text}",
        key=f"key {text}",
        actor=f"actor {text}",
    )
    with directory.metrics_file.open("a", encoding="utf-8") as file:
        file.write('{"step": 121, "x/<script>alert(1)</script>": 1.0}\n')
    with filled(directory, [writes]) as (server, _):
        client = signed_in(application(directory, server), directory)
        pages = {
            "table": client.get(f"{BASE}/"),
            "search": client.get(f"{BASE}/", params={"search": text, "prompt": text, "task": text}),
            "trajectory": client.get(f"{BASE}/trajectory/{writes.id}"),
            "curves": client.get(f"{BASE}/curves"),
            "bad": client.get(f"{BASE}/", params={"sort": text}),
        }
    visible = "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in text)
    for name, answer in pages.items():
        page = Elements(answer.text)
        kinds = Counter(tag for tag, _ in page.tags)
        assert (kinds["script"], kinds["img"], kinds["i"]) == (1, 0, 0), name
        assert answer.text.count('<script>"use strict";') == 1, "the script is the page's own"
        assert kinds["style"] == 1 and kinds["svg"] == answer.text.count('<svg viewBox="0 0'), name
        assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")], name
        addresses = page.attributes("href") + page.attributes("action") + page.attributes("src")
        assert all(place.startswith(("/inspect/demo", "#main")) for place in addresses), name
    for name in ("table", "trajectory"):
        assert visible in Elements(pages[name].text).text, name
    assert visible in Elements(pages["search"].text).attributes("value")


# --- a run that goes on


class Clock:
    """Seconds that pass when the test says so, and a little at every look."""

    def __init__(self, *, at_every_look: float = 0.0) -> None:
        self.now = 0.0
        self._step = at_every_look

    def __call__(self) -> float:
        self.now += self._step
        return self.now


def catalogue_of(directory: RunDirectory, server: RedisServer, clock: Clock) -> Catalogue:
    client = connect(server.url, password=server.password, timeout_s=5.0)
    return Catalogue(ReplayBrowser(client, run=directory.name), TOKENIZER.decode, clock=clock)


def test_the_table_follows_the_buffer(tmp_path: Path) -> None:
    directory, clock, some = make_run(tmp_path), Clock(), sums(12)
    with filled(directory, some[:6]) as (server, buffer):
        catalogue = catalogue_of(directory, server, clock)

        def listed() -> dict[str, Row]:
            clock.now += 100.0
            page = catalogue.page(catalogue.listing(), Query())
            assert [row.id for row in page.rows] == [entry.id for entry in page.entries]
            return {row.id: row for row in page.rows}

        assert listed().keys() == {t.id for t in some[:6]}
        buffer.seed(some[6:])
        assert listed().keys() == {t.id for t in some}
        buffer.discard(some[:2])
        assert listed().keys() == {t.id for t in some[2:]}
        buffer.add([replace(some[5], policy_version=11)])
        row = listed()[some[5].id]
        assert (row.version, row.tally) == (11, Tally(duplicates=1))
        assert "".join(piece.text for piece in row.pieces) == " 5 + 0 = 5, 5 5"


def test_the_buffer_is_left_in_peace_between_refreshes(tmp_path: Path) -> None:
    directory, clock = make_run(tmp_path), Clock()
    with filled(directory, sums(3)) as (server, buffer):
        catalogue = catalogue_of(directory, server, clock)
        first = catalogue.listing()
        buffer.seed(sums(4)[3:])
        assert catalogue.listing() is first
        clock.now += 2.0
        assert len(catalogue.listing().entries) == 4


def test_a_large_buffer_is_read_by_and_by(tmp_path: Path) -> None:
    directory, clock = make_run(tmp_path), Clock(at_every_look=10.0)
    many = [spelled(f"Q{number}", [(f" {number}", False)]) for number in range(70)]
    with filled(directory, many) as (server, _):
        catalogue = catalogue_of(directory, server, clock)
        progress = [(len(found.entries), found.unread_prompts) for found in listings(catalogue, 5)]
    assert progress == [(20, 50), (40, 30), (60, 10), (70, 0), (70, 0)]


@pytest.mark.parametrize(
    "text", ["3 + 2", "5, 17", "ANSWER IS 4", "question: 1", "e", "no such", "0a"]
)
def test_a_search_finds_what_a_plain_reading_does(
    running: tuple[RunDirectory, RedisServer, ReplayBuffer], text: str
) -> None:
    catalogue = catalogue_of(running[0], running[1], Clock())
    found = catalogue.page(catalogue.listing(), Query(search=text))
    folded = text.casefold()
    expected = {
        t.id
        for t in sums(120)
        if t.id.startswith(folded)
        or any(
            folded in TOKENIZER.decode(part.tolist()).casefold()
            for part in (t.prompt, t.completion, t.answer)
        )
    }
    assert (found.matching, found.unsearched) == (len(expected), 0)
    assert {row.id for row in found.rows} <= expected


def test_a_long_search_goes_on_where_it_ended(tmp_path: Path) -> None:
    directory, clock = make_run(tmp_path), Clock()
    many = [spelled(f"Q{n}", [(f" {n}", False)], answer=" done") for n in range(120)]
    with filled(directory, many) as (server, _):
        catalogue = catalogue_of(directory, server, clock)
        listing, slow = catalogue.listing(), Clock(at_every_look=1.0)
        catalogue._clock = slow
        progress = [catalogue.page(listing, Query(search=" 7")) for _ in range(4)]
        assert [page.unsearched for page in progress] == [70, 20, 0, 0]
        assert [page.matching for page in progress][-1] == 11
        other = catalogue.page(listing, Query(search="q7", sort="prompt"))
        assert (other.matching, other.unsearched) == (11, 59)


def listings(catalogue: Catalogue, count: int) -> Iterator[Listing]:
    for _ in range(count):
        yield catalogue.listing()


def test_a_redis_that_is_gone_is_said_and_found_again(tmp_path: Path) -> None:
    directory = make_run(tmp_path, phase="training")
    with filled(directory, sums(3)) as (server, _):
        client = signed_in(application(directory, server), directory)
        assert client.get(f"{BASE}/").status_code == 200
    answer = client.get(f"{BASE}/trajectory/{sums(3)[0].id}")
    assert answer.status_code == 503 and "did not answer" in answer.text
    assert "data-refresh" not in answer.text, "a message stays"
    assert server.password not in answer.text
    with filled(directory, []):
        assert client.get(f"{BASE}/trajectory/{sums(3)[0].id}").status_code == 200


# --- being served


def test_it_is_served_on_a_port_of_its_own_until_it_is_left(
    running: tuple[RunDirectory, RedisServer, ReplayBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(running[0], running[1])
    with served_here(target, port=free_port(HOST)) as place:
        request = urllib.request.Request(
            place.url, headers={"Authorization": f"Bearer {target.token}"}
        )
        with urllib.request.urlopen(request, timeout=30.0) as answer:
            assert b"trajectories in replay" in answer.read()
        place.watch()
        with pytest.raises(UserError, match=f"port {place.port} of .* is in use"):
            served_here(target, port=place.port).__enter__()
    monkeypatch.setattr("cluster.inspector.serve._SILENCE_TIMEOUT_S", 0.5)
    with pytest.raises(InspectorGone, match=r"the Ray cluster has ended.*inspect --run demo"):
        place.watch()


def test_another_program_on_the_port_does_not_pass_for_the_inspector() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b"give me your token")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer((HOST, 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        assert not answers(Place("demo", other.server_port), within_s=0.5)
        other.shutdown()
        thread.join()
