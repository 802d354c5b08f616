"""Electrocardiograms: reading, checking, filtering, and where in the heart's cycle a moment lies."""

from __future__ import annotations

from medgen.data.ecg_files import read_ecg, write_wfdb
from medgen.data.ecg_leads import ECG, LEADS, ECGError, cut, derive_limb_leads, lead_name

__all__ = ["ECG", "LEADS", "ECGError", "cut", "derive_limb_leads", "lead_name", "read_ecg", "write_wfdb"]
