"""Training steps of each method against its own baseline, in one table: clips a second, times, memory, FLOP/s.

    python tests/bench_train.py                                   # all methods; a quarter of an hour on two idle cores
    python tests/bench_train.py turbo sfa --rounds 9 --batch 4    # some of them

Clips of 224 x 224. On the CPU ViT-S (ViViT-B); on CUDA ViT-B (ViViT-L), compiled, in the best precision of the device.
The first row of a method is its baseline. The columns:
    forward+backward, optimizer   variants take turns, --rounds times, on clips that are in memory: medians
    data wait         measured apart, because in turns a loader would read while the others compute and so hide its
                      wait: each variant runs some steps in a row behind the scripts' loader, on a film of 340 x 256;
                      the mean, as processes deliver in bursts, from when all of them have delivered
    step, clips/s     of the three together, without augmentation on the device; against baseline: ratios of clips/s
    spread            the fastest and the slowest round over their median
    peak memory       model, gradients, optimizer, activations; CUDA: the allocator's maximum above what was there;
                      CPU: what a process grows by in which two steps of the variant run (Linux; to 0.05 GB)
    % of product      FLOP/s of forward+backward over the best square matrix product of this run in the same dtype;
                      the FLOPs of all products that the step needs, attention's too; nothing recomputed counts
"""

import argparse
import gc
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import avion
import common
import data
import sfa_vivit
import tpt_mae
import turbo

# CLIP's ViT-S, for the CPU: no size of the paper.
avion.MODELS["clip_s16"] = {
    "width": 384,
    "depth": 12,
    "heads": 6,
    "patch": 16,
    "text": (256, 12, 4),
}
LEVELS = {  # side of a clip; models; sides of the matrices
    "tiny": (32, ("vit_toy", "clip_toy", "vit_toy", "vivit_toy"), (256, 512)),
    "cpu": (224, ("vit_s", "clip_s16", "vit_s", "vivit_b"), (512, 1024, 2048)),
    "cuda": (224, ("vit_b", "clip_b16", "vit_b", "vivit_l"), (2048, 4096, 8192)),
}


class Variant:
    """A way to train, and the two parts of its step, as in the scripts: forward and backward, and the optimizer.

    plan: of data.ClipDataset. loss(model, clips, keys, labels); or where encode(model, ...) is given, both as
    common.cached_step has them. model: the net, behind DistributedDataParallel where there are several ranks.
    """

    def __init__(self, ctx, net, cfg, frames, plan, loss, encode=None, sgd=False):
        self.ctx, self.net, self.plan, self.shape = (
            ctx,
            net.to(ctx.device),
            plan,
            (frames, 3, cfg.size, cfg.size),
        )
        self.model = ctx.wrap(self.net)
        self.loss, self.encode, self.scaler = loss, encode, common.loss_scaler(ctx)
        kind = "sgd" if sgd else "adamw"
        self.optimizer = common.optimizer(
            kind, common.param_groups(net.train(), cfg.weight_decay), 1e-5
        )

    def inputs(self, batch):
        """What the step is handed, of a data.Batch on the device, or of that many random clips."""
        if isinstance(batch, int):
            clips, count = (
                torch.randint(0, 256, (batch, *self.shape), dtype=torch.uint8),
                torch.arange(batch),
            )
            batch = data.Batch(clips, 0 * count, common.make_key(count), count, []).to(
                self.ctx.device
            )
        return batch.clips, batch.keys.to(self.ctx.device), batch.labels

    def forward_backward(self, inputs):
        if self.encode:
            encode = partial(self.encode, self.model)
            return common.cached_step(
                self.ctx, self.model, encode, [inputs], self.loss, self.scaler
            )
        with self.ctx.autocast():
            loss = self.loss(self.model, *inputs).mean()
        self.scaler.scale(loss).backward()

    def optimizer_step(self):
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, inputs):
        self.forward_backward(inputs)
        self.optimizer_step()


# ---- Variants of the methods, made from (..., ctx, videos) -----------------------------------------------------------


def turbo_class(cfg, ctx, videos):
    net = turbo.build(cfg, cfg.num_classes)
    turbo_loss = common.compiled(turbo.turbo_loss, ctx)

    def loss(model, clips, keys, labels):
        logits, prediction, target = model(clips, keys, cfg.mask_ratio, cfg.recon_ratio)
        labels = data.soft_labels(labels, cfg.num_classes, cfg.label_smoothing)
        return turbo_loss(logits, labels, prediction, target)[0]

    return Variant(ctx, net, cfg, cfg.frames, turbo.clips_of(cfg, videos).plan, loss)


