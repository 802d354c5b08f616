"""Manifest builders, one module per public data set; `SOURCES` is the registry that `medgen data build` reads."""

from __future__ import annotations

from medgen.data.echo_records import ECHO_VIEWS, EchoView
from medgen.data.sources import (
    acdc,
    bids_sessions,
    camus,
    chestmnist,
    chexpert_csv,
    dicom_folder,
    echonet_dynamic,
    echoxflow,
    imagefolder,
    mimic_cxr_jpg,
    mimic_cxr_visits,
    mimic_iv_ecg,
    mimic_iv_echo,
    nih_followups,
    ptb_xl,
    rexgradient,
    ultrasound_dicom,
    visit_csv,
)
from medgen.data.sources.base import Source

_ECHO: tuple[EchoView, ...] = (*ECHO_VIEWS, "UNKNOWN")

SOURCES: dict[str, Source] = {
    "mimic_cxr_jpg": Source("MIMIC-CXR-JPG 2.x with MIMIC-CXR's report tree", mimic_cxr_jpg.records),
    "rexgradient": Source("ReXGradient-160K: metadata/*.csv and *_view_position.json", rexgradient.records),
    "chexpert_csv": Source("CheXpert (train.csv, valid.csv) or NIH ChestX-ray14 (Data_Entry_*.csv)", chexpert_csv.records),
    "chestmnist": Source("ChestMNIST: chestmnist[_64|_128|_224].npz", chestmnist.records, chestmnist.unpack),
    "imagefolder": Source(
        "Hugging Face ImageFolder: metadata.jsonl or metadata.csv with file_name and text", imagefolder.records
    ),
    "dicom_folder": Source("a folder of DX or CR DICOM files, with reports.csv if there are reports", dicom_folder.records),
    "echonet_dynamic": Source(
        "EchoNet-Dynamic: FileList.csv, VolumeTracings.csv, Videos/*.avi", echonet_dynamic.records, views=_ECHO
    ),
    "camus": Source("CAMUS, NIfTI edition: half sequences with masks of every frame", camus.records, views=_ECHO),
    "ultrasound_dicom": Source(
        "a folder of ultrasound cines (DICOM), with labels.csv if there are labels", ultrasound_dicom.records, views=_ECHO
    ),
    "mimic_iv_echo": Source(
        "MIMIC-IV-ECHO, joined with MIMIC-IV-ECG where that lies beside it", mimic_iv_echo.records, views=_ECHO
    ),
    "echoxflow": Source(
        "EchoXFlow: B-mode with the scanner's synchronised ECG (Zarr)", echoxflow.records, echoxflow.unpack, views=_ECHO
    ),
    "mimic_iv_ecg": Source("MIMIC-IV-ECG: record_list.csv, machine_measurements.csv, WFDB", mimic_iv_ecg.records, views=()),
    "ptb_xl": Source("PTB-XL: ptbxl_database.csv, WFDB", ptb_xl.records, views=()),
    "mimic_cxr_visits": Source(
        "MIMIC-CXR-JPG 2.x as dated visits: one frontal film and report per study", mimic_cxr_visits.records
    ),
    "nih_followups": Source("NIH ChestX-ray14 by Follow-up #, or PadChest by date", nih_followups.records),
    "acdc": Source("ACDC: cine MR from end-diastole to end-systole, as SADM reads it", acdc.records, views=()),
    "bids_sessions": Source("BIDS with sessions (OASIS, ADNI): sub-*/ses-*/anat/*_T1w.nii.gz", bids_sessions.records, views=()),
    "visit_csv": Source("visits.csv: patient, date|day|order, image (fundus, skin, ...)", visit_csv.records, views=()),
}
