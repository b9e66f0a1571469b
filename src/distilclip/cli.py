"""Run the command line: a table of stages, each imported when it is used, so that `distilclip --help` is immediate."""

from __future__ import annotations

import importlib
import os
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
COMMANDS = {
    "recipes": "list the recipes in the package; `distilclip recipes NAME > my.toml` copies one",
    "completion": "print completions for a shell: `distilclip completion bash` (or zsh, tcsh)",
}
FROM_A_RECIPE = """Flags can be saved in a recipe and given as `distilclip {} RECIPE[#STEP]`: a TOML file, or the
config.json of an earlier folder. Flags on the command line win over it."""
MESSAGES = """Every stage also takes
  --log-level LEVEL   debug, info (default), warning or error; messages go to stderr
  --quiet             only warnings and errors: --log-level warning
  --log-format json   one JSON object a line, for programs (default: text)"""


def usage() -> str:
    """Return the text of `distilclip --help`."""
    return "\n".join(
        [
            "usage: distilclip STAGE [RECIPE[#STEP]] [--flag value ...]",
            "",
            "Small CLIP models from large ones. Stages:",
            "",
            *(f"  {name:10} {text}" for name, text in STAGES.items()),
            "",
            "Also:",
            "",
            *(f"  {name:10} {text}" for name, text in COMMANDS.items()),
            "",
            "`distilclip STAGE --help` lists the flags of a stage. RECIPE is a TOML file, the config.json of an",
            "earlier folder, or (for run) the name of a recipe in the package; flags win over it.",
            "",
            MESSAGES,
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
    from distilclip.errors import InputError, did_you_mean

    name = argv.pop(0)
    try:
        if name in COMMANDS:
            print(importlib.import_module("distilclip.commands").COMMANDS[name](argv))
        elif name in STAGES:
            _run_stage(name, argv)
        else:
            raise InputError(f"no stage {name!r}. {did_you_mean(name, [*STAGES, *COMMANDS])}")
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes of torchrun, one says it
            print(f"distilclip{f' {name}' if name in STAGES else ''}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"distilclip {name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _run_stage(name: str, argv: list[str]) -> None:
    from distilclip import config, messages

    options = importlib.import_module(f"distilclip.configs.{name}")
    messages.set_up_messages(**config.take_message_flags(argv))
    started = time.perf_counter()
    values = config.parse(options.Config, argv, stage=name, description=f"{_sentence(STAGES[name])}\n\n{FROM_A_RECIPE.format(name)}\n\n{MESSAGES}")
    result = importlib.import_module(f"distilclip.stages.{name}").main(values)
    from distilclip.progress import summarise

    messages.say(summarise(result, seconds=time.perf_counter() - started, out=values.out))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    raise SystemExit(main())
