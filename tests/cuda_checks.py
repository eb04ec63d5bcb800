"""The GPU path, checked and measured: one command for a person with one GPU or eight. By estimate it takes half an
hour, most of it to compile.

    python tests/cuda.py
    torchrun --nproc_per_node=8 tests/cuda.py
    python tests/cuda.py --only attention steps    # some of its parts
    python tests/cuda.py --device cpu              # all of it, small: does it run? No figure of it is a GPU's

A check that fails is a line FAILED with its reason; the others go on, and the exit status is 1. What needs a GPU and has
none is "not measured". At the end stands one Markdown block to paste into an issue; --json holds the same as values.
    runs           each script's toy, compiled, in bf16 and fp16: trained at once, and stopped and resumed; same log
    waits          five steps of each, in which nothing may wait for the GPU (torch.cuda.set_sync_debug_mode)
    attention      flash-attn and SDPA against the plain softmax, and backbones whose attention is cut in many pieces
    augmentation   on the GPU as on the CPU
    memory         each script's full-size step: its peak against what --plan says
    steps          tests/bench_train.py at full size: clips a second, memory, and FLOP/s against the card's (MFU); each
                   method against its baseline, of VideoMAE plain attention with all patches embedded, as its code has it;
                   and a small batch as CUDA graphs (torch.compile's mode="reduce-overhead"), which no script uses
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import bench_train as bench
import torch
import torch.distributed as dist
from bench_train import avion, common, data, sfa_vivit, tpt_mae, turbo
from forked import Forked, Ranks

TESTS = Path(__file__).resolve().parent
SCRIPTS = {"turbo": turbo, "avion": avion, "tpt_mae": tpt_mae, "sfa_vivit": sfa_vivit}
PARTS = ("runs", "waits", "attention", "augmentation", "memory", "steps")
TIMED = ("seconds", "clips_per_second", "data_wait")  # of a log's record
# Dense TFLOP/s in half precision by the cards' data sheets; the first name that is part of the device's counts.
PEAKS = {"B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L40": 181,
         "L4": 121, "4090": 165, "Tesla T4": 65}  # fmt: skip
FULL = {  # a recipe, clips that a card of 80 GB holds at once, and what makes the recipe small
    "turbo": ("--recipe ucf101 --num-classes 8", 16, "--model vit_toy --size 32"),
    "avion": ("--recipe ego4d", 64, "--model clip_toy --size 64"),
    "tpt_mae": ("--recipe videomae_k400 --num-classes 8", 64, "--model vit_toy --size 32"),
    "sfa_vivit": ("--recipe k400 --num-classes 8 --stages 8:1", 16, "--model vivit_toy --size 64"),
}
STEPS = {  # groups of tests/bench_train.py: beginnings of the rows to take; clips, as above
    "turbo, classes": (("m 0, r 0", "m 0.75, r 0.25"), 16),
    "avion, CLIP": (("plain", "efficient"), 64),
    "tpt, pretraining": (("plain", "ours, 16", "ours, 2"), 64),
    "sfa, classes": (("stage 1", "stage 2"), 16),
}


class NotMeasured(Exception):
    """The reason why a check says nothing here."""


def need(condition, reason):
    """An error, which makes a check FAILED, unless the condition holds."""
    if not condition:
        raise AssertionError(reason)


class Setting:
    """Where the checks run, and how large: device, folder for what they write, sizes."""

    def __init__(self, ctx, small, folder):
        self.ctx, self.small, self.folder = ctx, small, Path(folder)
        self.cuda = ctx.device.type == "cuda"
        self.fork = (
            not self.cuda
        )  # quicker, but a process that has looked for a GPU can't be forked
        self.steps = 6 if small else 20
        self.compile = (
            "--compile" if self.cuda else "--no-compile"
        )  # the CPU's compiler takes minutes
        self.workers = "0" if small else "2"
        self.precisions = ["bf16"]
        if self.cuda:
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.precisions = ["bf16", "fp16"] if has_bf16 else ["fp16"]

    def clips(self, wanted):
        """An even number of clips for this card, of which one of 80 GB holds `wanted`."""
        if self.small:
            return 2
        share = torch.cuda.get_device_properties(0).total_memory / 80e9
        return max(2, int(wanted * min(1.0, share)) // 2 * 2)

    def need_gpu(self):
        if not self.cuda:
            raise NotMeasured("no GPU")


class Report:
    """The checks' results. `check` runs one and prints its line."""

    def __init__(self):
        self.rows = []

    def check(self, name, function, *args):
        start = time.time()
        try:
            result, text = "ok", function(*args)
        except NotMeasured as reason:
            result, text = "not measured", str(reason)
        except (Exception, SystemExit) as error:  # noqa: BLE001, whatever it is, the other checks go on
            lines = str(error).strip().splitlines() or ["no reason given"]
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            result, text = "FAILED", kind + lines[0]
        seconds = time.time() - start
        self.rows.append(
            {"check": name, "result": result, "text": text, "seconds": round(seconds, 1)}
        )
        print(f"{result:12} {name}: {text} ({seconds:.0f} s)", flush=True)

    def failed(self):
        return sum(row["result"] == "FAILED" for row in self.rows)


