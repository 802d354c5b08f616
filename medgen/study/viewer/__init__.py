"""The reading page of a study: one HTML file that opens from a disk, asks no network, and shows the pictures that lie beside it.

`render` puts the study, the style and the scripts into one page. Its content policy lets only that very script and style run (by their
SHA-256), and reach nothing but pictures of its own place and, where `medgen study serve` gave the page, that server.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medgen.study.tasks import TASKS

VERSION = "1.0"
SCRIPTS = ("keeper.js", "store.js", "picture.js", "stage.js", "tools.js", "questions.js", "screens.js", "main.js")


def render(study: Mapping[str, Any]) -> str:
    """The page for this study; the same bytes for the same study.

    Args:
        study: study_id, title, pack_sha256, instructions, readers (each with an order of items and the sizes of the sessions),
            washout_days, and items with their media and questions, as `medgen.study.build` makes them.
    """
    parts = "\n".join(_read(name) for name in SCRIPTS)
    script = f'\n(() => {{\n"use strict";\n{parts}}})();\n'
    style = "\n" + _read("viewer.css")

    environment = Environment(
        loader=PackageLoader("medgen.study", "viewer"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("viewer.html.j2").render(
        version=VERSION,
        title=str(study["title"]),
        policy=_policy(script, style),
        script=Markup(script),
        style=Markup(style),
        study=_data(study),
        instructions=_data({name: task.instruction for name, task in TASKS.items()}),
    )


def _data(value: object) -> Markup:
    """JSON for a data block. No "<" is left in it, so nothing in a title, prompt or label can end the block and begin another."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _policy(script: str, style: str) -> str:
    own = "'self' file:"  # browsers disagree whether 'self' covers a page that was opened from disk
    rules = {
        "default-src": "'none'",
        "img-src": own,
        "media-src": own,
        "connect-src": "'self'",
        "script-src": _digest(script),
        "style-src": _digest(style),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")
