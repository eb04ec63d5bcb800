"""The README's results at toy size, measured anew: python tests/evidence.py turbo [--seeds 0 1 2].

A measurement trains by the script's own command line (a run that is complete is only read) and
writes tests/evidence/NAME.json: rows with their seeds, the command, date, versions and machine.
`tables` writes tests/evidence/README.md and the pictures from all JSON files; every measurement
ends with that.
"""

import argparse
import json
import operator
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "evidence"
sys.path.insert(0, str(ROOT))

import common
import data
import sfa_vivit
import tpt_mae
import turbo


def run(script, out, *flags):
    """Train to the end; returns the log's records."""
    command = [sys.executable, ROOT / f"{script}.py", "--out", str(out), *map(str, flags)]
    subprocess.run(command, check=True)
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def evaluations(records, key):
    """The evaluations of a log that have a value of `key`."""
    return [record for record in records if key in record]


def load(script, out, recipe):
    """(model, config, classes) of a run's last checkpoint."""
    state = common.load_checkpoint(Path(out) / "last.pt")
    cfg = common.parse(script.Config, script.RECIPES, ["--recipe", recipe, "--workers", "2"])
    model = script.build(cfg, state["text_width"] or len(state["classes"])).eval()
    model.load_state_dict(state["model"])
    return model, cfg, state["classes"]


def best_constant(train, val, patches, masked):
    """Error of the best constant prediction: each pixel position's mean over the training clips.

    train, val: functions that return batches. patches(batch): targets [B, N, P]. masked(batch): the
    tokens [B, R] that are scored.
    """
    total = 0
    count = 0
    for batch in train():
        total = total + patches(batch).sum(0).double()
        count += len(batch.labels)
    mean = (total / count).float()  # [N, P]
    errors = []
    for batch in val():
        tokens = masked(batch)
        error = common.gather_tokens(patches(batch), tokens) - mean[tokens]  # [B, R, P]
        errors += error.square().mean((1, 2)).tolist()
    return statistics.mean(errors)


def in_turns(calls, rounds=13):
    """Median CPU seconds of each call, {name: function} -> {name: seconds}. The calls take turns in
    this process, and CPU time is counted: what else runs beside them is not."""
    spent = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(times[2:]) for name, times in spent.items()}


def training_step(net, loss):
    """A function that takes a step of AdamW on net's weights. loss: returns the clips' losses."""
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step():
        loss().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def reading(dataset, clips=16):
    """A function that reads the first so many clips of a data.ClipDataset."""
    return lambda: [dataset[0, index] for index in range(clips)]


def random_clips(cfg, frames):
    """(clips uint8 [B, T, C, H, W], keys [B], soft labels of 8 classes [B, 8]) of a step."""
    shape = cfg.batch_size, frames, 3, cfg.size, cfg.size
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    keys = common.make_key(torch.arange(len(clips)))  # [B]
    return clips, keys, torch.eye(8)[torch.arange(len(clips)) % 8]  # [B, 8]


# ---- The default commands whose tables are of other flags ----------------------------------------

# script: (what a run is measured by, in words; the log's name of it)
RESULTS = {
    "tpt_mae": ("masked error", "val_mae"),
    "sfa_vivit": ("top-1 %, of 8", "val_top1"),
}


def first_rows(seeds, out):
    """The default commands' first and last evaluation; of tpt_mae.py also of what follows."""
    rows = []
    for script, (words, key) in RESULTS.items():
        tuned = []
        for seed in seeds:
            folder = out / f"first-{script}-{seed}"
            log = evaluations(run(script, folder, "--seed", seed), key)
            row = {"row": f"`python {script}.py`: {words}", "seed": seed}
            rows.append(row | {"first": log[0][key], "last": log[-1][key]})
            path = folder.with_name(f"{folder.name}_ft") / "log.jsonl"
            if path.exists():
                log = [json.loads(line) for line in path.read_text().splitlines()]
                log = evaluations(log, "val_top1")
                row = {"row": "its fine-tuning: top-1 %, of 8", "seed": seed}
                tuned.append(row | {"first": log[0]["val_top1"], "last": log[-1]["val_top1"]})
        rows += tuned
    return rows


# ---- turbo.py ------------------------------------------------------------------------------------


def turbo_flags(*flags):
    return common.parse(turbo.Config, turbo.RECIPES, [*map(str, flags), "--workers", "2"])


def turbo_batches(cfg, path):
    """A function that returns the test clips of a list, batch by batch."""
    videos = data.VideoList(path, cfg.data_root, cfg.num_classes)
    failures = common.Failures(len(videos), 0.0)
    return lambda: data.test_batches(cfg, common.launch(), turbo.test_clips(cfg, videos), failures)


@torch.no_grad()
def turbo_constant(cfg):
    """`best_constant` on the tokens that turbo.evaluate scores."""
    model = turbo.build(cfg, cfg.num_classes)

    def patches(batch):
        return turbo.pixel_target(turbo.patchify(batch.clips, model.patch), cfg.target)  # [B, N, P]

    def masked(batch):
        ratios = cfg.mask_ratio, cfg.recon_ratio
        return turbo.token_dropout(batch.keys, model.num_tokens, *ratios)[1]  # [B, R]

    batches = [turbo_batches(cfg, path) for path in (cfg.train_list, cfg.val_list)]
    return best_constant(*batches, patches, masked)


