"""Findings that a report states: which, present or absent or uncertain, on which side, how large; by rules, without a model.

Mentions, negation, doubt and scope follow NegEx (Chapman 2001) and ConText (Harkema 2009), the labels follow CheXpert's.
negspacy and medspacy do this on spaCy (20-30 packages and a language model, no sides or sizes), so the rules stand here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

from medgen.data.records import FINDINGS, Finding, FindingLabel, Side, State
from medgen.data.report_text import split_sentences

_HEART = (
    r"(?:heart|cardiac silhouette|cardiac shadow|cardiac contours?|cardiac size|cardio-?mediastinal (?:silhouette|contours?))"
)
_NORMAL = r"(?:normal|within normal limits|unremarkable|not (?:enlarged|dilated)|stable and normal)"
_ANGLE = r"(?:costo-?phrenic (?:angle|sulc|recess)\w*|cp angles?)"
_DIAPHRAGM = r"(?:hemi-?)?diaphragms?"
_BE = (
    r"(?:is|are|may be|appears?|seems?|remains|be|now|again|borderline|mildly|moderately|severely|markedly|slightly|massively|grossly|"
    r"probably|not|top|normal|size|in)"
)

# What counts as a mention of a finding.
_MENTIONS: dict[Finding, tuple[str, ...]] = {
    "pleural_effusion": (
        r"(?<!pericardial )(?:pleural |parapneumonic |subpulmonic )?effusions?\b",
        r"pleural fluid|h[ae]{1,2}mothora\w+|hydrothora\w+|(?:h[ae]{1,2}mo|hydro)-?pneumothora\w+",
        r"fluid (?:in|within|along) the (?:\w+ )?(?:fissures?|pleural)",
        rf"blunt(?:ing|ed)(?: of)?(?: the)?(?: \w+){{0,3}} {_ANGLE}",
        rf"{_ANGLE}(?: \w+){{0,3}} blunt(?:ing|ed)",
    ),
    "pneumothorax": (r"(?:h[ae]{1,2}mo-?|hydro-?)?pneumothora\w+", r"\bptx\b"),
    "consolidation": (
        r"consolidat\w+|(?:air-?space|alveolar|lobar) (?:opaci\w+|disease|process\w*)",
        r"\w*pneumonias?\b|infiltrates?\b|air bronchograms?",
    ),
    "nodule": (
        r"\bnodules?\b|nodular (?:opaci\w+|densit\w+|lesions?)|granulomas?\b",
        r"(?:lung|pulmonary|parenchymal|coin|spiculated) (?:mass\w*|lesions?)",
        r"(?<!mediastinal )(?<!hilar )(?<!abdominal )(?<!breast )\bmass(?:es)?\b(?! effect)",
    ),
    "cardiomegaly": (
        r"cardio-?megaly|cardiac enlargement|enlargement of the (?:heart|cardiac)\w*(?: silhouette)?",
        r"enlarged (?:heart|cardiac silhouette|cardio-?mediastinal silhouette)",
        rf"{_HEART}(?: size)?(?: {_BE}){{0,5}},? (?:enlarged|large)",
        r"increased (?:cardiothoracic ratio|heart size)|cardiothoracic ratio (?:is )?(?:increased|enlarged)",
    ),
    "edema": (
        r"(?<!soft tissue )(?<!subcutaneous )(?<!peripheral )(?<!leg )\bo?edema\b",
        r"(?:pulmonary |vascular |pulmonary vascular |venous )congestion|interstitial fluid",
        r"congestive (?:heart )?failure|heart failure|cardiac decompensation|\bchf\b|(?:fluid|volume) overload",
        r"kerley|cephali[sz]ation|vascular (?:engorgement|redistribution|plethora)",
    ),
    "atelectasis": (
        r"atelecta\w+|volume loss|loss of volume",
        r"collapsed? (?:of )?(?:the )?(?:\w+ ){0,3}lobe|(?:lobar|lobe) collapse",
    ),
    "hyperinflation": (
        r"hyper-?(?:inflat\w+|expan\w+|aerat\w+|lucen\w+)|over-?(?:inflat\w+|expan\w+)|air[- ]trapping",
        rf"flatten(?:ed|ing)(?: of)?(?: the)?(?: \w+)? {_DIAPHRAGM}|{_DIAPHRAGM} (?:is|are|appear\w*) (?:\w+ )?flattened",
        r"(?<!subcutaneous )(?<!mediastinal )emphysema(?:tous)?\b|\bcopd\b|chronic obstructive pulmonary",
    ),
}
_MENTION_OF = {name: re.compile("|".join(patterns)) for name, patterns in _MENTIONS.items()}

# Normality stated without naming the finding.
_STATED_NORMAL: tuple[tuple[re.Pattern[str], tuple[Finding, ...]], ...] = tuple(
    (re.compile("|".join(patterns)), cast("tuple[Finding, ...]", names))
    for patterns, names in (
        ((rf"{_HEART}(?:(?! but |, but|;| is enlarged).){{0,60}}?\b{_NORMAL}", r"normal heart",
          rf"{_NORMAL} (?:in )?(?:size of the )?(?:and \w+ )?{_HEART}",
          rf"\bcardiac(?:,? and|,) (?:\w+ ){{0,3}}(?:contours?|silhouettes?) (?:is|are|appear) (?:\w+ )?{_NORMAL}"), ("cardiomegaly",)),
        ((rf"{_ANGLE}[^.]{{0,40}}\b(?:sharp|clear|preserved|normal)", rf"(?:sharp|clear) {_ANGLE}"), ("pleural_effusion",)),
        ((r"pleural (?:spaces?|surfaces?)[^.]{0,40}\b(?:clear|normal|unremarkable)",), ("pleural_effusion", "pneumothorax")),
        ((r"(?<!left )(?<!right )(?<!remaining )\blungs (?:\w+ )?(?:are|is|appear|remain)(?: \w+){0,5} clear\b(?! of)",
          r"\blungs clear\b|\bclear lungs"), ("consolidation", "edema")),
        ((r"no focal (?:lung |pulmonary |parenchymal )?(?:opaci|abnormalit|process)",), ("consolidation",)),
        ((r"(?:lungs|lung volumes) (?:are|is) (?:normally inflated|normal)|normal lung volumes",), ("hyperinflation",)),
        ((r"pulmonary vascul\w+ (?:is|are|appears) (?:\w+ )?(?:normal|unremarkable|within normal limits)",
          r"normal pulmonary vascul\w+"), ("edema",)),
        ((r"\bno (?:evidence of |radiographic evidence of )?(?:an )?(?:acute|active|significant)(?:,? (?:acute|or|active))* "
          r"(?:cardio-?pulmonary|cardiothoracic|intrathoracic|pulmonary|chest)",),
         ("pleural_effusion", "pneumothorax", "consolidation", "edema")),
        ((r"(?:normal|unremarkable)(?: \w+){0,3} (?:chest )?(?:radiographs?|x-?rays?|films?|study|examination|chest)\b",
          r"\bchest (?:radiograph|x-?ray|film)? ?is (?:normal|unremarkable)"), FINDINGS),
    )
)  # fmt: skip

_SCOPE_END = re.compile(
    r"\bbut\b|\bhowever\b|\balthough\b|\bthough\b|\bexcept\b|\baside from\b|\bapart from\b|\bother than\b|\bwhile\b|\bwhereas\b|;|"
    r"\bthere (?:is|are)\b|\band (?=(?:an? |there )|(?:tiny|small|trace|minimal|mild|moderate|large|severe|stable|unchanged)\b)|"
    r", (?=(?:an?|the|with|which|likely|probably|possibly|suggest\w+)\b)"
)
_NOT_A_NEGATION = re.compile(
    r"\bno (?:\w+ ){0,3}(?:change|increase|decrease|improvement|difference|progression)\b|\bwithout (?:\w+ ){0,2}change\b|"
    r"\bnot (?:only|significantly changed|necessarily)\b|\bnot (?:\w+ )?(?:excluded|exclude)\b|"
    r"\bcannot (?:\w+ )?(?:be )?(?:\w+ )?(?:excluded?|ruled? out)\b"
)
_NEGATION_BEFORE = re.compile(
    r"\b(?:no|without|negative for|free of|clear of|absence of|resolution of|neither|nor|lacks?|never|not|rather than|ruled out|"
    r"rules? out|exclud(?:es|ed))\b"
)
_NEGATION_AFTER = re.compile(
    r"^[^,;]{0,40}?\b(?:(?:is|are|was|were|has been|have been) (?:not|no longer|absent|excluded|ruled out|resolved)|"
    r"(?:is|are|has|have) (?:\w+ )?(?:resolved|cleared|disappeared)|not (?:seen|identified|present|evident|demonstrated|visuali[sz]ed))"
)
_DOUBT_BEFORE = re.compile(
    r"\b(?:may|might|could|can|possib\w+|potential\w*|probabl[ye]|likely|presum\w+|perhaps|question(?:able|ed)?|suspect\w*|suspici\w+|"
    r"suggest\w*|concern\w*|worrisome|versus|vs|cannot exclude|not exclude|borderline|equivocal|early|would|differential|indeterminate|"
    r"difficult to exclude|if any|or possibly)\b|\?"
)
_DOUBT_AFTER = re.compile(
    r"^[^;]{0,60}?(?:\b(?:cannot|can not|not|difficult to|hard to) (?:\w+ ){0,3}(?:be )?(?:\w+ )?(?:excluded?|ruled? out)|"
    r"\b(?:is|are) (?:\w+ )?(?:possible|suspected|likely|questioned|questionable|probable|equivocal|considered|a consideration)|"
    r"\b(?:may|might|could) (?:also )?be (?:present|considered)|\bif (?:any|present)\b|\?)"
)
_CERTAIN = re.compile(
    r"\b(?:consistent with|compatible with|in keeping with|diagnostic of|represent(?:s|ing)|reflect(?:s|ing)|due to|from)\b"
)
_BORDERLINE_HEART = re.compile(
    rf"{_HEART}(?: size)?[^.;]{{0,40}}\b(?:borderline|top[- ]normal|top normal|upper limits? of normal|upper[- ]normal)|"
    rf"\b(?:borderline|top[- ]normal)(?: \w+){{0,2}} {_HEART}|borderline cardiomegaly"
)

_SIDES = re.compile(
    r"\b(?P<bilateral>bilateral(?:ly)?|both|bi-?basilar|bi-?basal|bi-?apical|bi-?lateral|either|right and left|left and right)\b|"
    r"\b(?P<left>left|lll|lul|lingula\w*)\b|\b(?P<right>right|rll|rul|rml)\b"
)
_SIDELESS: tuple[Finding, ...] = ("cardiomegaly", "hyperinflation")
_MOSTLY_SIDELESS: tuple[Finding, ...] = (*_SIDELESS, "edema")  # a side counts only where it stands with them
_POST_SIDE = re.compile(r"\b(?:on|in|at|of|within|along|involving|overlying|to)\s+(?:the\s+)?(?:\w+ ){0,2}$")
_COORDINATION = re.compile(r"^[\s,]*(?:(?:and|or|with|plus|as well as|adjacent|associated|overlying|underlying|compressive|subjacent|some|"
                           r"likely|an?|the|small|mild|moderate|pleural|basilar|linear)[\s,/]*)*$")  # fmt: skip
_SIZE = re.compile(
    r"\b(?:(?:tiny|trace|minimal|small|mild|moderate|large)(?:ly)?[- ]to[- ](?:small|mild|moderate|large|severe)(?:ly)?(?:[- ]sized)?|"
    r"\d+(?:\.\d+)?(?: x \d+(?:\.\d+)?)* ?[cm]m|tiny|trace|small|large|extensive|"
    r"(?:minimal|slight|mild|moderate|massive|marked|severe|gross)(?:ly)?)\b"
)
_SIZE_AFTER = re.compile(
    rf"(?:[^.;,]*?\b(?:is|are|measur\w+|appears?|of)\b[^.;,]*?|[^.;,]*,\s*)(?P<size>{_SIZE.pattern})(?=\s*(?:$|[.,;)]|in|and|on|with))"
)
_RANK: dict[State, int] = {"present": 0, "uncertain": 1, "absent": 2}


@dataclass(frozen=True)
class _Mention:
    label: FindingLabel
    implied: bool = False  # normality stated without naming the finding: gives way to any mention


def label_text(text: str) -> tuple[FindingLabel, ...]:
    """The findings of `FINDINGS` that `text` states, at most one label each, in `FINDINGS`' order; unmentioned ones are left out.

    Of several statements the most positive wins (present, uncertain, absent; general normality last). Sides within a sentence go to
    the mention they stand with; "left" here and "right" there make "bilateral". `size` is the report's word ("small", "12 mm").
    """
    mentions: list[_Mention] = []
    for sentence in split_sentences(text):
        mentions += _label_sentence(sentence.lower().replace("_", " "))
    return tuple(label for name in FINDINGS if (label := _merge(m for m in mentions if m.label.name == name)) is not None)


def _merge(mentions: Iterable[_Mention]) -> FindingLabel | None:
    ordered = sorted(mentions, key=lambda m: (m.implied, _RANK[m.label.state]))
    if not ordered:
        return None
    best = ordered[0]
    same = [m.label for m in ordered if (m.implied, m.label.state) == (best.implied, best.label.state)]
    sides = {label.side for label in same if label.side is not None}
    side: Side | None = None if not sides else sides.pop() if len(sides) == 1 else "bilateral"
    size = next((label.size for label in same if label.size is not None), None)
    return replace(best.label, side=side, size=None if best.label.state == "absent" else size)


def _label_sentence(sentence: str) -> list[_Mention]:
    normal = [name for pattern, names in _STATED_NORMAL if pattern.search(sentence) for name in names]
    found = [_Mention(FindingLabel(name, "absent"), implied=True) for name in normal]
    if _BORDERLINE_HEART.search(sentence):
        found.append(_Mention(FindingLabel("cardiomegaly", "uncertain")))
    spans = _spans(sentence)
    sides = _sides_of(sentence, spans)
    for index, (name, begin, end) in enumerate(spans):
        state = _state(sentence, begin, end)
        following = spans[index + 1][1] if index + 1 < len(spans) else len(sentence)
        side = None if name in _SIDELESS else sides[index]
        size = None if state == "absent" else _size(sentence, spans, index, following)
        if not (name == "cardiomegaly" and _BORDERLINE_HEART.search(sentence)):
            found.append(_Mention(FindingLabel(name, state, side, size)))
    return found


def _spans(sentence: str) -> list[tuple[Finding, int, int]]:
    """Mentions in order; "hydropneumothorax" is two findings at one place."""
    spans = [
        (name, m.start(), max(m.end(), m.start() + 1))
        for name, pattern in _MENTION_OF.items()
        for m in pattern.finditer(sentence)
    ]
    return sorted(spans, key=lambda span: span[1:])


def _state(sentence: str, begin: int, end: int) -> State:
    before, after = sentence[:begin], sentence[end:]
    inside = sentence[begin:end]
    stops = list(_SCOPE_END.finditer(before))
    before = before[stops[-1].start() :] if stops else before
    stop_after = _SCOPE_END.search(after)
    after = after[: stop_after.start()] if stop_after else after
    masked = _NOT_A_NEGATION.sub(lambda m: " " * len(m.group()), before)
    if _DOUBT_AFTER.search(after):
        return "uncertain"
    if re.search(r"\bnot\b", inside) or _NEGATION_BEFORE.search(masked) or _NEGATION_AFTER.search(after):
        return "absent"
    hedges = list(_DOUBT_BEFORE.finditer(before))
    if re.search(r"\b(?:may|might|could|probably)\b", inside):
        return "uncertain"
    if hedges and not _CERTAIN.search(before[hedges[-1].end() :]):
        return "uncertain"
    return "uncertain" if _NOT_A_NEGATION.search(before) and "exclu" in before else "present"


def _sides_of(sentence: str, mentions: list[tuple[Finding, int, int]]) -> list[Side | None]:
    """The side of each mention: named before it or after it ("on the left"), else shared in a coordination, else the sentence's one."""
    spans = [(begin, end) for _, begin, end in mentions]
    sided = [name not in _MOSTLY_SIDELESS for name, *_ in mentions]
    own: list[set[str]] = [set() for _ in spans]
    everywhere: set[str] = set()
    for match in _SIDES.finditer(sentence):
        side = str(match.lastgroup)
        everywhere.add(side)
        place = _place_of(sentence, spans, match)
        for i, (begin, end) in enumerate(spans):  # two findings may share one place: "hydropneumothorax"
            if place is not None and begin < place[1] and place[0] < end:
                own[i].add(side)
    for i in (*range(1, len(spans)), *range(len(spans) - 2, -1, -1)):
        for other in (i - 1, i + 1):
            if other in range(len(spans)) and sided[i] and not own[i] and own[other]:
                first, second = sorted((i, other))
                if _COORDINATION.match(sentence[spans[first][1] : spans[second][0]]):
                    own[i] = own[other]
    one = everywhere if len(everywhere) == 1 else set()
    shared = [one if sided[i] and _state(sentence, *span) != "absent" else set() for i, span in enumerate(spans)]
    return [_one_side(sides or fallback) for sides, fallback in zip(own, shared, strict=True)]


