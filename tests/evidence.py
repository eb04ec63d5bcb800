"""The comparisons that back each script's claims, at toy size: python tests/evidence.py turbo_vl [--seeds 0 1 2].

Runs the script's own command line (a run that is already complete is only read) and prints one Markdown table.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import data
import sfa_vivit
import tpt_mae
import turbo


def run(script, out, *flags):
    """Train to the end; returns the log's records."""
    subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--out", str(out), *map(str, flags)], check=True
    )
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return records


@torch.no_grad()
def position_mean_error(cfg):
    """PMAE of the best constant: each pixel position's mean over the training clips, on the held-out tokens (and the
    target) that turbo.evaluate scores."""
    model = turbo.build(cfg, cfg.num_classes)
    target = lambda batch: turbo.pixel_target(
        turbo.patchify(batch.clips, model.patch), cfg.target
    )  # [B, N, P]
    ctx = common.launch()

    def loader(path):
        videos = data.VideoList(path, cfg.data_root, cfg.num_classes)
        return turbo.test_batches(cfg, ctx, videos, data.Failures(len(videos), 0.0))

    total, count = 0, 0
    for batch in loader(cfg.train_list):
        total, count = total + target(batch).sum(0).double(), count + len(batch.labels)
    mean, errors = (total / count).float(), []  # [N, P]
    for batch in loader(cfg.val_list):
        _, recon = turbo.token_dropout(
            batch.keys, model.num_tokens, cfg.mask_ratio, cfg.recon_ratio
        )  # [B, R]
        errors += (
            (common.gather_tokens(target(batch), recon) - mean[recon])
            .square()
            .mean((1, 2))
            .tolist()
        )
    return sum(errors) / len(errors)


def turbo_evidence(seeds, out):
    """`python turbo.py`, last step, all validation clips: top-1, and reconstruction against the per-position mean."""
    rows = []
    for seed in seeds:
        last = [r for r in run("turbo", out / f"turbo-{seed}", "--seed", seed) if "val_top1" in r][
            -1
        ]
        flags = ["--seed", str(seed), "--workers", "2"]
        rows.append(
            (seed, last, position_mean_error(common.parse(turbo.Config, turbo.RECIPES, flags)))
        )
    print(
        "\n| seed | top-1 % | clips | PMAE | per-position mean | below it | seconds |\n|---|---|---|---|---|---|---|"
    )
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