def turbo_seconds(cfg, settings):
    """({(m, r): CPU seconds of a training step}, CPU seconds of reading its clips)."""
    clips, keys, labels = random_clips(cfg, cfg.frames)

    def step(m, r):
        net = turbo.build(replace(cfg, recon_ratio=r), 8)

        def loss():
            logits, prediction, target = net(clips, keys, m, r)
            return turbo.turbo_loss(logits, labels, prediction, target)[0]  # [B]

        return training_step(net, loss)

    videos = data.VideoList(cfg.train_list, cfg.data_root, cfg.num_classes)
    calls = {setting: step(*setting) for setting in settings}
    calls["reading"] = reading(turbo.clips_of(cfg, videos), cfg.batch_size)
    seconds = in_turns(calls)
    return seconds, seconds.pop("reading")


def evaluated(checkpoint, *flags):
    """The numbers that `turbo.py --task eval` prints."""
    words = ["--task", "eval", "--init", str(checkpoint), *flags]
    command = [sys.executable, ROOT / "turbo.py", *words]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    words = out.strip().splitlines()[-1].split(": ")[-1].split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


def turbo_rows(seeds, out):
    """`python turbo.py`, and the same steps at two other (m, r), tested at three mask ratios."""
    toy = turbo_flags()
    default = toy.mask_ratio, toy.recon_ratio
    settings = [(0.0, 0.0), default, (0.75, 0.25)]
    seconds, read = turbo_seconds(toy, settings)
    rows = []
    for (m, r), step in seconds.items():
        cfg = turbo_flags("--mask-ratio", m, "--recon-ratio", r)
        model = turbo.build(cfg, 8)
        gmacs = 3 * turbo.count_gmacs(cfg, 8, m, r)[0]  # forward and backward
        for seed in seeds:
            folder = out / f"turbo-{m}-{r}-{seed}"
            flags = ["--seed", seed, "--mask-ratio", m, "--recon-ratio", r]
            name = f"{m:g}, {r:g}"
            if (m, r) == default:
                folder = out / f"turbo-{seed}"
                flags = ["--seed", seed]
                name += " (the default)"
            log = evaluations(run("turbo", folder, *flags), "val_top1")
            row = {"row": name, "seed": seed, "step_ms": 1000 * step, "read_ms": 1000 * read}
            row["saved_mb"] = turbo.saved_megabytes(model, model.num_tokens, m, r)
            row |= evaluated(folder / "last.pt", "--eval-mask-ratios", "0,0.5,0.75")
            if r > 0:
                row["constant"] = turbo_constant(turbo_flags(*flags))
            costs = gmacs / 1000, (step + read) / toy.batch_size  # of a clip
            row["tmacs"] = gmacs * log[-1]["clips"] / 1000
            row["curve"] = curve(log, costs)
            rows.append(row)
    strip(out / f"turbo-{seeds[0]}" / "recon.png")
    return rows


def curve(log, costs, before=(0.0, 0.0)):
    """(multiply-adds in 10^12, CPU seconds, top-1) at each evaluation of a log. costs: of a clip;
    before: of what was trained before."""
    points = []
    for record in log:
        spent = [start + cost * record["clips"] for start, cost in zip(before, costs, strict=True)]
        points.append((*spent, record["val_top1"]))
    return points