def _place_of(sentence: str, spans: list[tuple[int, int]], match: re.Match[str]) -> tuple[int, int] | None:
    """The mention that a side word stands with."""
    for span in spans:
        if span[0] <= match.start() < span[1]:
            return span
    before = [span for span in spans if span[1] <= match.start()]
    after = [span for span in spans if span[0] > match.start()]
    if before and (not after or _belongs_before(sentence, before[-1], after[0], match)):
        return before[-1]
    return after[0] if after else None


def _belongs_before(sentence: str, previous: tuple[int, int], following: tuple[int, int], match: re.Match[str]) -> bool:
    """Whether a side between two mentions describes the first: "effusion on the left and ...", "effusions, left greater than right"."""
    lead, rest = sentence[previous[1] : match.start()], sentence[match.end() : following[0]]
    separated = re.search(r",|;|\band\b|\bwith(?:out)?\b|\bbut\b|\bor\b|\bwhich\b|\bno\b|\bis\b|\bmay\b|\blikely\b", rest)
    compared = re.match(r"[\s,(]*(?:slightly )?(?:left|right) (?:greater|larger|more|>|worse)", sentence[previous[1] :])
    return bool(compared or (_POST_SIDE.search(lead) and separated))


def _one_side(sides: set[str]) -> Side | None:
    if not sides:
        return None
    return cast(Side, next(iter(sides))) if len(sides) == 1 else "bilateral"


def _size(sentence: str, spans: list[tuple[Finding, int, int]], index: int, following: int) -> str | None:
    """The size word nearest before the mention (after the previous one), inside it, or after it as in "is large" or "measures 9 mm"."""
    _, begin, end = spans[index]
    previous = max((e for _, b, e in spans[:index] if e <= begin), default=0)
    stops = [m.end() for m in _SCOPE_END.finditer(sentence[:begin]) if m.group().strip(" ,") in (";", "but", "however")]
    zone = sentence[max([previous, *stops]) : end]
    words = list(_SIZE.finditer(zone))
    if words and not (index and "," in zone[words[-1].end() :] and previous):
        return _plain(words[-1].group())
    after = sentence[end:following]
    tail = _SIZE_AFTER.match(after)
    return _plain(tail.group("size")) if tail else None


def _plain(word: str) -> str:
    """ "mildly" is "mild"."""
    return re.sub(r"(?<=[a-z])ly\b", "", " ".join(word.replace("-", " ").split()).replace(" sized", ""))
