"""The study server as a real process: killed and restarted under load, asked for what it must not give, and read by many at once."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from medgen.study.responses import COLUMNS, read_pack, read_responses
from medgen.study.viewer import VERSION, render

SERVE = "import tyro; from medgen.study.serve import serve; tyro.cli(serve)"
READERS, KILLS = (int(os.environ.get(name, few)) for name, few in (("STUDY_READERS", 20), ("STUDY_KILLS", 5)))


class Process:
    """`medgen study serve` in a process of its own, on one port over all its lives."""

    def __init__(self, study):
        self.study, self.database = study, study.folder / "answers.sqlite"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.process, self.said = f"http://127.0.0.1:{self.port}", None, ""

    def start(self, *more):
        log = (self.study.folder / "server.log").open("w+")
        command = ["--pack", self.study.pack, "--database", self.database, "--port", str(self.port), *more]
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, *map(str, command)], stdout=log, stderr=subprocess.STDOUT)
        while self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as probe:
                probe.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
                probe.recv(1)  # bound long before it answers; with TLS it hangs up
                break
            time.sleep(0.02)
        return self

    def stop(self, how=signal.SIGINT):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(20)
        return (self.study.folder / "server.log").read_text()

    def kill(self):
        self.stop(signal.SIGKILL)

    @property
    def links(self):
        with (self.study.folder / "answers.sqlite.links.csv").open(newline="") as file:
            return {row["reader"]: row["link"] for row in csv.DictReader(file)}

    def client(self, name):
        """A browser that has opened its link."""
        one = httpx.Client(base_url=self.url, trust_env=False, headers={"origin": self.url}, timeout=60, verify=False)
        answer = one.get("/", params={"token": self.links[name].rpartition("=")[2]})
        assert answer.status_code == 200
        return one


def once(study, *more):
    """A start that ends by itself: exit code and what it said."""
    command = [sys.executable, "-c", SERVE, "--pack", str(study.pack), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def reseal(study, change):
    """Change the page's study (or the whole page, if `change` returns one) as a builder would have written it, with right sums."""
    page = study.pack / "index.html"
    text = page.read_text()
    head, _, rest = text.partition('id="study">')
    data, _, tail = rest.partition("</script>")
    shown = json.loads(data)
    page.write_text(
        change(shown) or f'{head}id="study">{json.dumps(shown)}</script><script id="viewer">"use strict"</script>{tail}'
    )
    files = sorted(path for path in study.pack.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(study.pack)}\n" for path in files]
    (study.pack / "SHA256SUMS").write_text("".join(lines))
    study.orders = {reader: entry["order"] for reader, entry in shown["readers"].items()}


def two_halves(study):
    """r1 reads the first half of the items and r2 the others; every item has a picture, and a second one behind its reveal."""
    (study.pack / "media").mkdir()

    def change(shown):
        names = list(shown["items"])
        for name, item in shown["items"].items():
            item["media"] = [{"file": f"media/{name}.png", "kind": "image"}]
            (study.pack / "media" / f"{name}.png").write_bytes(name.encode() * 100)
            if any(q.get("before_reveal") for q in item["questions"]):
                item["media"] += [{"kind": "sequence", "reveal": True, "frames": [{"file": f"media/{name}_later.png"}]}]
                (study.pack / "media" / f"{name}_later.png").write_bytes(b"later")
        for reader, half in (("r1", names[::2]), ("r2", names[1::2])):
            shown["readers"][reader]["order"] = half

    reseal(study, change)
    return study


@pytest.fixture
def serve(request):
    running = []

    def start(study, *more):
        running.append(Process(study))
        return running[-1].start(*more)

    yield start
    for one in running:
        one.kill()


@pytest.fixture
def served(make_study, serve):
    study = two_halves(make_study().build())
    return study, serve(study)


def row(study, reader, item, question="origin", answer="real", nonce="n", /, **more):
    study.answer(reader, item, question, answer)
    return study.rows.pop() | {"nonce": nonce} | more