def strip(path):
    """The first two clips of a run's recon.png, three rows each, as tests/evidence/recon.png."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    rows = image.height // 2  # it shows four clips
    image.crop((0, 0, image.width, rows)).quantize(128).save(FOLDER / "recon.png")


@torch.no_grad()
def turbo_long_rows(seeds, out):
    rows = []
    for seed in seeds:
        folder = out / f"turbo-long-{seed}"
        log = run("turbo", folder, "--recipe", "toy_long", "--seed", seed)
        last = evaluations(log, "val_top1")[-1]
        model, cfg, classes = load(turbo, folder, "toy_long")
        reverse = [classes.index("+".join(reversed(name.split("+")))) for name in classes]
        hits = []
        videos = data.VideoList(cfg.val_list, cfg.data_root, classes=classes)
        failures = common.Failures(len(videos), 0.0)
        clips = turbo.test_clips(cfg, videos)
        for batch in data.test_batches(cfg, common.launch(), clips, failures):
            logits, _, _ = model(batch.clips, batch.keys, 0.0, 0.0)
            shares = logits.softmax(-1).unflatten(0, (cfg.test_clips, -1)).mean(0)  # [B, classes]
            for share, label in zip(shares, batch.labels.tolist(), strict=False):
                hits.append(bool(share[label] > share[reverse[label]]))
        order = 100 * statistics.mean(hits)
        row = {"row": "32 frames, m = 0.75", "seed": seed, "top1": last["val_top1"]}
        rows.append(row | {"order": order})
    return rows


@torch.no_grad()
def turbo_vl_rows(seeds, out):
    """R@1 of held-out sentences over their whole video; and, so that looks can't help, only over
    the seconds in which the same shape and colour is shown, doing this or another motion."""
    rows = []
    for seed in seeds:
        folder = out / f"turbo-vl-{seed}"
        log = run("turbo", folder, "--recipe", "toy_vl", "--seed", seed)
        last = evaluations(log, "val_recall1")[-1]
        model, cfg, _ = load(turbo, folder, "toy_vl")
        captions = turbo.captions_of(cfg, cfg.val_list)
        text = torch.from_numpy(turbo.open_text(cfg, captions)).float()  # [sentences, W]
        # of "a red square moves left"
        actors = [captions.text(i).split()[1:3] for i in range(len(captions))]
        failures = common.Failures(1, 0.0)
        features = turbo.read_seconds(cfg, common.launch(), model, captions, failures)
        hits = []
        chances = []
        for video, seconds in features.items():  # [seconds, E]
            inside = [int(i) for i in (captions.video_of == video).nonzero()[0]]
            for i in inside:
                allowed = torch.zeros(len(seconds), dtype=torch.bool)
                for j in inside:
                    if actors[j] == actors[i]:  # whole seconds within its time
                        allowed[int(np.ceil(captions.start[j])) : int(captions.end[j])] = True
                own = torch.zeros_like(allowed)
                own[int(captions.start[i]) : int(np.ceil(captions.end[i])) + 1] = True
                similarity = model.embed_text(text[i : i + 1])[0] @ seconds.T  # [seconds]
                hits.append(bool(own[similarity.masked_fill(~allowed, -2).argmax()]))
                chances.append(float((own & allowed).sum() / allowed.sum()))
        row = {"row": "240 narrated videos", "seed": seed}
        row |= {"recall1": last["val_recall1"], "chance": last["val_chance"]}
        row |= {"motion": 100 * statistics.mean(hits)}
        rows.append(row | {"motion_chance": 100 * statistics.mean(chances)})
    return rows


# ---- tpt_mae.py ----------------------------------------------------------------------------------

# How: the name of its folders, and --stages.
KINDS = {"in stages": ("progressive", "2:25,4:25,8:50"), "full length only": ("full", "8:100")}


def tpt_flags(*flags):
    return common.parse(tpt_mae.Config, tpt_mae.RECIPES, [*map(str, flags), "--workers", "2"])


@torch.no_grad()
def tpt_constant(cfg):
    """`best_constant` on the tokens that tpt_mae.evaluate_masked scores."""
    model = tpt_mae.build(cfg, cfg.num_classes)

    def batches(path):
        videos = data.VideoList(path, cfg.data_root, cfg.num_classes)
        failures = common.Failures(len(videos), 0.0)
        return lambda: data.test_batches(
            cfg, common.launch(), tpt_mae.test_clips(cfg, videos), failures
        )

    def patches(batch):
        pixels = tpt_mae.patchify(batch.clips, model.patch)
        return tpt_mae.pixel_target(pixels, cfg.target)  # [B, N, P]

    def masked(batch):
        return common.tube_split(batch.keys, model.grid[0], model.places, cfg.mask_ratio)[1]

    return best_constant(batches(cfg.train_list), batches(cfg.val_list), patches, masked)


@cache
def pretraining(kind, seed, out):
    """(folder of a pretraining at the toy's budget, its last evaluation, {frames: its clips}, its
    Config)."""
    short, stages = KINDS[kind]
    folder = out / f"tpt-{seed}-8-{short}"
    flags = ["--stages", stages, "--budget", 8, "--seed", seed, "--eval-every", 1000]
    flags += ["--repeated", 1]
    last = evaluations(run("tpt_mae", folder, *flags, "--then", ""), "val_mae")[-1]
    cfg = tpt_flags(*flags)
    plan = tpt_mae.schedule(cfg, cfg.train_clips)[0]
    return folder, last, {stage.frames: stage.steps * stage.batch for stage in plan}, cfg


def tpt_costs():
    """{frames: (multiply-adds in 10^12, CPU seconds, reading included) of a pretraining clip}."""
    cfg = tpt_flags()
    net = tpt_mae.build(cfg, 8)
    videos = data.VideoList(cfg.train_list, cfg.data_root, cfg.num_classes)

    def step(frames):
        clips, keys, _ = random_clips(cfg, frames)
        return training_step(net, lambda: tpt_mae.mae_loss(*net(clips, keys, cfg.mask_ratio)))

    calls = {}
    for frames in (2, 4, 8):
        calls[frames] = step(frames)
        calls[frames, "read"] = reading(tpt_mae.clips_of(cfg, videos, frames), cfg.batch_size)
    seconds = in_turns(calls)
    costs = {}
    for frames in (2, 4, 8):
        spent = seconds[frames] + seconds[frames, "read"]
        gmacs = 3 * tpt_mae.count_gmacs(cfg, 8, frames)[0]  # forward and backward
        costs[frames] = gmacs / 1000, spent / cfg.batch_size
    return costs


def tpt_spent(clips, costs):
    """(multiply-adds in 10^12, CPU seconds) of a pretraining on {frames: clips}."""
    each = [[n * cost for cost in costs[frames]] for frames, n in clips.items()]
    return tuple(map(sum, zip(*each, strict=True)))


def tpt_rows(seeds, out):
    rows = []
    costs = tpt_costs()
    for kind in KINDS:
        for seed in seeds:
            _, last, clips, cfg = pretraining(kind, seed, out)
            tmacs, seconds = tpt_spent(clips, costs)
            row = {"row": kind, "seed": seed, "error": last["val_mae"], "tmacs": tmacs}
            rows.append(row | {"seconds": seconds, "constant": tpt_constant(cfg)})
    return rows


def few_labels(out, number=300):
    """A list of the first so many training videos of the toy."""
    out.mkdir(parents=True, exist_ok=True)
    few = out / f"tpt-{number}.csv"
    train = Path("toy/actions/train.csv").read_text().splitlines()
    few.write_text("\n".join(train[:number]))
    return few


def tpt_ft_rows(seeds, out, labels=300, total=216):
    """Fine-tuning on few labelled clips, evaluated at 1/3, 2/3 and all of 216 steps."""
    rows = []
    few = few_labels(out, labels)
    epochs = total // (labels // 16)
    costs = tpt_costs()
    cfg = tpt_flags("--recipe", "toy_ft", "--train-list", few)
    net = tpt_mae.build(cfg, 8)
    clips, keys, soft = random_clips(cfg, 8)
    dataset = tpt_mae.clips_of(cfg, data.VideoList(few, cfg.data_root, 8), 8)
    cross_entropy = torch.nn.CrossEntropyLoss(reduction="none")
    step = training_step(net, lambda: cross_entropy(net(clips, keys), soft))
    seconds = sum(in_turns({"step": step, "read": reading(dataset, cfg.batch_size)}).values())
    cost = 3 * tpt_mae.count_gmacs(cfg, 8, 8)[0] / 1000, seconds / cfg.batch_size
    for start in ("scratch", *KINDS):
        for seed in seeds:
            init = []
            spent = (0.0, 0.0)
            short = "--scratch"
            if start != "scratch":
                folder, _, seen, _ = pretraining(start, seed, out)
                init = ["--init", folder / "last.pt"]
                spent = tpt_spent(seen, costs)
                short = f"8-{KINDS[start][0]}"
            flags = ["--recipe", "toy_ft", "--seed", seed, "--train-list", few, *init]
            flags += ["--epochs", epochs, "--eval-every", epochs // 3]
            log = run("tpt_mae", out / f"tpt-ft-{labels}-{seed}-{short}", *flags)
            log = evaluations(log, "val_top1")
            row = {"row": start, "seed": seed}
            row |= {f"top1_{i + 1}": x["val_top1"] for i, x in enumerate(log)}
            row["curve"] = curve(log, cost, spent)
            rows.append(row)
    return rows


# ---- tpt_mae.py, then turbo.py -------------------------------------------------------------------


def story_rows(seeds, out):
    """Both ideas, each alone, and neither: a pretraining in stages or at full length, then few
    labels with token dropout or on all tokens."""
    few = few_labels(out)
    shape = ["--recipe", "toy_tpt", "--train-list", few]
    cfg = turbo_flags(*shape)
    settings = [(0.0, 0.0), (cfg.mask_ratio, cfg.recon_ratio)]
    seconds, read = turbo_seconds(cfg, settings)
    costs = tpt_costs()
    rows = []
    for kind in KINDS:
        for m, r in settings:
            gmacs = 3 * turbo.count_gmacs(turbo_flags(*shape, "--recon-ratio", r), 8, m, r)[0]
            cost = gmacs / 1000, (seconds[m, r] + read) / cfg.batch_size
            tokens = "all tokens" if m == 0 else f"m = {m:g}, r = {r:g}"
            for seed in seeds:
                folder, _, clips, _ = pretraining(kind, seed, out)
                flags = ["--init", folder / "videomae.pth", "--seed", seed]
                flags += ["--mask-ratio", m, "--recon-ratio", r]
                log = run("turbo", out / f"story-{KINDS[kind][0]}-{m:g}-{seed}", *shape, *flags)
                log = evaluations(log, "val_top1")
                points = curve(log, cost, tpt_spent(clips, costs))
                row = {"row": f"{kind}, then {tokens}", "seed": seed}
                row |= {f"top1_{i + 1}": top1 for i, (_, _, top1) in enumerate(points)}
                tmacs, spent, _ = points[-1]
                rows.append(row | {"tmacs": tmacs, "seconds": spent, "curve": points})
    return rows


# ---- sfa_vivit.py --------------------------------------------------------------------------------


# Table 1 is measured at twice the default command's side, and for longer.
SFA_MANY = "16:10"  # V's second stage
SFA = ["--model", "vivit_toy", "--size", "64", "--stages", f"4:4,{SFA_MANY}"]


def sfa_flags(*flags):
    return common.parse(sfa_vivit.Config, sfa_vivit.RECIPES, [*SFA, *map(str, flags)])


def sfa_images(seed, path, steps=600, batch=64):
    """Train sfa_vivit's toy spatial transformer on single frames to tell colour and shape, 24
    classes, and write it to path: the toy's stand-in for image weights. Its accuracy on validation
    frames, in %, stands in the file."""
    cfg = sfa_flags("--seed", seed)
    frames = {}
    labels = {}
    for split, number in (("train", 16), ("val", 4)):
        videos = data.VideoList(f"{cfg.data_root}/{split}.csv", cfg.data_root, cfg.num_classes)
        actors = []
        images = []
        for i in range(len(videos)):
            _, scenes = data._toy_script("pairs", 0, split, i)
            actors.append(data.TOY_ACTORS.index(scenes[0][1]))
            with data.Video(videos.video(i)) as video:
                picked = torch.linspace(0, video.info.num_frames - 1, number).long().tolist()
                images.append(video.read(picked, cfg.size))
        labels[split] = torch.tensor(actors)
        frames[split] = torch.stack(images)  # [videos, number, C, H, W]
    torch.manual_seed(seed)
    net = sfa_vivit.ViViT(len(data.TOY_ACTORS), cfg.model, 2, cfg.size, head_std=cfg.head_std)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)

    def logits(images):
        still = images[:, None].expand(-1, 2, -1, -1, -1)  # [B, 2, C, H, W]
        return net.head(net.over_space(still)[:, 0])  # [B, classes]

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = common.cosine(step, steps, steps // 10, 1e-3)
        video = torch.randint(len(labels["train"]), (batch,))
        images = frames["train"][video, torch.randint(16, (batch,))]  # [B, C, H, W]
        torch.nn.functional.cross_entropy(logits(images), labels["train"][video]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        told = logits(frames["val"].flatten(0, 1)).argmax(1)
        right = told == labels["val"].repeat_interleave(4)
    parts = ("patch_embed.", "spatial.")
    weights = {k: v for k, v in net.state_dict().items() if k.startswith(parts)}
    torch.save({"model": weights, "told": 100 * right.float().mean().item()}, path)


def sfa_rows(seeds, out):
    """Rows of Table 1 on the toy pairs. V has both stages; the others train on 16 frames alone, as
    long as V's second stage; I and III start from sfa_images."""
    frozen = ["--stages", SFA_MANY, "--freeze", "spatial", "--init"]
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    data.make_toy("toy", "pairs")
    seconds = sfa_seconds(
        [[], ["--stages", SFA_MANY], [*frozen, "x", "--no-adapter"], [*frozen, "x"]]
    )
    for seed in seeds:
        image = out / f"sfa-image-{seed}.pt"
        if not image.exists():
            sfa_images(seed, image)
        settings = {  # row: (its folder, flags)
            "everything trained": ("full-steps-of-stage-2", ["--stages", SFA_MANY]),
            "I: frozen image weights, no adapter": ("I", [*frozen, image, "--no-adapter"]),
            "III: frozen image weights, adapter": ("III", [*frozen, image]),
            "V: 4 frames, then frozen, adapter": ("V", []),
            "frozen at random, adapter": ("random-frozen", [*frozen, "random"]),
        }
        for name, (short, flags) in settings.items():
            log = run("sfa_vivit", out / f"sfa-{short}-{seed}", *SFA, "--seed", seed, *flags)
            spent = sfa_spent(flags, seconds)
            log = evaluations(log, "near_peak_epoch")
            row = {"row": name, "seed": seed, "top1": log[-1]["val_top1"]}
            if short == "V":
                row["stage1"] = [x["val_top1"] for x in log if x["stage"] == 1][-1]
            if short in ("I", "III"):
                row["told"] = torch.load(image, weights_only=True).get("told")
            row["tmacs"], row["seconds"] = spent(log[-1]["step"])
            row["curve"] = [(*spent(x["step"]), x["val_top1"]) for x in log]
            rows.append(row)
    return rows


