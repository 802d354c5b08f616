"""What a report states is labelled: negation, doubt, side and size, in the words radiologists use."""

from __future__ import annotations

import pytest

from medgen.data.records import FINDINGS, FindingLabel
from medgen.data.report_labels import label_text
from medgen.data.report_text import labels_to_text

# + present, - absent, ? uncertain; then the side; then :size.
CASES = [
    ("No pneumothorax or effusion.", "pleural_effusion- pneumothorax-"),
    (
        "The lungs are clear without focal consolidation, effusion, or pneumothorax.",
        "pleural_effusion- pneumothorax- consolidation- edema-",
    ),
    ("Left lower lobe opacity may represent atelectasis or pneumonia.", "consolidation?left atelectasis?left"),
    ("A small right pleural effusion cannot be excluded.", "pleural_effusion?right:small"),
    ("Bibasilar atelectasis.", "atelectasis+bilateral"),
    ("Right-sided moderate pleural effusion.", "pleural_effusion+right:moderate"),
    ("Consolidation in the left lower lobe.", "consolidation+left"),
    ("Enlarged cardiac silhouette.", "cardiomegaly+"),
    ("Heart size is normal.", "cardiomegaly-"),
    ("Hyperinflated lungs.", "hyperinflation+"),
    ("Mild pulmonary vascular congestion.", "edema+:mild"),
    ("The cardiac silhouette is mildly enlarged.", "cardiomegaly+:mild"),
    ("Small bilateral pleural effusions, left greater than right.", "pleural_effusion+bilateral:small"),
    ("Small left pleural effusion with adjacent atelectasis.", "pleural_effusion+left:small atelectasis+left"),
    ("Moderate left pleural effusion without pneumothorax.", "pleural_effusion+left:moderate pneumothorax-"),
    ("There is no pneumothorax but there is a large right pleural effusion.", "pleural_effusion+right:large pneumothorax-"),
    ("No pneumothorax. Small left apical pneumothorax is seen.", "pneumothorax+left:small"),
    ("The right pneumothorax has resolved.", "pneumothorax-right"),
    ("No acute cardiopulmonary process.", "pleural_effusion- pneumothorax- consolidation- edema-"),
    (
        "Normal chest radiograph.",
        "pleural_effusion- pneumothorax- consolidation- nodule- cardiomegaly- edema- atelectasis- hyperinflation-",
    ),
    ("Blunting of the left costophrenic angle.", "pleural_effusion+left"),
    ("Small pericardial effusion.", ""),
    ("No significant change in the moderate right effusion.", "pleural_effusion+right:moderate"),
    ("The cardiomediastinal silhouette is within normal limits.", "cardiomegaly-"),
    ("The heart is top normal in size.", "cardiomegaly?"),
    ("Borderline cardiomegaly.", "cardiomegaly?"),
    ("A 12 mm nodule in the right upper lobe.", "nodule+right:12 mm"),
    ("1.5 cm left upper lobe nodule.", "nodule+left:1.5 cm"),
    ("No evidence of pneumonia.", "consolidation-"),
    ("Findings concerning for pneumonia in the right lower lobe.", "consolidation?right"),
    ("Patchy right basilar opacity, likely atelectasis.", "atelectasis?right"),
    ("Pleural effusion on the left and consolidation in the right upper lobe.", "pleural_effusion+left consolidation+right"),
    ("Left pleural effusion and right lower lobe consolidation.", "pleural_effusion+left consolidation+right"),
    ("Small right and moderate left pleural effusions.", "pleural_effusion+bilateral:moderate"),
    ("Subcutaneous emphysema along the right chest wall.", ""),
    ("Flattening of the diaphragms consistent with COPD.", "hyperinflation+"),
    ("Right hydropneumothorax.", "pleural_effusion+right pneumothorax+right"),
    ("Mild cardiomegaly and pulmonary edema.", "cardiomegaly+:mild edema+"),
    ("No mediastinal mass.", ""),
    ("There is no overt pulmonary edema.", "edema-"),
    ("Pneumothorax is not seen.", "pneumothorax-"),
    ("Effusion is absent.", "pleural_effusion-"),
    ("Costophrenic angles are sharp.", "pleural_effusion-"),
    ("Opacity in the left lung base consistent with consolidation.", "consolidation+left"),
    (
        "Severe right lower lobe atelectasis with small right pleural effusion; no pneumothorax.",
        "pleural_effusion+right:small pneumothorax- atelectasis+right:severe",
    ),
    ("Trace left effusion, no pneumothorax.", "pleural_effusion+left:trace pneumothorax-"),
    ("Moderate-sized right pneumothorax.", "pneumothorax+right:moderate"),
    ("Pulmonary edema cannot be ruled out.", "edema?"),
    ("Cannot exclude small left effusion.", "pleural_effusion?left:small"),
    (
        "The heart is mildly enlarged. The lungs are hyperinflated but clear.",
        "consolidation- cardiomegaly+:mild edema- hyperinflation+",
    ),
    ("Heart size and mediastinal contours are normal.", "cardiomegaly-"),
    ("Neither pleural effusion nor pneumothorax.", "pleural_effusion- pneumothorax-"),
    ("Possible trace bilateral effusions.", "pleural_effusion?bilateral:trace"),
    ("Cardiac, mediastinal and hilar contours are normal.", "cardiomegaly-"),
    (
        "There is no focal consolidation, pleural effusion or pneumothorax. The cardiomediastinal silhouette is normal.",
        "pleural_effusion- pneumothorax- consolidation- cardiomegaly-",
    ),
    ("There are low lung volumes and right base atelectasis.", "atelectasis+right"),
    (
        "Compared with ___, there is increased opacification at the right base consistent with pleural fluid and compressive atelectasis.",
        "pleural_effusion+right atelectasis+right",
    ),
    ("The patient has congestive heart failure with large bilateral effusions.", "pleural_effusion+bilateral:large edema+"),
    ("No pneumothorax, pneumonia, or edema. Small hiatal hernia.", "pneumothorax- consolidation- edema-"),
    ("Without evidence of effusion.", "pleural_effusion-"),
    ("The left lung is clear. Right lung consolidation.", "consolidation+right"),
    ("Multiple bilateral pulmonary nodules.", "nodule+bilateral"),
    ("Moderate to large left pleural effusion.", "pleural_effusion+left:moderate to large"),
    (
        "There is a large left pleural effusion with associated compressive atelectasis of the left lower lobe. No right effusion.",
        "pleural_effusion+left:large atelectasis+left",
    ),
]