def send(client, *rows, **more):
    return client.post("/api/answers", json={"answers": list(rows)}, **more)


def csv_of(server):
    return list(csv.DictReader(io.StringIO(server.client("organiser").get("/responses.csv").text)))


def read_whole_study(server, study, reader, acknowledged, wrong):
    """Answers every item, every third one twice; asks again with the same nonce until it is acknowledged, as the page does."""
    client = server.client(reader)
    for i, item in enumerate(study.orders[reader]):
        for answer in ["real", "synthetic"][: 1 + (i % 3 == 0)]:
            one = row(study, reader, item, "origin", answer, f"{item}{answer}")
            while True:
                try:
                    got = send(client, one)
                except httpx.TransportError:
                    time.sleep(0.05)
                    continue
                if got.status_code == 200:
                    acknowledged.append((reader, item, answer))
                    break
                wrong.append(got.text)
                return
    client.close()


def test_no_acknowledged_answer_is_lost_or_doubled_when_the_server_is_killed_again_and_again(make_study, serve):
    """20 readers and 5 SIGKILLs here; the whole thing: STUDY_READERS=50 STUDY_KILLS=20 pytest tests/study/test_serve.py -k killed."""
    study = make_study(readers=READERS, cases=15 if READERS <= 20 else 60, repeats=0).build()
    reseal(study, lambda shown: None)
    server = serve(study)
    acknowledged, wrong, lost = [], [], 0
    threads = [threading.Thread(target=read_whole_study, args=(server, study, r, acknowledged, wrong)) for r in study.readers]
    began = time.monotonic()
    for one in threads:
        one.start()
    total = sum(1 + (i % 3 == 0) for order in study.orders.values() for i in range(len(order)))
    for kill in range(KILLS):
        while len(acknowledged) < total * (kill + 1) / (KILLS + 1) and any(one.is_alive() for one in threads):
            time.sleep(0.005)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        known = list(acknowledged)
        with sqlite3.connect(server.database) as db:  # as the kill left it
            stored = set(db.execute("SELECT reader, item, answer FROM answers"))
        db.close()
        lost += len(set(known) - stored)
        server.start()
    for one in threads:
        one.join()
    with sqlite3.connect(server.database) as db:
        stored = db.execute("SELECT reader, item, answer FROM answers").fetchall()
    db.close()
    seconds = time.monotonic() - began
    print(f"{READERS} readers, {KILLS} kills, {len(acknowledged)} acknowledged answers in {seconds:.1f} s: lost {lost}")
    assert wrong == [] and lost == 0
    assert sorted(stored) == sorted(acknowledged) and len(stored) == total
    file = study.folder / "responses.csv"
    file.write_text(server.client("organiser").get("/responses.csv").text)
    answers, notes = read_responses([file], read_pack(study.pack))
    last = {
        (reader, item): ["real", "synthetic"][i % 3 == 0]
        for reader, order in study.orders.items()
        for i, item in enumerate(order)
    }
    assert {(a.reader, a.item): a.value for a in answers} == last and len(answers) == len(last) and notes == []


def test_links_are_shown_once_and_kept_in_a_file_of_the_organisers(served):
    study, server = served
    links = server.links
    assert list(links) == ["r1", "r2", "r3", "organiser"] and len(set(links.values())) == 4
    said = server.stop()
    assert all(link in said for link in links.values()) and said.rstrip().endswith("0 answers in " + str(server.database))
    assert stat.S_IMODE((study.folder / "answers.sqlite.links.csv").stat().st_mode) == 0o600
    said = server.start().stop()
    assert "token=" not in said and server.links == links


def test_a_link_becomes_a_cookie_and_leaves_the_address(served):
    _, server = served
    answer = httpx.get(server.links["r1"], trust_env=False)
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "path=/" in cookie
    assert answer.headers["refresh"] == "0; url=/" and answer.headers["referrer-policy"] == "no-referrer"


