"""Check a train folder: every file of its checkpoints, and the lines of metrics.jsonl."""

from __future__ import annotations

import json

from distilclip import files
from distilclip.errors import OtherVersionError
from distilclip.integrity.findings import Findings
from distilclip.train.checkpoint_files import complete_checkpoints, find_damage, folder_name, has_digests


def check_training(found: Findings) -> None:
    """Check all complete checkpoints; those that result.json names, and later ones, must be made anew together."""
    steps = complete_checkpoints(found.path)
    try:
        damage = {step: find_damage(found.child(folder_name(step))) for step in steps}
    except OtherVersionError as error:
        found.add_other_version(error)
        return
    best = found.result.get("best") or {}
    for name in {found.result.get("checkpoint"), best.get("checkpoint")} - {None, *map(folder_name, steps)}:
        found.add_fault(f"{found.child(str(name))}, which result.json names, is missing", remove=["result.json"])
    for step, faults in damage.items():
        name = folder_name(step)
        named = name in (found.result.get("checkpoint"), best.get("checkpoint"))
        again = [folder_name(later) for later in steps if later >= step] if named else [name]
        for fault in faults:
            found.add_fault(fault, remove=again)
    without = [step for step in steps if not damage[step] and not has_digests(found.child(folder_name(step)))]
    if without:
        found.notes.append(f"checkpoints of steps {without} have no digests (made by an older version)")
    whole = sum(not faults for faults in damage.values())
    found.whole.append(f"{whole} of {len(steps)} checkpoints: every file")
    _check_metrics(found)


def _check_metrics(found: Findings) -> None:
    path = found.child("metrics.jsonl")
    if not files.exists(path):
        return
    lines = files.read_bytes(path).splitlines()
    wrong = [number for number, line in enumerate(lines, start=1) if not _is_line(line)]
    if wrong and not found.result and wrong == [len(lines)]:
        return  # a kill cut the last line; training goes on without it
    if wrong:
        found.add_fault(f"{path}: lines {wrong[:5]} are damaged. Restore them, or remove these lines.")
    else:
        found.whole.append(f"metrics.jsonl: {len(lines)} lines")


def _is_line(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False