def turbo_text(cfg, ctx, videos):
    net, words = (
        turbo.build(cfg, 768),
        torch.randn(1, 768, device=ctx.device),
    )  # mpnet-base's width
    partial_mae = common.compiled(turbo.partial_mae, ctx)

    def encode(model, inputs):
        clips, keys, _ = inputs
        batch = clips, keys, words.expand(len(clips), -1), keys
        return turbo.encode_pairs(batch, model, cfg.mask_ratio, cfg.recon_ratio, partial_mae)

    loss = partial(turbo.nce_loss, temperature=cfg.temperature)
    return Variant(ctx, net, cfg, cfg.frames, turbo.clips_of(cfg, videos).plan, loss, encode)


def avion_clip(cfg, ctx, videos):
    net, words = (
        avion.build(cfg, "clip"),
        torch.randint(0, 49406, (1, 16), device=ctx.device),
    )  # of CLIP's vocabulary

    def encode(model, inputs):
        clips, keys, _ = inputs
        video, text, scale = model(clips, words.expand(len(clips), -1), keys)
        return {"video": video, "text": text, "ids": keys, "scale": scale}

    plan = avion.clips_of(cfg, videos, train=True).plan
    return Variant(ctx, net, cfg, cfg.frames, plan, avion.batch_loss, encode)


class EmbedAll(tpt_mae.VideoMAE):
    """The same model as VideoMAE has it: all patches are normalised and embedded, then the masked ones dropped."""

    @common.region
    def embed(self, patches, visible=None):
        x = self.patch_embed(
            data.normalize(patches, data.IMAGENET_MEAN, data.IMAGENET_STD)
        )  # [B, N, D]
        x = x + self.positions[:, : x.shape[1]].to(x.dtype)  # [B, N, D]
        return common.gather_tokens(x, visible)  # [B, K, D]


def tpt_step(cfg, frames, embed_all, ctx, videos):
    net = (
        EmbedAll(cfg.model, size=cfg.size, attention="plain")
        if embed_all
        else tpt_mae.build(cfg, 0)
    )
    plan = tpt_mae.clips_of(cfg, videos, frames).plan
    mae_loss = common.compiled(tpt_mae.mae_loss, ctx)

    def loss(model, clips, keys, labels):
        return mae_loss(*model(clips, keys, cfg.mask_ratio))

    return Variant(ctx, net, cfg, frames, plan, loss)