def test_a_reader_gets_their_own_items_and_no_one_elses(served):
    study, server = served
    one = server.client("r1")
    page = one.get("/")
    shown = json.loads(page.text.partition('id="study">')[2].partition("</script>")[0])
    assert list(shown["readers"]) == ["r1"] and list(shown["items"]) == sorted(study.orders["r1"], key=list(study.items).index)
    assert not any(item in page.text for item in study.orders["r2"])
    assert '<script type="application/json" id="server">{"reader":"r1"}</script>' in page.text
    assert page.headers["cache-control"] == "no-store" and "default-src 'none'" in page.headers["content-security-policy"]
    own, other = study.orders["r1"][0], study.orders["r2"][0]
    assert one.get(f"/media/{own}.png").content == own.encode() * 100
    assert one.get(f"/media/{own}.png", headers={"range": "bytes=8-15"}).content == own.encode()
    assert one.get(f"/media/{other}.png").status_code == 404


OUTSIDE = [
    *("/protocol.json", "/orders/r1.json", "/key_commitment.json", "/SHA256SUMS", "/index.html", "/media/", "/pack.key.json"),
    *("/media/../protocol.json", "/media/..%2fprotocol.json", "/media/%2e%2e/%2e%2e/pack.key.json", "/media//etc/passwd"),
    *("/media/%00", "/media/..%5c..%5cpack.key.json", "/../pack.key.json", "/responses.csv", "/progress"),
]


def test_nothing_else_is_served_to_a_reader(served):
    study, server = served
    cookie = f"medgen_reader_{study.sha[:12]}={server.links['r1'].rpartition('=')[2]}"
    for path in OUTSIDE:
        with socket.create_connection(("127.0.0.1", server.port)) as raw:  # as it stands: clients tidy such paths
            raw.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\ncookie: {cookie}\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.split()[1] in (b"401", b"404") and b'{"error"' in answer, path
        assert b"margin" not in answer and b"salt" not in answer


def test_another_readers_place_is_refused(served):
    study, server = served
    one = server.client("r1")
    own, other = study.orders["r1"][0], study.orders["r2"][0]
    answer = send(one, row(study, "r2", other))
    assert answer.status_code == 403 and "logged in as 'r1', not as 'r2'" in answer.json()["error"]
    taken = row(study, "r2", other, reader="r1")
    assert "not among those of reader 'r1'" in send(one, taken).json()["error"]
    send(one, row(study, "r1", own))
    assert server.client("r2").get("/api/mine").json() == {"reader": "r2", "answers": []}
    assert [got["item"] for got in one.get("/api/mine").json()["answers"]] == [own]
    for path in ("/", "/api/mine", f"/media/{own}.png", "/progress", "/responses.csv"):
        assert httpx.get(server.url + path, trust_env=False).status_code == 401
    with httpx.Client(base_url=server.url, trust_env=False) as reader:  # a reader's token is no organiser's
        reader.cookies = {f"medgen_organiser_{study.sha[:12]}": server.links["r1"].rpartition("=")[2]}
        assert reader.get("/progress").status_code == 401


REFUSED = [
    ({"answer": "maybe"}, "none of its options (real, synthetic)"),
    ({"position": 5}, "stands at position 0"),
    ({"question": "age"}, "no question 'age'"),
    ({"task": "artefact"}, "is of task"),
    ({"pack_sha256": "f" * 64}, "not in this one"),
    ({"viewer_version": "0.9"}, "reload"),
    ({"confidence": 1e12}, "on no scale"),
    ({"ms": -5}, "ms '-5'"),
    ({"ms": True}, "neither text nor a number"),
    ({"answer": ["real"]}, "neither text nor a number"),
    ({"session": "x" * 500}, "too long"),
    ({"session": "1\r\nr2"}, "control characters"),
    ({"nonce": ""}, "empty"),
    ({"extra": 1}, "expected an object with study_id"),
    ({"question": "comment", "answer": "\ud800"}, "half a character"),
    ({"question": "comment", "answer": "x" * 20_001}, "at most 20000"),
    ({"timestamp": "now"}, "not an ISO date"),
]


