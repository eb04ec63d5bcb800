"""The comparisons that back each script's claims, at toy size: python tests/evidence.py turbo | tpt [--seeds 0 1 2].

Runs the script's own command line (a run that is already complete is only read) and prints one Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import data
import tpt_mae
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


@torch.no_grad()
def tpt_mean_error(cfg):
    """The masked error that tpt_mae.evaluate scores, of the best constant: each pixel position's training mean."""
    model = tpt_mae.build(cfg, cfg.num_classes)
    target = lambda batch: tpt_mae.pixel_target(tpt_mae.patchify(batch.clips, model.patch), cfg.target)  # [B, N, P]
    ctx = common.launch()

    def loader(path):
        videos = data.VideoList(path, cfg.data_root, cfg.num_classes)
        return tpt_mae.eval_batches(videos, cfg, ctx, data.Failures(len(videos), 0.0))

    total, count = 0, 0
    for batch in loader(cfg.train_list):
        total, count = total + target(batch).sum(0).double(), count + len(batch.labels)
    mean, errors = (total / count).float(), []  # [N, P]
    for batch in loader(cfg.val_list):
        _, masked = common.tube_split(batch.keys, model.grid[0], model.places, cfg.mask_ratio)  # [B, R]
        errors += (common.gather_tokens(target(batch), masked) - mean[masked]).square().mean((1, 2)).tolist()
    return sum(errors) / len(errors)


def tpt_evidence(seeds, out):
    """Progressive against full length only at equal frames: masked error; then top-1 after fine-tuning on few labels.

    Two budgets, the second the toy recipe's own and four times the first. The fine-tuning curves, at 1/3, 2/3 and all
    of 162 steps, are beside those from scratch: where pretraining pays is what they show.
    """
    budgets, kinds = (2, 8), {"progressive": "2:25,4:25,8:50", "full length only": "8:100"}
    flags = lambda *argv: common.parse(tpt_mae.Config, tpt_mae.RECIPES, list(map(str, argv)))
    cost, rows, sources = {}, [], {}
    for budget in budgets:
        for seed in seeds:
            for kind, stages in kinds.items():
                folder = out / f"tpt-{seed}-{budget}-{kind.split()[0]}"
                argv = ["--stages", stages, "--budget", budget, "--seed", seed, "--eval-every", 1000]
                last = [r for r in run("tpt_mae", folder, *argv, "--then", "") if "val_mae" in r][-1]
                cfg = flags(*argv, "--workers", 2)
                plan, _ = tpt_mae.schedule(cfg, cfg.train_clips)
                if kind not in cost:
                    cost[kind] = {s.frames: tpt_mae.count_gmacs(cfg, 8, s.frames)[0] for s in plan}
                gmacs = sum(s.steps * s.batch * cost[kind][s.frames] for s in plan)
                rows.append((budget, seed, kind, last["val_mae"], tpt_mean_error(cfg), gmacs, last["seconds"]))
                sources[budget, seed, kind] = folder / "last.pt"
    print("\n| budget | seed | pretraining | masked error | per-position mean | GMACs | seconds |")
    print("|---|---|---|---|---|---|---|")
    for budget, seed, kind, error, mean, gmacs, seconds in rows:
        print(f"| {budget} | {seed} | {kind} | {error:.4f} | {mean:.4f} | {gmacs:.0f} | {seconds:.0f} |")

    print("\n| labelled clips | budget | start | top-1 at 1/3, mean (seeds) | 2/3 | all |\n|---|---|---|---|---|---|")
    lines = Path("toy/actions/train.csv").read_text().splitlines()
    for labels in (100, 300):
        few = out / f"tpt-{labels}.csv"
        few.write_text("\n".join(lines[:labels]))
        steps = labels // 16  # of a pass; 162 steps in all
        for budget, kind in [("-", "scratch"), *((b, k) for b in budgets for k in kinds)]:
            curves = []
            for seed in seeds:
                start = ["--init", sources[budget, seed, kind]] if kind != "scratch" else []
                folder = out / f"tpt-ft-{labels}-{seed}-{budget}-{kind.split()[0]}"
                records = run("tpt_mae", folder, "--recipe", "toy_ft", "--seed", seed, "--train-list", few, *start,
                              "--epochs", 162 // steps, "--eval-every", 54 // steps)  # fmt: skip
                curves.append([r["val_top1"] for r in records if "val_top1" in r])
            cells = [
                f"{statistics.mean(c):.1f} ({', '.join(f'{x:.0f}' for x in c)})" for c in zip(*curves, strict=True)
            ]
            print(f"| {labels} | {budget} | {kind} | {' | '.join(cells)} |")


EVIDENCE = {"turbo": turbo_evidence, "tpt": tpt_evidence}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=list(EVIDENCE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    EVIDENCE[args.script](args.seeds, args.out)