def turbo_steps(settings, rounds=15):
    """Median milliseconds of a training step of the toy recipe at each (m, r), in turns, without the loader."""
    cfg = common.parse(turbo.Config, turbo.RECIPES, [])
    clips = torch.randint(
        0, 256, (cfg.batch_size, cfg.frames, 3, cfg.size, cfg.size), dtype=torch.uint8
    )
    keys, labels = (
        common.make_key(torch.arange(len(clips))),
        torch.eye(8).repeat(2, 1),
    )  # [B], [B, classes]
    nets = [turbo.build(replace(cfg, recon_ratio=r), 8) for _, r in settings]
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True) for net in nets]
    times = [[] for _ in settings]
    for _ in range(rounds):
        for (m, r), net, optimizer, log in zip(settings, nets, optimizers, times, strict=True):
            start = time.perf_counter()
            logits, prediction, target = net(clips, keys, m, r)
            turbo.turbo_loss(logits, labels, prediction, target)[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            log.append(1000 * (time.perf_counter() - start))
    return [statistics.median(log[2:]) for log in times]


def turbo_tradeoff(seeds, out):
    """Table 1 at toy size: token dropout against none for the same number of steps; tested at three mask ratios."""
    settings = [(0.0, 0.0), (0.5, 0.5), (0.75, 0.25)]
    rows = {mr: [] for mr in settings}
    for seed in seeds:
        for m, r in settings:
            flags = [
                "--seed",
                seed,
                "--mask-ratio",
                m,
                "--recon-ratio",
                r,
                "--eval-mask-ratios",
                "0,0.5,0.75",
            ]
            log = run("turbo", out / f"turbo-{m}-{r}-{seed}", *flags, "--eval-every", 1000)
            rows[m, r].append([x for x in log if "val_top1" in x][-1])
    model = turbo.build(common.parse(turbo.Config, turbo.RECIPES, []), 8)
    print(
        "\n| m, r | top-1 %, m = 0 at test | 0.5 | 0.75 | step ms | saved MB a clip |\n|---|---|---|---|---|---|"
    )
    for ((m, r), runs), step in zip(rows.items(), turbo_steps(settings), strict=True):
        cells = [
            f"{statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"
            for values in ([x[f"val_top1{at}"] for x in runs] for at in ("", "@0.5", "@0.75"))
        ]
        print(
            f"| {m}, {r} | {' | '.join(cells)} | {step:.0f} | {turbo.saved_megabytes(model, 128, m, r):.2f} |"
        )


@torch.no_grad()
def turbo_long(seeds, out):
    """32 frames of a long video end to end: top-1, and telling an activity from its reverse (same motions)."""
    print("\n| seed | top-1 % | order, of the right pair % | seconds |\n|---|---|---|---|")
    for seed in seeds:
        folder = out / f"turbo-long-{seed}"
        last = [
            x
            for x in run("turbo", folder, "--recipe", "toy_long", "--seed", seed)
            if "val_top1" in x
        ][-1]
        model, cfg, classes = load(turbo, folder, "toy_long")
        reverse = [classes.index("+".join(reversed(name.split("+")))) for name in classes]
        videos = data.VideoList(cfg.val_list, cfg.data_root, classes=classes)
        hits = []
        for batch in turbo.test_batches(
            cfg, common.launch(), videos, data.Failures(len(videos), 0.0)
        ):
            logits, _, _ = model(batch.clips, batch.keys, 0.0, 0.0)
            shares = logits.softmax(-1).unflatten(0, (cfg.test_clips, -1)).mean(0)  # [B, classes]
            for share, label in zip(shares, batch.labels.tolist(), strict=False):
                hits.append(bool(share[label] > share[reverse[label]]))
        print(
            f"| {seed} | {last['val_top1']:.1f} | {100 * sum(hits) / len(hits):.1f} | {last['seconds']:.0f} |"
        )


@torch.no_grad()
def turbo_vl(seeds, out):
    """R@1 of held-out sentences over their whole video; and, so that looks can't help, only over the seconds in which
    the same shape and colour is shown, doing this or another of its four motions."""
    print(
        "\n| seed | R@1 % | chance % | same actor: R@1 % | chance % | seconds |\n|---|---|---|---|---|---|"
    )
    for seed in seeds:
        folder = out / f"turbo-vl-{seed}"
        last = [
            x
            for x in run("turbo", folder, "--recipe", "toy_vl", "--seed", seed)
            if "val_recall1" in x
        ][-1]
        model, cfg, _ = load(turbo, folder, "toy_vl")
        captions = turbo.captions_of(cfg, cfg.val_list)
        text, hits, chances = turbo.open_text(cfg, captions), [], []
        actors = [
            captions.text(i).split()[1:3] for i in range(len(captions))
        ]  # of "a red square moves left"
        features = turbo.align_features(
            cfg, common.launch(), model, captions, data.Failures(1, 0.0)
        )
        for video, rows in features.items():
            inside = [int(i) for i in (captions.video_of == video).nonzero()[0]]
            for i in inside:
                allowed = torch.zeros(len(rows), dtype=torch.bool)  # [seconds]
                for j in inside:
                    if actors[j] == actors[i]:  # whole seconds within its time
                        allowed[-int(-captions.start[j] // 1) : int(captions.end[j])] = True
                own = torch.zeros_like(allowed)
                own[int(captions.start[i]) : -int(-captions.end[i] // 1) + 1] = True
                similarity = (
                    model.embed_text(torch.from_numpy(text[i : i + 1]))[0] @ rows.T
                )  # [seconds]
                hits.append(bool(own[similarity.masked_fill(~allowed, -2).argmax()]))
                chances.append(float((own & allowed).sum() / allowed.sum()))
        print(
            f"| {seed} | {last['val_recall1']:.1f} | {last['val_chance']:.1f} | {100 * sum(hits) / len(hits):.1f} | "
            f"{100 * sum(chances) / len(chances):.1f} | {last['seconds']:.0f} |"
        )


@torch.no_grad()
def tpt_mean_error(cfg):
    """The masked error that tpt_mae.sum_errors sums, of the best constant: each pixel position's training mean."""
    model = tpt_mae.build(cfg, cfg.num_classes)
    target = lambda batch: tpt_mae.pixel_target(
        tpt_mae.patchify(batch.clips, model.patch), cfg.target
    )  # [B, N, P]
    ctx = common.launch()

    def loader(path):
        videos = data.VideoList(path, cfg.data_root, cfg.num_classes)
        return tpt_mae.test_batches(cfg, ctx, videos, data.Failures(len(videos), 0.0))

    total, count = 0, 0
    for batch in loader(cfg.train_list):
        total, count = total + target(batch).sum(0).double(), count + len(batch.labels)
    mean, errors = (total / count).float(), []  # [N, P]
    for batch in loader(cfg.val_list):
        _, masked = common.tube_split(
            batch.keys.to(ctx.device), model.grid[0], model.places, cfg.mask_ratio
        )  # [B, R]
        errors += (
            (common.gather_tokens(target(batch), masked) - mean[masked])
            .square()
            .mean((1, 2))
            .tolist()
        )
    return sum(errors) / len(errors)


def tpt_evidence(seeds, out):
    """Progressive against full length only at equal frames: masked error; then top-1 after fine-tuning on few labels.

    Two budgets, the second the toy recipe's own and four times the first. The fine-tuning curves, at 1/3, 2/3 and all
    of 216 steps, are beside those from scratch: where pretraining pays is what they show.
    """
    budgets, kinds = (2, 8), {"progressive": "2:25,4:25,8:50", "full length only": "8:100"}
    flags = lambda *argv: common.parse(tpt_mae.Config, tpt_mae.RECIPES, list(map(str, argv)))
    cost, rows, sources = {}, [], {}
    for budget in budgets:
        for seed in seeds:
            for kind, stages in kinds.items():
                folder = out / f"tpt-{seed}-{budget}-{kind.split()[0]}"
                argv = [
                    "--stages",
                    stages,
                    "--budget",
                    budget,
                    "--seed",
                    seed,
                    "--eval-every",
                    1000,
                ]
                last = [r for r in run("tpt_mae", folder, *argv, "--then", "") if "val_mae" in r][
                    -1
                ]
                cfg = flags(*argv, "--workers", 2)
                plan, _ = tpt_mae.schedule(cfg, cfg.train_clips)
                if kind not in cost:
                    cost[kind] = {s.frames: tpt_mae.count_gmacs(cfg, 8, s.frames)[0] for s in plan}
                gmacs = sum(s.steps * s.batch * cost[kind][s.frames] for s in plan)
                rows.append(
                    (
                        budget,
                        seed,
                        kind,
                        last["val_mae"],
                        tpt_mean_error(cfg),
                        gmacs,
                        last["seconds"],
                    )
                )
                sources[budget, seed, kind] = folder / "last.pt"
    print("\n| budget | seed | pretraining | masked error | per-position mean | GMACs | seconds |")
    print("|---|---|---|---|---|---|---|")
    for budget, seed, kind, error, mean, gmacs, seconds in rows:
        print(
            f"| {budget} | {seed} | {kind} | {error:.4f} | {mean:.4f} | {gmacs:.0f} | {seconds:.0f} |"
        )

    print(
        "\n| labelled clips | budget | start | top-1 at 1/3, mean (seeds) | 2/3 | all |\n|---|---|---|---|---|---|"
    )
    lines = Path("toy/actions/train.csv").read_text().splitlines()
    for labels in (100, 300):
        few = out / f"tpt-{labels}.csv"
        few.write_text("\n".join(lines[:labels]))
        steps = labels // 16  # of a pass; 216 steps in all
        for budget, kind in [("-", "scratch"), *((b, k) for b in budgets for k in kinds)]:
            curves = []
            for seed in seeds:
                start = ["--init", sources[budget, seed, kind]] if kind != "scratch" else []
                folder = out / f"tpt-ft-{labels}-{seed}-{budget}-{kind.split()[0]}"
                records = run("tpt_mae", folder, "--recipe", "toy_ft", "--seed", seed, "--train-list", few, *start,
                              "--epochs", 216 // steps, "--eval-every", 72 // steps)  # fmt: skip
                curves.append([r["val_top1"] for r in records if "val_top1" in r])
            cells = [
                f"{statistics.mean(c):.1f} ({', '.join(f'{x:.0f}' for x in c)})"
                for c in zip(*curves, strict=True)
            ]
            print(f"| {labels} | {budget} | {kind} | {' | '.join(cells)} |")


def sfa_images(seed, path, steps=600, batch=64):
    """Train sfa_vivit's toy spatial transformer on single frames to tell colour and shape, 24 classes, and write it to
    path: the toy's stand-in for image weights. Returns its accuracy on validation frames."""
    cfg = common.parse(sfa_vivit.Config, sfa_vivit.RECIPES, ["--seed", str(seed)])
    actors = {}
    for split in ("train", "val"):
        scripts = [
            data._toy_script("pairs", 0, split, i)
            for i in range(data.TOY_SETS["pairs"]["counts"][split])
        ]
        actors[split] = [data.TOY_ACTORS.index(scenes[0][1]) for _, scenes in scripts]
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
    net = sfa_vivit.ViViT(len(data.TOY_ACTORS), cfg.model, 2, cfg.size, head_std=cfg.head_std)
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
    weights = {
        k: v for k, v in net.state_dict().items() if k.startswith(("patch_embed.", "spatial."))
    }
    torch.save({"model": weights}, path)
    return 100 * hits.float().mean().item()


def sfa_evidence(seeds, out):
    """Rows of Table 1 on the toy pairs: top-1 of the last step, wall-clock. V is `python sfa_vivit.py`; full
    training has the epochs of V's second stage, and those of both; I and III start from sfa_images."""
    (few, first), (many, second) = (
        part.split(":") for part in sfa_vivit.RECIPES["toy"]["stages"].split(",")
    )
    alone, both = f"{many}:{second}", f"{many}:{int(first) + int(second)}"
    out.mkdir(parents=True, exist_ok=True)
    data.make_toy("toy", "pairs")
    rows = []
    for seed in seeds:
        image = out / f"sfa-image-{seed}.pt"
        told = sfa_images(seed, image) if not image.exists() else float("nan")
        frozen = ["--stages", alone, "--freeze", "spatial", "--init"]
        flags = {
            "full, steps of stage 2": ["--stages", alone],
            "full, steps of both stages": ["--stages", both],
            "I": [*frozen, image, "--no-adapter"],
            "III": [*frozen, image],
            "V": [],
            "random, frozen": [*frozen, "random"],
        }
        for name, extra in flags.items():
            folder = out / f"sfa-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            evaluations = [
                r
                for r in run("sfa_vivit", folder, "--seed", seed, *extra)
                if "near_peak_epoch" in r
            ]
            rows.append((name, seed, told, evaluations))
    print(
        f"\n| row | top-1 %, mean (seeds) | its stage 1 at {few} frames % | near-peak epochs | seconds |"
    )
    print("|---|---|---|---|---|")
    listed = lambda values, form: ", ".join(f"{x:{form}}" for x in values)
    for name in flags:
        runs = [evaluations for row, _, _, evaluations in rows if row == name]
        top1, peaks, seconds = (
            [run[-1][key] for run in runs] for key in ("val_top1", "near_peak_epoch", "seconds")
        )
        first = listed([run[0]["val_top1"] for run in runs], ".0f") if name == "V" else "-"
        print(
            f"| {name} | {statistics.mean(top1):.1f} ({listed(top1, '.1f')}) | {first} | {listed(peaks, 'g')} | "
            f"{listed(seconds, '.0f')} |"
        )
    print(
        "frozen image transformers: colour and shape of validation frames",
        {seed: told for _, seed, told, _ in rows},
    )


def sfa_g_evidence(seeds, out):
    """One stage-2 step of ViViT-g, batch 1, 16 frames, fp32 on the CPU, and the process's largest memory."""
    cfg = common.parse(
        sfa_vivit.Config, sfa_vivit.RECIPES, ["--recipe", "k400", "--model", "vivit_g"]
    )
    stage = sfa_vivit.Stage(1, 16, 0, 1, ("spatial",), True)
    net = sfa_vivit.ViViT(400, cfg.model, stage.frames, temporal_depth=4, spatial_chunk=2)
    net.enter(stage)
    optimizer = torch.optim.SGD(common.param_groups(net, 0.0), lr=1e-4, momentum=0.9, fused=True)
    clips, keys = (
        torch.randint(0, 256, (1, 16, 3, 224, 224), dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
    )
    before = [p.detach().clone() for p in net.temporal.parameters()]
    for _ in range(2):  # the head starts at zero: what is before it moves in the second step
        loss = sfa_vivit.vivit_loss(
            net(clips, keys), sfa_vivit.soft_targets(keys, (400,), 0.0), (400,)
        ).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = sum(
        (a - b).abs().sum().item() for a, b in zip(before, net.temporal.parameters(), strict=True)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"loss {loss.item():.4f}, temporal weights moved by {moved:.3g}; largest memory of the process {peak:.2f} GB"
    )
    if not moved or peak > 16:
        raise SystemExit("the step did not train, or took more than 16 GB")


def avion_evidence(seeds, out, clips=12_288, batches=(16, 32, 64, 128)):
    """`python avion.py`, last step: retrieval and zero-shot motion; then the global batch at equal clips seen, in
    micro-batches of 16 through the cached-gradient step (Fig. 6 at toy size)."""
    last = lambda name, *flags: [
        r for r in run("avion", out / f"avion-{name}", *flags) if "val_map" in r
    ][-1]
    keys = (
        "val_r1_t2v",
        "val_r1_v2t",
        "val_verb",
        "val_map",
        "shuffled_map",
        "val_ndcg",
        "shuffled_ndcg",
        "seconds",
    )
    print(f"\n| seed | {' | '.join(keys)} |\n|{'---|' * (1 + len(keys))}")
    for seed in seeds:
        result = last(seed, "--seed", seed)
        print(f"| {seed} | {' | '.join(f'{result[key]:.1f}' for key in keys)} |")
    print(
        "\n| global batch | steps | R@1 text to video | video to text | motion |\n|---|---|---|---|---|"
    )
    for batch in batches:
        flags = ["--batch-size", batch, "--micro-batch", 16, "--max-steps", clips // batch]
        results = [last(f"batch{batch}-{seed}", "--seed", seed, *flags) for seed in seeds]
        cells = [", ".join(f"{result[key]:.1f}" for result in results) for key in keys[:3]]
        print(f"| {batch} | {clips // batch} | {' | '.join(cells)} |")


EVIDENCE = {
    "turbo": turbo_evidence,
    "turbo_tradeoff": turbo_tradeoff,
    "turbo_long": turbo_long,
    "turbo_vl": turbo_vl,
    "avion": avion_evidence,
    "tpt": tpt_evidence,
    "sfa": sfa_evidence,
    "sfa_g": sfa_g_evidence,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=EVIDENCE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    EVIDENCE[args.what](args.seeds, args.out)