def test_what_the_analysis_would_refuse_is_not_stored(served):
    study, server = served
    one, good = server.client("r1"), row(study, "r1", study.orders["r1"][1], "origin", "real", "good")
    for change, says in REFUSED:
        body = json.dumps(
            {"answers": [good, row(study, "r1", study.orders["r1"][0]) | change]}
        )  # ASCII: half a character as \\ud800
        answer = one.post("/api/answers", content=body)
        assert answer.status_code == 422 and says in answer.json()["error"] and "answers[1]" in answer.json()["error"]
    assert one.get("/api/mine").json()["answers"] == []


def test_bodies_that_are_not_answers(served):
    study, server = served
    one = server.client("r1")
    for body, status in (
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"answers": []}', 400),
        (b'{"answers": [NaN]}', 400),
        (b"[" * 200_000, 400),
        (b'{"answers": ["x"]}', 422),
        (b" " * 5 * 1024**2, 413),
    ):
        assert one.post("/api/answers", content=body).status_code == status
    good = row(study, "r1", study.orders["r1"][0])
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert send(one, good, headers=headers).status_code == 403
    assert one.get("/api/answers").status_code == 405
    assert send(one, good).json() == {"saved": 1, "acknowledged": ["n"]}


def test_what_was_expected_before_the_reveal_stands_and_opens_it(make_study, serve):
    study = two_halves(make_study(task="plausible_course").build())
    one = (server := serve(study)).client("r1")
    item = study.orders["r1"][0]
    assert one.get(f"/media/{item}.png").status_code == 200
    assert one.get(f"/media/{item}_later.png").status_code == 404
    before = row(study, "r1", item, "expectation", "better", "a")
    assert send(one, before).json()["saved"] == 1
    assert one.get(f"/media/{item}_later.png").content == b"later"
    changed = send(one, before | {"answer": "worse", "nonce": "b"})
    assert changed.status_code == 409 and "before the reveal" in changed.json()["error"]
    after = row(study, "r1", item, "plausible", 4, "c")
    assert send(one, before, after).json() == {"saved": 1, "acknowledged": ["a", "c"]}
    assert send(one, after | {"answer": 2, "nonce": "d"}).json()["saved"] == 1
    assert [(got["question"], got["answer"]) for got in csv_of(server)] == [("expectation", "better"), ("plausible", "2")]


def test_wrong_links_are_slowed_but_readers_at_work_are_not(served):
    study, server = served
    one = server.client("r1")
    told = [httpx.get(f"{server.url}/?token=guess{i}", trust_env=False).status_code for i in range(12)]
    assert told == [403] * 10 + [429] * 2
    late = httpx.get(server.links["r2"], trust_env=False)
    assert late.status_code == 429 and 0 < int(late.headers["retry-after"]) <= 60
    assert one.get("/").status_code == 200 and send(one, row(study, "r1", study.orders["r1"][0])).status_code == 200


def test_a_lost_link_is_replaced_while_the_server_runs(served):
    study, server = served
    old = server.client("r2")
    code, said = once(study, "--database", server.database, "--port", server.port, "--new-token", "r2")
    assert code == 0 and said.startswith("r2: http") and server.links["r2"] in said
    assert old.get("/").status_code == 401
    assert server.client("r2").get("/").status_code == 200
    assert "no reader 'r9'" in once(study, "--database", server.database, "--new-token", "r9")[1]


