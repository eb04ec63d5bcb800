"""AVION's bottlenecks on this machine, in the form of its tables: python tests/bench_avion.py [--only table4 ...].

    table4  Table 4: seconds of waiting and of a whole step, clips a second: attention x chunk length x crop
    fig3    Fig. 3: activation memory of LayerNorm, attention and MLP: plain, efficient, recomputed
    fig4    Fig. 4: joint attention against TimeSformer's divided attention (tpt_mae.py's): speed, memory, batch
    fig5    Fig. 5: the loader alone, against the number of processes, decode-then-crop and fused
    fig7    Fig. 7: VideoMAE (tpt_mae.py's, 16 frames) on the same loaders: waiting and whole steps, against processes
    text    what stands beside the training: the tokenizer (--merges: CLIP's), and mAP and nDCG at the size of EK-100

By default on toy videos with a small model; on a GPU: ViT-B, 4 x 224 x 224. Your own chunks:
    python tests/bench_avion.py --list ego4d.pkl --short-root chunks_15s --long-root chunks_300s --batch 64 256
    python tests/bench_avion.py --only fig5 --processes 8 16 32 64 --list ... --short-root ... --frames 4 --size 224
Fig. 2 is `clips_per_second` in the log of: torchrun --nproc_per_node=<1, 2, 4, 8> avion.py --recipe ego4d --max-steps
50 ... with and without `--attention plain --loader decode_then_crop`.
"""

import argparse
import itertools
import os
import platform
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import avion
import common
import data

# Table 4: (batch a GPU, efficient attention, short chunks, merged crop): loading s/it, step s/it, clips/s on 8 GPUs.
# Its marks did not survive in the text of the paper; its order fits all four loaders at 64, then at 256 with the
# attention.
PAPER_4 = {
    (64, False, False, False): (0.5, 3.9, 130), (64, False, False, True): (0.3, 3.5, 146),
    (64, False, True, False): (0.1, 1.84, 278), (64, False, True, True): (0.1, 1.84, 278),
    (256, True, False, False): (10.1, 20.8, 98), (256, True, False, True): (8.3, 17.8, 115),
    (256, True, True, False): (1.3, 6.5, 315), (256, True, True, True): (0.9, 5.9, 347),
}  # fmt: skip
# Fig. 4, dual encoder on one 24 GB GPU, 4 frames, fp16: (largest batch, clips a second).
PAPER_4B = {
    ("divided", "plain"): (28, 39.4), ("divided", "efficient"): (31, 44.8), ("divided", "recomputed"): (180, 30.3),
    ("joint", "plain"): (22, 45.8), ("joint", "efficient"): (68, 78.1), ("joint", "recomputed"): (304, 62.8),
}  # fmt: skip
# Fig. 7, on 4 GPUs: loading s/it, step s/it.
PAPER_7 = {"decode_then_crop": (0.74, 2.4), "fused": (0.25, 1.55)}


def wait(ctx):
    if ctx.device.type == "cuda":
        torch.cuda.synchronize()


def table(head, rows):
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(
            f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in row)} |"
        )


def clips(args, ctx, root, loader, batch, workers, steps, frames=0):
    """Batches of clips as avion.py's training reads them, random crops included."""
    cfg = avion.Config(frames=frames or args.frames, size=args.size, loader=loader)
    videos = data.read_captions(args.list, root)
    dataset = avion.clips_of(cfg, videos, train=True)
    schedule = data.global_batches(len(videos), batch, batch, 0, 0, steps)
    return data.make_loader(dataset, schedule, workers, ctx.device)


def train_step(ctx, args, attention, batch, recompute=False):
    """A function of clips [B, T, C, H, W] that runs one contrastive training step."""
    cfg = avion.Config(model=args.model, frames=args.frames, size=args.size, attention=attention,
                       grad_checkpoint=recompute)  # fmt: skip
    net = avion.build(cfg, "avion", 514).to(ctx.device).train()
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=1e-5, fused=True
    )
    tokens = torch.randint(0, 512, (batch, 16), device=ctx.device)
    keys, scaler = common.make_key(torch.arange(batch, device=ctx.device)), common.loss_scaler(ctx)

    def step(clips):
        with ctx.autocast():
            video, text, scale = net(clips, tokens, keys)
        loss = common.contrastive_loss(video, text, scale).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(ctx, batches, step, rounds):
    """Seconds of waiting for clips and of a whole step, medians over `rounds` steps after two of warm-up."""
    waits, steps = [], []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        x = next(batches).clips
        waits.append(time.perf_counter() - start)
        step(x)
        wait(ctx)
        steps.append(time.perf_counter() - start)
    return statistics.median(waits[2:]), statistics.median(steps[2:])


