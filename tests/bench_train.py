"""Training-step time of each method against its own baseline: python tests/bench_train.py [turbo | tpt | sfa]
[--rounds 5] [--batch 2].

Variants of a step (forward, backward, optimizer; random clips, no loader) take turns in one process; medians over the
rounds, ratios of medians. On CUDA: full size, the device's best precision, with peak memory.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import data
import sfa_vivit
import tpt_mae
import turbo


def turbo_step(ctx, model, decoder, m, r, batch):
    """A function that runs one training step of Turbo at (m, r) on random clips."""
    net = turbo.Turbo(101, model, decoder, recon=r > 0, drop_path=0.1).to(ctx.device).train()
    optimizer = torch.optim.AdamW(common.param_groups(net, 0.05), lr=1e-5, fused=True)
    scaler = common.loss_scaler(ctx)
    clips = torch.randint(0, 256, (batch, 16, 3, 224, 224), dtype=torch.uint8, device=ctx.device)
    keys, labels = common.make_key(torch.arange(batch, device=ctx.device)), torch.eye(101, device=ctx.device)[:batch]
    if ctx.device.type == "cuda":
        net.compile()

    def step():
        with ctx.autocast():
            logits, prediction, target = net(clips, keys, m, r)
            loss, _, _ = turbo.turbo_loss(logits, labels, prediction, target)
        scaler.scale(loss.mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(ctx, step):
    if ctx.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if ctx.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bench_turbo(ctx, rounds, batch):
    cuda = ctx.device.type == "cuda"
    model = "vit_b" if cuda else "vit_s"
    settings = [("", 0.0, 0.0), ("", 0.5, 0.5), ("", 0.75, 0.75), ("", 0.75, 0.25), ("", 0.9, 0.1)]
    settings += [("4x384", 0.75, 0.25)] if not cuda else []
    steps, peaks, times = [turbo_step(ctx, model, d, m, r, batch) for d, m, r in settings], [], [[] for _ in settings]
    for step in steps:  # warm-up, and peak memory
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        step(), step()
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0)
    for _ in range(rounds):
        for step, log in zip(steps, times, strict=True):
            log.append(seconds(ctx, step))
    medians = [statistics.median(log) for log in times]
    print(f"\n{model}, batch {batch}, {rounds} rounds; decoder {turbo.MODELS[model]['decoder']} where not said")
    print("\n| m, r | step s | clips/s | against m = 0 | spread | peak GiB above start |\n|---|---|---|---|---|---|")
    for (decoder, m, r), median, log, peak in zip(settings, medians, times, peaks, strict=True):
        spread = f"{min(log) / median:.2f}-{max(log) / median:.2f}"
        shown = f"{peak:.2f}" if cuda else "-"
        print(
            f"| {m}, {r} {decoder} | {median:.4f} | {batch / median:.2f} | {medians[0] / median:.2f}x | {spread} "
            f"| {shown} |"
        )


class EmbedAll(tpt_mae.VideoMAE):
    """The same model as VideoMAE has it: all patches are normalised and embedded, then the masked ones dropped."""

    def encode(self, patches, visible=None, keys=None):
        x = data.normalize(patches, data.IMAGENET_MEAN, data.IMAGENET_STD)  # [B, N, P]
        x = common.gather_tokens(self.patch_embed(x) + self.positions[:, : x.shape[1]], visible)  # [B, K, D]
        return common.run_blocks(self.blocks, x)  # [B, K, D]


def hub_videomae(model):
    """transformers' VideoMAE of the same size, or None where it is not installed; its forward includes the loss."""
    try:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
    except ImportError:
        return None
    spec, (layers, width) = tpt_mae.MODELS[model], map(int, tpt_mae.MODELS[model]["decoder"].split("x"))
    return VideoMAEForPreTraining(VideoMAEConfig(
        hidden_size=spec["width"], num_hidden_layers=spec["depth"], num_attention_heads=spec["heads"],
        intermediate_size=4 * spec["width"], decoder_num_hidden_layers=layers, decoder_hidden_size=width,
        decoder_num_attention_heads=max(1, width // 64), decoder_intermediate_size=4 * width,
        use_mean_pooling=False))  # fmt: skip


def tpt_step(ctx, net, frames, batch):
    """A function that runs one pretraining step, 90 % masked. transformers' gets normalised pixels and masks ready."""
    net = net.to(ctx.device).train()
    optimizer = torch.optim.AdamW(common.param_groups(net, 0.05), lr=1e-5, fused=True)
    scaler = common.loss_scaler(ctx)
    clips = torch.randint(0, 256, (batch, frames, 3, 224, 224), dtype=torch.uint8, device=ctx.device)
    keys = common.make_key(torch.arange(batch, device=ctx.device))
    if not isinstance(net, tpt_mae.VideoMAE):
        mean, std = (torch.tensor(v, device=ctx.device).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
        pixels, (_, masked) = (clips / 255 - mean) / std, common.tube_split(keys, frames // 2, 196, 0.9)
        bools = torch.zeros(batch, frames // 2 * 196, dtype=torch.bool, device=ctx.device).scatter(1, masked, True)
    if ctx.device.type == "cuda":
        net.compile()

    def step():
        with ctx.autocast():
            ours = isinstance(net, tpt_mae.VideoMAE)
            loss = tpt_mae.mae_loss(*net(clips, keys, 0.9)).mean() if ours else net(pixels, bools).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def film(path, frames=300):
    """A 10 s H.264 video of 340 x 256, of Kinetics' usual size; smooth noise that moves."""
    rng = np.random.default_rng(0)
    sky = torch.from_numpy(rng.random((1, 3, 40, 60), np.float32)) * 255
    sky = torch.nn.functional.interpolate(sky, (512, 680), mode="bicubic")[0].clamp(0, 255).byte()  # [3, 512, 680]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height = 340, 256
        for i in range(frames):
            image = sky[:, i // 2 : i // 2 + 256, i : i + 340].permute(1, 2, 0).contiguous().numpy()
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def bench_decode(rounds):
    """Clips a second of one loader process in the 2-frame stage: one clip or several of each decode."""
    print("\n| sampling | frames | clips a decode | ms a video | clips/s | against one |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        film(Path(folder) / "film.mp4")
        videos = data.VideoList.of([Path(folder) / "film.mp4"])
        for sampling in ("stride", "segments"):
            cfg = tpt_mae.Config(sampling=sampling)
            base = None
            for repeats in (1, 2, 4, 8):
                plan = partial(tpt_mae.sample_clip, cfg, 2, True, (1, 1))
                dataset = data.ClipDataset(videos, plan, 224, 0, replace=False, views=repeats)
                times = []
                for epoch in range(4 * rounds):  # other clips of the same video
                    start = time.perf_counter()
                    dataset[epoch, 0]
                    times.append(time.perf_counter() - start)
                rate = repeats / statistics.median(times)
                base = base or rate
                print(f"| {sampling} | 2 | {repeats} | {1000 * repeats / rate:.1f} | {rate:.1f} | {rate / base:.2f}x |")


def bench_tpt(ctx, rounds, batch):
    """A pretraining step against VideoMAE's way and transformers', at 16 frames; the step at each stage's frames."""
    model = "vit_b" if ctx.device.type == "cuda" else "vit_s"
    variants = [
        ("ours", tpt_mae.VideoMAE(model), 16),
        ("plain attention, all embedded", EmbedAll(model, attention="plain"), 16),
    ]
    variants += [("transformers", net, 16) for net in [hub_videomae(model)] if net]
    variants += [(f"ours, {frames} frames", tpt_mae.VideoMAE(model), frames) for frames in (2, 4, 8)]
    steps, times = [tpt_step(ctx, net, frames, batch) for _, net, frames in variants], [[] for _ in variants]
    for step in steps:  # warm-up
        step(), step()
    for _ in range(rounds):
        for step, log in zip(steps, times, strict=True):
            log.append(seconds(ctx, step))
    medians = [statistics.median(log) for log in times]
    print(f"\n{model}, batch {batch}, {rounds} rounds, 90 % tubes")
    print("\n| step | seconds | clips/s | against ours at 16 | spread |\n|---|---|---|---|---|")
    for (name, *_), median, log in zip(variants, medians, times, strict=True):
        spread = f"{min(log) / median:.2f}-{max(log) / median:.2f}"
        print(f"| {name} | {median:.4f} | {batch / median:.2f} | {median / medians[0]:.2f}x the time | {spread} |")
    bench_decode(rounds)


def sfa_step(ctx, model, stage, batch):
    """A function that runs one training step of SFA-ViViT in a Stage on random clips."""
    net = sfa_vivit.ViViT(400, model, stage.frames, temporal_depth=4).to(ctx.device).train()
    net.enter(stage, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(ctx.precision))
    optimizer = torch.optim.SGD(common.param_groups(net, 0.0), lr=1e-3, momentum=0.9, fused=True)
    scaler = common.loss_scaler(ctx)
    clips = torch.randint(0, 256, (batch, stage.frames, 3, 224, 224), dtype=torch.uint8, device=ctx.device)
    keys = common.make_key(torch.arange(batch, device=ctx.device))
    targets = sfa_vivit.soft_targets(torch.arange(batch, device=ctx.device), (400,), 0.0)
    if ctx.device.type == "cuda":
        net.compile()

    def step():
        with ctx.autocast():
            loss = sfa_vivit.vivit_loss(net(clips, keys), targets, (400,))
        scaler.scale(loss.mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_sfa(ctx, rounds, batch):
    cuda = ctx.device.type == "cuda"
    model, frames = ("vivit_l", 32) if cuda else ("vivit_b", 16)
    settings = [
        ("full", sfa_vivit.Stage(0, frames, 0, 1, (), False)),
        ("stage 1", sfa_vivit.Stage(0, 8, 0, 1, (), False)),
        ("stage 2", sfa_vivit.Stage(1, frames, 0, 1, ("spatial",), True)),
    ]
    steps, peaks, times = [], [], [[] for _ in settings]
    for _, stage in settings:  # warm-up, and peak memory above what the models before hold
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step = sfa_step(ctx, model, stage, batch)
        step(), step()
        steps.append(step)
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0)
    for _ in range(rounds):
        for step, log in zip(steps, times, strict=True):
            log.append(seconds(ctx, step))
    medians = [statistics.median(log) for log in times]
    print(f"\n{model}, batch {batch}, {rounds} rounds")
    print(
        "\n| step | frames | step s | clips/s | of full | spread | peak GiB with model |\n|---|---|---|---|---|---|---|"
    )
    for (name, stage), median, log, peak in zip(settings, medians, times, peaks, strict=True):
        spread = f"{min(log) / median:.2f}-{max(log) / median:.2f}"
        shown = f"{peak:.2f}" if cuda else "-"
        print(
            f"| {name} | {stage.frames} | {median:.4f} | {batch / median:.2f} | {median / medians[0]:.3f} | {spread} "
            f"| {shown} |"
        )


BENCHES = {"turbo": bench_turbo, "tpt": bench_tpt, "sfa": bench_sfa}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", choices=list(BENCHES), default="turbo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    context = common.launch()
    where = (
        torch.cuda.get_device_name() if context.device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {context.precision}")
    BENCHES[args.script](context, args.rounds, args.batch)
