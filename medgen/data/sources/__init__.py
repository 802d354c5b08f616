"""Manifest builders, one module per public data set; `SOURCES` is the registry that `medgen data build` reads."""

from __future__ import annotations

from medgen.data.sources import chestmnist, chexpert_csv, dicom_folder, imagefolder, mimic_cxr_jpg, rexgradient
from medgen.data.sources.base import Source

SOURCES: dict[str, Source] = {
    "mimic_cxr_jpg": Source("MIMIC-CXR-JPG 2.x with MIMIC-CXR's report tree", mimic_cxr_jpg.records),
    "rexgradient": Source("ReXGradient-160K: metadata/*.csv and *_view_position.json", rexgradient.records),
    "chexpert_csv": Source("CheXpert (train.csv, valid.csv) or NIH ChestX-ray14 (Data_Entry_*.csv)", chexpert_csv.records),
    "chestmnist": Source("ChestMNIST: chestmnist[_64|_128|_224].npz", chestmnist.records, chestmnist.unpack),
    "imagefolder": Source(
        "Hugging Face ImageFolder: metadata.jsonl or metadata.csv with file_name and text", imagefolder.records
    ),
    "dicom_folder": Source("a folder of DX or CR DICOM files, with reports.csv if there are reports", dicom_folder.records),
}
