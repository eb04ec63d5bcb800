"""The comparisons that back each script's claims, at toy size: python tests/evidence.py turbo_vl [--seeds 0 1 2].

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


def load(script, out, recipe):
    """(model, config, classes) of a run's last checkpoint."""
    state = common.load_checkpoint(Path(out) / "last.pt")
    cfg = common.parse(script.Config, script.RECIPES, ["--recipe", recipe, "--workers", "2"])
    model = script.build(cfg, len(state["classes"]), state["text_width"]).eval()
    model.load_state_dict(state["model"])
    return model, cfg, state["classes"]


def turbo_tradeoff(seeds, out):
    """Table 1 at toy size: token dropout against none for the same number of steps; tested at three mask ratios."""
    settings = [(0.0, 0.0), (0.5, 0.5), (0.75, 0.25)]
    rows = {mr: [] for mr in settings}
    for seed in seeds:
        for m, r in settings:
            flags = ["--seed", seed, "--mask-ratio", m, "--recon-ratio", r, "--eval-mask-ratios", "0,0.5,0.75"]
            log = run("turbo", out / f"turbo-{m}-{r}-{seed}", *flags, "--eval-every", 15)
            rate = statistics.median(x["clips_per_second"] for x in log if "loss" in x)
            rows[m, r].append(([x for x in log if "val_top1" in x][-1], rate))
    model = turbo.build(common.parse(turbo.Config, turbo.RECIPES, []), 8)
    print("\n| m, r | top-1 %, m = 0 at test | 0.5 | 0.75 | ms a clip | saved MB a clip |\n|---|---|---|---|---|---|")
    for (m, r), runs in rows.items():
        cells = [" ".join(f"{x[f'val_top1{at}']:.1f}" for x, _ in runs) for at in ("", "@0.5", "@0.75")]
        speed = " ".join(f"{1000 / rate:.2f}" for _, rate in runs)
        print(f"| {m}, {r} | {' | '.join(cells)} | {speed} | {turbo.saved_megabytes(model, 128, m, r):.2f} |")


@torch.no_grad()
def turbo_long(seeds, out):
    """32 frames of a long video end to end: top-1, and telling an activity from its reverse (same motions)."""
    print("\n| seed | top-1 % | order, of the right pair % | seconds |\n|---|---|---|---|")
    for seed in seeds:
        folder = out / f"turbo-long-{seed}"
        last = [x for x in run("turbo", folder, "--recipe", "toy_long", "--seed", seed) if "val_top1" in x][-1]
        model, cfg, classes = load(turbo, folder, "toy_long")
        reverse = [classes.index("+".join(reversed(name.split("+")))) for name in classes]
        videos = data.VideoList(cfg.val_list, cfg.data_root, classes=classes)
        hits = []
        for batch in turbo.eval_batches(videos, cfg, common.launch(), data.Failures(len(videos), 0.0)):
            logits, _, _ = model(batch.clips, batch.keys, 0.0, 0.0)
            shares = logits.softmax(-1).unflatten(0, (cfg.test_clips, -1)).mean(0)  # [B, classes]
            for share, label in zip(shares, batch.labels.tolist(), strict=False):
                hits.append(bool(share[label] > share[reverse[label]]))
        print(f"| {seed} | {last['val_top1']:.1f} | {100 * sum(hits) / len(hits):.1f} | {last['seconds']:.0f} |")


@torch.no_grad()
def turbo_vl(seeds, out):
    """R@1 of held-out sentences over their whole video; and, so that looks can't help, only over the seconds in which
    the same shape and colour is shown, doing this or another of its four motions."""
    print("\n| seed | R@1 % | chance % | same actor: R@1 % | chance % | seconds |\n|---|---|---|---|---|---|")
    for seed in seeds:
        folder = out / f"turbo-vl-{seed}"
        last = [x for x in run("turbo", folder, "--recipe", "toy_vl", "--seed", seed) if "val_recall1" in x][-1]
        model, cfg, _ = load(turbo, folder, "toy_vl")
        captions = turbo.read_captions(cfg.val_list, cfg)
        text, hits, chances = turbo.open_text(cfg, captions), [], []
        actors = [captions.text(i).split()[1:3] for i in range(len(captions))]  # of "a red square moves left"
        features = turbo.second_features(model, captions, cfg, common.launch(), data.Failures(1, 0.0))
        for video, rows in features.items():
            inside = [int(i) for i in (captions.video_of == video).nonzero()[0]]
            for i in inside:
                allowed = torch.zeros(len(rows), dtype=torch.bool)  # [seconds]
                for j in inside:
                    if actors[j] == actors[i]:  # whole seconds within its time
                        allowed[-int(-captions.start[j] // 1) : int(captions.end[j])] = True
                own = torch.zeros_like(allowed)
                own[int(captions.start[i]) : -int(-captions.end[i] // 1) + 1] = True
                similarity = model.embed_text(torch.from_numpy(text[i : i + 1]))[0] @ rows.T  # [seconds]
                hits.append(bool(own[similarity.masked_fill(~allowed, -2).argmax()]))
                chances.append(float((own & allowed).sum() / allowed.sum()))
        print(
            f"| {seed} | {last['val_recall1']:.1f} | {last['val_chance']:.1f} | {100 * sum(hits) / len(hits):.1f} | "
            f"{100 * sum(chances) / len(chances):.1f} | {last['seconds']:.0f} |"
        )


EVIDENCE = {
    "turbo": turbo_evidence,
    "turbo_tradeoff": turbo_tradeoff,
    "turbo_long": turbo_long,
    "turbo_vl": turbo_vl,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=EVIDENCE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    EVIDENCE[args.what](args.seeds, args.out)
