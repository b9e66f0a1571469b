"""Run the command line: a table of stages, each imported when it is used, so that `distilclip --help` is immediate."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence

STAGES = {
    "corpus": "write the synthetic corpus: image-text pairs with known duplicates, and labelled sets",
    "embed": "embed image-text pairs once with the teacher, into a store",
    "import": "a store of embeddings that you have: DataComp's npz, clip-retrieval's npy, Parquet, .npy",
    "balance": "group semantically similar images exactly; keep one of each group",
    "select": "score every pair (caption fit, nearness to a target, a column of yours); keep the best",
    "cluster": "spherical k-means of the kept images: centers and labels",
    "weigh": "how often each kept image is drawn in training: by cluster, group and data set",
    "pack": "shuffle the kept pairs once into files that `train --pack` reads in order",
    "train": "train a student with contrastive, feature, relational, instance and cluster terms",
    "evaluate": "zero-shot, linear probe and retrieval of any number of models, in one table",
    "export": "kept data as tars, keys or a subset; models for open_clip, transformers, timm, ONNX Runtime",
    "search": "pictures that fit some words, by an exported ONNX model, without torch",
    "report": "one self-contained HTML page from any of these folders",
    "verify": "what is damaged in a stage's folder, or in all of a run; --repair removes it to be made anew",
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
    """Run one stage; the exit code. 0: done. 2 and 3: one line on stderr says what to change. 130: Ctrl-C.

    1 is for `verify` that found faults, and leaves them; 2 is for what the user gave;
    3 for the machine (a full disk, no rights, no memory, no network, a missing package). A
    defect of distilclip keeps its traceback, and Python's exit code 1.
    """
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
            from distilclip import folder_lock, termination

            with termination.ending_in_order(), folder_lock.held_for_block():
                return _run_stage(name, argv)
        else:
            raise InputError(f"no stage {name!r}. {did_you_mean(name, [*STAGES, *COMMANDS])}")
    except (Exception, KeyboardInterrupt) as error:
        code = _explain(name, error)
        if code is None:
            raise
        return code
    return 0


def _explain(name: str, error: BaseException) -> int | None:
    """Say in one line what went wrong; the exit code, None for what needs its traceback."""
    from distilclip import failures, termination
    from distilclip.messages import shows_details

    if isinstance(error, termination.Terminated):
        print(f"distilclip {name}: ended by SIGTERM; the same command goes on from here", file=sys.stderr)
        termination.end_by_signal()
    if isinstance(error, KeyboardInterrupt):
        print(f"distilclip {name}: interrupted; the same command goes on from here", file=sys.stderr)
        return failures.INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `distilclip ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    failure = failures.explain(error)
    if failure is None:
        return None
    if shows_details():
        traceback.print_exception(error)
    # Of several processes of torchrun, one says what all know; what is wrong on one machine, each.
    if os.environ.get("RANK", "0") == "0" or failure.code == failures.SYSTEM:
        print(f"distilclip{f' {name}' if name in STAGES else ''}: {failure.text}", file=sys.stderr)
    return failure.code


def _run_stage(name: str, argv: list[str]) -> int:
    from distilclip import config, failures, launch, messages, stage_calls

    module = stage_calls.module_of(name)
    options = importlib.import_module(f"distilclip.configs.{module}")
    messages.set_up_messages(**config.take_message_flags(argv))
    launch.find_place()
    launch.end_with_launcher()
    started = time.perf_counter()
    values = config.parse(
        options.Config,
        argv,
        stage=name,
        description=f"{_sentence(STAGES[name])}\n\n{FROM_A_RECIPE.format(name)}\n\n{MESSAGES}",
    )
    if name not in ("run", "train") and not launch.work_alone(name):
        return 0
    result = importlib.import_module(f"distilclip.stages.{module}").main(values)
    from distilclip.progress import summarise

    messages.say(summarise(result, seconds=time.perf_counter() - started, out=values.out))
    return failures.FAULTS_FOUND if result.get("num_left") else 0


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    raise SystemExit(main())
