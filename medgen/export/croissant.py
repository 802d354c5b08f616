"""A data set in Croissant 1.0 (https://docs.mlcommons.org/croissant) with its responsible-AI terms: every file with its SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from medgen import __version__
from medgen.export.release import STATEMENT

TABLE = "data/metadata.jsonl"
_TYPES = {bool: "sc:Boolean", int: "sc:Integer", float: "sc:Float", str: "sc:Text"}
_FORMATS = {".png": "image/png", ".avi": "video/x-msvideo", ".gz": "application/gzip"}
_CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "citeAs": "cr:citeAs", "column": "cr:column",
    "conformsTo": "dct:conformsTo", "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"}, "samplingRate": "cr:samplingRate", "equivalentProperty": "cr:equivalentProperty",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/", "examples": {"@id": "cr:examples", "@type": "@json"}, "extract": "cr:extract",
    "field": "cr:field", "fileProperty": "cr:fileProperty", "fileObject": "cr:fileObject", "fileSet": "cr:fileSet",
    "format": "cr:format", "includes": "cr:includes", "isLiveDataset": "cr:isLiveDataset", "jsonPath": "cr:jsonPath",
    "key": "cr:key", "md5": "cr:md5", "parentField": "cr:parentField", "path": "cr:path", "recordSet": "cr:recordSet",
    "references": "cr:references", "regex": "cr:regex", "repeated": "cr:repeated", "replace": "cr:replace", "sc": "https://schema.org/",
    "separator": "cr:separator", "source": "cr:source", "subField": "cr:subField", "transform": "cr:transform",
}  # fmt: skip


def croissant(
    name: str, license: str, description: str, rows: Sequence[Mapping[str, Any]], table: bytes, sums: Mapping[str, str]
) -> bytes:
    """The JSON-LD of a folder of `rows` (the lines of `table`, its metadata.jsonl); `sums`: SHA-256 by file name below the folder."""
    files = [_file(file, digest, _FORMATS[file[file.rindex(".") :]]) for file, digest in sorted(sums.items())]
    files.append(_file(TABLE, hashlib.sha256(table).hexdigest(), "application/jsonlines"))
    said = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": name,
        "description": f"{STATEMENT} {description}",
        "license": license,
        "version": "1.0.0",
        "citeAs": f"{name}. Synthetic, generated with medgen {__version__}.",
        "creator": {"@type": "sc:Organization", "name": f"medgen {__version__}"},
        "keywords": ["synthetic", "medical imaging"],
        "rai:hasSyntheticData": True,
        "rai:dataCollection": "Sampled from generative models; nothing was collected from people for this data set.",
        "rai:dataLimitations": "Not for diagnosis. A generative model can repeat its training data and carries its errors and biases.",
        "rai:personalSensitiveInformation": "None is stated: every patient is synthetic, ids are made up.",
        "distribution": files,
        "recordSet": [{"@type": "cr:RecordSet", "@id": "samples", "name": "samples", "field": _fields(rows)}],
    }
    return (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()


def _file(name: str, digest: str, encoding: str) -> dict[str, Any]:
    return {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name, "encodingFormat": encoding, "sha256": digest}


def _fields(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One field a column that holds anything; lists are repeated fields, mappings their JSON text."""
    fields = []
    for key in rows[0]:
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values or isinstance(values[0], dict):
            continue
        repeated = isinstance(values[0], list)
        flat = [item for value in values for item in value] if repeated else values
        kinds = {type(item) for item in flat}
        kind = _TYPES[float if kinds == {int, float} else kinds.pop() if len(kinds) == 1 else str]
        field = {
            "@type": "cr:Field", "@id": f"samples/{key}", "name": key, "dataType": kind,
            "source": {"fileObject": {"@id": TABLE}, "extract": {"column": key}},
        }  # fmt: skip
        fields.append({**field, "repeated": True} if repeated else field)
    return fields
