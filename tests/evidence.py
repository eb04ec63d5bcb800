"""The comparisons that back each script's claims, at toy size: python tests/evidence.py turbo [--seeds 0 1 2].

Runs the script's own command line (a run that is already complete is only read) and prints one Markdown table.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import data
import sfa_vivit
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


def sfa_images(seed, path, steps=600, batch=64):
    """Train sfa_vivit's toy spatial transformer on single frames to tell colour and shape, 24 classes, and write it to
    path: the toy's stand-in for image weights. Returns its accuracy on validation frames."""
    cfg = common.parse(sfa_vivit.Config, sfa_vivit.RECIPES, ["--seed", str(seed)])
    actors = {}
    for split in ("train", "val"):
        count = data.TOY_SETS["long"]["counts"][split]
        pairs = [data._toy_script("long", 0, split, i)[1][0][1] for i in range(count)]
        actors[split] = [data.TOY_ACTORS.index(pair) for pair in pairs]
    frames = {}
    for split, number in (("train", 16), ("val", 4)):
        videos = data.VideoList(f"{cfg.data_root}/{split}.csv", cfg.data_root, cfg.num_classes)
        frames[split] = []
        for i in range(len(videos)):
            with data.Video(videos.video(i)) as video:
                picked = torch.linspace(0, video.info.num_frames - 1, number).long().tolist()
                frames[split].append(video.read(picked, cfg.size))
        frames[split] = torch.stack(frames[split])  # [videos, number, C, H, W]
    torch.manual_seed(seed)
    net = sfa_vivit.ViViT(len(data.TOY_ACTORS), cfg.model, 2, cfg.size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    still = lambda images: images[:, None].expand(-1, 2, -1, -1, -1)  # [B, 2, C, H, W]
    logits = lambda images: net.head(net.frames(still(images))[:, 0])  # [B, classes]
    labels = {split: torch.tensor(actors[split]) for split in actors}
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = common.cosine(step, steps, steps // 10, 1e-3)
        video = torch.randint(len(labels["train"]), (batch,))
        images = frames["train"][video, torch.randint(16, (batch,))]  # [B, C, H, W]
        torch.nn.functional.cross_entropy(logits(images), labels["train"][video]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        hits = logits(frames["val"].flatten(0, 1)).argmax(1) == labels["val"].repeat_interleave(4)
    weights = {k: v for k, v in net.state_dict().items() if k.startswith(("patch_embed.", "spatial."))}
    torch.save({"model": weights}, path)
    return 100 * hits.float().mean().item()


def sfa_evidence(seeds, out):
    """Rows of Table 1 on the toy long videos: top-1 of the last step, wall-clock. V is `python sfa_vivit.py`; full
    training has the epochs of V's second stage, and those of both; I and III start from sfa_images."""
    (few, first), (many, second) = (part.split(":") for part in sfa_vivit.RECIPES["toy"]["stages"].split(","))
    alone, both = f"{many}:{second}", f"{many}:{int(first) + int(second)}"
    out.mkdir(parents=True, exist_ok=True)
    data.make_toy("toy", "long")
    rows = []
    for seed in seeds:
        image = out / f"sfa-image-{seed}.pt"
        told = sfa_images(seed, image) if not image.exists() else float("nan")
        frozen = ["--stages", alone, "--freeze", "spatial", "--init"]
        flags = {
            "full, stage 2's steps": ["--stages", alone],
            "full, both stages' steps": ["--stages", both],
            "I": [*frozen, image, "--no-adapter"],
            "III": [*frozen, image],
            "V": [],
            "random, frozen": [*frozen, "random"],
        }
        for name, extra in flags.items():
            folder = out / f"sfa-{name.replace(' ', '-').replace(',', '')}-{seed}"
            evaluations = [r for r in run("sfa_vivit", folder, "--seed", seed, *extra) if "near_peak_epoch" in r]
            rows.append((name, seed, told, evaluations))
    print(f"\n| row | seed | top-1 % | clips | its stage 1 at {few} frames % | near-peak epoch | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, seed, _, evaluations in rows:
        last = evaluations[-1]
        stage_1 = f"{evaluations[0]['val_top1']:.1f}" if len(evaluations) > 1 else "-"
        print(
            f"| {name} | {seed} | {last['val_top1']:.1f} | {last['val_clips']} | {stage_1} | "
            f"{last['near_peak_epoch']:g} | {last['seconds']:.0f} |"
        )
    print("frozen image transformers: colour and shape of validation frames", {seed: told for _, seed, told, _ in rows})


def sfa_g_evidence(seeds, out):
    """One stage-2 step of ViViT-g, batch 1, 16 frames, fp32 on the CPU, and the process's largest memory."""
    cfg = common.parse(sfa_vivit.Config, sfa_vivit.RECIPES, ["--recipe", "k400", "--model", "vivit_g"])
    stage = sfa_vivit.Stage(1, 16, 0, 1, ("spatial",), True)
    net = sfa_vivit.ViViT(400, cfg.model, stage.frames, temporal_depth=4, spatial_chunk=2)
    net.enter(stage)
    optimizer = torch.optim.SGD(common.param_groups(net, 0.0), lr=1e-4, momentum=0.9, fused=True)
    clips, keys = torch.randint(0, 256, (1, 16, 3, 224, 224), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    before = [p.detach().clone() for p in net.temporal.parameters()]
    for _ in range(2):  # the head starts at zero: what is before it moves in the second step
        loss = sfa_vivit.vivit_loss(net(clips, keys), sfa_vivit.soft_targets(keys, (400,), 0.0), (400,)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = sum((a - b).abs().sum().item() for a, b in zip(before, net.temporal.parameters(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"loss {loss.item():.4f}, temporal weights moved by {moved:.3g}; largest memory of the process {peak:.2f} GB")
    if not moved or peak > 16:
        raise SystemExit("the step did not train, or took more than 16 GB")


EVIDENCE = {
    "turbo": turbo_evidence,
    "sfa": sfa_evidence,
    "sfa_g": sfa_g_evidence,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=list(EVIDENCE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    EVIDENCE[args.script](args.seeds, args.out)
