"""Run the command line: a table of stages, each imported when it is used, so that `distilclip --help` is immediate."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence

STAGES = {
    "corpus": "write the synthetic corpus: image-text pairs with known duplicates, and labelled sets",
    "embed": "embed image-text pairs once with the teacher, into a store",
    "balance": "group semantically similar images exactly; keep one of each group",
    "cluster": "spherical k-means of the kept images: centers and labels",
    "train": "train a student with contrastive, feature, relational, instance and cluster terms",
    "evaluate": "zero-shot, linear probe and retrieval of any number of models, in one table",
    "export": "kept data as tars, keys or a subset; models for open_clip, transformers and ONNX Runtime",
    "search": "pictures that fit some words, by an exported ONNX model, without torch",
    "report": "one self-contained HTML page from any of these folders",
    "plan": "time, memory, disk and cost of every stage on a cluster, before anything runs",
    "run": "every step of a recipe, or of several with one report; finished steps are skipped",
    "demo": "the whole story on a made-up corpus, in minutes, on two CPU cores",
}


def usage() -> str:
    """Return the text of `distilclip --help`."""
    lines = [f"  {name:10} {text}" for name, text in STAGES.items()]
    return "\n".join(
        [
            "usage: distilclip STAGE [RECIPE.toml[#STEP]] [--flag value ...]",
            "",
            "Small CLIP models from large ones. Stages:",
            "",
            *lines,
            "",
            "`distilclip STAGE --help` lists the flags of a stage. Flags win over the recipe.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; 0 on success, 2 on bad input (one line on stderr, no traceback)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("distilclip"))
        return 0
    name = argv.pop(0)
    from distilclip.errors import InputError, did_you_mean

    if name not in STAGES:
        print(f"distilclip: no stage {name!r}. {did_you_mean(name, STAGES)}", file=sys.stderr)
        return 2
    from distilclip import config
    from distilclip.progress import say, summarise

    options = importlib.import_module(f"distilclip.configs.{name}")
    started = time.perf_counter()
    try:
        values = config.parse(options.Config, argv, stage=name, description=STAGES[name])
        result = importlib.import_module(f"distilclip.stages.{name}").main(values)
        say(summarise(result, seconds=time.perf_counter() - started, out=values.out))
    except InputError as error:
        print(f"distilclip {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"distilclip {name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