def test_the_organiser_sees_how_far_everyone_is_and_no_script_of_a_comment(served):
    study, server = served
    one, organiser = server.client("r1"), server.client("organiser")
    for i, item in enumerate(study.orders["r1"][:3]):
        send(one, row(study, "r1", item, "origin", "real", f"{i}", ms=[2000, 9000, 4000][i]))
    item = study.orders["r1"][0]
    send(one, row(study, "r1", item, "comment", "<script>alert(1)</script>", "c1", ms=0))
    send(one, row(study, "r1", study.orders["r1"][1], "comment", '=HYPERLINK("http://x")', "c2", ms=0))
    found = organiser.get("/progress").json()
    assert found["readers"][0] == {
        "reader": "r1",
        "done": 3,
        "items": 14,
        "median_seconds": 4.0,
        "last_seen": found["readers"][0]["last_seen"],
    }
    assert [(r["reader"], r["done"], r["last_seen"]) for r in found["readers"][1:]] == [("r2", 0, None), ("r3", 0, None)]
    page = organiser.get("/progress", headers={"accept": "text/html"}).text
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "3 of 14" in page
    assert not any(word in page.lower() for word in ("correct", "accuracy", "synthetic"))
    comments = [got["answer"] for got in csv_of(server) if got["question"] == "comment"]
    assert comments == ["<script>alert(1)</script>", '\'=HYPERLINK("http://x")']
    assert list(csv_of(server)[0]) == list(COLUMNS)


@pytest.mark.parametrize("fault", ["changed", "key", "renamed key", "database inside", "other pack", "busy port", "half of TLS"])
def test_what_must_not_be_served_is_not(make_study, tmp_path, fault):
    study = make_study().build()
    more, says = [], "was changed after the pack was built"
    if fault == "changed":
        (study.pack / "protocol.json").write_text("{}")
    elif fault == "key":
        shutil.copy(study.key_file, study.pack / "pack.key.json")
        says = "pack.key.json looks like the answer key"
    elif fault == "renamed key":
        (study.pack / "media").mkdir()
        shutil.copy(study.key_file, study.pack / "media" / "a.png")
        says = "a.png looks like the answer key"
    elif fault == "database inside":
        more, says = ["--database", study.pack / "answers.sqlite"], "lies inside the pack"
    elif fault == "other pack":
        other = make_study(task="likert_realism", cases=6)
        other.folder, other.pack = tmp_path / "other", tmp_path / "other" / "pack"
        other.key_file = other.folder / "key.json"
        other.build()
        assert once(other, "--database", tmp_path / "a.sqlite", "--new-token", "r1")[0] == 0
        more, says = ["--database", tmp_path / "a.sqlite"], f"holds answers to another pack: study 's1', pack {other.sha[:12]}"
    elif fault == "busy port":
        busy = socket.create_server(("127.0.0.1", 0))
        more, says = ["--port", busy.getsockname()[1]], "is it in use?"
    elif fault == "half of TLS":
        more, says = ["--certificate", study.key_file], "needs both"
    code, said = once(study, *more)
    assert code != 0 and says in said
    assert not list(study.folder.glob("*.links.csv"))


def test_plain_http_beyond_this_machine_is_warned_of_and_tls_is_not(make_study, serve, tmp_path):
    study = make_study().build()
    assert "WARNING: plain HTTP on 0.0.0.0" in serve(study, "--host", "0.0.0.0").stop()
    certificate, private_key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            "/CN=localhost",
        ]
        + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", private_key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    server = serve(study, "--database", tmp_path / "tls.sqlite", "--certificate", certificate, "--private-key", private_key)
    link = next(csv.DictReader((tmp_path / "tls.sqlite.links.csv").open()))["link"]
    answer = httpx.get(link, verify=ssl.create_default_context(cafile=str(certificate)), trust_env=False)
    assert (
        link.startswith("https://127.0.0.1") and answer.status_code == 200 and "; secure" in answer.headers["set-cookie"].lower()
    )
    assert "WARNING" not in server.stop()


