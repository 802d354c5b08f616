"""Where a digital film was taken: who comes there, how films are taken, what the detector and its display do to them.

Site "A" is what every digital chest film has always been. Site "B" is another hospital, to test on what nobody trained on:
an inpatient ward with computed radiography. Findings and reports are drawn alike at both, so that a difference between the
sites is one of pictures and people, not of case mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SiteName = Literal["A", "B"]


@dataclass(frozen=True)
class Site:
    """One hospital. The defaults are site A's. Scales are relative to the CT's; mm and degrees in the patient.

    Age (years), `depth` (antero-posterior scale), `height` and `width` are means with standard deviations; `breast_mm` a range.
    `portable_share` None films every patient in each of the wanted views; a number films everyone once, that share of them AP at
    the bedside. Poses of AP films vary `loose` times as much as those of PA films.
    """

    name: SiteName = "A"
    external: bool = False  # for testing only: every patient is in the split "test"
    # who comes
    age: tuple[float, float] = (58, 17)
    depth: tuple[float, float] = (1.03, 0.09)
    height: tuple[float, float] = (0.99, 0.03)
    width: tuple[float, float] = (1.0, 0.035)
    breast_mm: tuple[float, float] = (18, 50)
    # how they are filmed
    portable_share: float | None = None
    loose: float = 1.6
    rotation_deg: float = 2.0
    tilt_deg: float = 1.2
    inspiration_mm: tuple[float, float] = (2, -4)  # mean diaphragm below its place in the CT: PA, AP
    shift_mm: tuple[float, float] = (0.0, 4)  # mean of rows (positive: the patient sits higher on the film), spread of both
    collimation_mm: float = 0.0  # each edge of the film is shuttered black by up to this much
    # what detector and display do; brightness in units of the display's range
    scatter: float = 0.06  # per blurred primary
    quanta: float = 0.0  # effective quanta in 1 mm2 of open beam; 0: noise is only the display noise below
    electronic: float = 0.0  # detector noise, as a share of the open beam's signal in 1 mm2
    blur_mm: float = 0.0  # standard deviation of the point spread of detector, focus and motion
    percentiles: tuple[float, float] = (0.03, 0.96)  # of the chest's log signal that the display window spans
    edges: tuple[float, float] = (0.55, 0.35)  # unsharp masking at 16 mm and 4 mm
    sigmoid: float = 0.0  # width of a sigmoid display curve; 0: straight, with shoulder and toe
    exposure: tuple[float, float] = (0.0, 0.035)  # added brightness
    contrast: tuple[float, float] = (1.0, 0.07)
    noise: tuple[float, float] = (0.003, 0.008)  # display noise, uniform between


# Sources. Share of portable films: 60 % of MIMIC-CXR-JPG's frontal films are AP (Johnson et al. 2019, arXiv:1901.07042).
# Scatter to primary without a bedside grid is 2 to 4 times that behind a grid (Niklason et al. 1981, Med Phys 8:677). Quantum noise
# is Poisson in the signal, electronic noise is not (IEC 62220-1), so both show most behind spine and diaphragm. Display curve: the
# sigmoid VOI LUT function of DICOM PS3.3 C.11.2.1.3.1. Black edges: display shutters, PS3.3 C.7.6.11. Chosen by eye, no source: age,
# habitus, pose, and the size of blur and noise, which at 2.5 mm pixels stand for more than a detector's (motion, resampling).
SITES: dict[SiteName, Site] = {
    "A": Site(),
    "B": Site(
        name="B",
        external=True,
        age=(66, 13),
        depth=(1.11, 0.10),
        height=(0.98, 0.03),
        width=(1.02, 0.035),
        breast_mm=(25, 62),
        portable_share=0.6,
        loose=1.8,
        rotation_deg=2.6,
        tilt_deg=1.6,
        inspiration_mm=(0, -7),
        shift_mm=(3.0, 6),
        collimation_mm=11.0,
        scatter=0.09,
        quanta=4.0e4,
        electronic=3.0e-4,
        blur_mm=1.5,
        percentiles=(0.02, 0.97),
        edges=(0.3, 0.15),
        sigmoid=0.85,
        exposure=(0.03, 0.05),
        contrast=(1.05, 0.09),
        noise=(0.004, 0.010),
    ),
}


def site_of(name: str) -> Site:
    """The site of that name. Raises `ValueError` naming those there are."""
    for known, site in SITES.items():
        if known == name:
            return site
    raise ValueError(f"site {name!r}: there are {', '.join(SITES)}")
