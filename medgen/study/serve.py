"""`medgen study serve`: a pack for many readers at once, from a small server that keeps every acknowledged answer."""

from __future__ import annotations

import contextlib
import csv
import ipaddress
import json
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from medgen.study.responses import Pack, ResponseError, read_pack
from medgen.study.store import Store

ORGANISER = "organiser"


def serve(
    pack: Path,
    database: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: Path | None = None,
    new_token: str | None = None,
    url: str | None = None,
    certificate: Path | None = None,
    private_key: Path | None = None,
) -> None:
    """Serve a pack to its readers; the same command again goes on where it stopped, also after a kill. Ctrl-C ends it.

    The first start prints a log-in link per reader and one for the organiser (/progress and /responses.csv), and never again.

    Args:
        pack: the folder that `medgen study build` wrote.
        database: SQLite file of answers on a local disk; PACK.answers.sqlite beside the pack if left out.
        host: address to listen on; 0.0.0.0 for all of this machine's. Over a network use TLS: a proxy, or --certificate.
        port: port to listen on; 0 for any free one.
        tokens: where the first start writes the links, readable by you alone; DATABASE.links.csv if left out.
        new_token: a reader, or "organiser", who lost the link: print a new one, make the old one invalid, and end.
        url: what readers type, if a proxy stands before this server, for example https://study.example.org.
        certificate: TLS certificate (PEM), with --private-key.
        private_key: its private key (PEM).
    """
    opened = checked_pack(Path(pack))
    file = Path(database) if database else opened.folder.with_name(opened.folder.name + ".answers.sqlite")
    if file.resolve().is_relative_to(opened.folder.resolve()):
        raise ResponseError(f"{file} lies inside the pack, which must not change; name a --database outside {opened.folder}")
    if (certificate is None) != (private_key is None):
        raise ValueError("TLS needs both --certificate and --private-key")
    listening = None if new_token else _listen(host, port)
    if listening:
        port = listening.getsockname()[1]
    base = (url or f"{'https' if certificate else 'http'}://{_name(host)}:{port}").rstrip("/")
    store = Store(file, opened)
    links = Path(tokens) if tokens else file.with_name(file.name + ".links.csv")
    try:
        if new_token:
            print(_replace_token(store, opened, new_token, links, base))
        else:
            assert listening is not None
            _first_links(store, opened, links, base)
            _run(opened, store, listening, base, certificate, private_key)
    finally:
        store.close()


def checked_pack(folder: Path) -> Pack:
    """The pack, unchanged since it was built, and without its key. Raises `ResponseError`."""
    folder = folder.resolve()  # "." has no name to put a database beside
    pack = read_pack(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if looks_like_key(path):
            raise ResponseError(f"{path} looks like the answer key: it must not lie inside the pack; move it away, then serve")
    if ORGANISER in pack.orders:
        raise ResponseError(
            f"a reader is called {ORGANISER!r}, the name of who runs the study; give the reader another and build again"
        )
    return pack


def looks_like_key(path: Path) -> bool:
    """JSON with a salt and items, whatever the file is called."""
    with path.open("rb") as file:
        if not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return False
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "salt" in found and "items" in found


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is created, so that a second start by mistake changes nothing."""
    # TCP by name: asyncio sends small answers at once (TCP_NODELAY) only on sockets that say so, and else waits 40 ms each time.
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # a restart need not wait; elsewhere the option would let two servers share a port
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
        return listening
    except OSError as error:
        listening.close()
        raise ValueError(f"cannot listen on {host} port {port} ({error.strerror}); is it in use? Choose another --port") from None


def _name(host: str) -> str:
    """What to call this machine in a link."""
    if host in ("0.0.0.0", "::", ""):
        return socket.getfqdn()
    return f"[{host}]" if ":" in host else host


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token() -> str:
    return secrets.token_urlsafe(32)


def _first_links(store: Store, pack: Pack, links: Path, base: str) -> None:
    """Tokens for everyone, once. The file is written before the database knows them: a kill in between costs nothing but a second try."""
    missing = [name for name in (*pack.orders, ORGANISER) if name not in store.names()]
    if not missing:
        return
    tokens = {name: _token() for name in missing}
    _write_links(links, {name: f"{base}/?token={token}" for name, token in tokens.items()})
    store.set_tokens(tokens)
    for name, token in tokens.items():
        print(f"{name}: {base}/?token={token}")
    print(
        f"These links are shown this once, and are in {links} (only you can read it): send each reader their own, then delete it."
    )


def _replace_token(store: Store, pack: Pack, name: str, links: Path, base: str) -> str:
    if name not in (*pack.orders, ORGANISER):
        raise ResponseError(f"no reader {name!r} in this pack; it has {', '.join(pack.orders)}, and there is {ORGANISER!r}")
    token = _token()
    link = f"{base}/?token={token}"
    known = {}
    if links.is_file():
        with links.open(encoding="utf-8", newline="") as file:
            known = {row["reader"]: row["link"] for row in csv.DictReader(file)}
    _write_links(links, {**known, name: link})
    store.set_tokens({name: token})
    return f"{name}: {link}\nThe old link is no longer valid; {links} has the new one."


def _write_links(path: Path, links: Mapping[str, str]) -> None:
    """A CSV that its owner alone can read, complete or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("reader", "link"))
        writer.writerows(links.items())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _run(
    pack: Pack, store: Store, listening: socket.socket, base: str, certificate: Path | None, private_key: Path | None
) -> None:
    import uvicorn

    from medgen.study.app import Site

    host = listening.getsockname()[0]
    if not _loopback(host) and certificate is None and not base.startswith("https://"):
        print(
            f"WARNING: plain HTTP on {host}: whoever shares the network can read log-in links and answers. Put a TLS proxy in front "
            "(and name its address by --url), or give --certificate and --private-key."
        )
    print(
        f"{pack.title}: {len(pack.orders)} readers at {base}/, progress at {base}/progress, answers in {store.path}. Ctrl-C ends."
    )
    site = Site(pack, store, secure=base.startswith("https://"))
    config = uvicorn.Config(
        site.app(),
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
        log_level="warning",
        access_log=False,  # it would print every log-in link
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has finished its requests by now, and passes the signal on
        uvicorn.Server(config).run(sockets=[listening])
    print(f"stopped; {len(store.rows())} answers in {store.path}")
