"""Whole recipes, one and several: order, sharing, resume, SIGKILL in every stage, and refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from distilclip import cli, config
from distilclip.errors import InputError
from distilclip.models.architectures import STUDENTS
from distilclip.stages import demo
from distilclip.stages import run as run_stage
from distilclip.train.objective import objective
from tests.ranks import server

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = """
out = "unused"
[report]
folders = ["@"]
num_groups = 1
map_method = "pca"
[train]
batch_size = 32
num_steps = 4
warmup_steps = 1
checkpoint_every = 2
num_workers = 0
precision = "fp32"
student = {student}
[train.teacher]
data = ["@corpus/train/*.tar"]
[train.clip-kd]
store = "@embed"
objective = "clip-kd"
[train.clip-cid]
store = "@embed"
groups = "@balance"
clusters = "@cluster"
objective = "clip-cid"
[corpus]
num_pairs = 160
shard_size = 80
num_eval = 32
image_size = 32
num_workers = 0
[embed]
data = ["@corpus/train/*.tar"]
model = "@train/teacher"
num_workers = 0
[balance]
store = "@embed"
metric = "cosine"
target_removed = 0.3
max_threshold = 0.5
[cluster]
store = "@embed"
groups = "@balance"
num_centers = 8
[evaluate]
models = ["teacher=@train/teacher", "clip-kd=@train/clip-kd", "clip-cid=@train/clip-cid"]
sets = ["tar:@corpus/eval/shape", "pairs:@corpus/eval/retrieval"]
probe_l2 = 1.0
num_workers = 0
[export.kept]
what = "keys"
store = "@embed"
groups = "@balance"
[export.student]
what = "open_clip"
model = "@train/clip-cid"
evaluation = "@evaluate"
"""

ORDER = [
    "corpus",
    "train/teacher",
    "embed",
    "train/clip-kd",
    "balance",
    "cluster",
    "train/clip-cid",
    "evaluate",
    "export/kept",
    "export/student",
    "report",
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_clip_json: str) -> str:
    student = json.dumps(tiny_clip_json)  # a TOML string with the JSON inside
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("{student}", student))
    return str(path)


@pytest.fixture
def two_recipes(recipe: str, tmp_path: Path) -> tuple[str, str]:
    """`eight.toml` and `four.toml`, which differ in the number of centers."""
    eight, four = tmp_path / "eight.toml", tmp_path / "four.toml"
    text = (
        Path(recipe).read_text().replace("clip-cid", "eight").replace('objective = "eight"', 'objective = "clip-cid"')
    )
    eight.write_text(text)
    four.write_text(text.replace("num_centers = 8", "num_centers = 4").replace("eight", "four"))
    return str(eight), str(four)


def run(recipe: str, out: Path, *other_recipes: str) -> dict[str, Any]:
    return run_stage.main(run_stage.Config(recipe=recipe, other_recipes=other_recipes, out=str(out)))


def read_all(*paths: str) -> list[run_stage.Step]:
    """The steps of several recipes, in the folder `out`."""
    tables = {Path(path).stem: config.read_recipe(path) for path in paths}
    return run_stage.read_all_steps(tables, out="out", seed=None)


def steady_contents(out: Path) -> dict[str, Any]:
    """Every file below a run, without what depends on the clock."""
    contents: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or path.name == "env.json" or name.startswith("report/") or "evaluate/cache/" in name:
            continue  # the page shows speeds and dates; cached features are named by when their files changed
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            steady = [{k: v for k, v in line.items() if not k.endswith(("_per_second", "_share"))} for line in lines]
            contents[name] = steady
        else:
            contents[name] = path.read_bytes()
    return contents


def test_steps_run_after_those_they_use_whatever_the_order_of_the_file(recipe: str, tmp_path: Path) -> None:
    steps = run_stage.read_steps(config.read_recipe(recipe), out="here", seed=5, source="recipe")
    assert [step.path for step in steps] == ORDER
    assert steps[0].config.seed == 5
    assert steps[2].config.data == ("here/corpus/train/*.tar",)
    assert steps[-1].config.folders == ("here",)


@pytest.mark.slow
def test_killed_in_every_stage_and_run_again_equals_an_undisturbed_run(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("undisturbed", "killed"):  # the same relative path in two places: stores name their tars
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    run_elsewhere(recipe, Path("run"))
    monkeypatch.chdir(tmp_path / "killed")
    killed = Path("run")
    num_killed = 0
    for step in ORDER:
        num_killed += kill_in(killed / step, recipe, killed)
    assert num_killed >= 4  # a quick stage may have finished; most were caught at work
    run_elsewhere(recipe, killed)
    assert steady_contents(killed) == steady_contents(tmp_path / "undisturbed" / "run")


def run_elsewhere(*args: Any) -> None:
    """Run in a process of its own: libraries that other tests load into this one may move the last bits."""
    process = server().Process(target=run, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def kill_in(step: Path, *args: Any) -> bool:
    """Run in a process that is killed when it has begun a step; whether the step was still unfinished."""
    process = server().Process(target=run, args=args)
    process.start()
    while not (step / "config.json").exists() and process.is_alive():
        time.sleep(0.001)
    time.sleep(0.05)  # into the stage's work
    process.kill()
    process.join()
    return not (step / "result.json").exists()


@pytest.mark.slow
def test_a_second_run_computes_nothing(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(recipe, out)
    assert first["steps"] == ORDER
    times = modification_times(out)
    assert run(recipe, out) == first
    assert modification_times(out) == times


def modification_times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_several_recipes_share_equal_steps_and_one_report(two_recipes: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main(["run", *two_recipes, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    shared = ["corpus", "train/teacher", "embed", "train/clip-kd", "balance", "export/kept"]
    assert result["shared"] == {f"four/{path}": f"eight/{path}" for path in shared}
    assert not any((out / "four" / path).exists() for path in (*shared, "report"))
    assert (out / "four/cluster/result.json").exists()
    page = (out / "report/index.html").read_text()
    table = page[page.index("<table") : page.index("</table>")]
    assert [table.count(f"</span>{name}</span>") for name in ("teacher", "clip-kd", "eight", "four")] == [1] * 4
    times = modification_times(out)
    run(two_recipes[0], out, two_recipes[1])
    assert modification_times(out) == times


@pytest.mark.slow
def test_several_recipes_killed_and_run_again_equal_an_undisturbed_run(
    two_recipes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("undisturbed", "killed"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    run_elsewhere(two_recipes[0], Path("run"), two_recipes[1])
    monkeypatch.chdir(tmp_path / "killed")
    killed = Path("run")
    steps = ("eight/train/teacher", "four/cluster", "four/train/four", "four/evaluate")
    assert sum(kill_in(killed / step, two_recipes[0], killed, two_recipes[1]) for step in steps) >= 2
    run_elsewhere(two_recipes[0], killed, two_recipes[1])
    assert steady_contents(killed) == steady_contents(tmp_path / "undisturbed" / "run")


def test_a_step_is_shared_only_where_all_it_reads_is(two_recipes: tuple[str, str]) -> None:
    eight, four = two_recipes
    by_path = {step.path: step.config for step in read_all(eight, four)}
    assert by_path["four/embed"].out == "out/eight/embed"
    assert by_path["four/cluster"].store == "out/eight/embed"
    assert by_path["four/train/four"].clusters == by_path["four/cluster"].out == "out/four/cluster"
    assert by_path["four/evaluate"].models[0] == "teacher=out/eight/train/teacher"
    assert by_path["report"].folders.count("out/eight/corpus") == 1
    Path(four).write_text(Path(four).read_text().replace("num_pairs = 160", "num_pairs = 80"))
    assert all(step.config.out == f"out/{step.path}" for step in read_all(eight, four))


def test_recipes_whose_folders_would_be_one_are_refused(two_recipes: tuple[str, str], tmp_path: Path) -> None:
    eight, four = two_recipes
    with pytest.raises(InputError, match="Several recipes need --out"):
        run_stage.main(run_stage.Config(recipe=eight, other_recipes=(four,)))
    with pytest.raises(InputError, match=r"eight.toml: its folder would be eight, and so would another's"):
        run(eight, tmp_path / "out", four, eight)
    with pytest.raises(InputError, match="its folder would be report"):
        run(eight, tmp_path / "out", str(tmp_path / "report.toml"))
    assert not (tmp_path / "out").exists()


def test_ablations_share_what_they_have_in_common_and_evaluate_all_they_train() -> None:
    paths = sorted(str(path) for path in RECIPES.glob("ablation-*.toml"))
    assert [Path(path).stem for path in paths] == [
        f"ablation-{n}" for n in ("centers", "clip-kd", "losses", "teacher", "teaching", "threshold")
    ]
    steps = read_all(*paths)
    for path in paths:
        name = Path(path).stem
        trained = {s.path.rpartition("/")[2]: s.config.out for s in steps if s.path.startswith(f"{name}/train/")}
        (evaluate,) = (s.config for s in steps if s.path == f"{name}/evaluate")
        assert dict(model.split("=") for model in evaluate.models) == trained
    folders = {s.config.out for s in steps if s.stage == "train"}
    # Three teachers, and the students of the tables; CLIP on all pairs, CLIP on 59 % and CLIP-KD stand twice, CLIP-CID
    # three times.
    assert len(folders) == 3 + (4 + 6 + 5 + 2 - 3) + 6 + (9 - 2)


def test_the_ablation_of_clip_kd_trains_each_term_alone_its_three_and_all_six() -> None:
    steps = steps_of("ablation-clip-kd")
    trained = {s.path.rpartition("/")[2]: s.config for s in steps if s.stage == "train"}
    terms = {name: objective(c.objective, c.terms).weights for name, c in trained.items() if name != "teacher"}
    alone = {
        "task": {},
        "crd": {"relational": 1.0},
        "fd": {"feature": 200.0},
        "mfd": {"masked": 200.0},
        "gd": {"gradient": 8400.0},  # 256^2 x 128 / 1000 = 8389, rounded
        "icl": {"interactive": 1.0},
        "afd": {"augmented": 1.0},
    }
    expected = {
        **alone,
        "clip-kd": {**alone["crd"], **alone["fd"], **alone["icl"]},
        "all-six": {key: value for weights in alone.values() for key, value in weights.items()},
    }
    assert {name: {k: v for k, v in w.items() if v} for name, w in terms.items()} == {
        name: {"task": 1.0, **weights} for name, weights in expected.items()
    }
    assert {c.store for name, c in trained.items() if name != "teacher"} == {"out/ablation-clip-kd/embed"}
    assert {(c.batch_size, c.num_steps) for c in trained.values()} == {(256, 200)}


# What the papers, and CLIP-KD's published scripts, state: of each architecture AdamW's beta2 and eps ...
TRANSFORMER, OTHER = (0.98, 1e-6), (0.999, 1e-8)
ADAMW = {
    "ViT-B-32-quickgelu": TRANSFORMER,
    "ViT-B-16-quickgelu": TRANSFORMER,
    "ViT-B-16": TRANSFORMER,
    "ViT-T-16": TRANSFORMER,
    "MobileViT-S": TRANSFORMER,  # CLIP-KD's code asks whether "vit" is in the name
    "Swin-T": OTHER,
    "EfficientNet-B0": OTHER,
    "ResNet-18": OTHER,
    "MobileNetV3-S": OTHER,
    "RN50": OTHER,
    "RN101": OTHER,
}
SMALL = {
    "vit-t-16": "ViT-T-16",
    "mobilevit-s": "MobileViT-S",
    "swin-t": "Swin-T",
    "efficientnet-b0": "EfficientNet-B0",
    "resnet-18": "ResNet-18",
    "mobilenetv3-s": "MobileNetV3-S",
}
# ... and of each training the student, the live teacher, the objective and the batch.
TRAININGS = {
    "clip-cid": {
        "vit-b-32-alone": ("ViT-B-32-quickgelu", None, "clip", 32768),
        "vit-b-16-alone": ("ViT-B-16-quickgelu", None, "clip", 24576),
        "vit-b-32": ("ViT-B-32-quickgelu", None, "clip-cid", 32768),
        "vit-b-16": ("ViT-B-16-quickgelu", None, "clip-cid", 24576),
    },
    "clip-kd": {
        "vit-b-16": ("ViT-B-16", None, "clip", 1024),
        "rn101": ("RN101", None, "clip", 1024),
        **{f"{name}-alone": (student, None, "clip", 1024) for name, student in SMALL.items()},
        **{name: (student, "out/clip-kd/train/vit-b-16", "clip-kd", 1024) for name, student in SMALL.items()},
        **{
            f"{name}-by-rn101": (student, "out/clip-kd/train/rn101", "clip-kd", 1024)
            for name, student in SMALL.items()
            if name != "vit-t-16"
        },
        "vit-t-16-stored": ("ViT-T-16", None, "clip-kd", 1024),  # ours
    },
    "clip-kd-laion": {
        "vit-b-16-alone": ("ViT-B-16", None, "clip", 1024),
        "rn50-alone": ("RN50", None, "clip", 1024),
        "vit-t-16-alone": ("ViT-T-16", None, "clip", 1024),
        "vit-b-16-by-vit-l-14": ("ViT-B-16", "ViT-L-14=laion400m_e32", "clip-kd", 1024),
        "vit-t-16-by-vit-l-14": ("ViT-T-16", "ViT-L-14=laion400m_e32", "clip-kd", 1024),
        "rn50-by-vit-b-16": ("RN50", "ViT-B-16=laion400m_e32", "clip-kd", 1024),
        "vit-t-16-by-vit-b-16": ("ViT-T-16", "ViT-B-16=laion400m_e32", "clip-kd", 1024),
    },
}
# Epochs, learning rate, weight decay, warm-up (left open by CLIP-CID), clipping (none by either).
RATES = {
    "clip-cid": (32, 1e-3, 0.2, 2000, 0),
    "clip-kd": (32, 1e-3, 0.1, 10_000, 0),
    "clip-kd-laion": (32, 1e-3, 0.1, 10_000, 0),
}


def steps_of(recipe: str) -> list[run_stage.Step]:
    """The steps of a recipe of the package, in the folder `out/RECIPE`."""
    path = str(RECIPES / f"{recipe}.toml")
    return run_stage.read_steps(config.read_recipe(path), out=f"out/{recipe}", seed=None, source=path)


@pytest.mark.parametrize("recipe", TRAININGS)
def test_the_papers_own_recipes_hold_the_published_settings(recipe: str) -> None:
    steps = steps_of(recipe)
    trained = {step.path.rpartition("/")[2]: step.config for step in steps if step.stage == "train"}
    assert {n: (c.student, c.live_teacher, c.objective, c.batch_size) for n, c in trained.items()} == TRAININGS[recipe]
    for name, options in trained.items():
        how = options.optimization
        assert (how.beta1, how.beta2, how.eps) == (0.9, *ADAMW[options.student]), name
        rates = how.learning_rate, how.weight_decay, options.learning_curve.warmup_steps, how.gradient_clip
        assert (options.num_epochs, *rates) == RATES[recipe], name
        assert options.towers.batch_norm == ("whole-batch" if recipe == "clip-cid" else "per-process"), name
    (evaluate,) = (step.config for step in steps if step.stage == "evaluate")
    evaluated = {model.partition("=")[2] for model in evaluate.models}
    assert evaluated >= {options.out for options in trained.values()}
    assert evaluate.published == (("clip-kd-vit-b-16", "clip-kd-rn101") if recipe == "clip-kd" else (recipe,))
    head = (RECIPES / f"{recipe}.toml").read_text().partition("\n[")[0]
    assert "what we chose" in head.replace("\n# ", " ")


def test_clip_cids_recipe_asks_for_the_published_share_and_number_of_classes() -> None:
    by_path = {step.path: step.config for step in steps_of("clip-cid")}
    for name in ("vit-b-32", "vit-b-16"):
        taught, alone = by_path[f"train/{name}"], by_path[f"train/{name}-alone"]
        assert objective("clip-cid", taught.terms) == objective("clip-cid", {"sample_rate": 0.1})
        assert taught.optimization.centers_learning_rate == 1e-6
        assert taught.groups == alone.groups == by_path["balance"].out  # both on what the balance keeps
    assert by_path["balance"].target_removed == 0.437
    assert by_path["cluster"].fit.num_centers == 1_000_000
    assert by_path["embed"].model == "ViT-bigG-14"


def test_clip_kds_students_are_all_in_its_recipe_by_both_teachers() -> None:
    assert set(SMALL.values()) == set(STUDENTS)


def test_overrides_replace_a_value_in_every_step_of_a_stage(recipe: str) -> None:
    Path(recipe).write_text(Path(recipe).read_text().replace("[train.clip-kd]", "[train.clip-kd]\nnum_steps = 8"))
    tables = run_stage.override(config.read_recipe(recipe), ["train.num_steps=6", "balance.metric=euclidean"])
    steps = run_stage.read_steps(tables, out="here", seed=None, source="recipe")
    assert [step.config.num_steps for step in steps if step.stage == "train"] == [6, 6, 6]
    assert next(step.config.metric for step in steps if step.stage == "balance") == "euclidean"
    assert config.read_recipe(recipe)["train"]["num_steps"] == 4
    for wrong, message in (
        ("train.num_steps", "not of the form"),
        ("trian.num_steps=6", r"no \[trian\]. Did you mean 'train'"),
        ("search.query=x", r"no \[search\]"),
    ):
        with pytest.raises(InputError, match=message):
            run_stage.override(tables, [wrong])
    overridden = run_stage.override(tables, ["train.num_stepps=6"])
    with pytest.raises(InputError, match="unknown key 'num_stepps'"):
        run_stage.read_steps(overridden, out="here", seed=None, source="recipe")


def test_the_demo_trains_in_fp32_where_bf16_would_be_emulated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[run_stage.Config] = []
    monkeypatch.setattr(run_stage, "main", lambda given: asked.append(given) or {})
    monkeypatch.setattr(demo, "comparison", lambda out: "table")
    for fast in (False, True):
        monkeypatch.setattr(demo, "has_fast_bf16", lambda fast=fast: fast)
        demo.main(demo.Config(out=str(tmp_path)))
    assert [given.overrides for given in asked] == [("train.precision=fp32",), ()]
    assert capsys.readouterr().err.count("\n") == 1
    for given in asked:
        tables = run_stage.override(config.read_recipe(given.recipe), given.overrides)
        steps = run_stage.read_steps(tables, out="here", seed=0, source="recipe")
        expected = "fp32" if given.overrides else "bf16"
        assert {step.config.precision for step in steps if step.stage == "train"} == {expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[embed]\ndata = ['a']\nmodel = '@train/teacher'\n", "@train/teacher is no step"),
        ("[trian]\n", r"no stage \[trian\]. Did you mean 'train'"),
        ("seed = 3\n[embed]\n", "'seed' stands outside a table"),
        ("", "has no steps"),
        (
            "[embed]\ndata = ['@embed/x']\nmodel = 'm'\n",
            r"steps \['embed'\] wait for one another",
        ),
        ("[embed]\ndata = ['a']\nmodle = 'm'\n", "unknown key 'modle'. Did you mean 'model'"),
    ],
)
def test_bad_recipes_are_refused_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        run(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[embed]\n")
    with pytest.raises(InputError, match="names no `out` folder"):
        run_stage.main(run_stage.Config(recipe=str(path)))