class Hub(Variant):
    """transformers' VideoMAE of the same size. It is handed normalised pixels and masks, and has its loss inside."""

    def __init__(self, cfg, ctx, videos):
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        spec, plan = tpt_mae.MODELS[cfg.model], tpt_mae.clips_of(cfg, videos, 16).plan
        layers, width = map(int, spec["decoder"].split("x"))
        net = VideoMAEForPreTraining(VideoMAEConfig(
            image_size=cfg.size, patch_size=spec["patch"], hidden_size=spec["width"],
            num_hidden_layers=spec["depth"], num_attention_heads=spec["heads"], intermediate_size=4 * spec["width"],
            decoder_num_hidden_layers=layers, decoder_hidden_size=width, use_mean_pooling=False,
            decoder_num_attention_heads=max(1, width // 64), decoder_intermediate_size=4 * width))  # fmt: skip
        self.places = (cfg.size // spec["patch"]) ** 2
        super().__init__(
            ctx, net, cfg, 16, plan, lambda model, pixels, masks: model(pixels, masks).loss
        )

    def inputs(self, batch):
        clips, keys, _ = super().inputs(batch)
        mean, std = torch.tensor((data.IMAGENET_MEAN, data.IMAGENET_STD), device=clips.device).view(
            2, 3, 1, 1
        )
        _, masked = common.tube_split(keys, 8, self.places, 0.9)  # [B, R]
        masks = torch.zeros(len(clips), 8 * self.places, dtype=torch.bool, device=clips.device)
        return (clips / 255 - mean) / std, masks.scatter(1, masked, True)


def sfa_step(cfg, number, ctx, videos):
    stage, heads = sfa_vivit.stages_of(cfg, 1)[number], (cfg.num_classes,)
    net = sfa_vivit.build(cfg, heads, stage)
    net.enter(stage, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(ctx.precision))

    def loss(model, clips, keys, labels):
        return sfa_vivit.vivit_loss(
            model(clips, keys), sfa_vivit.soft_targets(labels, heads, 0.0), heads
        )

    plan = sfa_vivit.clips_of(cfg, videos, stage.frames).plan
    return Variant(ctx, net, cfg, stage.frames, plan, loss, sgd=True)


def groups(level):
    """(method, what of it, [(name, function of (ctx, videos) that makes the Variant)]), baselines first."""
    size, models, _ = LEVELS[level]
    models = dict(zip((turbo, avion, tpt_mae, sfa_vivit), models, strict=True))

    def config(script, recipe, **changes):
        return script.Config(
            **script.RECIPES[recipe] | {"model": models[script], "size": size} | changes
        )

    def row(make, recipe, m, r, **changes):
        name = ", ".join([f"m {m}, r {r}", *(f"{key} {value}" for key, value in changes.items())])
        return name, partial(make, config(turbo, recipe, mask_ratio=m, recon_ratio=r, **changes))

    ratios = (0, 0), (0.5, 0.5), (0.75, 0.75), (0.75, 0.25), (0.9, 0.1)
    rows = [row(turbo_class, "ucf101", m, r) for m, r in ratios]
    wide = [row(turbo_class, "ucf101", 0.75, 0.25, decoder="4x384")] * (
        level == "cpu"
    )  # ViT-B's decoder on ViT-S
    yield "turbo", "classes", [*rows, *wide]
    yield (
        "turbo",
        "video and text",
        [row(turbo_text, "htm_aa", m, r) for m, r in ((0, 0), (0.75, 0.25))],
    )
    long = (
        (0, 0, 32),
        (0.75, 0.25, 32),
        (0.875, 0.125, 64),
    )  # Table 5: both show, and reconstruct, 784 tokens
    yield (
        "turbo",
        "long video",
        [row(turbo_class, "breakfast", m, r, frames=frames) for m, r, frames in long],
    )

    flags = {"plain attention": {"attention": "plain"}, "efficient attention": {}}
    flags |= {
        "and recomputed": {"grad_checkpoint": True},
        "and patch dropout 0.5": {"patch_dropout": 0.5},
    }
    stored = {"grad_checkpoint": False}  # what the recipe recomputes
    yield (
        "avion",
        "CLIP",
        [(k, partial(avion_clip, config(avion, "ego4d", **stored | v))) for k, v in flags.items()],
    )

    cfg = config(tpt_mae, "k400")
    peer = [("transformers, 16 frames", partial(Hub, cfg))] if find_spec("transformers") else []
    plain = "plain attention, all embedded, 16 frames", partial(tpt_step, cfg, 16, True)
    ours = [
        (f"ours, {frames} frames", partial(tpt_step, cfg, frames, False))
        for frames in (16, 2, 4, 8)
    ]
    yield "tpt", "pretraining", [plain, *peer, *ours]

    n = 32 if level == "cuda" else 16
    full, staged = (config(sfa_vivit, "ssv2", stages=stages) for stages in (f"{n}:1", f"8:1,{n}:1"))
    rows = (
        (f"full, {n} frames", full, 0),
        ("stage 1, 8 frames", staged, 0),
        (f"stage 2, {n} frames", staged, 1),
    )
    yield "sfa", "classes", [(name, partial(sfa_step, cfg, number)) for name, cfg, number in rows]


# ---- Measuring -------------------------------------------------------------------------------------------------------


def clock(ctx):
    if ctx.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def best_product(ctx, sides):
    """(FLOP/s, side) of the fastest square matrix product in the run's dtype."""
    dtype, best = (
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(ctx.precision, torch.float32),
        (0, 0),
    )
    for n in sides:
        a, b = torch.randn(2, n, n, device=ctx.device, dtype=dtype)
        for _ in range(10):
            start = clock(ctx)
            a @ b
            best = max(best, (2 * n**3 / (clock(ctx) - start), n))
    return best


def count_flops(variant):
    """FLOPs a clip of forward and backward. Attention is written out, because the counter misses the CPU's fused kernel
    and flash-attn, and counts what others recompute; for the same reason no block is run twice. Spoils the variant."""
    clips = 2 if variant.encode else 1  # a pair is what a contrastive loss needs
    for part in variant.net.modules():
        part.kind, part.grad_checkpoint = "sdpa", False
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        variant.forward_backward(variant.inputs(clips))
    return counter.get_total_flops() / clips


def growth(build, batch):
    """Bytes that this process grows by for a variant and two of its steps."""
    resident = lambda field: (
        1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    )
    ctx, before = common.launch(), resident("VmRSS")
    variant = build(ctx, None)
    for _ in range(2):
        variant.step(variant.inputs(batch))
    return resident("VmHWM") - before


def peak_memory(build, batch):
    """`growth` in a process of its own, a fork, which knows all modules already; NaN where there is no /proc. Before
    this process computes anything: its threads would not be there in the other."""
    if not Path("/proc/self/status").exists():
        return math.nan
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(growth, build, batch).result()


def prepare(ctx, build, videos, batch):
    """(variant, warmed up and on CUDA compiled; FLOPs a clip; peak memory in bytes, on CUDA)."""
    cuda, flops = ctx.device.type == "cuda", count_flops(build(ctx, videos))
    gc.collect()
    before = torch.cuda.memory_allocated() if cuda else 0
    variant = build(ctx, videos)
    common.compile_model(variant.net, ctx)
    for i in range(3 if cuda else 1):
        if i == 2:
            torch.cuda.reset_peak_memory_stats()
        variant.step(variant.inputs(batch))
    return variant, flops, torch.cuda.max_memory_allocated() - before if cuda else None


def data_wait(variant, videos, batch, workers):
    """Mean seconds that a step waits for its clips while `workers` processes read."""
    first, steps, waits = max(1, workers), max(3, 2 * workers), []
    dataset = data.ClipDataset(videos, variant.plan, variant.shape[-1], 0, replace=True)
    schedule = data.global_batches(len(videos), batch, batch, 0, 0, first + steps)
    batches = data.make_loader(dataset, schedule, workers, variant.ctx.device)
    for _ in range(first):
        ready = next(batches)
    for _ in range(steps):
        variant.step(variant.inputs(ready))
        start = clock(variant.ctx)
        ready = next(batches)
        waits.append(time.perf_counter() - start)
    return statistics.mean(waits)


COLUMNS = ("clips/s", "step ms", "data wait ms", "forward+backward ms", "optimizer ms", "peak memory GB", "% of product",
           "against baseline", "spread")  # fmt: skip


def measure(ctx, rows, grown, videos, args, best):
    """A group's rows, each measured, as a dict: its name, numbers in units of 1, spread. All ranks take part, and clips a
    second are those of all. grown: peak memory of each row, where it is measured before. best: FLOP/s of best_product."""
    ready = [prepare(ctx, build, videos, args.batch) for _, build in rows]
    inputs, times, base = (
        [variant.inputs(args.batch) for variant, *_ in ready],
        [[] for _ in rows],
        None,
    )
    for _ in range(args.rounds):
        for (variant, *_), x, log in zip(ready, inputs, times, strict=True):
            start = clock(ctx)
            variant.forward_backward(x)
            middle = clock(ctx)
            variant.optimizer_step()
            log.append((middle - start, clock(ctx) - middle))
    measured = []
    for (name, _), (variant, flops, peak), log, grew in zip(rows, ready, times, grown, strict=True):
        wait = data_wait(variant, videos, args.batch, args.workers)
        compute, update = map(statistics.median, zip(*log, strict=True))
        step = wait + compute + update
        rate = ctx.world * args.batch / step
        base = base or rate
        both = [sum(pair) for pair in log]
        middle = statistics.median(both)
        measured.append({
            "variant": name, "rate": rate, "step": step, "wait": wait, "compute": compute, "optimizer": update,
            "memory": grew if peak is None else peak, "flops": flops * args.batch / compute, "best": best,
            "against": rate / base, "spread": (min(both) / middle, max(both) / middle)})  # fmt: skip
    return measured


def cells(row, first):
    """A row of `measure` as the texts of COLUMNS."""
    times = [row[name] for name in ("step", "wait", "compute", "optimizer")]
    texts = [
        f"{row['rate']:.3g}",
        *(f"{1000 * x:.1f}" for x in times),
        f"{row['memory'] / 1e9:.2f}",
    ]
    texts.append(f"{100 * row['flops'] / row['best']:.1f}")
    texts.append("baseline" if first else f"{row['against']:.2f}x")
    return [*texts, "{:.2f}-{:.2f}".format(*row["spread"])]


def film(path, width, height):
    """A 10 s H.264 video; smooth noise that moves."""
    noise = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0)) * 255
    sky = (
        torch.nn.functional.interpolate(noise, (512, 680), mode="bicubic")[0].clamp(0, 255).byte()
    )  # [3, 512, 680]
    sky = sky.permute(1, 2, 0).numpy()  # [512, 680, 3]
    data._toy_write(
        path, np.stack([sky[i // 2 : i // 2 + height, i : i + width] for i in range(300)]), 30
    )


def bench_decode(videos, rounds):
    """Clips a second of one loader process in tpt's 2-frame stage: one clip or several of each decode."""
    print(
        f"\n| tpt's loader | frames | clips a decode | ms a video | clips/s | against one |\n{'|---' * 6}|"
    )
    for sampling in ("stride", "segments"):
        plan, base = partial(tpt_mae.sample_clip, frames=2, sampling=sampling), None
        for repeats in (1, 2, 4, 8):
            dataset, times = (
                data.ClipDataset(videos, plan, 224, 0, replace=False, views=repeats),
                [],
            )
            for epoch in range(4 * rounds):  # other clips of the same video
                start = time.perf_counter()
                dataset[epoch, 0]
                times.append(time.perf_counter() - start)
            rate = repeats / statistics.median(times)
            base = base or rate
            print(
                f"| {sampling} | 2 | {repeats} | {1000 * repeats / rate:.1f} | {rate:.1f} | {rate / base:.2f}x |"
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods, cuda = ("turbo", "avion", "tpt", "sfa"), torch.cuda.is_available()
    parser.add_argument(
        "methods", nargs="*", metavar="method", help=f"{', '.join(methods)}; default: all"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batch", type=int, default=8 if cuda else 2, help="clips a step (2; on CUDA 8)"
    )
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count()) if cuda else 1,
                        help="loader processes (1; on CUDA one a core, at most 16)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="toy models at 32 x 32: does it run?")
    args = parser.parse_args()
    if not {*args.methods} <= {*methods}:
        parser.error(f"the methods are {', '.join(methods)}")
    methods, ctx = args.methods or methods, common.launch()
    level = "tiny" if args.tiny else "cuda" if cuda else "cpu"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [torch.cuda.get_device_name()] if cuda else []
    names += re.findall(r"model name\s*: (.*)", info)[:1] or [
        platform.processor() or platform.machine()
    ]
    print(f"{', '.join(names)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, "
          f"{ctx.precision}", flush=True)  # fmt: skip
    if "tpt" in methods and find_spec("transformers"):
        import_module("transformers.models.videomae.modeling_videomae")
    gc.freeze()  # what is imported stays: `prepare` need not look through it for each row
    chosen = [
        (f"{method}, {title}", rows) for method, title, rows in groups(level) if method in methods
    ]
    grown = [
        [None if cuda else peak_memory(build, args.batch) for _, build in rows]
        for _, rows in chosen
    ]
    best, side = best_product(ctx, LEVELS[level][2])
    print(f"`{shlex.join(['python', 'tests/bench_train.py', *sys.argv[1:]])}`: {args.rounds} rounds, batch {args.batch}, "
          f"loader processes {args.workers}; {' '.join(LEVELS[level][1])}; best matrix product {best / 1e9:.0f} GFLOP/s "
          f"(side {side})\n\n| method | variant | {' | '.join(COLUMNS)} |\n{'|---' * 11}|", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        film(
            Path(folder) / "film.mp4", *((86, 64) if args.tiny else (340, 256))
        )  # Kinetics' usual size
        videos = data.Captions([("film.mp4", 0.0, 10.0, "")] * max(64, args.batch), folder)
        for (title, rows), peaks in zip(chosen, grown, strict=True):
            for i, row in enumerate(measure(ctx, rows, peaks, videos, args, best)):
                print(
                    f"| {title} | {row['variant']} | {' | '.join(cells(row, i == 0))} |", flush=True
                )
        if "tpt" in methods:
            bench_decode(videos, args.rounds)


if __name__ == "__main__":
    main()