def real_page(study):
    """The pack with the shipped viewer and pictures: r1 rates how plausible courses are, and tells real films from synthetic ones."""
    (study.pack / "media").mkdir()
    rng = np.random.default_rng(0)

    def picture(name):
        Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(study.pack / "media" / f"{name}.png")
        return {"file": f"media/{name}.png", "kind": "image", "width": 64, "height": 64}

    def change(shown):
        shown |= {"version": VERSION, "instructions": "Read.", "washout_days": 0}
        for name, item in shown["items"].items():
            item |= {"feedback": None, "media": [picture(name)]}
            if item["task"] == "plausible_course":
                item["media"].append(picture(f"{name}_later") | {"reveal": True})
        for entry in shown["readers"].values():
            entry |= {"order": list(shown["items"]), "sessions": [len(shown["items"])]}
        return render(shown)

    reseal(study, change)
    return study


@pytest.fixture
def web_mail():
    """A page of another site, with one link; returns a function that makes its address."""
    links = []

    class Mail(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(f'<a href="{links[-1]}">your study</a>'.encode())

        def log_message(self, *_):
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Mail)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield lambda link: links.append(link) or f"http://localhost:{site.server_port}/"
    site.shutdown()


class Browser:
    """Chromium on one profile, with one page; `keys` presses each key when the page can take it."""

    def __init__(self, playwright, folder):
        self.requests, self.faults = [], []
        self.context = playwright.chromium.launch_persistent_context(
            folder / "profile", executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        self.context.set_default_timeout(60_000)
        self.page = self.context.pages[0]
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))

    def sees(self, text):
        self.page.get_by_text(text).first.wait_for()

    def keys(self, *keys):
        for key in keys:
            self.page.locator("#screen .primary:visible, #questions:not([inert]):visible").first.wait_for()
            self.page.keyboard.press(key)

    def course(self, expectation, rating):
        self.keys(expectation, "Enter")
        self.sees("recorded, before what came next was shown")
        self.keys(rating, "Enter")


def stored(server):
    with contextlib.closing(sqlite3.connect(server.database)) as db:
        return db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]


def test_a_reader_in_a_real_browser_goes_on_after_the_server_was_killed(make_study, serve, web_mail):
    """From a link in a web mail to the last case by keys alone; the server is killed on the way, then the browser is closed."""
    study = make_study(task="plausible_course", cases=3, repeats=0)
    study.add_section("2", "real_or_synthetic", 4)
    server = serve(real_page(study.build()))
    with sync_playwright() as playwright:
        reader = Browser(playwright, study.folder)
        reader.page.goto(web_mail(server.links["r1"]))
        reader.page.get_by_text("your study").click()
        reader.sees("Instructions")
        assert reader.page.url == server.url + "/"
        reader.keys("Enter", "Enter")
        reader.course("1", "4")
        reader.keys("2")
        server.kill()
        reader.keys("Enter")
        reader.sees("The server cannot be reached. Nothing is lost")
        reader.page.screenshot(path=study.folder / "killed.png")
        assert stored(server) == 2
        server.start()
        reader.sees("recorded, before what came next was shown")
        assert stored(server) == 3
        reader.context.close()

        again = Browser(playwright, study.folder)
        again.page.goto(server.url)
        again.keys("5", "Enter")
        again.course("1", "1")
        again.keys("Enter")
        for answer in "1221":
            again.keys(answer, "Enter")
        again.sees("All answers are with the organiser")
        again.page.goto(server.links["organiser"])
        again.sees("7 of 7")
        again.page.screenshot(path=study.folder / "progress.png", full_page=True)
        again.context.close()
    assert reader.faults == again.faults == []
    asked = [url for url in reader.requests + again.requests if not url.startswith((server.url, "http://localhost"))]
    assert asked == []
    assert [(r["question"], r["answer"]) for r in csv_of(server)] == [
        *(("expectation", "better"), ("plausible", "4"), ("expectation", "worse"), ("plausible", "5")),
        *(("expectation", "better"), ("plausible", "1")),
        *(("origin", answer) for answer in ("real", "synthetic", "synthetic", "real")),
    ]
