"""Check the folders of stages against their digests and their rules, and remove what is damaged."""

from __future__ import annotations

from typing import Any

from distilclip import stage_folder
from distilclip.configs.verify import Config
from distilclip.integrity.findings import Findings
from distilclip.integrity.folders import check_folders


def main(config: Config) -> dict[str, Any]:
    """Print what is whole and what is not, and return what `--out` holds; with `repair`, remove the damaged parts."""
    found = check_folders(config.folder, sources=config.sources)
    folders = []
    for findings in found:
        removed = findings.repair() if config.repair else []
        print("\n".join(_lines(findings, removed)))
        folders.append(
            {
                "path": findings.path,
                "stage": findings.stage,
                "whole": findings.whole,
                "notes": findings.notes,
                "faults": [fault.text for fault in findings.faults],
                "removed": removed,
            }
        )
    faults = [fault for findings in found for fault in findings.faults]
    left = [fault for fault in faults if not (config.repair and fault.remove)]
    print(_summary(len(found), len(faults), [f for f in found if any(x.remove for x in f.faults)], config))
    result = {"stage": "verify", "folders": folders, "num_faults": len(faults), "num_left": len(left)}
    if config.out is not None:
        stage_folder.write_json(config.out, result)
    return result


def _lines(findings: Findings, removed: list[str]) -> list[str]:
    """Return what is said of one folder."""
    return [
        f"{findings.path} ({findings.stage or 'unknown stage'})",
        *(f"  ok: {text}" for text in findings.whole),
        *(f"  note: {text}" for text in findings.notes),
        *(f"  FAULT: {fault.text}" for fault in findings.faults),
        *(f"  removed: {path}" for path in removed),
    ]


def _summary(num_folders: int, num_faults: int, repairable: list[Findings], config: Config) -> str:
    if not num_faults:
        return f"No fault in {num_folders} folders."
    again = ", ".join(f"`distilclip {found.stage} {found.path}/config.json`" for found in repairable)
    if not again:
        return f"{num_faults} faults; none of them can be repaired by running a stage again."
    if config.repair:
        return f"{num_faults} faults. What was removed is made anew by {again}."
    return (
        f"{num_faults} faults. `distilclip verify {config.folder} --repair` removes the damaged parts; then {again} "
        "makes them anew."
    )
