"""The comparisons that back each script's claims, at toy size: python tests/evidence.py <script> [--seeds 0 1 2].

Runs the script's own command line (a run that is already complete is only read) and prints one Markdown table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import data
import turbo


def run(script, out, *flags):
    """Train to the end; returns the log's records."""
    subprocess.run([sys.executable, ROOT / f"{script}.py", "--out", str(out), *map(str, flags)], check=True)
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return records


@torch.no_grad()
def position_mean_error(cfg):
    """PMAE of the best constant: each pixel position's mean over the training clips, on the held-out tokens (and the
    target) that turbo.evaluate scores."""
    model = turbo.build(cfg, cfg.num_classes)
    target = lambda batch: turbo.pixel_target(turbo.patchify(batch.clips, model.patch), cfg.target)  # [B, N, P]
    ctx = common.launch()

    def loader(path):
        videos = data.VideoList(path, cfg.data_root, cfg.num_classes)
        return turbo.eval_batches(videos, cfg, ctx, data.Failures(len(videos), 0.0))

    total, count = 0, 0
    for batch in loader(cfg.train_list):
        total, count = total + target(batch).sum(0).double(), count + len(batch.labels)
    mean, errors = (total / count).float(), []  # [N, P]
    for batch in loader(cfg.val_list):
        _, recon = turbo.token_dropout(batch.keys, model.num_tokens, cfg.mask_ratio, cfg.recon_ratio)  # [B, R]
        errors += (common.gather_tokens(target(batch), recon) - mean[recon]).square().mean((1, 2)).tolist()
    return sum(errors) / len(errors)


def turbo_evidence(seeds, out):
    """`python turbo.py`, last step, all validation clips: top-1, and reconstruction against the per-position mean."""
    rows = []
    for seed in seeds:
        last = [r for r in run("turbo", out / f"turbo-{seed}", "--seed", seed) if "val_top1" in r][-1]
        flags = ["--seed", str(seed), "--workers", "2"]
        rows.append((seed, last, position_mean_error(common.parse(turbo.Config, turbo.RECIPES, flags))))
    print("\n| seed | top-1 % | clips | PMAE | per-position mean | below it | seconds |\n|---|---|---|---|---|---|---|")
    for seed, last, constant in rows:
        print(
            f"| {seed} | {last['val_top1']:.1f} | {last['val_clips']} | {last['val_mae']:.4f} | {constant:.4f} | "
            f"{1 - last['val_mae'] / constant:.1%} | {last['seconds']:.0f} |"
        )


def avion_evidence(seeds, out, clips=16_384, batches=(16, 32, 64, 128)):
    """`python avion.py`, last step: retrieval and zero-shot motion; then the global batch at equal clips seen, in
    micro-batches of 16 through the cached-gradient step (Fig. 6 at toy size)."""
    last = lambda name, *flags: [r for r in run("avion", out / f"avion-{name}", *flags) if "val_map" in r][-1]
    keys = "val_r1_t2v", "val_r1_v2t", "val_verb", "val_map", "shuffled_map", "val_ndcg", "shuffled_ndcg", "seconds"
    print(f"\n| seed | {' | '.join(keys)} |\n|{'---|' * (1 + len(keys))}")
    for seed in seeds:
        result = last(seed, "--seed", seed)
        print(f"| {seed} | {' | '.join(f'{result[key]:.1f}' for key in keys)} |")
    print("\n| global batch | steps | R@1 text to video | video to text | motion |\n|---|---|---|---|---|")
    for batch in batches:
        flags = ["--batch-size", batch, "--micro-batch", 16, "--max-steps", clips // batch]
        results = [last(f"batch{batch}-{seed}", "--seed", seed, *flags) for seed in seeds]
        cells = [", ".join(f"{result[key]:.1f}" for result in results) for key in keys[:3]]
        print(f"| {batch} | {clips // batch} | {' | '.join(cells)} |")


EVIDENCE = {"turbo": turbo_evidence, "avion": avion_evidence}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=EVIDENCE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    EVIDENCE[args.script](args.seeds, args.out)