def sfa_plan(flags):
    """(Config, Stages) of a run by these flags."""
    cfg = sfa_flags(*flags)
    return cfg, sfa_vivit.stages_of(cfg, cfg.train_clips // cfg.batch_size)


def kind_of(stage):
    """What a step of a Stage costs by."""
    return stage.frames, stage.frozen, stage.adapter


def sfa_seconds(settings):
    """{kind_of(stage): CPU seconds of a step, reading included} of all stages of all settings."""
    steps = {}
    reads = {}
    for flags in settings:
        cfg, stages = sfa_plan(flags)
        videos = data.VideoList(cfg.train_list, cfg.data_root, cfg.num_classes)
        for stage in stages:
            dataset = sfa_vivit.clips_of(cfg, videos, stage.frames)
            reads[stage.frames] = reading(dataset, cfg.batch_size)
            steps[kind_of(stage)] = sfa_step(cfg, stage)
    seconds = in_turns(steps | reads, rounds=7)
    return {kind: seconds[kind] + seconds[kind[0]] for kind in steps}


def sfa_step(cfg, stage):
    net = sfa_vivit.build(cfg, (8,), stage)
    clips, keys, labels = random_clips(cfg, stage.frames)
    return training_step(net, lambda: sfa_vivit.vivit_loss(net(clips, keys), labels, (8,)))


def sfa_spent(flags, seconds):
    """A function that tells what a run's first steps cost: (multiply-adds in 10^12, CPU seconds).
    seconds: sfa_seconds."""
    cfg, stages = sfa_plan(flags)
    with torch.device("meta"):
        net = sfa_vivit.build(cfg, (cfg.num_classes,), stages[-1])
    costs = [cfg.batch_size * sfa_vivit.count_gmacs(net, stage) / 1000 for stage in stages]
    times = [seconds[kind_of(stage)] for stage in stages]

    def spent(steps):
        done = [max(0, min(steps, stage.stop) - stage.start) for stage in stages]
        sums = [sum(map(operator.mul, done, each)) for each in (costs, times)]
        return tuple(sums)

    return spent


def sfa_g_rows(seeds, out):
    """Stage-2 steps of ViViT-g, batch 1, 16 frames, fp32 on the CPU, and the process's memory."""
    flags = ["--recipe", "k400", "--model", "vivit_g"]
    cfg = common.parse(sfa_vivit.Config, sfa_vivit.RECIPES, flags)
    stage = sfa_vivit.Stage(1, 16, 0, 1, ("spatial",), True)
    net = sfa_vivit.ViViT(400, cfg.model, stage.frames, temporal_depth=4, spatial_chunk=2)
    net.enter(stage)
    optimizer = torch.optim.SGD(common.param_groups(net, 0.0), lr=1e-4, momentum=0.9, fused=True)
    clips = torch.randint(0, 256, (1, 16, 3, 224, 224), dtype=torch.uint8)
    keys = torch.zeros(1, dtype=torch.int64)
    before = [p.detach().clone() for p in net.temporal.parameters()]
    for _ in range(2):  # the head starts at zero: what is before it moves in the second step
        targets = sfa_vivit.soft_targets(keys, (400,), 0.0)
        sfa_vivit.vivit_loss(net(clips, keys), targets, (400,)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(before, net.temporal.parameters(), strict=True)
    moved = sum((old - new).abs().sum().item() for old, new in pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if not moved or peak > 16:
        raise SystemExit("the step did not train, or took more than 16 GB")
    return [{"row": "ViViT-g, 16 frames, frozen and adapter", "seed": 0, "gb": peak}]


# ---- avion.py ------------------------------------------------------------------------------------


def avion_last(out, *flags):
    """The last evaluation of a run of avion.py."""
    return evaluations(run("avion", out, *flags), "val_map")[-1]


def avion_rows(seeds, out):
    """`python avion.py`, last step: retrieval and the motion zero-shot."""
    rows = []
    for seed in seeds:
        last = avion_last(out / f"avion-{seed}", "--seed", seed)
        values = {k: v for k, v in last.items() if k.startswith(("val_", "shuffled_"))}
        rows.append({"row": "the default command", "seed": seed} | values)
    return rows


def avion_batch_rows(seeds, out, clips=12_288, batches=(16, 32, 64, 128)):
    """Fig. 6 at toy size: the global batch at equal clips seen, in micro-batches of 16 through the
    cached-gradient step."""
    rows = []
    for batch in batches:
        flags = ["--batch-size", batch, "--micro-batch", 16, "--max-steps", clips // batch]
        for seed in seeds:
            last = avion_last(out / f"avion-batch{batch}-{seed}", "--seed", seed, *flags)
            values = {k: last[k] for k in ("val_r1_t2v", "val_r1_v2t", "val_verb")}
            rows.append({"row": f"batch {batch}", "seed": seed} | values)
    return rows


# ---- Tables and pictures -------------------------------------------------------------------------


@dataclass
class Evidence:
    """A measurement: its function, what its table shows, the table's columns: title -> (key of a
    row, format). A cell is the mean over seeds, then each seed's value."""

    measure: Callable
    what: str
    columns: dict


EVIDENCE = {
    "first": Evidence(
        first_rows,
        "The two default commands whose tables below are of other flags, at their first and last "
        "evaluation. sfa_vivit.py's first is its stage 1, on 4 frames; tpt_mae.py's is of 2-frame "
        "training, tested on 8.",
        {"": ("row", ""), "first": ("first", ".3g"), "last": ("last", ".3g")},
    ),
    "turbo": Evidence(
        turbo_rows,
        "`turbo.py`: Table 1 at toy size. Top-1 in % of 320 held-out videos (chance 12.5) after "
        "the same 1,500 steps at each m, r, tested at three mask ratios; PMAE, the error of "
        "held-out dropped patches, beside that of the best constant (each pixel position's "
        "training mean); multiply-adds of the whole training; CPU time of a step of 16 "
        "clips, in turns in one process, and of reading them; activations that the blocks keep for a clip.",
        {
            "m, r": ("row", ""),
            "top-1 at m = 0": ("val_top1", ".1f"),
            "at 0.5": ("val_top1@0.5", ".1f"),
            "at 0.75": ("val_top1@0.75", ".1f"),
            "PMAE": ("val_mae", ".3f"),
            "best constant": ("constant", ".3f"),
            "TMACs": ("tmacs", ".1f"),
            "step ms": ("step_ms", ".0f"),
            "reading ms": ("read_ms", ".0f"),
            "saved MB": ("saved_mb", ".2f"),
        },
    ),
    "turbo_long": Evidence(
        turbo_long_rows,
        "`turbo.py --recipe toy_long`: 32 frames over a whole video, 8 activities (chance 12.5 "
        "%); of these, pairs have the same three motions in opposite order, told apart in "
        "`order` (chance 50 %).",
        {"": ("row", ""), "top-1 %": ("top1", ".1f"), "order %": ("order", ".1f")},
    ),
    "turbo_vl": Evidence(
        turbo_vl_rows,
        "`turbo.py --recipe toy_vl`: R@1 of 384 held-out sentences, each searched in its whole "
        "video; and only among the seconds that show the same shape in the same colour, where "
        "nothing but its motion tells the sentence's.",
        {
            "trained on": ("row", ""),
            "R@1 %": ("recall1", ".1f"),
            "chance": ("chance", ".1f"),
            "by motion alone %": ("motion", ".1f"),
            "its chance": ("motion_chance", ".1f"),
        },
    ),
    "tpt": Evidence(
        tpt_rows,
        "`tpt_mae.py`: pretraining on as many frames in stages, `--stages 2:25,4:25,8:50`, and "
        "at full length only, `8:100`, both with `--repeated 1`: 8 passes over 1,600 clips of 8 frames of 32 x 32. Error "
        "of held-out masked tokens at full length beside the best constant's; multiply-adds of "
        "the whole pretraining.",
        {
            "pretraining": ("row", ""),
            "masked error": ("error", ".3f"),
            "best constant": ("constant", ".3f"),
            "TMACs": ("tmacs", ".2f"),
            "CPU s": ("seconds", ".0f"),
        },
    ),
    "tpt_ft": Evidence(
        tpt_ft_rows,
        "The same, fine-tuned on 300 labelled clips for 216 steps: top-1 in % of 320 held-out "
        "clips (chance 12.5) after a third, two thirds and all of them.",
        {
            "start": ("row", ""),
            "72 steps": ("top1_1", ".1f"),
            "144": ("top1_2", ".1f"),
            "216": ("top1_3", ".1f"),
        },
    ),
    "story": Evidence(
        story_rows,
        "`tpt_mae.py`, then `turbo.py`: do the ideas add up? The pretrainings of `tpt`, then "
        "`turbo.py --recipe toy_tpt --init .../videomae.pth` on 300 labelled clips, with its "
        "token dropout or on all tokens, the same steps: top-1 in % of 320 held-out clips "
        "(chance 12.5) after a third, two thirds and all of them; multiply-adds and CPU seconds "
        "of one core, reading included, of pretraining and fine-tuning together.",
        {
            "pretraining, fine-tuning": ("row", ""),
            "a third": ("top1_1", ".1f"),
            "two thirds": ("top1_2", ".1f"),
            "all": ("top1_3", ".1f"),
            "TMACs": ("tmacs", ".2f"),
            "CPU s": ("seconds", ".0f"),
        },
    ),
    "sfa": Evidence(
        sfa_rows,
        f"`sfa_vivit.py {' '.join(SFA)}`: Table 1 at toy size, 320 held-out videos of two motions "
        "each (chance 12.5 %). All but V train on 16 frames only, for as many steps as V's second stage. For "
        "I and III the spatial transformer first learns colour and shape from single frames "
        "(top-1 of 24 on held-out frames beside it), which stands for image weights.",
        {
            "row": ("row", ""),
            "top-1 %": ("top1", ".1f"),
            "its stage 1, on 4 frames": ("stage1", ".1f"),
            "frames' colour and shape %": ("told", ".0f"),
            "TMACs": ("tmacs", ".1f"),
            "CPU s": ("seconds", ".0f"),
        },
    ),
    "sfa_g": Evidence(
        sfa_g_rows,
        "Memory of a process that trains ViViT-g's stage 2 on one clip, fp32 on the CPU.",
        {"": ("row", ""), "GB": ("gb", ".2f")},
    ),
    "avion": Evidence(
        avion_rows,
        "`avion.py`: 384 held-out narrated clips with 192 captions: R@1 (chance 0.5 %), the "
        "motion zero-shot (of 8), mAP and nDCG, beside those of mixed-up similarities.",
        {
            "": ("row", ""),
            "text to video %": ("val_r1_t2v", ".1f"),
            "video to text %": ("val_r1_v2t", ".1f"),
            "motion %": ("val_verb", ".1f"),
            "mAP": ("val_map", ".1f"),
            "mixed up": ("shuffled_map", ".1f"),
            "nDCG": ("val_ndcg", ".1f"),
            "mixed up ": ("shuffled_ndcg", ".1f"),
        },
    ),
    "avion_batch": Evidence(
        avion_batch_rows,
        "`avion.py`: Fig. 6 at toy size, the global batch at 12,288 clips seen, two fifths of "
        "the default run's, through the cached-gradient step in micro-batches of 16.",
        {
            "": ("row", ""),
            "text to video %": ("val_r1_t2v", ".1f"),
            "video to text %": ("val_r1_v2t", ".1f"),
            "motion %": ("val_verb", ".1f"),
        },
    ),
}


def cell(rows, key, form):
    """A row's name; or the mean over its seeds and, where they differ, each seed's value."""
    if not form:
        return rows[0][key]
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return ""
    each = [f"{value:{form}}" for value in values]
    if len(set(each)) == 1:
        return each[0]
    return f"{statistics.mean(values):{form}} ({', '.join(each)})"


def table(name, found):
    """The Markdown of a measurement."""
    evidence = EVIDENCE[name]
    groups = {}
    for row in found["rows"]:
        groups.setdefault(row["row"], []).append(row)
    lines = [f"## {name}", evidence.what, ""]
    lines += [f"| {' | '.join(evidence.columns)} |", "|" + "---|" * len(evidence.columns)]
    for rows in groups.values():
        cells = [cell(rows, key, form) for key, form in evidence.columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    note = f" {found['note']}" if found["note"] else ""
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    lines += ["", f"`{found['command']}`, {found['date']}; {versions}; {found['machine']}.{note}"]
    return "\n".join(lines)


def tables():
    """tests/evidence/README.md, of all measurements that there are."""
    parts = [HEADER]
    for name in EVIDENCE:
        path = FOLDER / f"{name}.json"
        if path.exists():
            parts.append(table(name, json.loads(path.read_text())))
    return "\n\n".join(parts) + "\n"


HEADER = """# Measured at toy size

Written by `python tests/evidence.py`, from the JSON files beside it. A cell is the mean over the
seeds (then each seed's value, where they differ). Other processors, numbers of threads and versions
round differently, and a small model's run then ends elsewhere."""

GREY = "#808080"  # readable on white and on black


TITLES = {  # of the pictures, and where their legends are: in which row, and where in it
    "turbo": ("Turbo: drop tokens (m, r)", 0, "lower right"),
    "tpt_ft": ("TPT: lengthen clips", 0, "upper left"),
    "story": ("TPT, then Turbo", 1, "upper left"),
    "sfa": ("SFA: freeze", 0, "center right"),
}
COSTS = ("multiply-adds of the training, $10^{12}$", "CPU seconds of one core, reading included")


def pictures():
    """tests/evidence/curves.png and loaders.png. Transparent, in colours that both a white and a
    black page show."""
    try:
        import matplotlib
    except ImportError:
        print("pictures are not drawn: pip install -r tests/requirements-bench.txt")
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name: FOLDER / f"{name}.json" for name in TITLES}
    found = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    shape = {"figsize": (4 * len(found), 6.4), "constrained_layout": True, "sharey": "col"}
    figure, axes = pyplot.subplots(len(COSTS), len(found), squeeze=False, **shape)
    for column, name in zip(axes.T, found, strict=True):
        title, row, place = TITLES[name]
        for i, axis in enumerate(column):
            draw_curves(axis, found[name]["rows"], i, pyplot.cm.tab10.colors)
            axis.set_xlabel(COSTS[i], color=GREY)
        column[0].set_title(title, color=GREY)
        column[row].legend(loc=place, fontsize=7, framealpha=0, labelcolor=GREY).set_zorder(0)
    for axis in axes[:, 0]:
        axis.set_ylabel("top-1 % of held-out videos", color=GREY)
    save(figure, axes.flat, "curves.png")

    path = FOLDER / "decode.json"
    if path.exists():
        figure, axis = pyplot.subplots(figsize=(8, 2.6), constrained_layout=True)
        draw_bars(axis, json.loads(path.read_text())["rows"], pyplot.cm.tab10.colors)
        save(figure, [axis], "loaders.png")


def draw_curves(axis, rows, cost, colours):
    """Accuracy against the training's cost number `cost`; each seed is a line, a row a colour."""
    groups = {}
    for row in rows:
        groups.setdefault(row["row"], []).append(row["curve"])
    for (label, curves), colour in zip(groups.items(), colours, strict=False):
        for i, points in enumerate(curves):
            style = {"color": colour, "marker": "o", "markersize": 3, "alpha": 0.8}
            spent = [point[cost] for point in points]
            axis.plot(spent, [point[-1] for point in points], label=None if i else label, **style)


def draw_bars(axis, rows, colours):
    """Our CPU time over each library's: the mean over the rows as a bar, each row as a point."""
    libraries = [key for key in rows[0] if key != "row"]
    for y, library in enumerate(reversed(libraries)):
        ratios = [row[library] for row in rows if library in row]
        mean = statistics.mean(ratios)
        axis.barh(y, mean, color=colours[0], alpha=0.6)
        axis.plot(ratios, [y] * len(ratios), "|", color=GREY, markersize=10)
        axis.text(0.01, y, f"{mean:.2f}", va="center", color="white", fontweight="bold")
    axis.axvline(1, color=GREY, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(libraries)), reversed(libraries))
    axis.set_xlabel("CPU time of data.Video over the library's: left of 1 is faster", color=GREY)


def save(figure, axes, name):
    """A figure as a PNG of few colours, which is small."""
    from PIL import Image

    for axis in axes:
        axis.tick_params(colors=GREY)
        axis.spines[:].set_color(GREY)
    path = FOLDER / name
    figure.savefig(path, dpi=90, transparent=True)
    Image.open(path).quantize(128).save(path, optimize=True)


def machine():
    """The processor's name and the cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


def shortened(value):
    """Five digits are more than any of these numbers has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list | tuple):
        return [shortened(x) for x in value]
    return {k: shortened(x) for k, x in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*EVIDENCE, "tables"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--note", default="", help="what a reader must know of how it was run")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if args.what != "tables":
        seeds = " ".join(map(str, args.seeds))
        found = {
            "command": f"python tests/evidence.py {args.what} --seeds {seeds}",
            "date": date.today().isoformat(),
            "versions": {"torch": torch.__version__, "av": av.__version__},
            "machine": machine(),
            "note": args.note,
            "rows": shortened(EVIDENCE[args.what].measure(args.seeds, args.out)),
        }
        (FOLDER / f"{args.what}.json").write_text(json.dumps(found, indent=1))
    (FOLDER / "README.md").write_text(tables())
    pictures()
