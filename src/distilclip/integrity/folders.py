"""Find the folders of stages below a path, and check each by what its stage writes."""

from __future__ import annotations

from distilclip import digests, files
from distilclip.errors import InputError
from distilclip.integrity.findings import Findings, open_findings
from distilclip.integrity.group_tables import check_groups
from distilclip.integrity.label_tables import check_labels
from distilclip.integrity.pack_files import check_pack
from distilclip.integrity.selection_files import check_selection
from distilclip.integrity.store_files import Sources, check_store
from distilclip.integrity.training_files import check_training
from distilclip.integrity.weight_files import check_weights

ORDER = ("embed", "import", "balance", "select", "cluster", "weigh", "pack", "train")  # each after what it is made from
CHECKS = {
    "balance": check_groups,
    "select": check_selection,
    "cluster": check_labels,
    "weigh": check_weights,
    "pack": check_pack,
    "train": check_training,
}


def check_folders(path: str, *, sources: Sources = "none") -> list[Findings]:
    """Check a stage's folder, or every one below the folder of a run.

    Raises `InputError` where there is none.
    """
    if not files.is_folder(path):
        raise InputError(f"{path} is no folder. Give the folder of a stage, or of a run.")
    digests.forget()
    found = []
    for at, names in files.walk(path):
        if "config.json" in names and "/checkpoints/" not in at and (findings := open_findings(at)) is not None:
            found.append(findings)
    if not found:
        raise InputError(f"{path} holds no folder that a stage wrote (no config.json that names one).")
    for findings in found:
        try:
            _check(findings, sources)
        except InputError as error:
            findings.notes.append(f"not compared with the folders that it was made from: {error}")
    return sorted(found, key=lambda findings: ORDER.index(findings.stage) if findings.stage in ORDER else len(ORDER))


def _check(found: Findings, sources: Sources) -> None:
    if found.stage in ("embed", "import"):
        check_store(found, sources)
    elif found.stage in CHECKS:
        CHECKS[found.stage](found)
    elif found.stage:
        found.notes.append(f"of {found.stage} only the JSON files are checked: it writes no digests")