# ---- The scripts -----------------------------------------------------------------------------------------------------


def train(script, stop, free, flags):
    """In a process of its own: a script's command. It gets a SIGTERM after step `stop`, may not wait for the GPU in the
    five steps from `free` on, and prints its peak memory after the last one. 0: never."""
    module, advance = SCRIPTS[script], common.Run.advance

    def watched(run, step, total):
        advance(run, step, total)
        cuda = run.ctx.device.type == "cuda"
        if cuda and free and step == free:
            torch.cuda.set_sync_debug_mode("error")
        if cuda and free and step == free + 5:
            torch.cuda.set_sync_debug_mode("default")
        if step == total:
            print(f"peak {torch.cuda.max_memory_allocated() if cuda else 0} bytes", flush=True)
        if step == stop and run.ctx.rank == 0:  # the ranks agree among themselves
            signal.raise_signal(signal.SIGTERM)

    common.Run.advance = watched
    module.main(common.parse(module.Config, module.RECIPES, flags))


def start(setting, script, flags, stop=0, free=0):
    """`train` with as many ranks as this program has; returns the process."""
    args = [str(TESTS / "cuda.py"), "train", script, str(stop), str(free), *flags]
    ranks = setting.ctx.world
    if setting.fork:
        return (
            Ranks(ranks, args, str(setting.folder))
            if ranks > 1
            else Forked(args, str(setting.folder))
        )
    of_torchrun = ("TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(of_torchrun)}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        args = [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            f"--master_port={port}",
            *args,
        ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *args], cwd=setting.folder, env=env, **pipes)


def finish(process, end="complete:"):
    """What a process of `start` printed; an error where it did not come to the line that has `end`."""
    try:
        out, err = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.terminate() if isinstance(
            process, subprocess.Popen
        ) else process.kill()  # torchrun ends its ranks
        raise AssertionError("took more than 400 s") from None
    if end not in out:
        places = re.findall(r'File "\S*/(\w+\.py)", line (\d+), in (\w+)', err)
        own = [
            f"{name}:{line}, {function}: "
            for name, line, function in places
            if name[:-3] in (*SCRIPTS, "common", "data")
        ]
        lines = (
            [line for line in err.splitlines() if re.match(r"\w*(error|Error)\b", line)]
            or err.splitlines()
            or ["-"]
        )
        raise AssertionError("".join(own[-1:]) + lines[-1 if own else 0])
    return out


