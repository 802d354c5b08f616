"""Browsers other than Chromium, driven as W3C WebDriver says: Firefox by its own Marionette port, WebKitGTK by WebKitWebDriver.

Playwright brings builds of its own for both; these are the system's, which is what a reader has.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

KEYS = {"Backspace": "\ue003", "Enter": "\ue007", "Shift": "\ue008", "ArrowLeft": "\ue012", "ArrowUp": "\ue013"}
KEYS |= {"ArrowRight": "\ue014", "ArrowDown": "\ue015", "Space": " "}
PREFERENCES = {
    "marionette.port": 0,  # a free one, written to the profile
    "browser.download.folderList": 2,
    "browser.download.useDownloadDir": True,
    "browser.download.alwaysOpenPanel": False,
}


def await_that(holds: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What `holds` gives, as soon as it is true."""
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < until, f"never came: {what}"
        time.sleep(0.02)
    return found


class Browser:
    """One window. `call(name, method, path, body)` speaks to it; `downloads` is where its files go."""

    downloads: Path
    processes: list[subprocess.Popen[bytes]]

    def call(self, name: str, method: str, path: str, **body: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        """Whatever is left of it, when a test has failed."""
        for process in self.processes[::-1]:
            process.kill()
            process.wait(60)

    def size(self, width: int, height: int) -> None:
        """Of the page, not of the window around it."""
        for _ in range(2):
            rest = self.js("return [outerWidth - innerWidth, outerHeight - innerHeight]")
            self.call("SetWindowRect", "POST", "/window/rect", width=width + rest[0], height=height + rest[1])

    def open(self, address: str) -> None:
        self.call("Navigate", "POST", "/url", url=address)

    def js(self, script: str) -> Any:
        return self.call("ExecuteScript", "POST", "/execute/sync", script=script, args=[])

    def press(self, *names: str) -> None:
        actions = []
        for name in names:
            keys = [KEYS.get(key, key) for key in (name.split("+") if len(name) > 1 else [name])]
            actions += [{"type": "keyDown", "value": key} for key in keys] + [
                {"type": "keyUp", "value": key} for key in keys[::-1]
            ]
        self.call("PerformActions", "POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def click(self, x: float, y: float) -> None:
        actions = [{"type": "pointerMove", "x": round(x), "y": round(y)}, {"type": "pointerDown", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "actions": [*actions, {"type": "pointerUp", "button": 0}]}
        self.call("PerformActions", "POST", "/actions", actions=[mouse])

    def text(self, selector: str) -> str:
        return str(self.js(f"return document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def see(self, selector: str, text: str) -> None:
        await_that(lambda: text in self.text(selector), f"{text!r} in {selector}")

    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(self.call("TakeScreenshot", "GET", "/screenshot"))))

    def grey(self, selector: str, x: float = 0.5, y: float = 0.5) -> int:
        """The pixel at this share of an element's width and height."""
        box = self.js(
            f"const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
        )
        return int(np.asarray(self.picture().convert("L"))[int(box[1] + y * box[3]), int(box[0] + x * box[2])])


class Firefox(Browser):
    """The system's Firefox without a screen; `folder` keeps its profile from one start to the next."""

    def __init__(self, folder: Path) -> None:
        profile, self.downloads = folder / "profile", folder / "downloads"
        for made in (profile, self.downloads):
            made.mkdir(parents=True, exist_ok=True)
        wanted = PREFERENCES | {"browser.download.dir": str(self.downloads)}
        (profile / "user.js").write_text("".join(f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in wanted.items()))
        port = profile / "MarionetteActivePort"
        port.unlink(missing_ok=True)
        found = shutil.which("firefox-esr") or shutil.which("firefox")
        assert found, "this test needs Firefox: apt-get install firefox-esr libavcodec59"
        command = [found, "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
        self.processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
        await_that(lambda: port.is_file() and port.read_text(), "Firefox's port", 120)
        self.socket = socket.create_connection(("127.0.0.1", int(port.read_text())), timeout=120)
        self.stream, self.number = self.socket.makefile("rb"), 0
        self._receive()
        self._send("WebDriver:NewSession", {"capabilities": {}})

    def _receive(self) -> Any:
        digits = b""
        while not digits.endswith(b":"):
            digits += self.stream.read(1)
        return json.loads(self.stream.read(int(digits[:-1])))

    def _send(self, name: str, body: dict[str, Any]) -> Any:
        self.number += 1
        message = json.dumps([0, self.number, name, body])
        self.socket.sendall(f"{len(message.encode())}:{message}".encode())
        _, _, error, result = self._receive()
        assert error is None, error
        return result.get("value") if isinstance(result, dict) else result

    def call(self, name: str, method: str, path: str, **body: Any) -> Any:
        return self._send(f"WebDriver:{name}", body | ({"full": False} if name == "TakeScreenshot" else {}))

    def close(self) -> None:
        self._send("Marionette:Quit", {"flags": ["eForceQuit"]})
        self.socket.close()
        self.processes[0].wait(60)


class WebKit(Browser):
    """WebKitGTK's own small browser on a screen of its own, for who asks for less motion: Debian's cannot play any film in a loop.

    What it keeps is gone when it closes: a WebDriver's sessions are private.
    """

    def __init__(self, folder: Path) -> None:
        self.downloads = folder  # its home
        places = {name: str(folder) for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR")}
        (folder / "gtk-3.0").mkdir(parents=True, exist_ok=True)
        (folder / "gtk-3.0" / "settings.ini").write_text("[Settings]\ngtk-enable-animations=0\n")
        read, write = os.pipe()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        screen = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x1024x24", "-nolisten", "tcp"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes = [subprocess.Popen(screen, pass_fds=[write], **quiet)]
        os.close(write)
        with os.fdopen(read) as said:  # to its end: Xvfb would die of a pipe that closes before its line does
            display = f":{said.readline().strip()}"
        # bubblewrap needs rights that a container does not give
        environment = {**os.environ, **places, "DISPLAY": display, "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1"}
        self.processes.append(subprocess.Popen(["WebKitWebDriver", f"--port={port}"], env=environment, **quiet))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        await_that(self._listens, "WebKitWebDriver")
        binary = next(Path("/usr/lib").glob("*/webkit2gtk-4.1/MiniBrowser"))
        wanted = {"webkitgtk:browserOptions": {"binary": str(binary), "args": ["--automation"]}}
        self.session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _listens(self) -> bool:
        try:
            return self.http.get("/status").is_success
        except httpx.TransportError:
            return False

    def _ask(self, method: str, path: str, body: dict[str, Any]) -> Any:
        reply = self.http.request(method, path, json=body if method == "POST" else None)
        assert reply.is_success, reply.text
        return reply.json()["value"]

    def call(self, name: str, method: str, path: str, **body: Any) -> Any:
        return self._ask(method, f"/session/{self.session}{path}", body)

    def close(self) -> None:
        self._ask("DELETE", f"/session/{self.session}", {})
        for process in self.processes[::-1]:
            process.terminate()
            process.wait(60)
