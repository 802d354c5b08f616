"""Simulated readers of known skill: a whole study can be rehearsed before a person reads, and its analysis checked against the truth.

They see no picture. They know the key and blur it: standard normal noise, of which a share is common to all readers of a case (hard cases
are hard for everybody) and a share of the reader's own comes back when the case is shown again. Every task reads that one noise in its
own way (equal-variance signal detection, Green & Swets 1966; cumulative thresholds; Thurstone's noisy ranks), so what the analysis should
find is known. Nothing that they write can be taken for a study: files, sessions and the README say SIMULATED, and the report repeats it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any

from medgen.seeds import stable_seed
from medgen.study.responses import COLUMNS, Pack, ResponseError, option_values, read_key, read_pack, write_csv
from medgen.study.sections import SIGNALS, correct, main_question
from medgen.study.tasks import CONFIDENCE

NORMAL = NormalDist()
_MOST_MARKS = 20
_DRAWN = ("d_prime", "criterion", "log_odds", "rating_shift", "error", "ef_bias", "seconds")
VIEWER = "simulated-readers"  # a viewer version of its own: the analysis refuses a mix of these answers and people's
_START = datetime(2000, 1, 1, 9, tzinfo=UTC)
_REAL_IS_LIKED = 0.8  # logits by which ratings of real cases lie above the middle of the scale


@dataclass(frozen=True)
class Skill:
    """What readers can do on average, and how they differ (`_sd`: between readers). Unit of evidence: the SD of its noise.

    Args:
        d_prime: how far apart the two kinds of case lie (real or synthetic, same patient; √2 as much in two-alternative choices).
        criterion: where they begin to say "signal"; 0 has no bias, above it they say it too rarely.
        log_odds: of a higher rating for a synthetic case than for a real one; 0 is alike.
        rating_sd: of readers' use of a scale (lenient, severe), in logits.
        error: share of wrong answers where the key knows the right one (findings, expected course).
        error_sd: of readers' errors, in probits.
        order_sd: noise of a film's place in time, in places.
        ef_bias: estimates of the ejection fraction minus the truth, in percent points.
        ef_sd: of one estimate.
        artefacts: marks on a synthetic picture, on average.
        artefacts_real: marks on a real one.
        case_share: share of the noise's variance that all readers of a case have in common.
        repeat_share: share of the rest that is the reader's own and comes back when the case is shown again.
        seconds: median time of an answer.
        seconds_sd: of the logarithm of one time.
    """

    d_prime: float = 1.5
    d_prime_sd: float = 0.3
    criterion: float = 0.0
    criterion_sd: float = 0.2
    log_odds: float = -0.8
    log_odds_sd: float = 0.3
    rating_sd: float = 0.5
    error: float = 0.1
    error_sd: float = 0.2
    order_sd: float = 0.7
    ef_bias: float = -2.0
    ef_bias_sd: float = 3.0
    ef_sd: float = 6.0
    artefacts: float = 0.7
    artefacts_real: float = 0.2
    case_share: float = 0.3
    repeat_share: float = 0.6
    seconds: float = 12.0
    seconds_sd: float = 0.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or (value < 0 and name not in ("d_prime", "criterion", "log_odds", "ef_bias")):
                raise ValueError(f"skill.{name} is {value}; expected a number of at least 0")
        for name in ("error", "case_share", "repeat_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"skill.{name} is {getattr(self, name)}; expected a share from 0 to 1")


@dataclass(frozen=True)
class Noise:
    """Stateless standard normal noise for what a reader sees of an item; `first` leads from a repeat to its first showing."""

    seed: int
    skill: Skill
    first: Mapping[str, str]

    def __call__(self, reader: str, item: str, what: object) -> float:
        case = self.first.get(item, item)
        shared, again = self.skill.case_share, self.skill.repeat_share
        own = math.sqrt(again) * self.draw(reader, case, what) + math.sqrt(1 - again) * self.draw("again", reader, item, what)
        return math.sqrt(shared) * self.draw("case", case, what) + math.sqrt(1 - shared) * own

    def draw(self, *parts: object) -> float:
        """An independent N(0, 1) for every purpose."""
        return NORMAL.inv_cdf(self.uniform(*parts))

    def uniform(self, *parts: object) -> float:
        """An independent number in (0, 1) for every purpose."""
        return (stable_seed("simulated reader", self.seed, *parts) // 2**11 + 0.5) / 2**52


@dataclass(frozen=True)
class SimulatedReader:
    """One reader: the skill drawn for them. The rest (noise, times) is that of the whole group."""

    name: str
    d_prime: float
    criterion: float
    log_odds: float
    rating_shift: float
    error: float
    ef_bias: float
    seconds: float
    skill: Skill = field(repr=False)
    noise: Noise = field(repr=False)

    @classmethod
    def drawn(cls, name: str, skill: Skill, noise: Noise) -> SimulatedReader:
        """The reader `name` of a group of this skill."""

        def around(mean: float, sd: float, what: str) -> float:
            return mean + sd * noise.draw("skill", name, what)

        error = min(max(skill.error, 1e-9), 1 - 1e-9)
        return cls(
            name,
            around(skill.d_prime, skill.d_prime_sd, "d_prime"),
            around(skill.criterion, skill.criterion_sd, "criterion"),
            around(skill.log_odds, skill.log_odds_sd, "log_odds"),
            around(0.0, skill.rating_sd, "rating"),
            # Probits widened, so that the mean over readers is the error asked for: E Φ(z √(1+s²) + s N) = Φ(z).
            NORMAL.cdf(around(NORMAL.inv_cdf(error) * math.hypot(1, skill.error_sd), skill.error_sd, "error")),
            around(skill.ef_bias, skill.ef_bias_sd, "ef"),
            skill.seconds * math.exp(around(0.0, 0.3, "seconds")),
            skill,
            noise,
        )

    def answers(self, pack: Pack, key: Mapping[str, Any], item: str) -> Iterator[tuple[Mapping[str, Any], str, str]]:
        """(question, answer, confidence) of every question but free comments, in the order in which they are asked."""
        shown, told = pack.items[item], key[item]
        main = main_question(pack, item)
        evidence = self._evidence(shown, key, item, main) if shown["task"] in SIGNALS else None
        for question in shown["questions"]:
            if question["kind"] == "text":
                continue
            right = correct(key, item, question["id"])
            answer = self._answer(question, item, shown, told, right, evidence, question["id"] == main)
            sure = str(level(evidence, CONFIDENCE[1])) if question.get("confidence") and evidence is not None else ""
            yield question, answer, sure

    def _evidence(self, shown: Mapping[str, Any], key: Mapping[str, Any], item: str, main: str) -> float:
        """Distance from the criterion: above 0 they say "signal". Two pictures are compared: their difference tells √2 as much."""
        task = shown["task"]
        if task == "real_or_synthetic":
            signal = key[item]["source"] == "synthetic"
        else:
            signal = str(correct(key, item, main)) == SIGNALS[task]
        noise, side = self.noise(self.name, item, "evidence"), 1 if signal else -1
        if task == "two_alternative":  # a repeat may come with its sides exchanged: what was seen is exchanged with them
            return side * (self.d_prime / math.sqrt(2) + noise)
        return side * self.d_prime / 2 + noise - self.criterion

    def _answer(
        self,
        question: Mapping[str, Any],
        item: str,
        shown: Mapping[str, Any],
        told: Mapping[str, Any],
        right: Any,
        evidence: float | None,
        main: bool,
    ) -> str:
        kind, what = question["kind"], question["id"]
        if kind == "choice":
            options = option_values(question)
            if evidence is not None and main:
                signal = SIGNALS[shown["task"]] if SIGNALS[shown["task"]] in options else options[-1]
                return signal if evidence > 0 else next(word for word in options if word != signal)
            return self._choice(options, item, what, right)
        if kind == "scale":
            low, high = int(question["min"]), int(question["max"])
            return str(self._rating(item, what, told["source"], low, high))
        if kind == "number":
            return self._number(question, item, right)
        if kind == "order":
            return json.dumps(self._order(option_values(question) if right is None else list(right), item))
        if kind == "points":
            return json.dumps(self._points(item, shown, told["source"]))
        raise ResponseError(f"item {item}: simulated readers do not know questions of kind {kind!r}")

    def _choice(self, options: Sequence[str], item: str, what: str, right: Any) -> str:
        """The right option, or with the reader's error one of the others; any one where the key knows none."""
        wrong = [option for option in options if option != str(right)]
        if right is not None and (not wrong or NORMAL.cdf(self.noise(self.name, item, what)) >= self.error):
            return str(right)
        return wrong[int(self.noise.uniform("which", self.name, item, what) * len(wrong))]

    def _rating(self, item: str, what: str, source: str, low: int, high: int) -> int:
        """P(Y ≤ k) = logistic(θ_k − shift − log odds): the model that the analysis fits. Thresholds are even logits."""
        u = NORMAL.cdf(self.noise(self.name, item, what))
        seen = math.log(u / (1 - u)) + self.rating_shift + _REAL_IS_LIKED + (self.log_odds if source == "synthetic" else 0.0)
        steps = high - low + 1
        return low + sum(seen > math.log(k / (steps - k)) for k in range(1, steps))

    def _number(self, question: Mapping[str, Any], item: str, right: Any) -> str:
        """The truth with the reader's bias and noise, as a whole number on the question's scale; an average heart where none is known."""
        number = float(55 if right is None else right) + self.ef_bias
        number += self.skill.ef_sd * self.noise(self.name, item, question["id"])
        return str(round(min(max(number, question.get("min", -math.inf)), question.get("max", math.inf))))

    def _order(self, truth: list[Any], item: str) -> list[Any]:
        """Noisy places, put in order (Thurstone 1927)."""
        place = {one: i + self.skill.order_sd * self.noise(self.name, item, ("place", i)) for i, one in enumerate(truth)}
        return sorted(truth, key=place.__getitem__)

    def _points(self, item: str, shown: Mapping[str, Any], source: str) -> list[dict[str, float]]:
        """Marks in pixels of the first picture; their number is Poisson's, by inversion. All readers mark the same places."""
        mean = self.skill.artefacts if source == "synthetic" else self.skill.artefacts_real
        u, count, below, term = NORMAL.cdf(self.noise(self.name, item, "marks")), 0, 0.0, math.exp(-mean)
        while below + term < u and count < _MOST_MARKS:
            below, count = below + term, count + 1
            term *= mean / count
        size = {"x": 100, "y": 100} if not shown["media"] else {"x": shown["media"][0]["width"], "y": shown["media"][0]["height"]}
        place = self.noise.first.get(item, item)
        return [
            {"media": 0, "frame": 0, **{k: round(v * (0.1 + 0.8 * self.noise.uniform(k, place, n)), 1) for k, v in size.items()}}
            for n in range(count)
        ]