def toy_flags(setting, script):
    """Flags of a script's lists of toys, made on first use: a few more videos than its steps take, so that no epoch ends."""
    which = {"avion": "narrated", "sfa_vivit": "pairs"}.get(script, "actions")
    clips = 2 * setting.ctx.world * (setting.steps + 2)
    counts = {
        "train": -(-clips // 8) if which == "narrated" else clips,
        "val": 1 if which == "narrated" else 8,
    }
    folder = data.make_toy(setting.folder, which, counts=counts)
    suffix, root = ("jsonl", folder / "chunks") if which == "narrated" else ("csv", folder)
    return ["--train-list", str(folder / f"train.{suffix}"), "--val-list", str(folder / f"val.{suffix}"),
            "--data-root", str(root)]  # fmt: skip


def toy_run(setting, script, precision, out):
    """Flags of a toy run of setting.steps steps into the folder `out`."""
    steps = setting.steps
    flags = [
        *toy_flags(setting, script),
        "--out",
        str(setting.folder / out),
        "--precision",
        precision,
    ]
    flags += [
        "--batch-size",
        str(2 * setting.ctx.world),
        "--workers",
        setting.workers,
        setting.compile,
    ]
    flags += ["--log-every", str(steps // 2)]
    flags += ["--size", "32"] if setting.small else []  # else half of the time is pictures
    # Where there are stages, the second one begins after half of the steps.
    if script == "sfa_vivit":
        steps //= 2
    if script == "tpt_mae":
        flags += ["--then", "", "--stages", "2:20,8:80"]
    return [*flags, "--max-steps", str(steps)]


def log_of(setting, out):
    """{step: record} of the intervals, and of the evaluations, of a run's log."""
    _, *lines = (setting.folder / out / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {(record["step"], "loss" in record): record for record in records}


def stopped_and_resumed(setting, script, precision):
    """Trains at once, and in two parts; the logs must be the same, on a GPU to what its sums' order does to the loss."""
    whole, parts = f"{script}-{precision}", f"{script}-{precision}-parts"
    at_once = start(setting, script, toy_run(setting, script, precision, whole))
    first = start(
        setting, script, toy_run(setting, script, precision, parts), stop=setting.steps // 2
    )
    finish(at_once)
    finish(first, "stopped at step")
    finish(start(setting, script, toy_run(setting, script, precision, parts)))
    one, two = log_of(setting, whole), log_of(setting, parts)
    need(one.keys() == two.keys(), f"the resumed run logged {sorted(two)}, not {sorted(one)}")
    losses = [record["loss"] for (_, has_loss), record in one.items() if has_loss]
    need(losses and None not in losses, f"losses are not finite: {losses}")
    worst = 0.0
    for at, record in one.items():
        for name, value in record.items():
            if name in TIMED or not isinstance(value, float) or (setting.cuda and name != "loss"):
                continue
            other = two[at][name]
            worst = max(worst, abs(value - other) / max(abs(value), 1e-6))
    limit = 0.02 if setting.cuda else 0.0
    need(worst <= limit, f"the resumed run's log differs by {worst:.1e}, more than {limit:g}")
    compiled = "compiled" if setting.cuda else "not compiled"
    return f"{compiled}, {setting.steps} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}; resumed: differs by {worst:.1e}"


def free_of_waits(setting, script):
    if setting.small and script != "turbo":
        raise NotMeasured("not tried when small")
    precision = setting.precisions[0]
    free = (
        setting.steps // 2 + 2
    )  # half of the steps are logged, and a stage begins, before it; the rest after it
    finish(
        start(setting, script, toy_run(setting, script, precision, f"{script}-waits"), free=free)
    )
    setting.need_gpu()
    return f"steps {free + 1} to {free + 5} of the script's own loop"


def planned_memory(setting, script):
    """The peak of a full-size step in the script's own loop, and --plan's estimate: bytes."""
    recipe, wanted, small = FULL[script]
    micro = setting.clips(wanted)
    batch = micro * setting.ctx.world
    flags = f"{recipe} --batch-size {batch} --micro-batch {micro} --precision {setting.precisions[0]}".split()
    flags += small.split() if setting.small else []
    module = SCRIPTS[script]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plan = [*flags, "--plan", "--gpus", str(setting.ctx.world)]
        module.main(common.parse(module.Config, module.RECIPES, plan))
    estimate = max(float(number) for number in re.findall(r"([\d.]+) GB a GPU", printed.getvalue()))

    lists = toy_flags(setting, script)
    short = Path(lists[1])
    lines = short.read_text().splitlines(keepends=True)
    lists[1] = str(setting.folder / f"{script}{short.suffix}")
    Path(lists[1]).write_text(
        "".join(lines * (1 + 6 * batch // len(lines)))
    )  # six times as long as a batch, or longer
    flags += [
        "--init",
        "random",
        "--out",
        str(setting.folder / f"{script}-full"),
        "--workers",
        setting.workers,
    ]
    out = finish(
        start(
            setting,
            script,
            [*flags, *lists, setting.compile, "--max-steps", "3", "--log-every", "3"],
        )
    )
    setting.need_gpu()
    peak = max(int(number) for number in re.findall(r"peak (\d+) bytes", out)) + common.CUDA_BYTES
    text = f"{micro} clips a GPU: {peak / 2**30:.1f} GB with 1 GB of CUDA's own, --plan says {estimate:.1f}"
    need(0.5 * estimate < peak / 2**30 < 1.1 * estimate, text)
    return text


# ---- Attention and augmentation --------------------------------------------------------------------------------------


def attention_agrees(setting, kind):
    """Output and gradients in half precision: at most three times as far from float64's as the plain softmax is."""
    if kind == "flash":
        setting.need_gpu()
        if common.flash_attn_func is None:
            raise NotMeasured("flash-attn is not installed")
        if torch.cuda.get_device_capability() < (8, 0):
            raise NotMeasured("flash-attn is for cards from Ampere on")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    worst = 0.0
    for name in setting.precisions:
        # Of VideoMAE's decoder, AVION's encoders, ViViT-H and ViViT-g: clips, tokens, heads, width of one, causal.
        for B, N, H, d, causal in ((2, 1568, 6, 64, False), (4, 785, 12, 64, False), (4, 77, 8, 64, True),
                                   (2, 257, 16, 80, False), (2, 325, 16, 88, False)):  # fmt: skip
            if setting.small:
                B, N = 1, N // 16
            shape = 3, B, N, H, d
            qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
                setting.ctx.device, dtypes[name]
            )

            def results(kind, qkv, causal=causal):
                parts = [part.clone().requires_grad_() for part in qkv]
                out = common.attention(*parts, kind=kind, causal=causal)  # [B, N, H, d]
                weight = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
                (out.double() * weight).sum().backward()
                return [x.double() for x in (out, *(part.grad for part in parts))]

            exact, plain, other = (
                results("plain", qkv.double()),
                results("plain", qkv),
                results(kind, qkv),
            )
            for a, b, c in zip(exact, plain, other, strict=True):
                error, own = (c - a).abs().max().item(), (b - a).abs().max().item()
                need(
                    error <= 3 * own + 1e-5,
                    f"{name}, {N} tokens, width {d}: {error:.1e} off, plain softmax {own:.1e}",
                )
                worst = max(worst, error / max(own, 1e-9))
    return f"{', '.join(setting.precisions)}: at most {worst:.2f} times as far from float64's as the plain softmax"


def backbone_runs(setting, backbone):
    """More rows of attention than a kernel takes at once: the first clips come out as they do alone."""
    clips, steps, places = (
        (4, 4, 9) if setting.small else (96, 8, 98)
    )  # 96 clips: 9,408 places x 8 heads
    width, heads = 256, 8
    block = tpt_mae.BLOCKS[backbone](width, heads).to(setting.ctx.device)
    x = torch.randn(clips, steps * places, width, generator=torch.Generator().manual_seed(0)).to(
        setting.ctx.device
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[setting.precisions[0]]
    with torch.autocast(setting.ctx.device.type, dtype):
        many = block(x, None, steps)  # [B, N, D]
        many.square().mean().backward()
        few = block(x[:2], None, steps)
    difference = ((many[:2] - few).norm() / few.norm()).item()
    need(difference < 0.01, f"clips differ by {difference:.1e} from themselves alone")
    need(
        all(p.grad.isfinite().all() for p in block.parameters() if p.grad is not None),
        "gradients are not finite",
    )
    return (
        f"{clips * steps * places} tokens: clips differ by {difference:.1e} from themselves alone"
    )


def augmentations():
    """{name: a function of (clips, keys) with the strengths of the papers}."""
    yield "rand_augment", partial(data.rand_augment, magnitude=9, layers=4)
    yield "scenic_rand_augment", partial(data.scenic_rand_augment, magnitude=20)
    yield "colour_jitter", partial(data.colour_jitter, hue=0.2)
    yield "erase", partial(data.erase, p=0.5)
    yield "flip", data.flip
    for name, strengths in (("mixup", (0.8, 0.0)), ("cutmix", (0.0, 1.0))):
        yield (
            name,
            lambda clips, keys, s=strengths: data.mix(
                clips, torch.eye(len(clips), device=clips.device), (0, 1), *s
            )[0],
        )


def same_pixels(setting, function):
    """The GPU's clips are the CPU's; a pixel in a thousand may lie beyond some rounding."""
    count, frames, side = (4, 2, 32) if setting.small else (32, 8, 224)
    noise = (
        torch.rand(
            count, frames, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0)
        )
        * 255
    )
    clips = (
        torch.nn.functional.interpolate(noise.flatten(0, 1), (side, side), mode="bicubic")
        .clamp(0, 255)
        .byte()
    )
    clips = clips.unflatten(0, (count, frames))  # [B, T, 3, H, W]
    keys = common.make_key(torch.arange(count))
    there = function(clips.clone(), keys)
    here = function(
        clips.to(setting.ctx.device), keys
    ).cpu()  # keys stay on the CPU, as the loader gives them
    need(
        here.dtype == there.dtype and here.shape == there.shape, f"{here.dtype} {list(here.shape)}"
    )
    off = (here.int() - there.int()).abs()
    share = (off > 1).float().mean().item()
    need(
        share < 1e-3, f"{share:.2%} of the values are more than one level off, at most {off.max()}"
    )
    setting.need_gpu()
    return (
        f"{(off > 0).float().mean():.2%} of the values are off, by more than one level {share:.4%}"
    )


# ---- Steps -----------------------------------------------------------------------------------------------------------


def steps_rows(setting, title, rows):
    """The chosen rows of a group of bench.groups, each a dict as of bench.measure. All ranks take part."""
    ctx = setting.ctx
    chosen, wanted = STEPS[title]
    rows = [(name, build) for name, build in rows if name.startswith(chosen)]
    level = "tiny" if setting.small else "cuda"
    film = f"film{ctx.rank}.mp4"
    bench.film(setting.folder / film, *((86, 64) if setting.small else (340, 256)))
    videos = data.Captions([(film, 0.0, 10.0, "")] * 512, setting.folder)
    best, _ = bench.best_product(ctx, bench.LEVELS[level][2])
    name = torch.cuda.get_device_name() if setting.cuda else ""
    peak = next((1e12 * tflops for card, tflops in PEAKS.items() if card in name), math.nan)
    workers = max(1, min(16, os.cpu_count() // ctx.world)) if setting.cuda else 0
    args = argparse.Namespace(
        batch=setting.clips(wanted), workers=workers, rounds=1 if setting.small else 5
    )
    measured = bench.measure(ctx, rows, [math.nan] * len(rows), videos, args, best)
    return [
        row | {"method": title, "clips": args.batch, "mfu": row["flops"] / peak} for row in measured
    ]


def cuda_graphs(setting):
    """Turbo's step of the two clips that ucf101's batch leaves to each of 8 GPUs, where the host is slower than the
    card: as it is, and with each region as CUDA graphs. Without other ranks."""
    alone = dataclasses.replace(setting.ctx, rank=0, world=1)
    groups = bench.groups("tiny" if setting.small else "cuda")
    rows = next(group for method, what, group in groups if (method, what) == ("turbo", "classes"))
    build = next(build for name, build in rows if name.startswith("m 0.75, r 0.25"))
    as_graphs = partial(torch.compile, mode="reduce-overhead", dynamic=False)
    compilers = [common._compile, functools.cache(lambda function, backend: as_graphs(function))]
    times = []
    for compiler in compilers:
        with mock.patch.object(common, "_compile", compiler):
            variant = build(alone, None)
            common.compile_model(variant.net, alone)
            inputs = variant.inputs(2)
            laps = [bench.clock(alone)]
            for _ in range(3 if setting.small else 30):
                torch.compiler.cudagraph_mark_step_begin()
                try:
                    variant.step(inputs)
                except RuntimeError as error:
                    reason = str(error).strip().splitlines()[0]
                    raise NotMeasured(f"CUDA graphs don't take it: {reason}") from None
                laps.append(bench.clock(alone))
        steps = [after - before for before, after in itertools.pairwise(laps)]
        times.append(1000 * statistics.median(steps[len(steps) // 2 :]))
    setting.need_gpu()
    return f"2 clips: {times[0]:.1f} ms a step, by mode=reduce-overhead {times[1]:.1f} ms"


def steps_table(rows):
    """The lines of a Markdown table of measure_steps' rows."""
    columns = ["method", "variant", "clips a GPU", *bench.COLUMNS, "MFU %"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1]["method"] != row["method"]
        mfu = "-" if math.isnan(row["mfu"]) else f"{100 * row['mfu']:.1f}"
        texts = [row["method"], row["variant"], str(row["clips"]), *bench.cells(row, first), mfu]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


# ---- All of it -------------------------------------------------------------------------------------------------------


def environment(setting):
    """Card, versions and processor, in a line."""
    versions = [f"torch {torch.__version__}"]
    for package in ("triton", "flash-attn"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    card = "no GPU: no figure here is a GPU's"
    if setting.cuda:
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        card = f"{setting.ctx.world} x {properties.name} ({properties.total_memory / 2**30:.0f} GB, {capability})"
        versions.append(f"CUDA {torch.version.cuda}")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return f"{card}; {', '.join(versions)}; {machine}; {', '.join(setting.precisions)}"


def check_all(setting, parts, report):
    """All parts but the steps, on rank 0."""
    if "runs" in parts:
        for script in SCRIPTS:
            for precision in setting.precisions:
                report.check(
                    f"runs, {script}, {precision}", stopped_and_resumed, setting, script, precision
                )
    if "waits" in parts:
        for script in SCRIPTS:
            report.check(f"waits, {script}", free_of_waits, setting, script)
    if "attention" in parts:
        for kind in ("flash", "sdpa"):
            report.check(f"attention, {kind}", attention_agrees, setting, kind)
        for backbone in ("divided", "trajectory"):
            report.check(f"attention, {backbone}", backbone_runs, setting, backbone)
    if "augmentation" in parts:
        for name, function in augmentations():
            report.check(f"augmentation, {name}", same_pixels, setting, function)
    if "memory" in parts:
        for script in SCRIPTS:
            report.check(f"memory, {script}", planned_memory, setting, script)
    if "steps" in parts:
        report.check("steps, reduce-overhead", cuda_graphs, setting)


def measure_all(setting, report, rows):
    """Append the table's rows, a check a method."""
    for method, what, group in bench.groups("tiny" if setting.small else "cuda"):
        title = f"{method}, {what}"
        if title not in STEPS:
            continue

        def measured(title=title, group=group):
            before = len(rows)
            rows.extend(steps_rows(setting, title, group))
            return f"{len(rows) - before} rows below"

        if setting.ctx.world > 1:
            measured()  # an error ends this program: the other ranks would wait for this one
        else:
            report.check(f"steps, {title}", measured)


def markdown(where, report, rows):
    """The block to paste."""
    lines = [f"`{shlex.join(['python', 'tests/cuda.py', *sys.argv[1:]])}`: {where}", ""]
    lines += ["| check | result | what | s |", "|---|---|---|---|"]
    for row in report.rows:
        lines.append(
            f"| {row['check']} | {row['result']} | {row['text'].replace('|', '/')} | {row['seconds']:.0f} |"
        )
    if rows:
        lines += ["", *steps_table(rows)]
    return "\n".join(lines)


def main(argv):
    """The command line; or, as `train` has started it, one process of a script."""
    if argv[:1] == ["train"]:
        return train(argv[1], int(argv[2]), int(argv[3]), argv[4:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument(
        "--small", action="store_true", help="toy models and few steps; always so without a GPU"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument(
        "--json", default="runs/cuda.json", help="where to write the results (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ctx = common.launch()
    if ctx.world > 1:
        # The other ranks wait for all of rank 0's checks; gloo would give up after half an hour.
        ctx.side_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    os.environ.pop(
        "TORCHELASTIC_USE_AGENT_STORE", None
    )  # it would lead the scripts' ranks to the store of these
    report, rows = Report(), []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(ctx, args.small or ctx.device.type == "cpu", folder)
        where = environment(setting)
        if ctx.rank == 0:
            print(where, flush=True)
            with common.writing(args.json):
                Path(args.json).parent.mkdir(parents=True, exist_ok=True)
                Path(args.json).touch()
            check_all(setting, args.only, report)
        ctx.barrier()
        if "steps" in args.only:
            measure_all(setting, report, rows)
    if ctx.rank == 0:
        block = markdown(where, report, rows)
        print(
            f"\n{block}\n\n{report.failed()} of {len(report.rows)} checks FAILED; values: {args.json}"
        )
        for row in rows:
            row |= {
                name: None for name in ("memory", "mfu") if math.isnan(row[name])
            }  # JSON has no NaN
        result = {"environment": where, "gpu": setting.cuda, "checks": report.rows, "steps": rows}
        with common.writing(args.json):
            Path(args.json).write_text(json.dumps(result | {"markdown": block}, indent=1))
        sys.exit(int(report.failed() > 0))
