"""Tell the results in a few sentences, each as far as its evidence allows."""

from __future__ import annotations

from distilclip.report import phrases
from distilclip.report.comparison import Cell, Row, Table
from distilclip.report.evidence import Difference
from distilclip.report.load import Results
from distilclip.sets.score import title

CLEAR = 0.05
"""A difference is called clear when chance alone would show as large a one less often than this."""


def story(table: Table, results: Results) -> list[str]:
    """Tell who scores highest, then by how much and how sure that is, then what balance removed: a paragraph each."""
    paragraphs = _best_student(table) if table.columns else []
    for folder in results.finished("balance")[:1]:
        kept, valid = phrases.count(folder.result["num_kept"]), phrases.count(folder.result["num_valid"])
        removed = phrases.percent(folder.result["removed_ratio"])
        doubt = ", which is doubtful, see below" if folder.result.get("warnings") else ""
        paragraphs.append(f"Semantic balance kept {kept} of {valid} pictures ({removed} % removed{doubt}).")
    for folder in results.finished("select"):
        kept, scored = phrases.count(folder.result["num_kept"]), phrases.count(folder.result["num_scored"])
        paragraphs.append(f"A selection kept {kept} of {scored} pairs: {folder.result['description']}.")
    return paragraphs or [f"Results of {phrases.number(len(results.folders), 'stage folder')}."]


def _best_student(table: Table) -> list[str]:
    """Return what the first column says about the students; nothing where none has a score."""
    found = [(row.cells[0].value, row) for row in table.rows if row.model.role in ("baseline", "student")]
    scored = [(value, row) for value, row in found if value is not None]
    if not scored:
        return []
    value, best = max(scored, key=lambda pair: pair[0])
    column, students = table.columns[0], [row for _, row in scored]
    task = title(column.task).lower()
    measure = f"mean {task} {column.set.removeprefix('mean ')}" if column.members else f"{task} on {column.set}"
    rank = f"scores highest of {len(scored)} students" if len(scored) > 1 else "is the only student"
    text = f"{best.model.name} {rank}: {phrases.percent(value)} % {measure}{_uncertainty(best.cells[0], best)}"
    teacher = next((row.cells[0].value for row in table.rows if row.model.role == "teacher"), None)
    if teacher:
        text += f", {100 * value / teacher:.0f} % of its teacher's score"
    evidence = [*_against_baseline(best, students), *_seeds(students)]
    return [f"{text}.", " ".join(evidence)] if evidence else [f"{text}."]


def _uncertainty(cell: Cell, row: Row) -> str:
    if cell.spread is not None:
        return f" (mean of {row.num_seeds} seeds, standard deviation {phrases.percent(cell.spread)})"
    if cell.low is not None and cell.high is not None:
        return f" (95 % interval {phrases.percent(cell.low)} to {phrases.percent(cell.high)})"
    return ""


def _against_baseline(best: Row, students: list[Row]) -> list[str]:
    """Compare the best student with the baseline, and say whether the two can be told apart."""
    baseline = next((row for row in students if row.model.role == "baseline"), None)
    if baseline is None or len(students) < 2:
        return []
    if best is baseline:
        return ["It had no teacher: no distilled student scores higher."]
    found = best.cells[0].difference
    if found is None:
        return []
    begin = f"That is {phrases.gain(found.value)} points against {baseline.model.name}, which had no teacher"
    if found.low is None or found.high is None:
        return [f"{begin}; there is too little to say how sure this is."]
    return [f"{begin} ({_evidence(found, len(students) - 1)}): {_verdict(found, len(students) - 1)}."]


def _evidence(found: Difference, num_compared: int) -> str:
    """Say where the interval comes from. The best of several had several chances, which its p must pay for."""
    assert found.low is not None
    assert found.high is not None
    over = {
        "images": f"on the same {phrases.count(found.num_images)} test pictures",
        "scores": "from the intervals of the two scores",
        "seeds": "over the seeds",
    }[found.basis]
    text = f"{phrases.gain(found.low)} to {phrases.gain(found.high)} {over}"
    if found.p is None:
        return text
    best_of = f", as the best of {num_compared}" if num_compared > 1 else ""
    return f"{text}; {'paired ' * (found.basis == 'images')}test{best_of}: {_p_value(found.p, num_compared)}"


def _p_value(p: float, num_compared: int) -> str:
    corrected = min(1.0, p * num_compared)  # Bonferroni
    return "p < 0.001" if corrected < 0.001 else f"p = {corrected:.2g}"


def _verdict(found: Difference, num_compared: int) -> str:
    clear = found.is_clear if found.p is None else found.p * num_compared < CLEAR
    drawn = "training seed" if found.basis == "seeds" else "choice of test pictures"
    return f"more than the {drawn} explains" if clear else f"no more than the {drawn} can explain"


def _seeds(students: list[Row]) -> list[str]:
    """Warn of what one seed leaves open."""
    if all(row.num_seeds > 1 for row in students):
        return []
    who = "Each student" if all(row.num_seeds == 1 for row in students) and len(students) > 1 else "Not every student"
    if len(students) == 1:
        who = "It"
    trained = "was trained with one seed only" if who != "Not every student" else "was trained with several seeds"
    return [f"{who} {trained}: another seed can change {'the score' if who == 'It' else 'the order'}."]