def level(evidence: float, levels: int) -> int:
    """How sure, 1 to `levels`, from the distance to the criterion; without skill and bias every level is as frequent."""
    below = 2 * NORMAL.cdf(abs(evidence)) - 1
    return min(int(below * levels), levels - 1) + 1


def simulate(
    pack: Path, key: Path, out: Path, skill: Skill = Skill(), readers: tuple[str, ...] = (), missing: float = 0.01, seed: int = 0
) -> None:
    """Answer a pack by simulated readers of known skill, to rehearse a study: one CSV per reader, marked SIMULATED everywhere.

    Args:
        pack: the folder that `medgen study build` wrote.
        key: the pack's .key.json: simulated readers look at nothing else.
        out: folder of the CSVs, of simulated_readers.json (the skill of each) and a README.
        skill: what the readers can do, and how they differ.
        readers: which readers of the pack; all if none are named.
        missing: share of items that a reader leaves unanswered.
        seed: of the readers, their noise and times; the same seed gives the same bytes.
    """
    opened = read_pack(pack)
    truth = read_key(key, opened)
    drawn = simulated_readers(opened, truth, skill, readers, seed)
    if not 0 <= missing < 1:
        raise ResponseError(f"missing {missing}: expected a share from 0 to below 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for reader in drawn:
        path = out / f"simulated-{reader.name}.csv"
        write_csv(path, COLUMNS, rows(opened, truth, reader, missing))
    facts = {
        "SIMULATED": True,
        "study_id": opened.study_id,
        "pack_sha256": opened.sha256,
        "seed": seed,
        "missing": missing,
        "skill": asdict(skill),
        "readers": {reader.name: {name: getattr(reader, name) for name in _DRAWN} for reader in drawn},
    }
    (out / "simulated_readers.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    (out / "README.md").write_text(_README.format(title=opened.title, study=opened.study_id, seed=seed), "utf-8")
    print(f"SIMULATED answers of {len(drawn)} readers in {out}; next:")
    print(f"  medgen study analyze --pack {pack} --responses {out}/*.csv --key {key} --out {out}-analysis")


_README = """# SIMULATED answers

Nobody read these cases. The answers of study "{title}" ({study}) in this folder were made by `medgen study simulate` (seed {seed}) from the
answer key and the skills in `simulated_readers.json`. They rehearse a study and test its analysis; they are evidence of nothing else.
"""


def simulated_readers(
    pack: Pack, key: Mapping[str, Any], skill: Skill, readers: Sequence[str] = (), seed: int = 0
) -> list[SimulatedReader]:
    """Readers of `skill`, drawn one by one: who else reads changes nobody's answers."""
    if unknown := [name for name in readers if name not in pack.orders]:
        raise ResponseError(f"no reader {unknown[0]!r} in {pack.folder}; it has {', '.join(pack.orders)}")
    first = {item: str(told["repeat_of"]) for item, told in key.items() if told.get("repeat_of") is not None}
    noise = Noise(seed, skill, first)
    return [SimulatedReader.drawn(name, skill, noise) for name in readers or pack.orders]


def rows(pack: Pack, key: Mapping[str, Any], reader: SimulatedReader, missing: float = 0.0) -> Iterator[tuple[object, ...]]:
    """The reader's answers as rows of a response file, in the order of reading, a washout between sessions."""
    ends = _session_ends(pack, reader.name)
    washout = timedelta(days=float(pack.protocol.get("washout_days") or 0))
    now, session = _START, 1
    for position, item in enumerate(pack.orders[reader.name]):
        if session < len(ends) and position >= ends[session - 1]:
            session, now = session + 1, now + washout + timedelta(days=1)
        if reader.noise.uniform("missing", reader.name, item) < missing:
            continue
        for question, answer, sure in reader.answers(pack, key, item):
            ms = round(
                1000
                * reader.seconds
                * math.exp(reader.skill.seconds_sd * reader.noise.draw("ms", reader.name, item, question["id"]))
            )
            now += timedelta(milliseconds=ms)
            yield (
                pack.study_id, pack.sha256, reader.name, f"simulated-{session}", position, item, pack.items[item]["task"],
                question["id"], answer, sure, ms, VIEWER, now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            )  # fmt: skip


def _session_ends(pack: Pack, reader: str) -> list[int]:
    """Positions at which the reader's sessions end."""
    order = json.loads((pack.folder / "orders" / f"{reader}.json").read_text("utf-8"))
    return [sum(order["sessions"][: n + 1]) for n in range(len(order["sessions"]))]
