"""Reports as hospitals store them become prompts about one image."""

from __future__ import annotations

import pytest

from medgen.data.records import FindingLabel
from medgen.data.report_text import (
    PromptConfig,
    ReportError,
    clean_report,
    estimate_tokens,
    labels_to_text,
    report_to_prompt,
    sections,
    split_sentences,
)

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation, pleural effusion or pneumothorax.  Bilateral
 nodular opacities that most likely represent nipple shadows. The
 cardiomediastinal silhouette is normal.

 IMPRESSION:

 1. No acute cardiopulmonary process.
 2. As compared to the previous radiograph of ___, the small left effusion is unchanged.
"""


def test_sections_of_a_mimic_report() -> None:
    found = sections(MIMIC)
    assert set(found) == {"technique", "indication", "comparison", "findings", "impression"}
    assert found["findings"].startswith("There is no focal consolidation") and found["findings"].endswith("is normal.")
    assert found["impression"].startswith("1. No acute") and found["comparison"] == "None."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "FINAL REPORT\n PORTABLE AP CHEST:  Lungs are clear.\n\n IMPRESSION: Normal.",
            {"findings": "Lungs are clear.", "impression": "Normal."},
        ),
        ("FINDINGS AND IMPRESSION:\nSmall effusion.", {"findings": "Small effusion."}),
        (
            "HISTORY: Cough.\n\nPA and lateral views were obtained.\n\nThe lungs are clear.",
            {"history": None, "findings": "The lungs are clear."},
        ),
        ("The lungs are clear.", {"findings": "The lungs are clear."}),
        ("Findings: Effusion.\nImpression: Effusion.", {"findings": "Effusion.", "impression": "Effusion."}),
        ("REASON FOR EXAM: Cough.\nCONCLUSION: Pneumonia.", {"impression": "Pneumonia."}),
        ("", {}),
    ],
)
def test_other_layouts(text: str, expected: dict[str, str | None]) -> None:
    found = sections(text)
    assert {k: v for k, v in found.items() if k in ("findings", "impression")} == {
        k: v for k, v in expected.items() if v is not None
    }


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("In comparison with the study of ___, there is little change in the small left effusion.", "Small left effusion."),
        (
            "Compared to the prior study, there is a new right lower lobe consolidation.",
            "There is a right lower lobe consolidation.",
        ),
        ("Since ___, there has been interval improvement in pulmonary edema.", "There is pulmonary edema."),
        ("Stable cardiomegaly.", "Cardiomegaly."),
        ("Cardiac silhouette remains enlarged.", "Cardiac silhouette is enlarged."),
        ("Moderate right pleural effusion is unchanged.", "Moderate right pleural effusion."),
        ("Small left effusion, unchanged from ___.", "Small left effusion."),
        ("Right-sided pleural effusion has slightly increased in size.", "Right-sided pleural effusion is present."),
        ("The right pneumothorax has resolved.", "No right pneumothorax."),
        ("Interval resolution of the left pleural effusion.", "No left pleural effusion."),
        ("There is no new consolidation.", "There is no consolidation."),
        ("A 1.5 cm nodule in the right upper lobe, not seen on prior CT from ___.", "A 1.5 cm nodule in the right upper lobe."),
        ("___-year-old woman with a small effusion.", "Woman with a small effusion."),
        ("These findings were discussed with Dr. ___ by phone at 3:15 pm on ___.", ""),
        ("No significant interval change.", ""),
        ("___", ""),
        ("1. Effusion.\n2. No pneumothorax.", "Effusion. No pneumothorax."),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean_report(text) == cleaned


@pytest.mark.parametrize(
    "text",
    ["Mild pulmonary edema is suspected.", "No focal consolidation. Heart is normal in size.", "The heart is enlarged, severe."],
)
def test_what_needs_no_cleaning_stays(text: str) -> None:
    assert clean_report(text) == text


def test_sentences_survive_abbreviations_and_decimals() -> None:
    assert split_sentences("Nodule of 1.5 cm. Seen by Dr. Who.") == ["Nodule of 1.5 cm.", "Seen by Dr. Who."]


def test_prompts() -> None:
    found = sections(MIMIC)
    prompt = report_to_prompt(found["findings"], found["impression"], "PA", PromptConfig(view=True))
    assert prompt.startswith("PA chest X-ray. No acute cardiopulmonary process. Small left effusion. There is no focal")
    assert "_" not in prompt and "compared" not in prompt
    assert report_to_prompt("Effusion.", "", config=PromptConfig(sections="impression")) == "Effusion.", (
        "the other section stands in"
    )
    assert report_to_prompt("Effusion.", "Edema.", config=PromptConfig(sections="findings")) == "Effusion."
    assert report_to_prompt("Edema. Effusion.", "Edema.") == "Edema. Effusion.", "nothing is said twice"


def test_a_ten_thousand_word_report_is_cut_at_a_sentence() -> None:
    prompt = report_to_prompt("There is a small effusion. The heart is large. " * 1100, "")
    assert prompt == "There is a small effusion. The heart is large."
    long = report_to_prompt(" ".join(f"finding{i} is seen in the lung.".capitalize() for i in range(1700)), "")
    assert long.endswith(".") and estimate_tokens(long) <= 77
    endless = report_to_prompt("effusion " * 10_000, "")
    assert 10 < len(endless.split()) and estimate_tokens(endless) <= 77


@pytest.mark.parametrize("text", ["", "   ", "___", "No interval change."])
def test_no_words_is_an_error(text: str) -> None:
    with pytest.raises(ReportError, match="no words"):
        report_to_prompt(text, text)


def test_labels_become_sentences() -> None:
    labels = [
        FindingLabel("pleural_effusion", "present", "left", "small"),
        FindingLabel("edema", "absent"),
        FindingLabel("nodule", "uncertain"),
    ]
    assert labels_to_text(labels) == "Small left pleural effusion. No pulmonary edema. Possible pulmonary nodule."
