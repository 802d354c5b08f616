"""From a radiology report as it is stored to the words a model is prompted with.

Sections are found in free text, de-identification marks and talk about earlier examinations are taken out (one image cannot
show a change, and the marks are what models memorise best: arXiv 2502.07516), and what remains is cut at a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

from pydantic import Field

from medgen.config import Config
from medgen.data.records import FindingLabel
from medgen.seeds import stable_seed

FINDING_WORDS = {
    "pleural_effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "consolidation": "consolidation",
    "nodule": "pulmonary nodule",
    "cardiomegaly": "cardiomegaly",
    "edema": "pulmonary edema",
    "atelectasis": "atelectasis",
    "hyperinflation": "hyperinflation of the lungs",
}


class ReportError(ValueError):
    """A report without words that could prompt an image."""


class PromptConfig(Config):
    """How a report becomes a prompt."""

    sections: Literal["impression", "findings", "both", "mixed"] = Field(
        "both",
        description="which section; a missing one is replaced by the other; both: impression first, so that a cut costs detail; "
        "mixed: one of the three for each record (and the view for half of them), so that short and long prompts are learned",
    )
    view: bool = Field(False, description="begin with the view, as in 'PA chest X-ray.'")
    max_tokens: int = Field(77, ge=4, description="tokens of the text encoder, its own marks included; cut at a sentence")
    random_words: int = Field(
        0,
        ge=0,
        le=20,
        description="words without meaning put into each training caption, others each epoch, against memorisation",
    )

    def for_record(self, record_id: str) -> PromptConfig:
        """This configuration with "mixed" decided: always the same way for the same record."""
        if self.sections != "mixed":
            return self
        which, with_view = divmod(stable_seed("prompt sections", record_id) % 6, 2)
        return self.model_copy(
            update={"sections": ("impression", "findings", "both")[which], "view": self.view and bool(with_view)}
        )


# ---------------------------------------------------------------- sections

_SECTION_NAMES = {
    "findings": r"findings?|report|observations?|chest findings",
    "impression": r"impressions?|conclusions?|opinion|summary|assessment",
    "indication": r"indications?|(?:clinical )?history|clinical (?:information|indication)|reason for (?:this )?(?:exam(?:ination)?|study)",
    "comparison": r"comparisons?|prior (?:study|exam)|comparison exams?",
    "technique": r"techniques?|procedure|(?:type of )?exam(?:ination)?|study|exam type",
    "wet_read": r"wet read|preliminary report",
    "recommendation": r"recommendations?(?: ?\(s\))?|notifications?|communications?|addendum|critical results",
}
_NAME_OF = [(re.compile(rf"(?:{pattern})$"), name) for name, pattern in _SECTION_NAMES.items()]
# A header stands at a line's start, in capitals (or a known name), with at most a few words before its colon.
_HEADER = re.compile(r"^[ \t]*([A-Z][A-Za-z ,/&()\-_]{2,70}?):", re.MULTILINE)
_BANNER = re.compile(r"^[ \t]*(?:FINAL|PRELIMINARY|RADIOLOGY) (?:REPORT|ADDENDUM)[ \t]*$|^[ \t]*\*+.*\*+[ \t]*$", re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """Sections of a free-text report by name: findings, impression, indication, comparison, technique, wet_read, recommendation.

    Headers vary ("FINDINGS AND IMPRESSION:", "PORTABLE AP CHEST:", "REASON FOR EXAM:"); one that names a view or the chest opens
    the findings. A report without findings and impression has its last paragraph as findings, as MIT-LCP's parser does.
    """
    text = _BANNER.sub("", text.replace("\r\n", "\n"))
    found: dict[str, str] = {}
    marks = [(m.start(), m.end(), name) for m in _HEADER.finditer(text) if (name := _section_of(m.group(1)))]
    for (_, begin, name), (end, *_rest) in zip(marks, [*marks[1:], (len(text), 0, "")], strict=False):
        body = text[begin:end].strip()
        if body:
            found[name] = f"{found[name]}\n{body}" if name in found else body
    if "findings" not in found and "impression" not in found:
        first = marks[0][0] if marks else len(text)
        tail = text[marks[-1][1] :] if marks else text
        paragraphs = [p.strip() for p in re.split(r"\n[ \t]*\n", tail) if p.strip()]
        if len(paragraphs) > 1 or not marks:
            found["findings"] = paragraphs[-1] if paragraphs else ""
        elif text[:first].strip():
            found["findings"] = text[:first].strip()
    return {name: body for name, body in found.items() if body}


def _section_of(header: str) -> str | None:
    words = " ".join(header.lower().split())
    if re.search(r"finding|impression", words) and re.search(r" and | ?/ ?|&", words):
        return "impression" if "impression" in words and "finding" not in words else "findings"
    for pattern, name in _NAME_OF:
        if pattern.match(words):
            return name
    capitals = header.upper() == header
    if capitals and re.search(r"\b(chest|ap|pa|lateral|portable|views?|radiographs?|x-?ray|cxr)\b", words):
        return "findings"
    return None


# ---------------------------------------------------------------- cleaning

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])|\n\s*\n|\n\s*(?=\d+[.)]\s)|\n\s*[-*•]\s+")
_ABBREVIATION = re.compile(r"\b(?:dr|mr|mrs|ms|st|vs|approx|e\.g|i\.e|a\.m|p\.m|no)\.$", re.IGNORECASE)
_MARK = r"(?:_{2,}|\[\*\*.*?\*\*\]|\[redacted\]|<deid>|\bxxxx+\b)"
_TALK = re.compile(
    r"\b(?:discussed|communicated|conveyed|reported|telephoned|paged|notified|entered|called|informed|relayed|e-?mailed)\b.{0,80}?"
    rf"\b(?:dr|doctor|physician|team|nurse|rn|phone|telephone|dashboard|pager|at \d|by|with|to|{_MARK})|"
    r"\b(?:dictated|transcribed|signed|read back|attending|telephone|critical results?)\b",
    re.IGNORECASE,
)
_PRIOR = r"(?:prior|previous|earlier|preceding|most recent|last|recent|old|outside|baseline|comparison)"
_EXAM = (
    r"(?:stud(?:y|ies)|exam(?:ination)?s?|radiographs?|films?|x-?rays?|ct|cts|scans?|imaging|images?|cxrs?|tracings?|ones?|day)"
)
_WHEN = (
    rf"(?:{_MARK}|yesterday|today|(?:the )?(?:{_PRIOR}|same)\b|\d{{1,2}}[/-]\d{{1,2}}|\d{{4}}|earlier|the (?:{_EXAM})|{_EXAM})"
)
_COMPARED = re.compile(
    rf"(?:(?:,|\(|\bas\b|\bwhen\b)\s*)*\b(?:(?:as )?compared (?:to|with)|in comparison (?:to|with)|relative to|with respect to|since|"
    r"(?:not )?(?:seen|noted|visible|present) on (?=(?:the )?(?:prior|previous))|"
    rf"(?:unchanged|changed|different|similar|stable)?\s*(?:from|to) (?=(?:the |her |his |a )?(?:{_PRIOR}|{_MARK})))"
    rf"\s*(?:the |her |his |a )?{_WHEN}[^,;.()]*(?:\)|,)?",
    re.IGNORECASE,
)
_CHANGE_IN = re.compile(
    r"^(?:there (?:is|has been) )?(?:no|little|minimal|slight|mild|some)"
    r"(?: (?:significant|interval|appreciable|relevant|substantial|definite|if any))*"
    r" change in (?:the )?(?:(?:size|extent|appearance|degree) of (?:the )?)?(?=.*[a-z])",
    re.IGNORECASE,
)
_NO_CHANGE = re.compile(
    r"\b(?:no|without)\b[^.]{0,40}\b(?:change|changed)\b|\b(?:is|are|remains?|appears?)\b[^.]{0,30}\bunchanged\b$|^unchanged\b[^a-z]*$|"
    r"^(?:there (?:has been|is) )?(?:little|minimal|slight|mild)?\s*(?:interval )?(?:change|improvement|worsening)\b[^a-z]*$",
    re.IGNORECASE,
)
_RESOLVED = re.compile(
    r"^(?:the |there (?:has been|is) |interval |complete |previously (?:seen|noted) |previous |prior )*"
    r"(?:resolution of (?:the |a )?(?:previous |prior )?(?P<a>[^,.;]+)|"
    r"(?P<b>[^,.;]+?) (?:has|have) (?:now |completely |largely |fully )*(?:resolved|cleared|disappeared))(?P<rest>.*)$",
    re.IGNORECASE,
)
_AMOUNT = (
    r"(?:slight(?:ly)?|mild(?:ly)?|marked(?:ly)?|significant(?:ly)?|substantial(?:ly)?|minimal(?:ly)?|somewhat|further|interval)"
)
_COURSE = (
    r"(?:(?:essentially|relatively|overall|grossly|largely) )?(?:unchanged|stable|persist(?:ent|ing)|recurrent|new(?:ly)?|worsen(?:ing|ed)|"
    r"improv(?:ing|ed)|increas(?:ing|ed)|decreas(?:ing|ed)|evolving|residual|previously (?:seen|noted)|pre-?existing|known|long-?standing)"
)
_FINDING_AHEAD = (
    r"(?=(?:[a-z-]+ ){0,4}(?:effusion|pneumothora|consolidat|opaci|nodul|mass|cardiomegaly|edema|atelecta|hyperinfl|enlarge|infiltr|"
    r"congest|heart|cardiac|fluid|volume|bibasilar|basilar|bilateral|left|right|focal|pulmonary|pleural|interstitial|airspace|mild|moderate|small|"
    r"large|severe|tiny))"
)
_CHANGE_WORDS = [
    (re.compile(pattern, re.IGNORECASE), new)
    for pattern, new in (
        (r"\bthere (?:has|have) been\b", "there is"),
        (rf"\b(?:has|have) (?:{_AMOUNT} )*(?:increased|decreased|improved|worsened|progressed|enlarged|developed)"
         r"(?: in size| slightly| substantially)?", "is present"),
        (rf"\b(?:{_AMOUNT} )*(?:increase|decrease|improvement|worsening|progression|development|appearance) (?:in|of) (?:the )?"
         r"(?:(?:size|extent|degree|severity) of (?:the )?)?", ""),
        (r"\b(?:once )?(?:again|now) (?:seen|noted|demonstrated|identified|visualized|present)\b", "seen"),
        (r"\b(?:is|are) (?:again|now|still|stably|essentially|overall|relatively) ", "is "),
        (rf"\b{_COURSE}(?: and)? {_FINDING_AHEAD}", ""),
        (r"\b(?:remains?|continues? to be|persists? as) (?=[a-z])", "is "),
        (r"\bno longer (?:seen|visible|visualized|present|identified)\b", "not seen"),
        (r"\b(?:(?:once )?again|in the interval|in the interim|interval|interim|still)\b", ""),
    )
]  # fmt: skip


def clean_report(text: str) -> str:
    """The statements about this image, in one paragraph: no marks, no comparisons or changes, no talk between people, no numbering.

    A finding said to have resolved becomes its negation. May be empty (for "No interval change." for example).
    """
    kept = (_clean_sentence(sentence) for sentence in split_sentences(text))
    return " ".join(sentence for sentence in kept if sentence)


def split_sentences(text: str) -> list[str]:
    """Sentences and list items of a report; abbreviations and decimals do not end one."""
    parts: list[str] = []
    for part in _SENTENCE.split(text):
        part = " ".join(part.split())
        if parts and (_ABBREVIATION.search(parts[-1]) or re.fullmatch(r"\d+[.)]", parts[-1])):
            parts[-1] = f"{parts[-1]} {part}"
        elif part:
            parts.append(part)
    return parts


def _clean_sentence(sentence: str) -> str:
    sentence = re.sub(r"^\s*(?:\d+[.)]|[-*•])\s*", "", sentence)
    if _TALK.search(sentence):
        return ""
    sentence = re.sub(rf"\b(?:on|at|dated|from|of)\s+(?=(?:{_MARK}))", "", _COMPARED.sub(" ", sentence), flags=re.IGNORECASE)
    sentence = re.sub(rf"{_MARK}(?:[- ]?(?:year[- ]old|y/?o))?", " ", sentence, flags=re.IGNORECASE)
    sentence = _tidy(sentence)
    sentence = _tidy(_CHANGE_IN.sub("", sentence))
    if _NO_CHANGE.search(sentence.rstrip(".")):
        unchanged = re.match(
            r"(?:the )?(.{4,}?) (?:is|are|remains?|appears?)\b[^.]{0,30}\bunchanged\.?$", sentence, re.IGNORECASE
        )
        if unchanged is None or unchanged.group(1).lower() in ("examination", "appearance", "findings", "study"):
            return ""
        sentence = unchanged.group(1) + "."
    resolved = _RESOLVED.match(sentence)
    if resolved:
        sentence = f"No {(resolved.group('a') or resolved.group('b')).strip()}{resolved.group('rest') or '.'}"
    for pattern, new in _CHANGE_WORDS:
        sentence = pattern.sub(new, sentence)
    return _tidy(sentence)


def _tidy(sentence: str) -> str:
    sentence = re.sub(r"\(\s*\)", "", " ".join(sentence.split()))
    sentence = re.sub(r"\s+([,.;:)])", r"\1", sentence)
    sentence = re.sub(r"[,;:]+(?=[.])|([,;])(?:\s*[,;])+", r"\1", sentence).strip(" ,;:-")
    if len(re.sub(r"[^A-Za-z]", "", sentence)) < 4:
        return ""
    sentence = sentence[0].upper() + sentence[1:]
    return sentence if sentence[-1] in ".!?" else sentence + "."


# ---------------------------------------------------------------- prompts


def report_to_prompt(
    findings: str,
    impression: str,
    view: str | None = None,
    config: PromptConfig | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> str:
    """The prompt for a report's sections, cleaned, at most `config.max_tokens` long and cut at a sentence.

    `count_tokens` is the text encoder's own count (with its marks); without it tokens are estimated from above. A first sentence
    that alone is too long is cut at a word. Raises `ReportError` if no words remain.
    """
    config = config or PromptConfig()
    parts = {"impression": clean_report(impression), "findings": clean_report(findings)}
    order = ["impression", "findings"] if config.sections != "findings" else ["findings", "impression"]
    chosen = [parts[name] for name in order if parts[name]]
    if config.sections != "both":
        chosen = chosen[:1]
    sentences = list(
        dict.fromkeys(s for part in chosen for s in split_sentences(part))
    )  # an impression often repeats its findings
    if not sentences:
        raise ReportError("the report has no words about the image (both sections empty after cleaning)")
    prefix = f"{view} chest X-ray." if config.view and view and view != "UNKNOWN" else ""
    return _fit(prefix, sentences, config.max_tokens, count_tokens or estimate_tokens)


def estimate_tokens(text: str) -> int:
    """Tokens of a subword tokenizer, estimated from above: one per four letters of a word, one per mark, two for its ends."""
    return 2 + sum(-(-len(word) // 4) for word in re.findall(r"\w+|[^\w\s]", text))


def _fit(prefix: str, sentences: Iterable[str], limit: int, count: Callable[[str], int]) -> str:
    prompt, cut = prefix, True
    for sentence in sentences:
        longer = f"{prompt} {sentence}".strip()
        if count(longer) > limit:
            break
        prompt, cut = longer, False
    if not cut:
        return prompt
    words = f"{prefix} {next(iter(sentences))}".split()[: 2 * limit]  # never more words than tokens; a bound for huge sentences
    while len(words) > 1 and count(" ".join(words)) > limit:
        words.pop()
    return " ".join(words).rstrip(",;:")


def labels_to_text(labels: Iterable[FindingLabel]) -> str:
    """Plain sentences for a data set that has labels and no report: "Small left pleural effusion. No pneumothorax."""
    sentences = []
    for label in labels:
        words = FINDING_WORDS[label.name]
        if label.state != "absent":
            words = " ".join(filter(None, (label.size, label.side, words)))
        lead = {"present": "", "uncertain": "possible ", "absent": "no "}[label.state]
        sentences.append((lead + words)[0].upper() + (lead + words)[1:] + ".")
    return " ".join(sentences)
