"""The web application of a served study: the pack's own page for one reader, what that reader may fetch and send, and the organiser's view.

A reader's page holds that reader's order and the items in it, nothing else; a file is served only if those items name it. The key is
nowhere near: this process never reads it. An answer is acknowledged after its transaction has been committed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sqlite3
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from medgen.study.attempts import Attempts
from medgen.study.progress import progress, responses_csv
from medgen.study.responses import COLUMNS, STUDY, Pack, ResponseError, read_answer
from medgen.study.store import Given, Locked, Store, now

ORGANISER = "organiser"
LARGEST_BODY = 4 * 1024**2
MOST_ROWS = 2000
LONGEST_CELL = {"nonce": 100, "session": 100, "timestamp": 40, "viewer_version": 100}
COOKIE_SECONDS = 400 * 86_400  # a study with a wash-out lasts months; browsers keep no cookie longer
SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # the address of a log-in link never travels on
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Refused(HTTPException):
    """A request that is answered with a 4xx status and one sentence that says why."""


class Site:
    """One pack, its database, and who may see what."""

    def __init__(self, pack: Pack, store: Store, secure: bool = False) -> None:
        """`secure`: readers come by https (through a proxy), so cookies travel by https only."""
        self.pack, self.store, self.secure = pack, store, secure
        self.page = (pack.folder / "index.html").read_text("utf-8")
        self.study = json.loads(STUDY.search(self.page)["json"])  # type: ignore[index]  # read_pack found it
        self.questions = {(name, q["id"]): q for name, item in pack.items.items() for q in item["questions"]}
        self.media = {reader: media_of(pack, reader) for reader in pack.orders}
        self.attempts = Attempts()
        self.seen: dict[str, str] = {}
        self.templates = Environment(loader=PackageLoader("medgen.study"), autoescape=True, undefined=StrictUndefined)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self.index),
            Route("/media/{name:path}", self.file),
            Route("/api/answers", self.answers, methods=["POST"]),
            Route("/api/mine", self.mine),
            Route("/progress", self.progress),
            Route("/responses.csv", self.responses),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self.refused, sqlite3.Error: self.not_stored})

    # Who is asking

    def cookie(self, role: str) -> str:
        """Cookies are shared by all ports of a host: two studies, or reader and organiser, must not overwrite each other's."""
        return f"medgen_{role}_{self.pack.sha256[:12]}"

    def who(self, request: Request, role: str) -> str:
        """The reader, or the organiser, whose cookie this is; refuses what is no token, and slows who tries many."""
        token = request.cookies.get(self.cookie(role))
        if token is None:
            raise Refused(401, "not logged in: open the link that you were sent")
        holder = self.store.holder(token)
        if holder is None or (holder == ORGANISER) != (role == ORGANISER):
            self.attempts.failed(address(request))
            raise Refused(401, "your log-in is no longer valid: ask the organiser for a new link")
        self.seen[holder] = now()
        return holder

    def login(self, request: Request, token: str) -> Response:
        """Exchange the token for a cookie, and leave its address at once."""
        self.attempts.check(address(request))
        holder = self.store.holder(token)
        if holder is None:
            self.attempts.failed(address(request))
            raise Refused(403, "this link is not valid (any more): ask the organiser for a new one")
        role = ORGANISER if holder == ORGANISER else "reader"
        # Not a 3xx: a browser that came from a web mail would not send a SameSite=Strict cookie along with the redirected request.
        # A refresh is a navigation of our own, and replaces the address with the token in the history.
        target = "/progress" if role == ORGANISER else "/"
        answer = HTMLResponse(f'<!doctype html><title>…</title><a href="{target}">Continue</a>', headers=SAFE)
        answer.headers["refresh"] = f"0; url={target}"
        secure = self.secure or request.url.scheme == "https"
        answer.set_cookie(self.cookie(role), token, COOKIE_SECONDS, path="/", httponly=True, samesite="strict", secure=secure)
        return answer

    # Readers

    def index(self, request: Request) -> Response:
        """The study's page of the reader who is logged in."""
        if "token" in request.query_params:
            return self.login(request, request.query_params["token"])
        if self.cookie("reader") not in request.cookies and self.cookie(ORGANISER) in request.cookies:
            return RedirectResponse("/progress", 303, headers=SAFE)
        page = reader_page(self.page, self.study, self.who(request, "reader"))
        return HTMLResponse(page, headers=SAFE | {"content-security-policy": policy(page)})

    def file(self, request: Request) -> Response:
        """A picture or film that one of the reader's items shows; nothing else exists."""
        reader, name = self.who(request, "reader"), f"media/{request.path_params['name']}"
        shown_by = self.media[reader].get(name, ())
        if not any(before <= self.store.answered(reader, item) if before else True for item, before in shown_by):
            raise Refused(404, "no such file among your items, or not yet")
        return FileResponse(self.pack.folder / name, headers=SAFE | {"cache-control": "private, max-age=86400, immutable"})

    async def answers(self, request: Request) -> Response:
        """Store answers, all or none of them; acknowledges when they are on the disk."""
        reader = await run_in_threadpool(self.who, request, "reader")
        if not same_origin(request):
            raise Refused(403, "answers are taken from the study's own page only")
        given = [self.given(reader, row, number) for number, row in enumerate(await rows_of(request))]
        try:
            new = await run_in_threadpool(self.store.add, given)
        except Locked as error:
            raise Refused(409, str(error)) from None
        return JSONResponse({"saved": new, "acknowledged": [one.nonce for one in given]}, headers=SAFE)

    def given(self, reader: str, row: Any, number: int) -> Given:
        """One row of the request's body, held to the rules by which the analysis reads it."""
        if not isinstance(row, dict) or set(row) != {*COLUMNS, "nonce"}:
            raise Refused(422, f"answers[{number}]: expected an object with {', '.join((*COLUMNS, 'nonce'))}")
        try:
            cells = {name: cell(name, value) for name, value in row.items()}
            if cells["reader"] != reader:
                raise Refused(403, f"answers[{number}]: you are logged in as {reader!r}, not as {cells['reader']!r}")
            if cells["viewer_version"] != str(self.study.get("version")):
                raise ResponseError(
                    f"answered in page {cells['viewer_version']!r}; reload this one ({self.study.get('version')!r})"
                )
            read_answer(cells, self.pack, "", number)
        except ResponseError as error:
            raise Refused(422, f"answers[{number}]: {error}") from None
        question = self.questions[cells["item"], cells["question"]]
        locked = bool(question.get("before_reveal"))
        return Given(reader, cells["item"], cells["question"], cells["nonce"], cells, locked)

    def mine(self, request: Request) -> Response:
        """What the reader has answered so far, as the page sent it: to go on where a closed browser stopped."""
        reader = self.who(request, "reader")
        study = {"study_id": self.pack.study_id, "pack_sha256": self.pack.sha256}
        rows = [{**study, **{name: row[name] for name in COLUMNS if name in row}} for row in self.store.rows(reader)]
        return JSONResponse({"reader": reader, "answers": rows}, headers=SAFE)

    # The organiser

    def progress(self, request: Request) -> Response:
        """How far everyone is: a page for browsers, JSON for programs."""
        self.who(request, ORGANISER)
        found = progress(self.pack, self.store.rows(), self.seen)
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse(found, headers=SAFE)
        page = self.templates.get_template("progress.html.j2").render(p=found)
        return HTMLResponse(page, headers=SAFE | {"content-security-policy": policy(page)})

    def responses(self, request: Request) -> Response:
        """Every reader's last answers, as `medgen study analyze` reads them."""
        self.who(request, ORGANISER)
        name = f"attachment; filename=\"responses.csv\"; filename*=UTF-8''responses-{self.pack.sha256[:12]}.csv"
        text = responses_csv(self.pack, self.store.rows())
        return Response(text, media_type="text/csv", headers=SAFE | {"content-disposition": name})

    # What goes wrong

    def refused(self, request: Request, error: Exception) -> Response:
        """One sentence, as a page for a person and as JSON for the study's page."""
        assert isinstance(error, HTTPException)
        headers = SAFE | dict(error.headers or {})
        if request.url.path in ("/", "/progress") and "text/html" in request.headers.get("accept", ""):
            page = self.templates.get_template("refused.html.j2").render(title=self.pack.title, says=error.detail)
            return HTMLResponse(page, error.status_code, headers | {"content-security-policy": policy(page)})
        return JSONResponse({"error": error.detail}, error.status_code, headers)

    def not_stored(self, _: Request, error: Exception) -> Response:
        """The disk is full, say: nothing was stored, and the page will try again."""
        says = f"the server could not use its database ({error}); nothing was saved, try again"
        return JSONResponse({"error": says}, 503, SAFE | {"retry-after": "5"})


