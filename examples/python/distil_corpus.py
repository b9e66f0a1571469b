"""Distil a small student from a teacher, all from Python, on pictures that are made up: the pipeline as function calls.

    python examples/python/distil_corpus.py --out runs/distil-corpus

Put your own tars in place of the corpus, and a published model in place of the teacher that is trained here. Run it
again after an interruption: what is finished is not computed again.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from distilclip import stages

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}


def network(width: int, dim: int) -> str:
    """Return a small convolutional CLIP in open_clip's own format."""
    vision = {"timm_model_name": f"cnn_w{width}", "timm_pool": "max", "timm_proj": "linear", "image_size": 64}
    return json.dumps({"embed_dim": dim, "vision_cfg": vision, "text_cfg": TEXT})


def main() -> None:
    """Run every stage; print the zero-shot accuracy of teacher and students."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for everything")
    parser.add_argument("--num-pairs", type=int, default=12_000, help="pairs to train on")
    parser.add_argument("--num-eval", type=int, default=500, help="pictures of each evaluation set")
    parser.add_argument("--num-steps", type=int, default=200, help="steps of each training")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs per step")
    parser.add_argument("--precision", default="fp32", help="bf16 on a GPU")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read pictures")
    given = parser.parse_args()
    at = {name: f"{given.out}/{name}" for name in ("corpus", "teacher", "store", "balance", "scores", "page")}
    training: dict[str, Any] = {
        "num_steps": given.num_steps,
        "warmup_steps": given.num_steps // 8,
        "batch_size": given.batch_size,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "precision": given.precision,
        "num_workers": given.num_workers,
    }
    reading = {"num_workers": given.num_workers}
    stages.corpus(out=at["corpus"], num_pairs=given.num_pairs, num_eval=given.num_eval, **reading)
    pairs = f"{at['corpus']}/train/*.tar"
    stages.train(data=pairs, student=network(24, 128), out=at["teacher"], **training)
    # The teacher runs once; all that follows reads the store.
    stages.embed(data=pairs, model=at["teacher"], out=at["store"], **reading)
    stages.balance(store=at["store"], metric="cosine", target_removed=0.41, max_threshold=0.1, out=at["balance"])
    taught = {"store": at["store"], "groups": at["balance"], "student": network(8, 64), **training}
    stages.train(out=f"{given.out}/alone", **taught)
    stages.train(out=f"{given.out}/taught", objective="clip-kd", terms={"feature": 200}, **taught)
    models = {"teacher": at["teacher"], "alone": f"{given.out}/alone", "taught": f"{given.out}/taught"}
    scores = stages.evaluate(
        models=[f"{name}={folder}" for name, folder in models.items()],
        sets=[f"tar:{at['corpus']}/eval/shape", f"pairs:{at['corpus']}/eval/retrieval"],
        out=at["scores"],
        **reading,
    )
    stages.report(folders=given.out, out=at["page"])
    for row in scores["rows"]:
        if row["task"] == "zero-shot" and row["metric"] == "top1":
            print(f"{row['model']:8} {100 * row['value']:.1f} % top-1 on {row['set']}")
    print(f"All scores: {at['page']}/index.html")


if __name__ == "__main__":
    main()