def shorthand(labels: tuple[FindingLabel, ...]) -> str:
    """The notation of CASES."""
    mark = {"present": "+", "absent": "-", "uncertain": "?"}
    return " ".join(f"{x.name}{mark[x.state]}{x.side or ''}{':' + x.size if x.size else ''}" for x in labels)


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_sentences(text: str, expected: str) -> None:
    assert shorthand(label_text(text)) == expected


def test_a_whole_report_says_each_finding_once_the_most_positive_statement_wins() -> None:
    text = """Heart size is normal. The lungs are clear. No pleural effusion on the left.

    IMPRESSION:
    1. Small right pleural effusion.
    2. Possible pneumonia at the right base."""
    assert shorthand(label_text(text)) == "pleural_effusion+right:small consolidation?right cardiomegaly- edema-"


@pytest.mark.parametrize("name", FINDINGS)
@pytest.mark.parametrize("state", ["present", "absent", "uncertain"])
def test_plain_sentences_from_labels_are_read_back(name: str, state: str) -> None:
    side = None if name in ("cardiomegaly", "hyperinflation", "edema") or state == "absent" else "left"
    label = FindingLabel(name, state, side, None if state == "absent" else "mild")  # type: ignore[arg-type]
    assert label_text(labels_to_text([label])) == (label,)


def test_nothing_said_is_nothing_labelled() -> None:
    assert label_text("") == label_text("Sternotomy wires. Endotracheal tube in place.") == ()
    assert len(label_text("No pneumothorax. " * 5000)) == 1
