"""Training-step time of each method against its own baseline: python tests/bench_train.py [--only sfa] [--rounds 5].

Variants of a step (forward, backward, optimizer; random clips, no loader) take turns in one process; medians over the
rounds, ratios of medians. On CUDA: full size, the device's best precision, with peak memory.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import sfa_vivit
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


BENCHMARKS = {"turbo": bench_turbo, "sfa": bench_sfa}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(BENCHMARKS), nargs="+", default=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    context = common.launch()
    where = (
        torch.cuda.get_device_name() if context.device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {context.precision}")
    for name in args.only:
        BENCHMARKS[name](context, args.rounds, args.batch)