def table4(args, ctx):
    """Waiting for data and whole steps of contrastive training."""
    rows = []
    for batch, attention, root, loader in itertools.product(
        args.batch, ("plain", "auto"), ("long", "short"), ("decode_then_crop", "fused")
    ):
        name = (attention == "auto", root == "short", loader == "fused")
        marks = [("no", "yes")[flag] for flag in name]
        paper = PAPER_4[(256 if name[0] else 64, *name)]
        step = train_step(ctx, args, attention, batch)
        batches = clips(
            args, ctx, getattr(args, f"{root}_root"), loader, batch, args.workers, args.rounds + 2
        )
        try:
            waited, seconds = measure(ctx, batches, step, args.rounds)
            rows.append((batch, *marks, waited, seconds, batch / seconds, *paper))
        except torch.OutOfMemoryError:
            rows.append((batch, *marks, "OOM", "OOM", "N/A", *paper))
        del batches, step
    table(["batch", "efficient attention", "short chunks", "merged crop", "loading s/it", "step s/it", "clips/s",
           "paper, batch 256 (plain: 64): loading", "step", "clips/s, 8 GPUs"], rows)  # fmt: skip


def fig3(args, ctx):
    """MB of a clip, all blocks, in fp16 (fp32's half), on a real block; the paper's bars are drawn, not printed."""
    rows = []
    names = {"plain": "plain", "sdpa": "efficient", "checkpoint": "efficient, recomputed"}
    for kind, sizes in avion.saved_megabytes("clip_b16", 785).items():
        sizes = [size / 2 for size in sizes]
        rows.append(
            (
                names[kind],
                *sizes,
                sum(sizes),
                f"{sizes[1] / sum(sizes):.1%}",
                "> 60 %" if kind == "plain" else "-",
            )
        )
    table(
        [
            "ViT-B, 4 frames",
            "LayerNorm MB",
            "attention MB",
            "MLP MB",
            "all MB",
            "attention",
            "paper: attention",
        ],
        rows,
    )


def fig4(args, ctx):
    """Forward and backward of the video encoder on random clips; memory a clip; on CUDA the largest batch."""
    try:
        import tpt_mae
    except ImportError:
        print(
            "\nFig. 4 needs tpt_mae.py (DividedBlock) beside avion.py: only joint attention is measured"
        )
        tpt_mae = None
    rows, batch = [], args.batch[0]
    for shape, (attention, recompute) in itertools.product(
        ("divided", "joint") if tpt_mae else ("joint",),
        (("plain", False), ("sdpa", False), ("sdpa", True)),
    ):
        torch.manual_seed(0)
        encoder = avion.VideoEncoder(
            args.model, args.frames, args.size, "avion", 0.0, 0.0, attention, recompute
        )
        if shape == "divided":
            steps = args.frames // encoder.patch[0]
            encoder.blocks = torch.nn.ModuleList(Divided(tpt_mae, encoder.width, b.attn.heads, attention, steps)
                                                 for b in encoder.blocks)  # fmt: skip
        encoder.to(ctx.device)

        def step(n, encoder=encoder):
            x = torch.randint(
                0,
                256,
                (n, args.frames, 3, args.size, args.size),
                dtype=torch.uint8,
                device=ctx.device,
            )
            with ctx.autocast():
                y = encoder(x)
            y.float().square().mean().backward()

        step(batch)
        log = []
        for _ in range(args.rounds):
            wait(ctx)
            start = time.perf_counter()
            step(batch)
            wait(ctx)
            log.append(time.perf_counter() - start)
        x = torch.randint(
            0, 256, (1, args.frames, 3, args.size, args.size), dtype=torch.uint8, device=ctx.device
        )
        saved, largest = common.saved_bytes(encoder, x) / 1e6, "-"
        if ctx.device.type == "cuda":
            largest = batch
            while True:
                try:
                    step(2 * largest)
                    largest *= 2
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    break
        name = "recomputed" if recompute else {"plain": "plain", "sdpa": "efficient"}[attention]
        speed = batch / statistics.median(log)
        rows.append((shape, name, speed, saved, largest, *reversed(PAPER_4B[shape, name])))
    table(
        [
            "attention",
            "",
            "clips/s",
            "saved MB/clip",
            "largest batch (powers of 2)",
            "paper: clips/s",
            "largest batch",
        ],
        rows,
    )


class Divided(torch.nn.Module):
    """tpt_mae's divided block under avion's CLS token, which looks at nothing here: times and memory, not accuracy."""

    def __init__(self, tpt_mae, width, heads, kind, frames):
        super().__init__()
        self.block, self.frames = tpt_mae.DividedBlock(width, heads, kind=kind), frames
        self.drop_path = 0.0

    def forward(self, x, keys=None):
        return torch.cat(
            [x[:, :1], self.block(x[:, 1:], keys, steps=self.frames)], dim=1
        )  # [B, 1 + N, D]


