"""Every interval and test of the report in simulated studies: how often it holds the truth, how often it errs.

Target: 93-97 % and 3-7 % at nominal 5 %. Where answers are few an interval can only be wider (a share of 20 answers moves in steps); the
bounds below say where. Each test prints what it measured: `pytest -s` shows the table, STUDY_SIMULATIONS=10000 a finer one.
"""

import os
from dataclasses import replace

import krippendorff
import numpy as np
import pytest
from scipy import stats

from medgen.study.measures import _mrmc_mean, _repeats_alike, _trend, compare_arms
from medgen.study.statistics import agreement, mrmc
from medgen.study.statistics import signal_detection as sd
from medgen.study.statistics.equivalence import tost
from medgen.study.statistics.proportions import reader_mean
from medgen.study.tables import Table

STUDIES = int(os.environ.get("STUDY_SIMULATIONS", 1000))


def coverage(intervals, truth):
    return float(np.mean([one.low <= truth <= one.high for one in intervals]))


def errors(means, truth):
    return float(np.mean([mean.p_value(truth) < 0.05 for mean in means]))


def told(what, low=0.93, high=0.97, /, **found):
    """Prints and checks: every number within its bounds."""
    print(f"{what}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    for name, value in found.items():
        assert low <= value <= high, f"{what}: {name} {value:.3f} is not within {low} to {high}"


def ratings(rng, studies, readers, per_kind, skill, case=None):
    """Signed confidence [S,N,J] of readers who differ in skill (SD .5) and criterion (.4) on cases of differing difficulty; signal [N].

    Evidence is N(±skill/2, 1) with half of its spread from the case, one and the same for all readers.
    """
    signal = np.arange(2 * per_kind) >= per_kind
    case = rng.normal(0, 0.6, (studies, 2 * per_kind, 1)) if case is None else case
    own, criterion = skill + 0.5 * rng.normal(size=(studies, 1, readers)), 0.4 * rng.normal(size=(studies, 1, readers))
    evidence = np.where(signal[:, None], own / 2, -own / 2) + case - criterion
    evidence += rng.normal(0, 0.8, (studies, 2 * per_kind, readers))
    sure = np.digitize(np.abs(evidence), [0.2, 0.5, 0.8, 1.2, 1.7]) + 1
    return np.where(evidence > 0, sure, -sure).astype(float), signal


def aucs(rated, signal):
    """AUC over the cases, the last axis but one."""
    ranks = stats.rankdata(rated, axis=-2)
    high, low = signal.sum(), (~signal).sum()
    return (ranks[..., signal, :].sum(-2) - high * (high + 1) / 2) / (high * low)


def right(rated, signal):
    return ((rated > 0) == signal[:, None]).astype(float)


@pytest.mark.parametrize("readers", [5, 10, 17])
def test_mean_share_over_readers(readers):
    """Readers' own shares are beta distributed (SD 11 points at .5), 40 answers each: the mean, an arm's mean, a control arm's."""
    rng = np.random.default_rng(readers)
    for truth in (0.5, 0.7, 0.9):
        skill = rng.beta(20 * truth, 20 * (1 - truth), (STUDIES, readers))
        means = [reader_mean(shares, share=True) for shares in rng.binomial(40, skill) / 40]
        told(f"share {truth}, {readers} readers", coverage=coverage([m.interval() for m in means], truth))
        told("  test of that share", 0.03, 0.07, error=errors(means, truth))
        if readers > 5:  # five readers cannot resolve a margin of ten points
            told(
                "  TOST at the margin", 0.03, 0.07, error=np.mean([tost(m, truth - 0.1, 0.1).p_equivalence < 0.05 for m in means])
            )


def test_few_answers_and_shares_near_one_make_it_wider_not_wrong():
    """Ten answers a reader, up to 95 % right: a plain t interval holds the truth in 87 % there."""
    rng = np.random.default_rng(0)
    for readers in (5, 10):
        for truth in (0.8, 0.9, 0.95):
            shares = rng.binomial(10, rng.beta(20 * truth, 20 * (1 - truth), (STUDIES, readers))) / 10
            told(
                f"share {truth}, {readers} readers x 10",
                0.93,
                0.99,
                coverage=coverage([reader_mean(s, True).interval() for s in shares], truth),
            )


def test_a_readers_own_score():
    """Exact, over all outcomes of n cases: the mean of right and wrong answers, as the scoring tasks report it."""
    for n, truth in ((20, 0.5), (20, 0.8), (20, 0.9), (60, 0.9), (60, 0.95)):
        chance = stats.binom.pmf(np.arange(n + 1), n, truth)
        ends = [reader_mean(np.arange(n) < k, share=True).interval() for k in range(n + 1)]
        held = sum(p for p, one in zip(chance, ends, strict=True) if one.low <= truth <= one.high)
        told(f"a reader's score {truth} of {n}", 0.92, 0.98, coverage=held)


def of_these_cases(rated, signal):
    return replace(mrmc.these_cases(mrmc.auc_merit(rated.T[None], signal)), share=True)


@pytest.mark.parametrize(("readers", "skill", "per_kind"), [(5, 3.0, 40), (5, 3.0, 20), (10, 3.0, 40), (5, 2.5, 40)])
def test_readers_who_are_nearly_always_right(readers, skill, per_kind):
    """AUC .95-.99 of other readers, these cases; ten sets of cases. By the spread of five readers alone 90-93 % held the truth."""
    held = []
    for seed in range(10):
        rng = np.random.default_rng([readers, per_kind, seed])
        case = rng.normal(0, 0.6, (1, 2 * per_kind, 1))
        everyone, signal = ratings(rng, 1, 5000, per_kind, skill, case)
        rated, _ = ratings(rng, STUDIES // 10, readers, per_kind, skill, case)
        truth = aucs(everyone[0], signal).mean()
        held.append(coverage([of_these_cases(one, signal).interval() for one in rated], truth))
    told(f"AUC of {readers} readers, d' {skill}, {per_kind} + {per_kind} cases", 0.925, 0.975, coverage=np.mean(held))


@pytest.mark.parametrize(("readers", "skill"), [(5, 0.0), (10, 0.0), (5, 1.5), (10, 1.5)])
def test_means_over_readers_on_these_cases(readers, skill):
    """AUC, d' and criterion: other readers, the same 40 + 40 cases. The truth is that of 20 000 readers of these cases."""
    rng = np.random.default_rng(readers)
    case = rng.normal(0, 0.6, (1, 80, 1))
    everyone, signal = ratings(rng, 1, 20_000, 40, skill, case)
    own, c = skill + 0.5 * rng.normal(size=(4000, 1)), 0.4 * rng.normal(size=(4000, 1))
    hit = stats.norm.cdf((own / 2 + case[0, signal, 0] - c) / 0.8).mean(1)
    alarm = stats.norm.cdf((-own / 2 + case[0, ~signal, 0] - c) / 0.8).mean(1)
    true_d, true_c = (
        (stats.norm.ppf(hit) - stats.norm.ppf(alarm)).mean(),
        -(stats.norm.ppf(hit) + stats.norm.ppf(alarm)).mean() / 2,
    )
    rated, _ = ratings(rng, STUDIES, readers, 40, skill, case)
    said = rated > 0
    z = [
        stats.norm.ppf((said[:, kind].sum(1) + 0.5) / 41) for kind in (signal, ~signal)
    ]  # as sd.detection, whose own test this is not
    assert z[0][0, 0] - z[1][0, 0] == pytest.approx(
        sd.detection(int(said[0, signal, 0].sum()), 40, int(said[0, ~signal, 0].sum()), 40).d_prime.value
    )
    means = [of_these_cases(one, signal) for one in rated]
    told(
        f"{readers} readers, d' {skill}, these cases",
        auc=coverage([m.interval() for m in means], aucs(everyone[0], signal).mean()),
        d_prime=coverage([reader_mean(v).interval() for v in z[0] - z[1]], true_d),
        criterion=coverage([reader_mean(v).interval() for v in -(z[0] + z[1]) / 2], true_c),
    )
    told("  test of the AUC", 0.03, 0.07, error=errors(means, aucs(everyone[0], signal).mean()))


@pytest.mark.parametrize(("readers", "skill"), [(5, 0.0), (10, 1.5)])
def test_means_over_readers_and_cases(readers, skill):
    """Accuracy and AUC by Obuchowski-Rockette: other readers, other cases (40 + 40)."""
    rng = np.random.default_rng(readers)
    many = [ratings(rng, 10, 200, 400, skill) for _ in range(4)]
    true_auc = np.mean([aucs(rated, signal).mean() for rated, signal in many])
    true_share = np.mean([right(rated, signal).mean() for rated, signal in many])
    rated, signal = ratings(rng, STUDIES, readers, 40, skill)
    by_auc = [replace(mrmc.single(mrmc.auc_merit(one.T[None], signal)), share=True) for one in rated]
    by_share = [_mrmc_mean(right(one, signal), signal) for one in rated]
    told(
        f"{readers} readers, d' {skill}, other cases",
        accuracy=coverage([m.interval() for m in by_share], true_share),
        auc=coverage([m.interval() for m in by_auc], true_auc),
    )
    told("  tests", 0.03, 0.07, accuracy=errors(by_share, true_share), auc=errors(by_auc, true_auc))
    margin = {"accuracy": (by_share, true_share), "auc": (by_auc, true_auc)}
    wrong = {name: np.mean([tost(m, t - 0.1, 0.1).p_equivalence < 0.05 for m in means]) for name, (means, t) in margin.items()}
    told("  TOST at the margin (never more than 7 %)", 0.0, 0.07, **wrong)


def test_a_habit_shared_by_all_readers_is_not_taken_for_a_difference_between_cases():
    """Guessers who all call four of five cases real. With the mix of cases taken for chance, 100 % of intervals held the truth."""
    rng = np.random.default_rng(0)
    signal = np.arange(80) >= 40
    evidence = (
        0.8 * rng.normal(size=(STUDIES, 80, 8)) + 0.6 * rng.normal(size=(STUDIES, 80, 1)) + 0.2 * rng.normal(size=(STUDIES, 1, 8))
    )
    found = [_mrmc_mean(right(one - 0.84, signal), signal).interval() for one in evidence]
    told("habit of one answer", coverage=coverage(found, 0.5))
    loose = [_mrmc_mean(right(one - 0.84, signal)).interval() for one in evidence[:200]]
    assert coverage(loose, 0.5) > 0.99


def test_two_generators_compared_against_the_same_real_cases():
    """Equally good ones, 30 cases each and 30 real: the difference of AUCs errs in 3-7 %."""
    rng = np.random.default_rng(1)
    arms = ("real",) * 30 + ("a",) * 30 + ("b",) * 30
    signal = np.arange(90) >= 30
    found = []
    for _ in range(STUDIES * 3 // 5):
        skill = 1 + 0.4 * rng.normal(size=10) + 0.2 * rng.normal(size=(2, 10))
        shown = np.repeat(np.concatenate([np.zeros((1, 10)), skill]), 30, axis=0)
        evidence = shown - 0.5 + 0.6 * rng.normal(size=(90, 1)) + 0.8 * rng.normal(size=(90, 10))
        rated = np.where(evidence > 0, 1, -1) * (np.digitize(np.abs(evidence), [0.3, 0.7, 1.2]) + 1.0)
        nothing = np.full((90, 10), np.nan)
        cases = Table((), tuple("abcdefghij"), arms, (), rated, nothing, nothing, nothing, nothing, np.full(90, -1))
        found.append(compare_arms(cases, rated, signal)["a − b"])
    told("difference of two generators", coverage=coverage([m.interval() for m in found], 0))
    told("  its test", 0.03, 0.07, error=errors(found, 0))


@pytest.mark.parametrize("readers", [5, 10])
def test_learning_and_tiring(readers):
    """Readers who do not change while reading 48 cases: the test of a change errs in 3-7 %, the fifths hold the share."""
    rng = np.random.default_rng(readers)
    found = []
    for _ in range(STUDIES * 3 // 5):
        answers = (rng.random((48, readers)) < np.clip(rng.normal(0.65, 0.12, readers), 0, 1)).astype(float)
        found.append(_trend(answers, np.argsort(rng.random((48, readers)), axis=0).astype(float), share=True))
    fifths = [one for trend in found for one in trend.fifths]
    told(f"trend, {readers} readers", change=coverage([t.change for t in found], 0), fifths=coverage(fifths, 0.65))
    told("  its test", 0.03, 0.07, error=np.mean([t.p_value < 0.05 for t in found]))


@pytest.mark.parametrize("readers", [5, 10])
def test_ratings_of_synthetic_against_real(readers):
    """How often a synthetic case is rated above a real one, on a scale of 5, the same 20 + 20 cases; and the difference of the means."""
    rng = np.random.default_rng(readers)
    synthetic, case = np.arange(40) >= 20, rng.normal(0, 0.8, (1, 40, 1))

    def rate(studies, count):
        liking = case + rng.normal(0, 1, (studies, 40, count)) + 0.5 * rng.normal(size=(studies, 1, count))
        dislike = 0.3 + 0.4 * rng.normal(size=(studies, 1, count))
        return np.digitize(liking - np.where(synthetic[:, None], dislike, 0), [-1.2, -0.4, 0.4, 1.2]) + 1.0

    def apart(rated):
        return rated[..., synthetic, :].mean(-2) - rated[..., ~synthetic, :].mean(-2)

    everyone, rated = rate(1, 20_000)[0], rate(STUDIES, readers)
    above, truth = [reader_mean(v, share=True) for v in aucs(rated, synthetic)], aucs(everyone, synthetic).mean()
    differences = [reader_mean(v) for v in apart(rated)]
    told(
        f"ratings, {readers} readers",
        superiority=coverage([m.interval() for m in above], truth),
        difference=coverage([m.interval() for m in differences], apart(everyone).mean()),
    )
    told("  tests", 0.03, 0.07, superiority=errors(above, truth), difference=errors(differences, apart(everyone).mean()))
    if readers > 5:
        told(
            "  TOST at the margin",
            0.03,
            0.07,
            superiority=np.mean([tost(m, truth - 0.1, 0.1).p_equivalence < 0.05 for m in above]),
        )


@pytest.mark.parametrize(("readers", "repeats"), [(5, 20), (8, 12), (6, 40)])
def test_readers_against_themselves(readers, repeats):
    """Readers of differing consistency see the same cases twice. Pooled binomial intervals held the truth in 80-85 %."""
    rng = np.random.default_rng(readers)

    def read(studies, count, cases):
        seen = rng.normal(size=(studies, cases, 1)) + 0.5 * rng.normal(size=(studies, cases, count))
        noise = np.exp(rng.normal(np.log(0.5), 0.4, (studies, 1, count)))
        return [(seen + noise * rng.normal(size=seen.shape) > 0).astype(float) for _ in range(2)]

    categories = np.array([0.0, 1.0])
    once, again = (part[0] for part in read(1, 2000, 1000))
    alike, kappa = (once == again).mean(), agreement.kappa(once.ravel(), again.ravel(), categories)
    studies = list(zip(*read(STUDIES, readers, repeats), strict=True))
    told(
        f"repeats, {readers} readers x {repeats}",
        0.925,
        0.98,
        alike=coverage([_repeats_alike(one, two) for one, two in studies], alike),
        kappa=coverage([agreement.with_oneself(one, two, categories) for one, two in studies], kappa),
    )


def test_agreement_between_readers():
    """50 cases, 4 readers who share a truth: kappas and alpha, intervals over cases, 200 studies (AC1, AC2, Fleiss's: test_agreement)."""
    rng, categories, count = np.random.default_rng(4), np.arange(5.0), max(60_000, 10 * STUDIES)
    seen = rng.normal(size=(count, 1)) + rng.normal(0, 0.8, (count, 4))
    population = np.digitize(seen, np.quantile(seen, np.arange(1, 5) / 5)).astype(float)
    studies = population[: 10 * STUDIES].reshape(-1, 50, 4)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    for name, weights in (("kappa", "identity"), ("weighted", "quadratic")):
        truth = np.mean([agreement.kappa(population[:, a], population[:, b], categories, weights) for a, b in pairs])
        found = [agreement.mean_kappa(one, categories, weights) for one in studies]
        told(f"mean of pairs, {name}", 0.92, 0.98, coverage=coverage(found, truth))
    truth = krippendorff.alpha(reliability_data=population[::3].T, level_of_measurement="ordinal")
    found = [agreement.krippendorff_alpha(one, "ordinal") for one in studies]
    told("Krippendorff's alpha, ordinal", 0.92, 0.98, coverage=coverage(found, truth))


@pytest.mark.parametrize(
    ("readers", "real", "made", "difficulty", "spread"),
    [(8, 20, 20, 0.3, 0.3), (5, 20, 20, 0.3, 0.3), (8, 10, 30, 0.3, 0.3), (8, 30, 10, 0.6, 0.1), (12, 60, 20, 0.2, 0.5)],
)
def test_hard_cases_are_not_taken_for_a_difference_between_arms(readers, real, made, difficulty, spread):
    """No difference, difficulty shared by readers: a t test over readers alone finds one in 29 % of studies of 8 readers, 20 + 20 cases."""
    rng, synthetic = np.random.default_rng([readers, real]), np.arange(real + made) >= real
    shape, reader = (STUDIES, real + made, readers), rng.normal(0, spread, (STUDIES, 1, readers))
    studies = rng.normal(0, np.sqrt(difficulty), (STUDIES, real + made, 1)) + reader
    studies = studies + rng.normal(0, np.sqrt(1 - difficulty), shape)
    found = [mrmc.contrast(mrmc.contrast_merit(one.T, synthetic)) for one in studies]
    told(f"synthetic minus real, {readers} readers, {real} + {made} cases", 0.03, 0.07, error=errors(found, 0))
    rated = np.clip(np.round(3 + 1.2 * studies[: STUDIES // 2]), 1, 5)
    above = [replace(mrmc.contrast(mrmc.auc_merit(one.T[None], synthetic)), share=True) for one in rated]
    told("  rated above", 0.015, 0.07, error=errors(above, 0.5))


def test_a_contrast_has_clarks_degrees_of_freedom():
    """Against the mean squares of the textbook's analysis of variance: cases within kinds, crossed with readers (Clark 1973)."""
    rng, kind, n, readers = np.random.default_rng(3), np.arange(24) >= 12, 12, 6
    x = rng.normal(size=(24, 1)) + 0.5 * rng.normal(size=(1, readers)) + rng.normal(size=(24, readers))
    mean = mrmc.contrast(mrmc.contrast_merit(x.T, kind))
    apart = x[kind].mean(0) - x[~kind].mean(0)
    readers_square, df = n / 2 * apart.var(ddof=1), [(readers - 1.0)]  # MS(kind x reader)
    total, spread = readers_square, readers_square**2 / df[0]
    for own in (x[kind], x[~kind]):  # MS(cases) and MS(cases x readers) within each kind, at half weight in the mean of two
        cases = readers * own.mean(1).var(ddof=1)
        rest = ((own - own.mean(1, keepdims=True) - own.mean(0) + own.mean()) ** 2).sum() / ((n - 1) * (readers - 1))
        total += (cases - rest) / 2
        spread += (cases / 2) ** 2 / (n - 1) + (rest / 2) ** 2 / ((n - 1) * (readers - 1))
    assert mean.standard_error**2 == pytest.approx(2 * total / (n * readers))
    assert mean.df == pytest.approx(total**2 / spread)


def icc_2(x):
    """ICC(2,1) with its ends [3,S] of ratings [S,N,R]: Shrout & Fleiss (1979) as pingouin computes it, many studies at once."""
    _, n, k = x.shape
    mean, by_case, by_reader = x.mean((1, 2)), x.mean(2), x.mean(1)
    cases = k * ((by_case - mean[:, None]) ** 2).sum(1) / (n - 1)
    readers = n * ((by_reader - mean[:, None]) ** 2).sum(1) / (k - 1)
    rest = ((x - by_case[..., None] - by_reader[:, None] + mean[:, None, None]) ** 2).sum((1, 2)) / ((n - 1) * (k - 1))
    value = (cases - rest) / (cases + (k - 1) * rest + k * (readers - rest) / n)
    a, b = k * value * readers / rest, n * (1 + (k - 1) * value) - k * value
    df = (n - 1) * (k - 1) * (a + b) ** 2 / ((n - 1) * a**2 + b**2)
    up, down = stats.f.ppf(0.975, n - 1, df), stats.f.ppf(0.975, df, n - 1)
    low = n * (cases - up * rest) / (up * (k * readers + (k * n - k - n) * rest) + n * cases)
    high = n * (down * cases - rest) / (k * readers + (k * n - k - n) * rest + n * down * cases)
    return np.stack([value, low, high])


@pytest.mark.parametrize("readers", [4, 10])
def test_intraclass_correlation(readers):
    """Two-way random effects, 40 cases: ICC(2,1), and with it ICC(2,k), whose ends are functions of the same ends."""
    rng, case, reader, rest = np.random.default_rng(readers), 1.0, 0.2, 0.6
    drawn = rng.normal(0, np.sqrt(case), (4000, 40, 1)) + rng.normal(0, np.sqrt(reader), (4000, 1, readers))
    studies = drawn + rng.normal(0, np.sqrt(rest), (4000, 40, readers))
    value, low, high = icc_2(studies)
    truth, one = case / (case + reader + rest), agreement.icc(studies[0])
    assert (one["ICC2"].value, one["ICC2"].low, one["ICC2"].high) == pytest.approx((value[0], low[0], high[0]), abs=1e-9)
    spread = [k * end / (1 + end * (k - 1)) for k, end in ((readers, low[0]), (readers, high[0]))]
    assert (one["ICC2k"].low, one["ICC2k"].high) == pytest.approx(spread, abs=1e-9)
    told(f"ICC, {readers} readers", coverage=np.mean((low <= truth) & (truth <= high)))
