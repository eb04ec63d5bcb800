"""Training-step time of each method against its own baseline: python tests/bench_train.py [--rounds 5] [--batch 2].

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    context = common.launch()
    where = (
        torch.cuda.get_device_name() if context.device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {context.precision}")
    bench_turbo(context, args.rounds, args.batch)
