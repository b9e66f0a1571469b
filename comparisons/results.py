"""Run every comparison and put its table into docs/results.md, between its marks.

    python comparisons/results.py [--icons FOLDER] [--seeds 3]

Finished steps are kept in runs/results: the same command goes on. Without --icons, only the made-up corpus is used.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGE = ROOT / "docs/results.md"
COMPARISONS = ("teaching", "curation")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", default="", help="folder of the icons (default: without them)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/results", help="folder to work in")
    given = parser.parse_args()
    wanted = [(name, data) for data in ("corpus", "icons") for name in COMPARISONS if data == "corpus" or given.icons]
    for number, (name, data) in enumerate(wanted, 1):
        print(f"results: {name} on the {data}, {number} of {len(wanted)}", file=sys.stderr, flush=True)
        out = given.runs / f"{name}-{data}"
        options = ["--seeds", str(given.seeds), "--out", str(out)]
        options += ["--icons", given.icons, "--num-steps", "400"] if data == "icons" else []
        began = time.monotonic()
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), data, *options], check=True)
        write_block(f"{name}-{data}", (out / "table.md").read_text(), seconds=time.monotonic() - began)
    return 0


def write_block(name: str, table: str, *, seconds: float) -> None:
    """Replace what stands between the marks of a comparison."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    head = f"{datetime.date.today()}, commit {commit.strip()}, {where}; this call took {seconds / 60:.0f} minutes."
    text = PAGE.read_text()
    pattern = rf"(<!-- comparison: {re.escape(name)} -->\n).*?(<!-- end -->)"
    if not re.search(pattern, text, re.DOTALL):
        sys.exit(f"{PAGE} has no marks for {name}: put '<!-- comparison: {name} -->' and '<!-- end -->' into it.")
    PAGE.write_text(re.sub(pattern, lambda found: f"{found[1]}{head}\n\n{table}{found[2]}", text, flags=re.DOTALL))


if __name__ == "__main__":
    sys.exit(main())