def address(request: Request) -> str:
    """Where a request comes from (uvicorn puts the client here when a proxy on this machine forwards for it)."""
    return request.client.host if request.client else ""


def same_origin(request: Request) -> bool:
    """Sent by a page of this server: browsers say so in headers that no script can forge."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        return site == "same-origin"
    return origin is not None and urlsplit(origin).netloc == request.headers.get("host")


async def rows_of(request: Request) -> list[Any]:
    """The answers in a request's body; refuses what is too long, not JSON, or not a list of rows."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_BODY:
                raise Refused(413, f"more than {LARGEST_BODY // 1024**2} MB of answers at once")
    except ClientDisconnect:
        raise Refused(400, "the connection ended before the answers did") from None
    try:
        rows = json.loads(body.decode("utf-8"), parse_constant=_no_constant)["answers"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(400, 'expected JSON: {"answers": [rows]}') from None
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_ROWS:
        raise Refused(400, f"expected 1 to {MOST_ROWS} answers")
    return rows


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def cell(name: str, value: Any) -> str:
    """A value as its cell of the CSV. Raises `ResponseError` for what no page sends."""
    if value is None:
        value = ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ResponseError(f"{name} is neither text nor a number")
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    text = str(value)
    if name == "answer":
        text = text.replace("\x00", "")
    elif re.search(r"[\x00-\x1f\x7f]", text) or len(text) > LONGEST_CELL.get(name, 200) or (name == "nonce" and not text):
        raise ResponseError(f"{name} is empty, too long, or holds control characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ResponseError(f"{name} holds half a character (a lone surrogate)") from None
    return text


def media_of(pack: Pack, reader: str) -> dict[str, list[tuple[str, frozenset[str]]]]:
    """The files that a reader's items name, each with its items and the questions to be answered before it is shown.

    All of them lie in the pack's media folder and are checked by SHA256SUMS; `ResponseError` if not.
    """
    listed = {line.partition("  ")[2].strip() for line in (pack.folder / "SHA256SUMS").read_text("utf-8").splitlines()}
    named: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for item in pack.orders[reader]:
        first = frozenset(q["id"] for q in pack.items[item]["questions"] if q.get("before_reveal"))
        for shown in pack.items[item]["media"]:
            before = first if shown.get("reveal") else frozenset()
            for file in (shown.get("file"), *(frame["file"] for frame in shown.get("frames") or [])):
                if file is not None:
                    named.setdefault(file, []).append((item, before))
    for file in named:
        if not file.startswith("media/") or file not in listed:
            raise ResponseError(f"{pack.folder}: an item names {file!r}, which is not a file of the pack; build it again")
    return named


def reader_page(page: str, study: Mapping[str, Any], reader: str) -> str:
    """The pack's page with one reader's order and items, and a block of data that tells the viewer that it is served."""
    entry = study["readers"][reader]
    own = {**study, "readers": {reader: entry}, "items": {item: study["items"][item] for item in entry["order"]}}
    found = STUDY.search(page)
    assert found is not None
    start, end = found.span("json")
    server = f'<script type="application/json" id="server">{script_json({"reader": reader})}</script>\n'
    return page[: found.start()] + server + page[found.start() : start] + script_json(own) + page[end:]


def script_json(value: Any) -> str:
    """JSON that cannot end the script it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def policy(page: str) -> str:
    """A content security policy by which the page runs its own scripts, by their hashes, and fetches from this server only."""
    scripts = re.findall(r"<script\b[^>]*>(.*?)</script>", page, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts}
    allowed = " ".join(f"'sha256-{value}'" for value in sorted(hashes)) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
        "media-src 'self' blob:; connect-src 'self'; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
