"""The effect of each TIME loss on the demo set: trains the demo recipe with each set of losses.

`python -m bench.demo_losses` writes bench/results/demo-losses_<device>_<date>_<commit>.json, from
which the README's table is made. Runs are kept, so an interrupted call goes on where it stopped.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path

import torch

from timefast import load_model
from timefast.data import open_videos
from timefast.demo_data import demo_data_folder
from timefast.device import device_name, pick_device
from timefast.eval.accuracy import Predictions, predict, protocol, summarise
from timefast.log import to_console
from timefast.pipelines.loader import ClipLoader
from timefast.recipes import RECIPES
from timefast.run_folder import git_commit, versions, write_json
from timefast.train import clip_spec
from timefast.train import main as train

ROWS = ("none", "order", "debias", "flow", "order,debias,flow")
SHUFFLES = 3


def accuracy(predictions: Predictions, keep: list[bool]) -> float:
    rows = torch.tensor(keep)
    hits = predictions.original[rows].argmax(1) == predictions.label[rows]
    return 100 * hits.double().mean().item()


def measure(run: Path, root: Path) -> dict[str, float]:
    """One row of the table: the trained model on the validation videos."""
    config = RECIPES["demo"]()
    videos = open_videos(root, "validation")
    spec = clip_spec(config.replace({("method", "losses"): ()}))
    loader = ClipLoader(videos, spec, train=False, batch_size=16)
    predictions = predict(load_model(run), loader.batches(0), views=1, draws=SHUFFLES)
    if predictions.failures:
        raise RuntimeError(f"demo videos that do not decode: {predictions.failures}")
    temporal = summarise(predictions, videos, videos.subsets["temporal"])
    static = summarise(predictions, videos, videos.subsets["static"])
    everything = summarise(predictions, videos)

    labels = root / "something-something-v2-validation.json"
    aligned = {e["id"]: bool(e["aligned"]) for e in json.loads(labels.read_text("utf-8"))}
    chosen = [videos.records[int(i)] for i in predictions.sample]
    is_temporal = [r.label in videos.subsets["temporal"] for r in chosen]
    agrees = [aligned[r.id] for r in chosen]
    return {
        "temporal_original": temporal["top1"],
        "temporal_shuffled": temporal["shuffled_top1"],
        "temporal_gap": temporal["gap"],
        "aligned": accuracy(
            predictions, [t and a for t, a in zip(is_temporal, agrees, strict=True)]
        ),
        "conflict": accuracy(
            predictions, [t and not a for t, a in zip(is_temporal, agrees, strict=True)]
        ),
        "static_original": static["top1"],
        "static_shuffled": static["shuffled_top1"],
        "all": everything["top1"],
        "confidence": everything["confidence"],
        "shuffled_confidence": everything["shuffled_confidence"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-losses"))
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    to_console()
    root = demo_data_folder()
    rows = []
    for losses in args.rows:
        for seed in args.seeds:
            run = args.runs / f"{losses.replace(',', '-')}-{seed}"
            start, fresh = time.perf_counter(), not run.exists()
            if not (run / "report.html").exists():
                flags = ["--recipe", "demo", "--losses", losses, "--seed", str(seed), "--resume"]
                code = train([*flags, "--data", str(root), "--out", str(run)])
                if code:
                    raise SystemExit(code)
            seconds = time.perf_counter() - start if fresh else None
            rows.append({"losses": losses, "seed": seed, **measure(run, root), "seconds": seconds})
    if not args.write:
        return
    device = device_name(pick_device("auto"))
    config = RECIPES["demo"]()
    spec = clip_spec(config)
    how = protocol(spec.frames, (1, 1), spec.crop, spec.test_short_side, "logits")
    commit = git_commit()
    result = {
        "what": "demo-losses",
        "device": device,
        "date": date.today().isoformat(),
        "commit": commit,
        "versions": versions(),
        "protocol": f"{how}; shuffled: mean of {SHUFFLES} random frame orders per video; "
        f"160 temporal and 80 static validation videos, data seed 0",
        "rows": rows,
    }
    name = f"demo-losses_{device.replace(' ', '-')}_{result['date']}_{(commit or 'none')[:12]}.json"
    write_json(Path(__file__).with_name("results") / name, result)


if __name__ == "__main__":
    main()