def fig5(args, ctx):
    """The loader alone: seconds of a clip in a process (latency), clips a second of a process, and of all."""
    rows, batch = [], args.batch[0]
    for processes, loader in itertools.product(args.processes, ("decode_then_crop", "fused")):
        steps = args.rounds + 2 * max(1, processes)
        batches = clips(args, ctx, args.short_root, loader, batch, processes, steps)
        for _ in range(max(1, processes)):
            next(batches)  # until all processes are at work
        start, count = time.perf_counter(), steps - 2 * max(1, processes)
        for _ in range(count):
            next(batches)
        rate = count * batch / (time.perf_counter() - start)
        rows.append(
            (processes, loader, 1000 * max(1, processes) / rate, rate / max(1, processes), rate)
        )
        del batches
    table(
        [
            "processes",
            "loader",
            "ms a clip (97-152 in the paper, fused)",
            "clips/s a process",
            "clips/s",
        ],
        rows,
    )


def fig7(args, ctx):
    """Waiting for data and whole steps of masked pretraining, 90 % of tubes, against the number of processes."""
    import tpt_mae

    net = (
        tpt_mae.VideoMAE("vit_b" if ctx.device.type == "cuda" else "vit_toy", size=args.size)
        .to(ctx.device)
        .train()
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    rows, batch, scaler = [], args.batch[0], common.loss_scaler(ctx)

    def step(clips):
        with ctx.autocast():
            keys = common.make_key(torch.arange(batch, device=ctx.device))
            loss = tpt_mae.mae_loss(*net(clips, keys, 0.9)).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    for processes, loader in itertools.product(args.processes, PAPER_7):
        batches = clips(
            args, ctx, args.short_root, loader, batch, processes, args.rounds + 2, frames=16
        )
        waited, seconds = measure(ctx, batches, step, args.rounds)
        rows.append((processes, loader, waited, seconds, batch / seconds, *PAPER_7[loader]))
        del batches
    table(
        [
            "processes",
            "loader",
            "loading s/it",
            "step s/it",
            "clips/s",
            "paper, 4 GPUs: loading",
            "step",
        ],
        rows,
    )


def text(args, ctx):
    """Sentences of six words a second, of words that are new and known; seconds of the metrics of EK-100's size."""
    rng, rows, (V, S) = random.Random(0), [], args.pairs
    words = ["".join(rng.choices("abcdefghilmnoprstu", k=rng.randint(2, 8))) for _ in range(2000)]
    sentences = [" ".join(rng.choices(words, k=6)) for _ in range(10_000)]
    for _ in range(args.rounds):
        tokenizer, row = avion.BPETokenizer(args.merges or ()), []
        for _ in ("first", "again"):
            start = time.perf_counter()
            tokenizer(sentences)
            row.append(len(sentences) / (time.perf_counter() - start))
        rows.append(row)
    verbs, nouns = (
        torch.randint(0, 97, (V,)),
        torch.zeros(V, 300).scatter_(1, torch.randint(0, 300, (V, 2)), 1.0),
    )
    relevant = avion.relevancy(verbs, nouns, verbs[:S], nouns[:S])
    relevant[torch.arange(V), torch.arange(V) % S] = 1
    start = time.perf_counter()
    avion.retrieval_metrics(torch.rand(V, S), relevant)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table(["tokenizer", "sentences/s, new words", "known words", "mAP, nDCG: seconds", "the process's GB"],
          [(args.merges or "bytes", *map(statistics.median, zip(*rows, strict=True)), seconds, memory)])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda, parts = (
        torch.cuda.is_available(),
        {"table4": table4, "fig3": fig3, "fig4": fig4, "fig5": fig5, "fig7": fig7},
    )
    parts["text"] = text
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument(
        "--list", nargs="+", help="a list that avion.py reads; default: the toy narrated videos"
    )
    parser.add_argument("--short-root", help="folder of short chunks; default: the toy's, 5 s")
    parser.add_argument(
        "--long-root",
        help="folder of long chunks, or whole videos; default: the toy's videos, whole",
    )
    parser.add_argument("--model", choices=avion.MODELS, default="clip_b16" if cuda else "clip_toy")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--size", type=int, default=224 if cuda else 64)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256] if cuda else [16])
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() - 1))
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[8, 16, 32, 64] if cuda else [1, 2]
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--merges", default="", help="CLIP's merges file")
    parser.add_argument(
        "--pairs", type=int, nargs=2, default=[9668, 3842], help="clips and texts of the metrics"
    )
    args = parser.parse_args()
    if not args.list and {"table4", "fig5", "fig7"} & set(args.only):
        folder = data.make_toy("toy", "narrated")
        args.list, args.short_root, args.long_root = (
            [folder / "train.jsonl"],
            folder / "chunks",
            folder / "videos",
        )
    ctx = common.launch()
    where = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {ctx.precision}; {args.model}, "
          f"{args.frames} x {args.size} x {args.size}, {args.workers} loader processes")  # fmt: skip
    for name in args.only:
        parts[name](args, ctx)


if __name__ == "__main__":
    main()
