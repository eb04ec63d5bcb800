"""What the four trainers share and no paper changed: ViT blocks, keyed randomness, how a run lives.

    1. Command line       a dataclass becomes the flags, a recipe changes its defaults
    2. Processes          one process or torchrun, the same code
    3. Keyed randomness   every random draw is a hash of what it belongs to: no generator state
    4. Compiling          regions of a model, each one graph
    5. ViT blocks         attention (flash-attn / SDPA / plain), pre-norm block, patches, masks
    6. Weights            published files (.pth, safetensors) read as tensors, their names made ours
    7. Optimisation       cosine schedule, parameter groups, loss scaling
    8. A run              folder, log, checkpoints that can't be lost, signals; the loop's chores
    9. Contrastive step   InfoNCE over the global batch, at any number of ranks and micro-batches
    10. Evaluation        means over all videos of a list
    11. Counting          multiply-adds, saved activations and memory of a real model, for --plan

Shapes: B clips, T frames, C colours, N tokens, K kept tokens, D width, H heads, P pixel values in
a patch.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import difflib
import faulthandler
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import platform
import re
import signal
import sys
import time
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None
try:  # optional: pip install flash-attn; used on CUDA in half precision
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


class UserError(SystemExit):
    """A mistake that the user can mend. As a SystemExit it ends the program with its one
    line, not with a traceback."""

    seen = False

    def __init__(self, message):
        super().__init__(f"error: {message}")
        UserError.seen = True


# ---- 1. Command line -----------------------------------------------------------------------------
# A field of a dataclass is a flag, with its meaning and where the paper has it. RunConfig has those
# that are no paper's business; a script's Config extends it, and a recipe changes its defaults.
# What is wrong with them is said in one line before anything is read or computed.


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def opt(default, help, choices=None, free=False, within="[0, inf)"):
    """A Config field: its default, meaning and source. free: may differ when a run is resumed
    (paths, machine). within: the interval of a number, which `check_ranges` heeds."""
    meta = {"help": help, "choices": choices, "free": free, "within": within}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass
class RunConfig:
    """The flags that are no paper's business: what a run reads and writes, and the
    machine it is on. A script's Config extends it with the paper's hyper-parameters, or
    gives a field another default."""

    recipe: str = opt("toy", "settings of one of the paper's trainings: see RECIPES")
    task: str = opt(
        "train", "what to do with it", ["train", "eval", "predict", "features"], free=True
    )
    train_list: str = opt(
        "", "list of training videos: `path label` or `path,label` a line", free=True
    )
    val_list: str = opt("", "list of validation videos", free=True)
    data_root: str = opt("", "folder that the lists' paths are relative to", free=True)
    train_clips: int = opt(0, "size of the training set, for --plan", free=True)
    num_classes: int = opt(0, "number of classes; 0: as many as the training list has")
    input: tuple = opt((), "videos for --task predict", free=True)
    out: str = opt("", "run folder; empty: runs/<script>-<recipe>", free=True)
    init: str = opt("", "weights to start from: see the header; `random`: none, and mean it")
    resume: str = opt(
        "auto", "auto: continue the run folder's last.pt if it is there; or a checkpoint", free=True
    )
    overwrite: bool = opt(False, "start anew in a run folder that holds another run", free=True)
    max_steps: int = opt(0, "number of optimizer steps instead of its epochs; 0: by epochs")
    micro_batch: int = opt(0, "clips that one process holds at once; 0: batch / ranks", free=True)
    grad_checkpoint: bool = opt(
        False, "recompute blocks in backward: less memory, more time", free=True
    )
    attention: str = opt(
        "auto", "auto: flash-attn if it can run, or sdpa", ["auto", "flash", "sdpa", "plain"], True
    )
    precision: str = opt(
        "auto", "auto: the device's best", ["auto", "fp32", "bf16", "fp16"], free=True
    )
    compile: bool | None = opt(None, "torch.compile the model; default: on CUDA", free=True)
    workers: int = opt(
        min(8, cores()),
        "loader processes a rank; 0: load in the training process",
        free=True,
    )
    max_bad: float = opt(
        0.01, "share of an epoch's videos (at least 1) that may be unreadable", free=True
    )
    max_skipped: int = opt(
        20, "updates skipped for a non-finite loss or gradient before the run stops", free=True
    )
    seed: int = opt(0, "key of every random draw", within="(-inf, inf)")
    eval_every: float = opt(1, "epochs between evaluations; the last step is always evaluated")
    log_every: int = opt(20, "steps between log records", within="[1, inf)")
    save_minutes: float = opt(10.0, "minutes between checkpoints, besides one an epoch", free=True)
    tensorboard: bool = opt(
        False, "also write the log for TensorBoard, where it is installed", free=True
    )
    plan: bool = opt(
        False, "print what would run (cost, memory, steps) without data or GPU, and exit", free=True
    )
    gpus: int = opt(
        8, "GPUs that --plan counts memory for (the paper's)", free=True, within="[1, inf)"
    )
    gpu_gb: tuple = opt(
        ("24", "80"), "GB of the cards that --plan fits micro-batches into", free=True
    )


def check_ranges(cfg):
    """UserError where the value of a flag lies outside of its interval."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if type(value) not in (int, float):
            continue
        within = field.metadata["within"]
        low, high = (float(end) for end in within[1:-1].split(","))
        inside = low <= value if within[0] == "[" else low < value
        inside &= value <= high if within[-1] == "]" else value < high  # not inside: NaN
        if not inside:
            flag = f"--{field.name.replace('_', '-')}"
            words = {"(0, inf)": "above 0", "[0, inf)": "at least 0", "[1, inf)": "at least 1"}
            words["(0, 1e6]"] = "above 0 and at most 1000000"
            raise UserError(f"{flag} must be {words.get(within, f'in {within}')}, not {value}")


def check_flags(cfg, patch):
    """UserError where flags can't work in any script. patch: pixels of its height and width."""
    check_ranges(cfg)
    if cfg.min_lr > cfg.lr:
        raise UserError(
            f"--min-lr {cfg.min_lr:g}, where the cosine ends, is above the peak, --lr {cfg.lr:g}"
        )
    if cfg.overwrite and cfg.resume != "auto":
        raise UserError(f"--overwrite starts anew, --resume {cfg.resume} goes on: give one of them")
    if cfg.size < patch or cfg.size % patch:
        raise UserError(f"--size {cfg.size} is not a multiple of the patch's {patch} pixels")
    for card in cfg.gpu_gb:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", card) or not float(card):
            raise UserError(f"--gpu-gb {' '.join(cfg.gpu_gb)}: sizes of cards in GB, such as 11 24")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        flags = sorted(flag for flag in self._option_string_actions if flag.startswith("--"))
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        if "unrecognized" in message and unknown:
            message += f"\n  flags: {' '.join(flags)}"
            close = difflib.get_close_matches(unknown[0], flags, 3)
            message += f"\n  did you mean {' or '.join(close)}?" if close else ""
        self.exit(2, f"error: {message}\n")


def integer(text):
    """int(text) within the 64 bits that tensors and seeds have."""
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} has more than 64 bits")
    return number


def parse(config_class, recipes, argv=None):
    """The command line as a Config: a field a flag, defaults from the recipe. Wrong
    flags exit with status 2."""
    parser = _Parser(description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    of_runs = {field.name for field in dataclasses.fields(RunConfig)}
    papers = parser.add_argument_group("the paper's")
    runs = parser.add_argument_group("a run's, in all four scripts")
    for field in dataclasses.fields(config_class):
        name = "--" + field.name.replace("_", "-")
        meta = field.metadata
        group = runs if field.name in of_runs else papers
        help = f"{meta['help']} [{field.default!r}]".replace("%", "%%")
        if field.type is bool or field.type == (bool | None):
            group.add_argument(
                name, action=argparse.BooleanOptionalAction, default=field.default, help=help
            )
        elif field.type is tuple:
            group.add_argument(name, nargs="+", default=field.default, help=help)
        else:
            choices = list(recipes) if field.name == "recipe" else meta["choices"]
            kind = integer if field.type is int else field.type
            group.add_argument(name, type=kind, default=field.default, choices=choices, help=help)
    chosen, _ = parser.parse_known_args(argv)
    parser.set_defaults(**recipes[chosen.recipe])
    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = tuple(value)
    return config_class(**flags)


def two_numbers(flag, text):
    """(8, 512) of "8x512"; UserError where a flag's text has another form."""
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", text):
        raise UserError(
            f"{flag} {text} is not two numbers above 0 with an x between them, such as 8x512 or 5x3"
        )
    return tuple(map(int, text.split("x")))


def check_decoder(text):
    """UserError where a --decoder is not layers x width, in heads of 64."""
    _, width = two_numbers("--decoder", text)
    if width > 64 and width % 64:
        raise UserError(f"--decoder {text}: a width of {width} is not in heads of 64")


def need_init(cfg, recipes, source):
    """UserError where one of `recipes`, which start from `source` (in words), would train
    from random weights unasked: it would run for days and end far below the paper.
    `--init random` asks for it."""
    if cfg.task == "train" and not cfg.plan and not cfg.init and cfg.recipe in recipes:
        raise UserError(
            f"--recipe {cfg.recipe} starts from {source}: give them as --init; "
            "--init random trains from nothing"
        )


def settled(cfg, name):
    """The Config after its check: --out is a folder, --init what a task reads, by default the
    folder's best.pt, and `--init random`, which has been asked for, is done by loading nothing.
    A plan counts SDPA for flash-attn, which costs as much and runs on no CPU."""
    init = "" if cfg.init == "random" else cfg.init
    out = Path(cfg.out or f"runs/{name}-{cfg.recipe}")
    if cfg.task in ("eval", "predict", "features", "search"):
        init = init or str(out / "best.pt")
    attention = "sdpa" if cfg.plan and cfg.attention == "flash" else cfg.attention
    return dataclasses.replace(cfg, init=init, out=str(out), attention=attention)


def clips_together(cfg, repeated=1):
    """How many clips stay in one micro-batch: the `repeated` ones of a video; where mixup or cutmix
    take clip 2i's partner to be clip 2i+1, those of two."""
    mixing = cfg.mixup or getattr(cfg, "cutmix", 0)
    return 2 * repeated if mixing else repeated


def micro_batches(cfg, ctx, repeated=1):
    """(micro-batch, accumulation steps) of a rank, from the global --batch-size;
    UserError where it doesn't divide. repeated: clips of a video."""
    per_rank, rest = divmod(cfg.batch_size, ctx.world)
    micro = cfg.micro_batch or per_rank
    if rest or micro < 1 or per_rank < 1 or per_rank % micro:
        raise UserError(
            f"--batch-size {cfg.batch_size} is not divisible by {ctx.world} ranks x --micro-batch "
            f"{micro}; the batch is global: batch = ranks x micro-batch x accumulation steps"
        )
    if micro % repeated:
        raise UserError(
            f"--micro-batch {micro} (default: batch / ranks) is not a multiple of "
            f"--repeated {repeated}"
        )
    if micro % clips_together(cfg, repeated):
        unit = f"a multiple of {2 * repeated} (two videos x --repeated)" if repeated > 1 else "even"
        raise UserError(
            f"mixup and cutmix pair clips, so --micro-batch must be {unit}, not {micro}; "
            "or --mixup 0 --cutmix 0"
        )
    return micro, per_rank // micro


def steps_of_epoch(source, entries, batch_size, repeated=1, what="videos"):
    """Optimizer steps of a pass over a list's entries, `repeated` clips of each; UserError, which
    names their source and what they are, where they are less than one batch."""
    steps = entries * repeated // batch_size
    if not steps:
        times = f" x --repeated {repeated}" if repeated > 1 else ""
        raise UserError(
            f"{source}: {entries} {what}{times} are less than one --batch-size of {batch_size} "
            "clips"
        )
    return steps


# ---- 2. Processes --------------------------------------------------------------------------------
# One process or torchrun's many: the code is the same, and a Context says where it runs. On one
# process what ranks exchange is returned as it came. A rank that fails ends the others, and what a
# machine lacks is one line with the flag that makes up for it.


@dataclasses.dataclass
class Context:
    """Where this process runs: plain `python script.py` is rank 0 of 1, torchrun sets the rest."""

    rank: int
    world: int
    device: torch.device
    precision: str
    side_group: object = None  # gloo, for flags that must not make the CPU wait for the GPU

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def sum(self, tensor):
        """The sum of a tensor over ranks, as a new tensor; every rank must call it."""
        tensor = tensor.clone()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags):
        """For each flag, whether it is true on any rank; every rank must call it. On the side
        group: no GPU is waited for. One flag gives a bool, several a list of them."""
        flags = torch.tensor([float(flag) for flag in flags])
        if self.world > 1:
            dist.all_reduce(flags, group=self.side_group)
        found = [flag > 0 for flag in flags.tolist()]
        return found if len(found) > 1 else found[0]

    def gather(self, value):
        """The list of every rank's `value` (plain data); every rank must call it."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.side_group)
        return values

    def gather_rows(self, tensor):
        """Rows [b, ...] of every rank, b equal on all, rank after rank:
        [world * b, ...], without gradient."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def barrier(self):
        self.any(False)

    def wrap(self, model):
        """DistributedDataParallel where there are several ranks: it averages
        gradients while backward still runs."""
        if self.world == 1:
            return model
        kind = nn.parallel.DistributedDataParallel
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are constants here, such as positions. The flag's name changed in PyTorch 2.13,
        # which warns of the old.
        new = "forward_sync_buffers" in inspect.signature(kind).parameters
        options = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        options["gradient_as_bucket_view"] = True  # else each gradient is held twice
        for parameter in model.parameters():
            if parameter.requires_grad and 1 in parameter.shape:
                parameter.register_hook(plain_strides)
        return kind(model, device_ids=ids, **options)

    def sync(self, model, last):
        """Context of one micro-batch's forward pass: gradients are exchanged
        in the backward pass of the last one only."""
        return contextlib.nullcontext() if self.world == 1 or last else model.no_sync()


def plain_strides(gradient):
    """Hook of a parameter such as a class token, [1, 1, D]: its gradient with the
    strides that it has itself.

    In a micro-batch of one clip the gradient is a piece of the tokens' gradient, and where a size
    is 1 strides are whatever they were in the whole. DistributedDataParallel, whose buckets have
    the parameters', warns of that.
    """
    return gradient.reshape(-1).view(gradient.shape)


def launch(precision="auto"):
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on
    CPUs), pick device and precision."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if precision == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        half = "bf16" if bf16 else "fp16"
        precision = half if cuda else "fp32"
    ctx = Context(rank, world, device, precision)
    if cuda:
        check_card(device)
    if cuda and precision != "fp32":
        # TF32: what autocast leaves in float32 needs no more.
        torch.set_float32_matmul_precision("high")
    if world > 1:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
            sys.excepthook = partial(_report_lost_rank, sys.excepthook)
        ctx.side_group = dist.new_group(backend="gloo")
    return ctx


def check_card(device):
    """UserError where this build of PyTorch has no code for the card: its first kernel would say
    so, or be wrong."""
    builds = torch.cuda.get_arch_list() if torch.version.cuda else []  # such as sm_75, compute_120
    major, minor = torch.cuda.get_device_capability(device)
    for build in builds:
        kind, _, number = build.partition("_")
        number = int(re.match("[0-9]+", number)[0])  # sm_90a is 90
        older = number <= 10 * major + minor
        same = number // 10 == major
        # Machine code is of one major version; "compute" is compiled when it is loaded.
        if older and (same or kind == "compute"):
            return
    if builds:
        version = torch.__version__.partition("+")[0]
        index = "https://download.pytorch.org/whl/cu126"
        other = f"`pip install torch=={version} --index-url {index}`, for CUDA 12.6"
        if major >= 8:
            other = "a newer one"
        card = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        raise UserError(
            f"PyTorch {torch.__version__} has no code for {card}, only for {' '.join(builds)}; "
            f'install {other}, or hide the card with CUDA_VISIBLE_DEVICES=""'
        )


# What torch's compilers say where a machine has not what they need: inductor on the CPU; Triton;
# inductor on a card.
_NO_COMPILER = (
    r"No working C\+\+ compiler|Failed to find C compiler"
    r"|working triton installation|too old to be supported"
)


def in_one_line(main):
    """Decorator of a script's main: what a machine lacks, and a flag makes up for, ends it with one
    line that says so."""

    @functools.wraps(main)
    def call(*args, **options):
        try:
            return main(*args, **options)
        except torch.OutOfMemoryError as error:
            why = ". ".join(str(error).split(". ")[:2])
            flags = "a lower --micro-batch, or --grad-checkpoint, takes less (--plan counts it)"
            raise UserError(f"{why}: {flags}") from None
        except RuntimeError as error:
            found = re.search(f"[^\n]*({_NO_COMPILER})[^\n]*", str(error))
            if not found:
                raise
            way_out = "install what it names, or run with --no-compile"
            raise UserError(f"{found[0].strip()}: {way_out}") from None

    return call


# Registered while this module is imported: atexit calls its first entry last, after the loaders'.
@atexit.register
def _leave_group():
    """End the group, or its threads may abort the process at its very end. That waits for
    collectives in flight, which other ranks may never join after an error: then the process ends
    without a goodbye, with the status of an error."""
    if dist.is_initialized():
        if UserError.seen or hasattr(sys, "last_type"):  # the latter is of a traceback
            sys.stdout.flush()
            nowhere = open(os.devnull, "w")  # noqa: SIM115, it stays open
            faulthandler.dump_traceback_later(5, exit=True, file=nowhere)
        dist.destroy_process_group()


def _report_lost_rank(report, kind, error, trace):
    """sys.excepthook of several ranks: the first to fail says why; one that loses it has no more
    than a line to add."""
    if "gloo/transport" in str(error):
        line = str(error).splitlines()[0]
        print(f"error: lost another rank, which says why ({line})", file=sys.stderr)
    else:
        report(kind, error, trace)


# ---- 3. Keyed randomness -------------------------------------------------------------------------
# A generator's next number depends on everything drawn before it, so that the worker, the rank, the
# micro-batch and the restart all change the run. A hash of (seed, epoch, index, view, purpose)
# depends on nothing else: resuming and re-sharding are exact by construction, and any one sample
# can be made again alone.


def _int64(value):
    """The int64 with the same 64 bits (torch has no unsigned arithmetic; its
    int64 multiplication wraps as needed)."""
    return (value & (2**64 - 1)) - (2**64 if value >> 63 & 1 else 0)


def _mix(z):
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): every input bit changes every output
    bit. int64 -> int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        shifted = z >> shift & (1 << 64 - shift) - 1  # the mask makes >> a logical shift
        z = (z ^ shifted) * _int64(factor)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _crc32(text):
    return zlib.crc32(text.encode())


# A constant to torch.compile, which can't look inside. torch.compiler.assume_constant_result sets
# this too, but imports the compiler for it, which takes as long as torch itself: too long for
# --help or a mistyped flag.
_crc32._dynamo_marked_constant = True


def make_key(*parts):
    """Hash a tuple of ints, strings and int64 tensors (which broadcast, on any device) to int64
    keys of their shape."""
    key = torch.tensor(_int64(0x9E3779B97F4A7C15))
    for part in parts:
        part = _crc32(part) if isinstance(part, str) else part
        part = _int64(part) if isinstance(part, int) else part
        key = _mix(key * _int64(0xD1342543DE82EF95) + part + _int64(0x9E3779B97F4A7C15))
    return key


def uniform(keys, purpose, n=None):
    """Uniforms in [0, 1) that belong to `keys` (int64, any shape) and `purpose`:
    float32 [...], or [..., n]."""
    bits = make_key(keys, purpose) if n is None else _hash_row(keys, purpose, n)
    bits = bits >> 40 & (1 << 24) - 1  # 24: all that a float32 in [0, 1) can hold evenly
    return bits.float() * 2.0**-24


def permutation(keys, purpose, n):
    """A random order of range(n) a key: int64 [..., n]. Sorts 64-bit hashes, so
    ties don't happen in practice."""
    return _hash_row(keys, purpose, n).argsort(dim=-1)


def _hash_row(keys, purpose, n):
    places = torch.arange(n, device=keys.device)  # [n]
    return make_key(make_key(keys, purpose)[..., None], places)  # [..., n]


# ---- 4. Compiling --------------------------------------------------------------------------------
# Regions are compiled, not models: a block once, for all layers, and what comes before and after
# the blocks. A graph of a whole model grows with its depth, and with the pieces that it takes a
# long clip in; minutes go by before the first step. Blocks cost little of it: what a larger graph
# would fuse across their bounds is one reading of the stream.


def region(method):
    """Decorator of a module's method that is compiled as one graph,
    where compile_model has said so.

    In training only: an evaluation's batches are of other sizes, and each size would be a graph
    more. What the method reads as a number or a string is a constant of the graph, so modules that
    share it must not differ there.
    """

    @functools.wraps(method)
    def call(self, *args, **options):
        backend = getattr(self, "compile_backend", None) if self.training else None
        function = method if backend is None else _compile(method, backend)
        return function(self, *args, **options)

    return call


@functools.cache
def _compile(function, backend):
    # A graph for each shape: its kernels are faster.
    return torch.compile(function, backend=backend, dynamic=False)


def compile_model(net, ctx, wanted=None, backend="inductor"):
    """Have the regions of `net` compiled, in place: its modules and state dict stay as they are.

    wanted: as --compile says; None: on CUDA. Not with mode="reduce-overhead", whose CUDA graphs
    would spare a small batch the host's time a kernel: they record one step's addresses. Here
    gradients are let go after each update, batches come in other memory and stages have other
    sizes, and what a graph gives is overwritten by its next run, when the cached step still needs
    it. tests/cuda.py measures it.
    """
    if not _compiles(ctx, wanted):
        return
    # DistributedDataParallel would have each graph cut at its buckets. Graphs of one block need no
    # cuts: their gradients are exchanged while the backward pass is at the blocks before.
    torch._dynamo.config.optimize_ddp = False
    # Beyond this many graphs of one region its code would run uncompiled, with no more than
    # a warning. Each stage of training and each size of a batch of texts needs one or two;
    # 8 is PyTorch's limit.
    torch._dynamo.config.recompile_limit = 128
    for module in net.modules():
        module.compile_backend = backend


def compiled(function, ctx, wanted=None, backend="inductor"):
    """A function of tensors, such as a loss, compiled as compile_model compiles a
    region; or as it is."""
    return _compile(function, backend) if _compiles(ctx, wanted) else function


def _compiles(ctx, wanted):
    return ctx.device.type == "cuda" if wanted is None else wanted


# ---- 5. ViT blocks -------------------------------------------------------------------------------
# The blocks of all four models, in the order of a forward pass: attention, MLP, the block around
# them, a stack of blocks; then patches, positions and masks. Tokens run (t, h, w), w fastest. What
# a paper changed, such as attention over time alone, is in its script.


def attention(q, k, v, kind="auto", causal=False):
    """softmax(q k^T / sqrt(d)) v of [B, N, H, d] tensors -> [B, N, H, d] (Vaswani et al., Eq. 1).

    kind: "flash" (flash-attn: CUDA, half precision), "sdpa" (PyTorch's fused kernels), "plain"
    (written out; it stores the N x N weights, the memory that AVION, Sec. 4.1, is about), or
    "auto": flash-attn where it can run, else SDPA.
    """
    if kind == "auto":
        half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        kind = "sdpa"
        if half and flash_attn_func is not None and _takes_flash(q.device.index):
            kind = "flash"
    if kind == "flash":
        if flash_attn_func is None or not (q.is_cuda and _takes_flash(q.device.index)):
            raise UserError(
                "--attention flash needs the flash-attn package and a card of compute capability "
                "8.0 (Ampere) or later; leave --attention at auto"
            )
        return flash_attn_func(q, k, v, causal=causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, d]
    if kind == "sdpa":
        return _sdpa(q, k, v, causal).transpose(1, 2)  # [B, N, H, d]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, N, N]
    if causal:
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)  # [N, N], may not see
        scores = scores.masked_fill(future, float("-inf"))  # [B, H, N, N]
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)  # [B, N, H, d]


def _takes_flash(index):
    """Whether flash-attn runs on a CUDA device: it refuses what came before Ampere."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


_takes_flash._dynamo_marked_constant = True  # as _crc32


# A CUDA kernel's grid takes up to 65,535 sequences x heads in the dimension that SDPA's have for
# them, and its 32-bit offsets reach 2^31 elements. Of whole clips no batch is as large; of the
# tokens of a batch, each a sequence, some are.
SDPA_ROWS = 65_535
SDPA_ELEMENTS = 2**31 - 1


def _sdpa(q, k, v, causal):
    """SDPA of [B, H, N, d], in pieces of the batch where it is too large for one: [B, H, N, d]."""
    clip = max(x[0].numel() for x in (q, k, v))
    rows = max(1, min(SDPA_ROWS // q.shape[1], SDPA_ELEMENTS // clip))
    if len(q) <= rows:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    pieces = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*piece, is_causal=causal) for piece in pieces])


class Project(torch.autograd.Function):
    """x W^T + b in as many parts as there are biases, views of one product: x [B, N, D], W [E, D],
    biases [E / parts] or None -> [B, N, E / parts] each.

    Autograd's gradients, with a fifth less of a block's traffic. Those of parts are multiplied
    where they lie; autograd would copy them into one tensor. In half precision a bias's is summed
    over a clip's tokens first: compiled, the kernel that writes GELU's gradient does it on the way.
    """

    @staticmethod
    def forward(ctx, x, weight, *biases):
        zero = torch.zeros_like(biases[0])  # [E / parts]
        bias = torch.cat([zero if part is None else part for part in biases])  # [E]
        x, weight, bias = (tensor.to(working_type(x)) for tensor in (x, weight, bias))
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias).chunk(len(biases), dim=-1)  # [B, N, E / parts] each

    @staticmethod
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        parts = [gradient.flatten(0, 1) for gradient in gradients]  # [B N, E / parts] each
        first, *others = zip(parts, weight.chunk(len(parts)), strict=True)
        dx = first[0] @ first[1]  # [B N, D]
        for part, rows in others:
            dx = torch.addmm(dx, part, rows)  # [B N, D]
        dweight = None
        if ctx.needs_input_grad[1]:
            products = [part.T @ x.flatten(0, 1) for part in parts]  # [E / parts, D] each
            dweight = torch.cat(products) if others else products[0]  # [E, D], not copied if whole
        dbiases = [None] * len(parts)
        for i, part in enumerate(parts):
            if ctx.needs_input_grad[2 + i]:
                if x.dtype.itemsize < 4:  # half precision
                    part = gradients[i].sum(1, dtype=torch.float32)  # [B, E / parts]
                dbiases[i] = part.sum(0)  # [E / parts]
        return dx.view_as(x), dweight, *dbiases


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D].

    Biases on q and v only: a key's bias would add the same number to all logits of a query,
    which softmax cancels. (BEiT and VideoMAE train it so; weights that do have a key bias lose
    nothing by leaving it out.)
    """

    def __init__(self, dim, heads, kind="auto", causal=False):
        super().__init__()
        self.heads = heads
        self.kind = kind
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.project(x)  # [B, N, H, d] each
        x = attention(q, k, v, kind=self.kind, causal=self.causal)  # [B, N, H, d]
        return self.proj(x.reshape(*x.shape[:2], -1))  # [B, N, D]

    def project(self, x):
        """Tokens [B, N, D] -> queries, keys and values, [B, N, H, d] each."""
        biases = (self.q_bias, None, self.v_bias)
        parts = Project.apply(x, self.qkv.weight, *biases)  # [B, N, D] each
        return [part.unflatten(2, (self.heads, -1)) for part in parts]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702  # one fused kernel, and one tensor kept for backward


class MLP(nn.Module):
    """Linear, activation, linear: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim, hidden, act=nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        (x,) = Project.apply(x, self.fc1.weight, self.fc1.bias)  # [B, N, hidden]
        return self.fc2(self.act(x))  # [B, N, D]


def drop_path(x, rate, keys, purpose):
    """Stochastic depth (Huang et al. 2016): zero a clip's whole branch with probability `rate`,
    scale up the rest.

    x [B, N, D]; keys int64 [B], or None outside training: then x as it is. rate, purpose: 0-d
    tensors, or as numbers.
    """
    if keys is None:
        return x
    exact = torch.promote_types(x.dtype, torch.float32)  # where x is in half precision too
    kept = (uniform(keys, purpose) >= rate).to(exact)  # [B]
    factor = (kept / (1.0 - rate)).to(x.dtype)  # [B]
    return x * factor[:, None, None]  # [B, N, D]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), x + mlp(norm(x)).
    `index` keys its drop-path draws.

    What differs between the blocks of a model, drop path's rate and its purposes, are tensors:
    numbers and strings would be constants of the graph, and each block would be compiled anew.
    """

    branches = ("attn", "mlp")  # where drop path draws

    def __init__(
        self,
        dim,
        heads,
        mlp_ratio=4,
        drop_path=0.0,
        eps=1e-6,
        act=nn.GELU,
        kind="auto",
        causal=False,
        index=0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, kind, causal)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act)
        self.drop_path = drop_path
        purposes = [_crc32(f"drop_path.{index}.{branch}") for branch in self.branches]
        self.register_buffer("purposes", torch.tensor(purposes), persistent=False)
        self.register_buffer("rate", torch.tensor(drop_path, dtype=torch.float64), persistent=False)

    def forward(self, x, keys=None, *more):
        return self.add_branches(x, keys, *more)[0]  # [B, N, D]

    @region
    def add_branches(self, x, keys, *more):
        """The block's output, and what is between the branches, [B, N, D] each. more: what
        attention takes beside tokens.

        The latter is returned for the compiler's sake, which then keeps it for the backward pass.
        Otherwise it adds it up again there, and reads both of its terms for each norm's gradients.
        """
        branch = self.attn(self.norm1(x), *more)  # [B, N, D]
        between = x + drop_path(branch, self.rate, keys, self.purposes[0])  # [B, N, D]
        branch = self.mlp(self.norm2(between))  # [B, N, D]
        x = between + drop_path(branch, self.rate, keys, self.purposes[1])  # [B, N, D]
        return x, between.detach()


def working_type(x):
    """The type in which autocast has products of `x` computed; where it is off, x's own."""
    device = x.device.type  # meta, where things are counted, has no autocast
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def run_blocks(blocks, x, keys=None, grad_checkpoint=False, *more):
    """Apply blocks in turn; grad_checkpoint stores a block's input only and recomputes the
    rest in the backward pass.

    The recomputation draws the same drop path because draws are keyed: no generator
    state to save and restore.
    more: what else each block takes. Under autocast the tokens that blocks add to are in half
    precision, as VideoMAE's and CLIP's: embeddings and, on CUDA, what LayerNorm gives are float32,
    and would lift all blocks' sums, which are most of a step's traffic.
    """
    x = x.to(working_type(x))  # [B, N, D]
    if not any(block.drop_path for block in blocks):
        keys = None  # nothing to draw
    for block in blocks:
        if grad_checkpoint:
            call = partial(
                torch.utils.checkpoint.checkpoint,
                block,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            call = block
        x = call(x, keys, *more)
    return x  # [B, N, D]


class Decoder(nn.Module):
    """VideoMAE's decoder: blocks, norm, one linear layer to the pixels of a patch."""

    def __init__(self, layers, width, heads, pixels, kind):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, kind=kind) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, pixels)

    def forward(self, x, count, grad_checkpoint=False):
        """Pixels of the last `count` tokens: [B, K + R, D] -> [B, R, P]; the
        visible ones need no prediction."""
        x = run_blocks(self.blocks, x, grad_checkpoint=grad_checkpoint)  # [B, K + R, D]
        return self.pixels(x, count)  # [B, R, P]

    @region
    def pixels(self, x, count):
        return self.head(self.norm(x[:, x.shape[1] - count :]))  # [B, R, P]


class Autoencoder(nn.Module):
    """VideoMAE's way from encoded tokens to pixels, of a model that has its `encoder_to_decoder`,
    `mask_token` [1, 1, D'], `decoder_positions` [1, N, D'] and `decoder`."""

    def decode(self, tokens, visible, masked):
        """Predicted pixels [B, R, P] of the tokens `masked` [B, R], from encoded visible tokens
        [B, K, D] (no CLS)."""
        x = self.add_mask_tokens(tokens, visible, masked)  # [B, K + R, D']
        return self.decoder(x, masked.shape[1], self.grad_checkpoint)  # [B, R, P]

    @region
    def add_mask_tokens(self, tokens, visible, masked):
        """The decoder's input: encoded visible tokens, and for each masked one the mask token, with
        their positions. [B, K, D] -> [B, K + R, D']."""
        x = self.encoder_to_decoder(tokens)  # [B, K, D']
        positions = self.decoder_positions.to(x.dtype)  # [1, N, D']
        hidden = self.mask_token.to(x.dtype) + gather_tokens(positions, masked)  # [B, R, D']
        return torch.cat([x + gather_tokens(positions, visible), hidden], dim=1)  # [B, K + R, D']


def patchify(clip, patch):
    """Cut [B, T, C, H, W] into non-overlapping patches (p_t, p_h, p_w): [B, N, P], same dtype.

    Tokens run (t, h, w), w fastest; pixels in a patch run (p_t, p_h, p_w, c), c
    fastest, as in VideoMAE's targets.
    """
    B, T, C, H, W = clip.shape
    pt, ph, pw = patch
    x = clip.reshape(B, T // pt, pt, C, H // ph, ph, W // pw, pw)
    return x.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(B, -1, pt * ph * pw * C)  # [B, N, P]


def unpatchify(patches, patch, grid, channels=3):
    """The inverse of patchify: [B, N, P], with a grid of (n_t, n_h, n_w) tokens
    -> [B, T, C, H, W]."""
    (pt, ph, pw), (nt, nh, nw) = patch, grid
    x = patches.reshape(-1, nt, nh, nw, pt, ph, pw, channels).permute(0, 1, 4, 7, 2, 5, 3, 6)
    return x.reshape(-1, nt * pt, channels, nh * ph, nw * pw)  # [B, T, C, H, W]


def conv_to_linear(weight):
    """A Conv3d patch embedding's kernel [D, C, p_t, p_h, p_w] as the weight [D, P] of a linear
    layer over patchify's P.

    A convolution whose stride is its kernel is one matrix product over patches; as such
    it can skip dropped patches.
    """
    return weight.permute(0, 2, 3, 4, 1).flatten(1)  # [D, P]


def linear_to_conv(weight, patch, channels=3):
    """The inverse of conv_to_linear: [D, P] -> [D, C, p_t, p_h, p_w]."""
    kernel = weight.reshape(-1, *patch, channels).permute(0, 4, 1, 2, 3)
    return kernel.contiguous()  # [D, C, p_t, p_h, p_w]


def gather_tokens(x, index):
    """Pick tokens a clip: x [B, N, ...] or [1, N, ...] (shared by all), index int64 [B, K]
    -> [B, K, ...]."""
    x = x.expand(index.shape[0], *x.shape[1:])
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2))  # [B, K, 1, ...]
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))  # [B, K, ...]


def sinusoid_table(n, dim):
    """VideoMAE's fixed positions: sin at even, cos at odd channels, over the flat
    (t, h, w) index. float32 [n, dim].

    Computed in float64. One-dimensional, so that the table of fewer frames is a prefix
    of the table of more.
    """
    channel = torch.arange(dim, dtype=torch.float64)
    wavelength = 10000 ** (2 * (channel // 2) / dim)  # [dim]
    angle = torch.arange(n, dtype=torch.float64)[:, None] / wavelength  # [n, dim]
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()  # [n, dim]


def random_split(keys, n, *sizes):
    """Per-token random masking: disjoint random subsets of range(n), one a size:
    int64 [B, size] each, ascending."""
    order = permutation(keys, "mask", n)  # [B, n]
    start = 0
    parts = []
    for size in sizes:
        parts.append(order[:, start : start + size].sort(dim=1).values)  # [B, size]
        start += size
    return tuple(parts)


def tube_split(keys, n_time, n_space, ratio):
    """VideoMAE's tube masking: the same places dropped in all time steps. -> visible, masked: int64
    [B, K], [B, N - K].

    int(ratio * n_space) places are masked, as upstream.
    """
    masked = int(ratio * n_space)
    steps = torch.arange(n_time, device=keys.device)[None, :, None] * n_space  # [1, n_t, 1]
    parts = random_split(keys, n_space, n_space - masked, masked)
    return tuple((steps + part[:, None, :]).flatten(1) for part in parts)  # [B, n_t * size]


def init_linear(module):
    """Xavier-uniform linear layers with zero bias
    (MAE, VideoMAE pretraining); use with Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- 6. Weights ----------------------------------------------------------------------------------
# Published files are told apart by their content and read as tensors, without running code of
# theirs. Tables of names make their names ours, replaced in order; a convolution over patches
# becomes a matrix. What was loaded, what stays as it was and what was of no use is a line to print.


_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# VideoMAE's names -> ours, replaced in this order: upstream's pretraining and fine-tuning files,
# then the hub's.
_VIDEOMAE = (
    ("module.", ""), ("backbone.", ""), ("videomae.", ""), ("encoder.layer.", "blocks."),
    ("encoder.", ""), ("embeddings.patch_embeddings.projection.", "patch_embed."),
    ("patch_embed.proj.", "patch_embed."), ("decoder.decoder_layers.", "decoder.blocks."),
    ("layernorm.", "norm."), ("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."),
    ("attention.attention.", "attn."), ("intermediate.dense.", "mlp.fc1."),
    ("attention.output.dense.", "attn.proj."), ("output.dense.", "mlp.fc2."),
    ("classifier.", "head."),
)  # fmt: skip


def read_safetensors(path):
    """A .safetensors file as a dict of tensors; UserError where it is cut, inconsistent
    or of an unknown dtype.

    The format (github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian;
    the header, JSON with each tensor's dtype, shape and [begin, end) in the data; the data, without
    gaps. There is no code in it.
    """
    try:
        size = os.path.getsize(path)
        # Mapped, not read.
        raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        start = at = 8 + int.from_bytes(raw[:8].numpy(), "little")
        header = json.loads(raw[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = _SAFETENSORS[entry["dtype"]]
            begin, end = entry["data_offsets"]
            if start + begin != at or end - begin != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"the place or size of {name} is wrong")
            at = start + end
            aligned = raw[start + begin : at].clone()
            tensors[name] = aligned.view(dtype).reshape(entry["shape"])
        if at != size:
            raise ValueError(f"{size} bytes long, by its header {at}")
        return tensors
    # A damaged header raises anything: JSONDecodeError, KeyError, TypeError, ...
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a readable safetensors file ({why})") from error


def read_npz(path):
    """A numpy .npz file as a dict of tensors, without pickled objects; UserError where it is
    damaged or holds them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    # A damaged archive raises anything: BadZipFile, EOFError, ValueError, zlib.error, ...
    except Exception as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable .npz file of arrays ({why})") from error


def read_state(path):
    """What a file of weights holds, on the CPU: their tensors by name; of a file by torch.save all
    of its dict. Told apart by content; no code of it is run.

    path: a file by torch.save; a TorchScript archive; a .safetensors file, or a hub folder with
    model.safetensors; numpy's .npz (Google's ViTs). UserError where it is none of these.
    """
    if os.path.isdir(path):
        path = Path(path) / "model.safetensors"
    if os.path.isfile(path):
        with open(path, "rb") as file:
            # Where the JSON begins; torch's files have another byte there.
            if file.read(9)[8:] == b"{":
                return read_safetensors(path)
        names = []
        # torch's files are zip archives too.
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:
            names = file.namelist()
        if names and all(name.endswith(".npy") for name in names):
            return read_npz(path)
        if any(name.endswith("/constants.pkl") for name in names):
            return torchscript_weights(path)
    return load_checkpoint(path)


def read_weights(path):
    """The tensors of a file of weights, by their names in it, on the CPU: see read_state."""
    return weights_of(read_state(path), path)


def weights_of(state, path):
    """The tensors of what read_state gives: at its top, under `model` (ours, VideoMAE's), `module`
    or `state_dict` (AVION's). UserError where there are none."""
    for name in ("model", "module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    weights = {}
    if isinstance(state, dict):
        weights = {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
    if not weights:
        where = "neither at its top nor under model, module or state_dict"
        raise UserError(f"{path}: no weights are in it, {where}")
    return weights


def hub_setting(path, name, default):
    """What the config.json beside a hub model's weights, a file or their folder, says of its image
    model; or the default."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    if not config.is_file():
        return default
    try:
        settings = json.loads(config.read_text())
        return type(default)(settings.get("vision_config", settings).get(name, default))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: not the settings of a model ({error})") from None


def videomae_weights(state):
    """VideoMAE's weights by the names of our modules, whichever of its forms they are in; other
    names stay as they are.

    Forms: upstream's pretraining and fine-tuning files (github.com/MCG-NJU/VideoMAE), the hub's
    pretraining and classification models. Ours: upstream's pretraining names without `encoder.`;
    patch_embed's Conv3d kernel [D, 3, 2, 16, 16] as a linear weight [D, P]; query, key and value as
    one qkv [3D, D]; a classifier's fc_norm and head, which read the tokens' mean. (The hub's config
    has LayerNorm eps 1e-12, upstream trained with our 1e-6.)
    """
    ours = {}
    for name, tensor in state.items():
        for theirs, replacement in _VIDEOMAE:
            name = name.replace(theirs, replacement)
        if name == "patch_embed.weight" and tensor.dim() == 5:
            tensor = conv_to_linear(tensor)  # [D, P]
        ours[name] = tensor
    for query in [name for name in ours if name.endswith("attn.query.weight")]:
        parts = [query.replace("query", part) for part in ("query", "key", "value")]
        if all(part in ours for part in parts):
            tensors = [ours.pop(part) for part in parts]  # [D, D] each
            ours[query.replace("query", "qkv")] = torch.cat(tensors)  # [3D, D]
    return ours


# The names of Google's ViTs (original, AugReg, big_vision) -> ours, replaced in this order.
_VIT = (
    ("Transformer/encoder_norm", "norm"), ("Transformer/encoderblock_", "blocks."),
    ("LayerNorm_0", "norm1"), ("LayerNorm_1", "norm2"), ("LayerNorm_2", "norm2"),
    ("MlpBlock_0/", "mlp/"), ("MlpBlock_3/", "mlp/"), ("Dense_0", "fc1"), ("Dense_1", "fc2"),
    ("MultiHeadDotProductAttention_0/", "attn/"), ("MultiHeadDotProductAttention_1/", "attn/"),
    ("attn/out", "attn/proj"), ("Transformer/posembed_input/", ""),
    ("pos_embedding", "pos_embed"), ("embedding/", "patch_embed/"), ("/scale", ".weight"),
    ("/kernel", ".weight"), ("/", "."),
)  # fmt: skip

# The hub's ViT -> ours, once videomae_weights has named what the hub's VideoMAE has too.
_HUB_VIT = (
    ("embeddings.position_embeddings", "pos_embed"), ("embeddings.", ""),
    ("attn.query.bias", "attn.q_bias"), ("attn.value.bias", "attn.v_bias"),
)  # fmt: skip


def vit_weights(state):
    """An image ViT's weights by the names of our modules; {} where `state` is no image ViT's.

    Forms: Google's .npz (github.com/google-research/vision_transformer, big_vision; layers stacked
    or not), the hub's ViT (its layernorm_eps is 1e-12, here 1e-6). Ours: patch_embed's kernel
    [D, C, p, p]; cls_token [1, 1, D]; pos_embed [1, 1 + N, D], CLS first (big_vision's [1, N, D]);
    blocks; norm. Inputs are in [-1, 1]. Key biases, which softmax cancels, classifiers and
    pre_logits are left out.
    """
    if any(name.endswith("embedding/kernel") for name in state):
        state = _from_npz(state)
    elif not any(name.endswith("embeddings.position_embeddings") for name in state):
        return {}
    state = videomae_weights({name.removeprefix("vit."): x for name, x in state.items()})
    wanted = ("patch_embed.", "cls_token", "pos_embed", "blocks.", "norm.")
    ours = {}
    for name, x in state.items():
        for theirs, replacement in _HUB_VIT:
            name = name.replace(theirs, replacement)
        if name.startswith(wanted) and "key.bias" not in name:
            ours[name] = x.float().contiguous()
    return ours


def _from_npz(state):
    """Google's arrays as tensors of our names, laid out as torch lays them out."""
    theirs = {}
    for name, x in state.items():
        name = name.removeprefix("opt/target/").removeprefix("params/")
        if "/encoderblock/" not in name:
            theirs[name] = x
            continue
        for i, layer in enumerate(x):  # big_vision's scan: [layers, ...]
            theirs[name.replace("encoderblock/", f"encoderblock_{i}/")] = layer
    ours = {}
    for name, x in theirs.items():
        kernel = name.endswith("kernel")
        for old, new in _VIT:
            name = name.replace(old, new)
        if name == "patch_embed.weight":
            x = x.permute(3, 2, 0, 1)  # [D, C, p, p]
        elif kernel:
            x = x.flatten(0, -2) if "proj" in name else x.flatten(1)  # from [D, H, d] and others
            x = x.T  # [D_out, D_in]
        elif ".attn." in name:
            x = x.flatten()  # [D], a bias
        ours["cls_token" if name == "cls" else name] = x
    return ours


def vit_for_video(image, frames, mean, std):
    """An image ViT's weights, of vit_weights, for tubelets of `frames` frames, which
    share its kernel, and for pixels as (p - mean) / std in the place of its (p - 1/2) *
    2: patch_embed.weight is [D, P]."""
    mean, std = torch.tensor(mean), torch.tensor(std)  # [3] each
    kernel = image["patch_embed.weight"].permute(0, 2, 3, 1).flatten(1, 2)  # [D, p p, 3]
    bias = image["patch_embed.bias"] + (kernel * (2 * mean - 1)).sum((1, 2))  # [D]
    weight = (2 * kernel * std / frames).repeat(1, frames, 1).flatten(1)  # [D, P]
    return image | {"patch_embed.weight": weight, "patch_embed.bias": bias}


# CLIP's names -> ours, replaced in this order: the hub's, then OpenAI's and AVION's.
_HUB_CLIP = (
    ("vision_model.embeddings.patch_embedding.", "visual.patch_embed."),
    ("vision_model.embeddings.", "visual."), ("text_model.embeddings.", "textual."),
    ("position_embedding.weight", "positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("text_model.final_layer_norm.", "textual.ln_final."),
    ("vision_model.encoder.layers.", "visual.blocks."),
    ("text_model.encoder.layers.", "textual.blocks."), ("layer_norm", "norm"),
    ("self_attn.out_proj.", "attn.proj."), ("self_attn.", "attn."),
)  # fmt: skip
_CLIP = (
    ("visual.conv1.", "visual.patch_embed."), ("transformer.resblocks.", "blocks."),
    ("ln_1.", "norm1."), ("ln_2.", "norm2."), ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."), ("attn.out_proj.", "attn.proj."),
    ("attn.Wqkv.", "attn.in_proj_"), ("fc_cls.", "head."),
    ("visual.proj", "visual_projection.weight"),
    ("visual.image_projection", "visual_projection.weight"),
    ("textual.text_projection", "text_projection.weight"),
)  # fmt: skip


def torchscript_weights(path):
    """The tensors of a TorchScript archive (OpenAI's .pt) by name, without running or building
    anything of it.

    The archive is a zip: code/ has the program, which is not opened; data.pkl the tree of modules,
    a pickle; data/<n> the bytes. Here modules become plain nodes, tensors are made from bytes, and
    any other class or function is refused.
    """

    class Node:
        def __setstate__(self, state):
            self.state = state

    plain = {("collections", "OrderedDict"): dict}
    plain |= {
        ("torch", f"{name.title()}Storage"): getattr(torch, name)
        for name in ("half", "float", "double", "int", "long")
    }
    plain["torch._utils", "_rebuild_tensor_v2"] = lambda x, at, size, stride, *_: x.as_strided(
        size, stride, at
    ).clone()

    class Tree(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__."):
                return Node
            if module == "torch.jit._pickle":
                return lambda value, *_: value  # says what type a plain list or dict has
            if (module, name) not in plain:
                raise pickle.UnpicklingError(f"loading it would call {module}.{name}")
            return plain[module, name]

        def persistent_load(self, entry):
            return torch.frombuffer(bytearray(file.read(f"{root}data/{entry[2]}")), dtype=entry[1])

    def tensors(node, prefix=""):
        for name, value in node.state.items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, Node):
                yield from tensors(value, f"{prefix}{name}.")

    try:
        with zipfile.ZipFile(path) as file:
            root = next(
                name for name in file.namelist() if name.endswith("/data.pkl")
            ).removesuffix("data.pkl")
            with file.open(f"{root}data.pkl") as pickled:
                return dict(tensors(Tree(pickled).load()))
    except Exception as error:  # a damaged archive raises anything
        raise UserError(
            f"{path}: not readable as a TorchScript archive of weights ({error})"
        ) from error


def clip_weights(state):
    """Weights by the names of avion.py's modules of OpenAI's, the hub's or AVION's CLIP, or of
    AVION's classifier.

    A key's bias is left out, because softmax cancels it (Attention); a convolution over patches
    becomes a linear layer, and so does AVION's, whose pixels run colour first.
    """
    hub = any(name.startswith("vision_model.") for name in state)
    ours = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if not hub and not name.startswith(("visual.", "textual.", "logit_scale", "fc_cls.")):
            name = f"textual.{name}"
        transposed = name in ("visual.proj", "visual.image_projection", "textual.text_projection")
        for theirs, replacement in _HUB_CLIP if hub else _CLIP:
            name = name.replace(theirs, replacement)
        if transposed:
            ours[name] = tensor.T  # [E, D]
        elif name == "visual.patch_embed.weight":
            side = math.isqrt(tensor[0].numel() // 3)
            ours[name] = conv_to_linear(tensor.reshape(len(tensor), 3, 1, side, side))  # [D, P]
        elif name.endswith("attn.in_proj_weight"):
            ours[name.replace("in_proj_", "qkv.")] = tensor  # [3D, D]
        elif name.endswith("attn.in_proj_bias"):
            stem = name.removesuffix("in_proj_bias")
            query, _, value = tensor.chunk(3)  # [D] each
            ours[f"{stem}q_bias"] = query
            ours[f"{stem}v_bias"] = value
        else:
            ours[re.sub(r"attn\.([qv])_proj\.bias$", r"attn.\1_bias", name)] = tensor
    for name in [name for name in ours if name.endswith("attn.q_proj.weight")]:
        parts = [ours.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        ours[name.replace("q_proj", "qkv")] = torch.cat(parts)  # [3D, D]
        ours.pop(name.replace("q_proj.weight", "k_proj.bias"), None)
    return ours


def load_weights(model, weights, source):
    """Copy a state dict into `model` by name; returns what was loaded, left at init, not used,
    as a line to print.

    UserError where a shape differs or nothing matches.
    """
    own = model.state_dict()
    for name in weights:
        if name in own and weights[name].shape != own[name].shape:
            shapes = f"{tuple(weights[name].shape)}, the model's is {tuple(own[name].shape)}"
            flags = "--model, --decoder and --num-classes"
            raise UserError(f"{source}: {name} is {shapes}; are {flags} the file's?")
    loaded = [name for name in own if name in weights]
    if not loaded:
        held = ", ".join(list(weights)[:3])
        raise UserError(f"{source}: no weight of this model is in it (it holds {held} ...)")
    model.load_state_dict(weights, strict=False)
    groups = {
        "loaded": loaded,
        "left at init": [name for name in own if name not in weights],
        "not used": [name for name in weights if name not in own],
    }
    texts = []
    for word, names in groups.items():
        example = f" ({names[0]} ...)" if names else ""
        texts.append(f"{word} {len(names)}{example}")
    return f"{source}: {', '.join(texts)}"


# ---- 7. Optimisation -----------------------------------------------------------------------------
# The learning rate of a step, who gets weight decay, and the two optimizers. Their update is
# skipped where a gradient is not finite, by a flag on the device that the host doesn't wait for.
# That is the scaler's work, and so every precision has one.


def cosine(step, total, warmup, peak, floor=0.0):
    """Learning rate of step 0, 1, ...: linear from 0 over `warmup` steps, then half a
    cosine from peak to floor."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def param_groups(model, weight_decay, layer_decay=1.0, layer_of=None, layers=0, no_decay=()):
    """Optimizer groups: no weight decay on 1-D parameters and on those whose names are in
    `no_decay`; `lr_scale` = layer_decay ** (layers + 1 - layer_of(name)).

    layer_of maps a parameter's name to 0 (patch embedding, CLS) ... layers (last block),
    layers + 1 (head). (BEiT.)
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.squeeze().dim() > 1  # squeeze: tokens [1, 1, D] are 1-D too
        decay = weight_decay if matrix and name not in no_decay else 0.0
        scale = layer_decay ** (layers + 1 - layer_of(name)) if layer_of else 1.0
        new = {"params": [], "weight_decay": decay, "lr_scale": scale}
        groups.setdefault((decay, scale), new)["params"].append(parameter)
    return list(groups.values())


def optimizer(kind, groups, lr, betas=(0.9, 0.999)):
    """The fused "adamw", or "sgd" with momentum 0.9, of param_groups' groups
    at the learning rate `lr`."""
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    zero_momentum(sgd)
    sgd.register_load_state_dict_post_hook(zero_momentum)  # an older checkpoint may lack some
    return sgd


def zero_momentum(sgd):
    """Give each parameter that has no momentum yet a momentum of zero, from which the
    first update is the gradient's.

    torch's fused SGD allocates it in the first step and leaves the filling to the update. Where the
    scaler skips that one (in fp16 the first as a routine), what happened to be in the memory is
    momentum from then on.
    """
    for group in sgd.param_groups:
        for parameter in group["params"]:
            if sgd.state[parameter].get("momentum_buffer") is None:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def loss_scaler(ctx):
    """GradScaler for every precision: its step() skips a non-finite update by a flag on
    the device, without a sync.

    fp16 needs its dynamic scale. Elsewhere the scale is 1 and stays 1.
    """
    if ctx.precision == "fp16":
        return torch.amp.GradScaler(ctx.device.type)
    scaler = torch.amp.GradScaler(ctx.device.type, init_scale=1.0)
    scaler.set_growth_factor(1.0)
    scaler.set_backoff_factor(1.0)
    return scaler


# ---- 8. A run ------------------------------------------------------------------------------------
# A run is a folder: its log, its last and its best checkpoint. Whatever kills it, the same command
# goes on from the last one, and ends with the same weights. First come files that can't be half
# written; then Meter, what a step's losses were; Run, the folder; and Trainer, what a loop calls.


# What to do where loader processes don't keep up.
LOADER_ADVICE = (
    "videos encoded for training (`python data.py chunk`: 3 times faster to read), several clips "
    "of a decode (--repeated of turbo.py and tpt_mae.py), fewer frames first (--stages of "
    "tpt_mae.py and sfa_vivit.py)"
)
LIST_SPEED = "`python data.py check LIST --speed` measures your list"


@contextlib.contextmanager
def writing(path, hint=""):
    """Around what writes `path`: UserError where the disk is full or can't be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save's own error comes after the file's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: can't write it ({cause.strerror}){hint}") from None


@contextlib.contextmanager
def replacing(path):
    """Gives the name to write a new `path` under, which takes the old one's place once it
    is whole, and not before."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, "; the one before is kept" if path.exists() else ""):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # the bytes are on the disk before the name points to them
            os.replace(temporary, path)
        except Exception:
            temporary.unlink(missing_ok=True)  # which may be what fills the disk
            raise


def save_atomic(path, state):
    """torch.save that leaves either the old file or the whole new one, whenever the
    process or the machine dies.

    UserError where the disk is full or can't be written."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def new_array(path, shape, dtype, value=0):
    """A new .npy file full of `value`, as an array in memory whose changes are the file's.

    All of it is written first: where the disk is full that is an error, and a change of an
    unwritten part a SIGBUS."""
    row = np.full(shape[1:], value, dtype)
    head = {
        "descr": np.lib.format.dtype_to_descr(row.dtype),
        "fortran_order": False,
        "shape": shape,
    }
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        file.writelines(row.tobytes() for _ in range(shape[0]))
    return np.lib.format.open_memmap(path, "r+")


def load_checkpoint(path):
    """A checkpoint's dict, on the CPU; UserError names a file that is missing, damaged or unsafe.

    Never runs code from the file: tensors, plain data, argparse.Namespace, which upstream's
    training files carry, and numpy's scalars: AVION's keep their best score as one.
    """
    scalar = np.float64().__reduce__()[0]
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [argparse.Namespace, np.dtype, type(np.dtype(np.float64))]
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(allowed):
            # An open file: of a path torch would heed the name.
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = "it is not a file of tensors and plain data"
        if unsafe:
            why = f"loading it would call {unsafe[1]}"
        raise UserError(f"{path}: refused, {why}; nothing in it was run") from error
    # A damaged file raises anything: EOFError, IndexError, struct.error, ...
    except Exception as error:
        why = (str(error) or "it ends too early").splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({why})") from error


def open_trained(cfg, script, settings, more, build, state=None):
    """(cfg, model, state) of --init, a checkpoint of `script`: cfg with the checkpoint's own
    `settings`, of which build(cfg, state) makes the model, here loaded. more: what else the state
    must have. state: the checkpoint, where it has been read.

    UserError, one line that names the file, where it is damaged, another script's, or of a version
    whose settings or weights differ; where `build` refuses, which may check the settings; and where
    --task lacks what it reads.
    """
    source = cfg.init
    state = load_checkpoint(source) if state is None else state
    if not isinstance(state, dict) or not {"model", "config", *more} <= set(state):
        raise UserError(f"{source}: not a checkpoint of {script}")
    try:
        cfg = dataclasses.replace(cfg, **{name: state["config"][name] for name in settings})
        model = build(cfg, state)
        model.load_state_dict(state["model"])
    except torch.OutOfMemoryError:  # a RuntimeError that is no fault of the file
        raise
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix('error: ')}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{source}: not a checkpoint of this version of {script} ({why})") from None
    if cfg.task == "predict" and not cfg.input:
        raise UserError("--task predict needs --input video.mp4 ...")
    if cfg.task in ("eval", "features") and not cfg.val_list:
        raise UserError(f"--task {cfg.task} needs --val-list")
    return cfg, model.eval(), state


class Meter:
    """Sums of per-clip values over a log interval, and what was not finite, kept on
    the device: only read() waits."""

    def __init__(self, device, *names):
        self.names = names
        self.sums = torch.zeros(1 + len(names), dtype=torch.float64, device=device)
        self.losses = []  # (clips' indices, whether each loss is finite), one a micro-batch
        self.norms = []  # the gradient's, one a step
        self.micro = []  # whether all losses are finite, of the step's micro-batches so far
        self.finite = self.norm = torch.ones((), device=device)  # of the latest step

    def add(self, index, *values):
        """A micro-batch's values, [B] each, the loss first; index [B] says which clips
        they are (on the CPU)."""
        values = torch.stack([torch.ones_like(values[0]), *values])  # [1 + names, B]
        values = values.detach().double()  # [1 + names, B]
        finite = values.isfinite().all(0)  # [B]
        self.sums += values.where(finite, 0.0).sum(1)
        self.losses.append((index, finite))
        self.micro.append(finite.all())

    def step(self, norm):
        """The gradient's norm of a step, once all its micro-batches are added."""
        self.norms.append(norm)
        self.norm = norm
        self.finite = torch.stack(self.micro).all()
        self.micro = []

    def read(self, ctx):
        """(means over all ranks' clips since the last read, clips whose loss was not finite, number
        of steps whose gradient was not); starts the next interval."""
        count, *sums = ctx.sum(self.sums).tolist()
        bad = []
        for index, finite in self.losses:
            bad += index[~finite.cpu()].tolist()
        clips = list(itertools.chain.from_iterable(ctx.gather(bad)))
        steps = sum(not norm.isfinite().item() for norm in self.norms)
        means = dict.fromkeys(self.names, math.nan)
        if count:
            means = {name: total / count for name, total in zip(self.names, sums, strict=True)}
        means["grad_norm"] = self.norm.item()
        self.sums.zero_()
        self.losses = []
        self.norms = []
        return means, clips, steps

    def healthy(self, ctx):
        """Whether the latest step was finite on all ranks (in fp16 its loss: gradients overflow
        there as a routine)."""
        finite = self.finite if ctx.precision == "fp16" else self.norm.isfinite()
        return not ctx.any(not finite)

    def state(self, ctx):
        """The interval's sums so far, over all ranks, for the checkpoint: a resumed run
        logs what it would have."""
        return ctx.sum(self.sums).cpu()

    def load(self, sums, ctx):
        if ctx.rank == 0:
            self.sums.copy_(sums)


class Failures:
    """The videos of an epoch that could not be read, over workers and ranks: too
    many of them end the run."""

    def __init__(self, n, fraction):
        self.limit = max(1, int(fraction * n))
        self.new = []
        self.lines = {}  # {video: why} of this epoch
        self.epoch = 0

    def add(self, batch, size):
        """Note a training batch's failures; UserError where even its
        replacements could not be read."""
        self.new += batch.failures
        if len(batch.labels) < size:
            raise UserError(
                f"no replacement found for a clip (--max-bad): {'; '.join(batch.failures[:3])}"
            )

    def collect(self, ctx, epoch):
        """Exchange the failures since the last call; every rank calls it, at an epoch's end at the
        latest. Returns a line of each video that is new in this epoch; UserError past the limit."""
        if epoch != self.epoch:
            self.lines = {}
            self.epoch = epoch
        found = {}
        for part in ctx.gather(self.new):
            for line in part:
                video, _, _ = line.partition(": ")
                found[video] = line
        new = {video: line for video, line in found.items() if video not in self.lines}
        self.new = []
        self.lines |= new
        if len(self.lines) > self.limit:
            raise UserError(
                f"{len(self.lines)} videos could not be read in epoch {epoch}, "
                f"more than the {self.limit} that --max-bad allows: "
                f"{'; '.join([*self.lines.values()][:5])}"
            )
        return list(new.values())

    def unread(self, ctx):
        """An evaluation's lines of what could not be read, which are printed; every rank must call
        it."""
        lines = self.collect(ctx, 0)
        if ctx.rank == 0:
            for line in lines:
                print(f"unreadable, not scored: {line}")
        return lines


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def tensorboard_writer(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs `pip install tensorboard`") from None
    return SummaryWriter(folder)


class Run:
    """A run's folder: log.jsonl, last.pt, best.pt, pictures. The same command again continues it.

    resume() gives the checkpoint to continue from, or None; log() writes and shows a record; save()
    writes checkpoints. Rank 0 writes. SIGTERM and SIGINT set `stopped`, which the loop heeds
    between two steps; a second Ctrl-C kills.
    """

    def __init__(self, cfg, ctx):
        self.cfg = cfg
        self.ctx = ctx
        self.folder = Path(cfg.out)
        self.lists = {}  # digests of what is in them, by their flags' names
        self.batch_size = cfg.batch_size  # for the log's rate; Trainer.begin sets a stage's own
        self.started = self.saved = self.logged = self.advanced = time.time()
        self.logged_step = 0
        self.logged_records = 0
        self.waited = 0.0  # for data, since the last record
        self.longest_wait = 0.0
        self.advised = False
        self.bar = None
        self.board = None
        self.stopped = 0  # the number of a signal
        self.leaving = False  # after one, on any rank
        if ctx.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "log.jsonl").open("a").close()
                self.claim()
            except OSError as error:
                why = f"can't write there ({error.strerror})"
                raise UserError(f"--out {self.folder}: {why}") from None
            if cfg.tensorboard:
                self.board = tensorboard_writer(self.folder)
        ctx.barrier()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def claim(self):
        """Hold the folder's lock, which ends with this process, however it ends. UserError where
        another process holds it: both would write the same files."""
        self.lock = open(self.folder / ".lock", "w")  # noqa: SIM115, it stays open
        if fcntl:
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(
                    f"--out {self.folder}: another process trains there; wait until it has ended, "
                    "or choose another --out. (If its machine died and none is left, remove "
                    f"{self.folder / '.lock'})"
                ) from None
            except OSError:  # a file system without locks
                pass

    def _stop(self, number, frame):
        self.stopped = number
        # A scheduler may repeat its SIGTERM; a person who repeats Ctrl-C means it.
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def config(self):
        # As the log gives it back: lists for tuples.
        return json.loads(json.dumps(dataclasses.asdict(self.cfg)))

    def records(self):
        """The log's records, the first of which describes the run; a last line cut short by
        a kill is left out."""
        for line in (self.folder / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    def resume(self, **lists):
        """The state to continue from, or None to start anew; UserError where
        the folder holds another run.

        lists: VideoLists or Captions by their flags' names. What is in them is a part
        of what a run is."""
        last = self.folder / "last.pt"
        self.lists = {name: entries.digest() for name, entries in lists.items()}
        state = None
        records = []
        source = last
        if not self.cfg.overwrite:
            records = list(self.records())
            if self.cfg.resume != "auto" and not last.exists():
                source = Path(self.cfg.resume)
            if source != last or last.exists():
                state = load_checkpoint(source)
        if state and not (isinstance(state, dict) and {"config", "at", "records"} <= state.keys()):
            raise UserError(
                f"{source}: not the checkpoint of a run, which --resume needs; "
                "for weights use --init"
            )
        # A run that failed before its first step, as for want of weights, left nothing but the head
        # of its log: another may have the folder.
        begun = len(records) > 1 or (self.folder / "best.pt").exists()
        if state or (records and begun):
            self.check_same(state or records[0])
        # What a killed run logged after its last checkpoint is dropped: those steps are
        # done, and logged, again.
        kept = records[1 : 1 + state["records"]] if state else []
        self.logged_records = len(kept)
        self.ctx.barrier()  # all ranks have read what rank 0 now rewrites
        if self.ctx.rank == 0:
            with replacing(self.folder / "log.jsonl") as temporary:
                lines = [json.dumps(record) + "\n" for record in [self.head(), *kept]]
                temporary.write_text("".join(lines))
            if self.cfg.overwrite:
                for name in ("last.pt", "best.pt"):
                    (self.folder / name).unlink(missing_ok=True)
        self.ctx.barrier()
        if state:
            self.started -= state["seconds"]
            self.logged_step = state["at"]["step"]
            if source != last or self.cfg.resume != "auto":
                self.say(f"continuing {source}")
        return state

    def check_same(self, earlier):
        """UserError where a checkpoint, or a log's first record, has other flags or lists."""
        config = self.config()
        before = earlier.get("config", config)
        differ = []
        for field in dataclasses.fields(self.cfg):
            old = before.get(field.name)
            new = config[field.name]
            if old != new and not field.metadata["free"]:
                differ.append(f"--{field.name.replace('_', '-')} {old} -> {new}")
        if differ:
            raise UserError(
                f"{self.folder} holds another run ({', '.join(differ)}); choose another --out, "
                f"with --init {self.folder / 'last.pt'} to train its weights on, or --overwrite it"
            )
        # A run begun before lists were kept has none.
        for name, digest in earlier.get("lists", {}).items():
            if self.lists.get(name, digest) != digest:
                path = getattr(self.cfg, name)
                path = " ".join(path) if isinstance(path, tuple) else path
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {path} is not the list that {self.folder} began with: "
                    "its lines differ; take that one again, or choose another --out"
                )

    def head(self):
        """The log's first record: what runs, where."""
        cuda = self.ctx.device.type == "cuda"
        head = {"config": self.config(), "lists": self.lists, "versions": versions()}
        head["device"] = torch.cuda.get_device_name() if cuda else platform.machine()
        return head | {"ranks": self.ctx.world, "argv": sys.argv}

    def say(self, text):
        """Print a line, on rank 0, without breaking the progress bar."""
        if self.ctx.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def wait(self, seconds):
        """Count a batch's wait for data (`data_wait` in the log)."""
        self.waited += seconds
        self.longest_wait = max(self.longest_wait, seconds)

    def end_waits(self, seconds):
        """End an interval of so many seconds: say what helps where it is the run's first that
        waited for data for more than a tenth of it.

        Its longest wait is left out: it may be for loader processes that
        start, as each stage's do."""
        steady = self.waited - self.longest_wait
        if steady > 0.1 * (seconds - self.longest_wait) and not self.advised:
            self.advised = True
            self.say(
                "more than a tenth of this interval went into waiting for data. What helps: more "
                f"--workers where cores are free, {LOADER_ADVICE}; {LIST_SPEED}"
            )
        self.waited = 0.0
        self.longest_wait = 0.0

    def advance(self, step, total):
        """Note the end of a step, and move a terminal's progress bar to it."""
        self.advanced = time.time()
        if self.ctx.rank == 0 and sys.stderr.isatty():
            self.bar = self.bar or tqdm(
                total=total, initial=step - 1, unit="step", dynamic_ncols=True
            )
            self.bar.update(step - self.bar.n)

    def log(self, record, step, total):
        """Append a record to log.jsonl and show it: on the bar, or as a line with the time left
        where there is none."""
        now = time.time()
        record = {"step": step, "seconds": round(now - self.started, 1), **record}
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()]
        text = "  ".join(words[1:])  # without the step
        seconds = now - self.logged
        trained = "loss" in record
        if trained:
            rate = (step - self.logged_step) / seconds
            record["clips_per_second"] = round(rate * self.batch_size, 2)
            record["data_wait"] = round(self.waited / seconds, 4)
            left = tqdm.format_interval((total - step) / rate)
            text += f"  clips/s {record['clips_per_second']:.4g}"
            text += f"  data_wait {record['data_wait']:.1%}  left {left}"
            self.logged = now
            self.logged_step = step
        else:
            self.logged += now - self.advanced  # an evaluation is not counted as training time
        self.logged_records += 1
        if self.ctx.rank == 0:
            with writing(self.folder / "log.jsonl"), open(self.folder / "log.jsonl", "a") as file:
                infinite = lambda v: isinstance(v, float) and not math.isfinite(v)
                strict = {k: None if infinite(v) else v for k, v in record.items()}
                file.write(json.dumps(strict) + "\n")
        if self.board:
            with writing(self.folder):
                for key, value in record.items():
                    self.board.add_scalar(key, value, step)
        if self.bar is not None and trained:
            self.bar.set_postfix_str(
                f"loss {record['loss']:.4f}, {record['clips_per_second']:.0f} clips/s"
            )
        else:
            self.say(f"step {step}/{total}  {text}")
        if trained:
            self.end_waits(seconds)

    def save(self, state, *names):
        """Write `state` under each name, last.pt last: once it is there the others are
        too. Every rank calls it."""
        self.saved = time.time()
        if self.ctx.rank == 0:
            state |= {"config": self.config(), "lists": self.lists, "versions": versions()}
            state |= {"precision": self.ctx.precision}
            state |= {"seconds": time.time() - self.started, "records": self.logged_records}
            for name in names:
                save_atomic(self.folder / name, state)

    def guard(self, clips, steps, before, scale):
        """Name the clips whose loss was not finite; returns how many of `steps` skipped updates
        count, beside the `before` ones. UserError past --max-skipped. (fp16's gradients overflow as
        a routine while `scale` is large.)
        """
        if self.ctx.precision == "fp16" and not clips and scale >= 1:
            return 0
        if steps:
            culprits = ", ".join(clips[:8]) or "by the gradient"
            self.say(f"{steps} updates skipped, loss or gradient not finite: {culprits}")
        if before + steps > self.cfg.max_skipped:
            raise UserError(
                f"{before + steps} updates were skipped because the loss or gradient was not "
                f"finite, more than --max-skipped {self.cfg.max_skipped}; the last good checkpoint "
                f"is kept in {self.folder}. Lower --lr, or look at the clips"
            )
        return steps

    def save_due(self):
        """Whether a signal came or --save-minutes have passed since the last checkpoint;
        the same on all ranks."""
        late = self.ctx.rank == 0 and time.time() - self.saved > 60 * self.cfg.save_minutes
        self.leaving, late = self.ctx.any(self.stopped, late)
        return self.leaving or late

    def leave(self, step):
        """Once saved after a signal on any rank: say so and end as a program that the
        signal ended (128 + number)."""
        if self.leaving:
            command = "the same command"
            if self.cfg.overwrite:
                command += " without --overwrite"
            self.say(f"stopped at step {step}; {command} continues from {self.folder / 'last.pt'}")
            raise SystemExit(128 + (self.stopped or signal.SIGTERM))


class Trainer(Run):
    """A run's training: its state, and what its loop has to do beside the method.

        run = Trainer(cfg, ctx, train_list=videos)          # new, or goes on
        run.prepare(net, optimizer, classes=names)          # weights; compiled, over ranks
        run.begin(batches, stop=stage.stop, ...)            # a stage: its batches, its steps
        while run.step < run.stop:
            for batch in run.micro_batches():               # counts waits, unreadable videos
                with run.forward():                         # autocast; exchange over ranks
                    loss = loss_fn(run.model(batch.clips))  # [B]
                run.backward(loss)                          # of the global batch's mean, guarded
            run.update(lr)                                  # clip, step, zero
            run.end_step()                                  # log, checkpoint; leaves on a signal
            if run.evaluation_due():
                run.evaluated(evaluate(...), "val_top1")    # log, best.pt, last.pt

    It is called and never calls: it knows no model, no loss and no metric. All draws are keyed and
    the data's order too, so what a checkpoint needs beside weights is `at`: the step, what was
    evaluated, what is best, and what a script adds.
    """

    def __init__(self, cfg, ctx, names=("loss",), at=None, **lists):
        """names: the values a clip that `backward` is given, the loss first. at: what a script
        counts, as it is at the start. lists: see `resume`."""
        super().__init__(cfg, ctx)
        self.videos = lists["train_list"]
        self.meter = Meter(ctx.device, *names)
        self.at = {"step": 0, "evaluated": 0, "best": -math.inf, "skipped": 0, "last": {}}
        self.at |= at or {}
        self.state = self.resume(**lists)  # a checkpoint that `prepare` goes on from, or None
        if self.state:
            self.at = self.state["at"]
            self.meter.load(self.state["sums"], ctx)

    def prepare(self, net, optimizer, **more):
        """Take a model and its optimizer, as the checkpoint has them where there is
        one to go on from.

        `model` is `net` compiled and over ranks, to train; `net` itself is evaluated and saved.
        more: what a checkpoint holds beside them, such as the names of the classes.
        """
        self.net = net
        self.optimizer = optimizer
        self.more = more
        self.trained = [p for p in net.parameters() if p.requires_grad]
        self.scaler = loss_scaler(self.ctx)
        if self.state:
            net.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
            if self.state["precision"] == self.ctx.precision:
                self.scaler.load_state_dict(self.state["scaler"])
        self.state = None  # its memory is free
        compile_model(net, self.ctx, self.cfg.compile)
        self.model = None  # the one of the stage before lets go of the parameters first
        self.model = self.ctx.wrap(net)

    def begin(self, batches, batch_size, micro_batch, epoch_steps, stop, total=0, start=0,
              epoch_zero=0):  # fmt: skip
        """Start, or go on, to train up to step `stop` of `total` (0: `stop` is the run's last)
        on `batches`, a rank's micro-batches.

        batch_size: clips a step over all ranks. Epochs have `epoch_steps` steps, counted from step
        `epoch_zero`, and end with a checkpoint. Evaluations are --eval-every epochs apart, and come
        after step `start`.
        """
        self.batches = batches
        self.failures = Failures(len(self.videos), self.cfg.max_bad)
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.accumulation = batch_size // self.ctx.world // micro_batch
        self.start = start
        self.stop = stop
        self.total = total or stop
        self.epoch_steps = epoch_steps
        self.epoch_zero = epoch_zero
        self.eval_steps = max(1, round(self.cfg.eval_every * epoch_steps))

    @property
    def step(self):
        """Optimizer steps done."""
        return self.at["step"]

    def micro_batches(self):
        """Yields this rank's micro-batches of a step."""
        self.indices = []
        for i in range(self.accumulation):
            batch = next(self.batches)
            self.wait(batch.waited)
            self.failures.add(batch, self.micro_batch)
            self.indices.append(batch.index)
            self.last = i == self.accumulation - 1
            yield batch

    @contextlib.contextmanager
    def forward(self):
        """Context of a micro-batch's forward pass and loss: half precision where --precision says
        so. Ranks exchange gradients in the backward pass of a step's last one only."""
        with self.ctx.sync(self.model, self.last), self.ctx.autocast():
            yield

    def backward(self, loss, *values):
        """Add to the gradients what this micro-batch has of the global batch's mean loss.

        loss, values: [B], a clip each, which the log gets. Ranks' gradients are
        averaged, hence the factor `world`. A loss that is not finite makes the gradient
        so too, and thereby skips the update.
        """
        poison = torch.where(loss.isfinite().all(), 1.0, math.nan)
        mean = loss.sum() * poison * self.ctx.world / self.batch_size
        self.scaler.scale(mean).backward()
        self.note(loss, *values)

    def note(self, loss, *values):
        """Give the log [B] values of the clips that were fetched since the last note."""
        self.meter.add(torch.cat(self.indices), loss, *values)
        self.indices = []

    def update(self, lr):
        """An optimizer step at learning rate `lr`, with gradients clipped to --clip-grad. Where a
        gradient is not finite it is skipped, by a flag on the device that nothing waits for."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.lr = lr
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if self.cfg.clip_grad:
            nn.utils.clip_grads_with_norm_(self.trained, self.cfg.clip_grad, norm)
        self.meter.step(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.at["step"] += 1

    def end_step(self, **more):
        """What is due once a step is done: its record in the log, with `more`, of which tensors are
        read where a record is due only; a checkpoint; after a signal, the end."""
        step = self.step
        own = step - self.epoch_zero  # of the stage's epochs
        self.advance(step, self.total)
        epoch_ends = own % self.epoch_steps == 0
        logs = step % self.cfg.log_every == 0 or step == self.stop
        if epoch_ends or logs:
            for line in self.failures.collect(self.ctx, (own - 1) // self.epoch_steps):
                self.say(f"unreadable, replaced by another: {line}")
        if logs:
            means, clips, skipped = self.meter.read(self.ctx)
            names = [self.videos.video(i) for i in clips]
            scale = self.scaler.get_scale()
            self.at["skipped"] += self.guard(names, skipped, self.at["skipped"], scale)
            record = {"epoch": round(own / self.epoch_steps, 3), **means, "lr": self.lr}
            record["clips"] = step * self.batch_size
            for name, value in more.items():
                record[name] = value.item() if isinstance(value, torch.Tensor) else value
            self.log(record, step, self.total)
        if (self.save_due() or epoch_ends) and self.checkpoint("last.pt"):
            self.leave(step)

    def evaluation_due(self, at_stop=True):
        """Whether this step is to be evaluated, and was not: --eval-every epochs are over or, if
        at_stop, the stage is. True also at the start of a run that was stopped between the two."""
        step = self.step
        if step <= self.start or step <= self.at["evaluated"]:
            return False
        return (step - self.epoch_zero) % self.eval_steps == 0 or (at_stop and step == self.stop)

    def evaluated(self, result, metric, lower_is_better=False, also=(), **more):
        """Note an evaluation: in the log, with `more`; in best.pt, if it is better than all before;
        in files `also`; in last.pt."""
        step = self.step
        self.log(result | {"clips": step * self.batch_size} | more, step, self.total)
        score = -result[metric] if lower_is_better else result[metric]
        files = [*also, "last.pt"]
        if score > self.at["best"] and self.meter.healthy(self.ctx):
            self.at["best"] = score
            files.insert(0, "best.pt")
        self.at["evaluated"] = step
        self.at["last"] = result
        self.checkpoint(*files)

    def checkpoint(self, *names):
        """Save under each name. False, and the last good checkpoint stays, where the latest step
        was not finite; but the last step of all is saved."""
        if self.step < self.total and not self.meter.healthy(self.ctx):
            return False
        state = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict(), "at": self.at}
        self.save(state | {"sums": self.meter.state(self.ctx)} | self.more, *names)
        return True


# ---- 9. Contrastive step -------------------------------------------------------------------------
# InfoNCE compares a clip with every text of the global batch, so it is no sum over micro-batches:
# to accumulate theirs is to train an easier task. (AVION's --update-freq keeps the last one only,
# or fails.) But it sees nothing but the features: its gradient at these is small, and the chain
# rule takes it on from there, a micro-batch at a time (Gao et al. 2021, "Scaling Deep Contrastive
# Learning Batch Size under Memory Limited Setup"), for one more forward pass.


def contrastive_loss(video, text, scale, same=None):
    """Symmetric InfoNCE (Turbo, Eq. 2; CLIP's), a pair at a time: half video -> text, half text
    -> video. -> [B].

    video, text: features [B, D] of length 1, row i of one belongs to row i of the
    other; scale: 1 / temperature.
    same: bool [B, B], True for pairs that show or say the same: they are
    no negatives of each other.
    """
    logits = scale * video.float() @ text.float().T  # [B, B]
    if same is not None:
        own = torch.eye(len(same), dtype=torch.bool, device=same.device)  # [B, B]
        logits = logits.masked_fill(same & ~own, -math.inf)  # [B, B]
    labels = torch.arange(len(logits), device=logits.device)  # [B]
    to_text = F.cross_entropy(logits, labels, reduction="none")  # [B]
    to_video = F.cross_entropy(logits.T, labels, reduction="none")  # [B]
    return 0.5 * (to_text + to_video)  # [B]


def cached_step(ctx, model, encode, batches, loss_fn, scaler):
    """Add to .grad the scaled gradient of mean(loss_fn) + mean(own_loss) of the global batch.

    batches: this rank's micro-batches, all of one size. model: as ctx.wrap made it.
    encode(batch) -> what the loss compares, by name, of one call of `model`: features [b, ...];
    integers [b], such as ids; 0-d tensors that are the same in all micro-batches, such as the
    logit scale. Whatever learns must come through these: DistributedDataParallel knows of nothing
    else. Beside them, where there is one, "own_loss": [b], which needs no other clip
    (Turbo's PMAE), and counts in the pass with a graph only (torch.is_grad_enabled() tells). Draws
    must be keyed, so that both passes are the same. Autocast is entered here, for `encode` alone:
    the loss is in float32.
    loss_fn(**what encode gives, of the global batch) -> a loss a clip, [B]; rows run
    rank after rank, and in a rank micro-batch after micro-batch. Returns losses and own
    losses of this rank's clips.
    """
    batches = list(batches)
    single = len(batches) == 1  # then its graph is kept, and nothing is computed twice

    def forward(batch, graph):
        with torch.set_grad_enabled(graph), ctx.autocast():
            return encode(batch)

    first = [forward(batch, single) for batch in batches]
    compared = {}
    for name in first[0]:
        if name != "own_loss":
            parts = [outputs[name].detach() for outputs in first]
            whole = parts[0]  # [], the same in all
            if whole.dim():
                whole = ctx.gather_rows(torch.cat(parts))  # [B, ...]
            if whole.is_floating_point():
                whole = whole.float().requires_grad_()
            compared[name] = whole
    losses = loss_fn(**compared)  # [B]
    learned = [name for name in compared if compared[name].requires_grad]
    wanted = [compared[name] for name in learned]
    # Zeros, of what the loss leaves out.
    gradients = torch.autograd.grad(losses.mean(), wanted, materialize_grads=True)

    own = len(losses) // ctx.world  # this rank's rows
    start = ctx.rank * own
    size = own // len(batches)
    own_losses = []
    for i, batch in enumerate(batches):
        rows = slice(start + i * size, start + (i + 1) * size)  # the micro-batch's
        with ctx.sync(model, last=i == len(batches) - 1):
            outputs = first[0] if single else forward(batch, True)
            own_loss = outputs.get("own_loss", torch.zeros_like(losses[rows])).float()  # [b]
            # Ranks' gradients are averaged, hence `world` where each has its own part. A scalar's
            # is whole on each.
            total = own_loss.sum() * ctx.world / len(losses)
            for name, gradient in zip(learned, gradients, strict=True):
                x = outputs[name]
                share = gradient[rows] * ctx.world if x.dim() else gradient / len(batches)
                total = total + (x.float() * share).sum()  # has the chain rule's gradient
            # Where one isn't finite, the update must be skipped.
            finite = losses.isfinite().all() & own_loss.isfinite().all()
            scaler.scale(total * torch.where(finite, 1.0, math.nan)).backward()
        own_losses.append(own_loss.detach())
    return losses[start : start + own].detach(), torch.cat(own_losses)


# ---- 10. Evaluation ------------------------------------------------------------------------------
# Each rank evaluates its part of a list; the numbers are those of all ranks. A video that could not
# be read is named, and counted in no result. (Predictions and features: data.py, Tasks.)


class Evaluation:
    """Means by name of what is added for each of `number` videos, over all ranks; and in `failures`
    those that could not be read, at most the share max_bad."""

    def __init__(self, number, max_bad):
        self.failures = Failures(number, max_bad)
        self.sums = {}  # on the device
        self.counts = Counter()

    def add(self, name, values):
        """values: [B], one a video."""
        self.sums[name] = self.sums.get(name, 0.0) + values.double().sum()
        self.counts[name] += len(values)

    def add_hits(self, scores, labels, suffix=""):
        """Top-1 and top-k in % (k = 5, or all classes if fewer): scores [B, classes], labels
        [B]."""
        k = min(5, scores.shape[1])
        hits = 100 * (scores.topk(k).indices == labels[:, None])  # [B, k]
        self.add(f"top1{suffix}", hits[:, 0])
        self.add(f"top{k}{suffix}", hits.amax(1))

    def result(self, ctx, name="val"):
        """{name_score: mean}; name_clips videos count, name_unread could not be read. Every rank
        must call it."""
        unread = self.failures.unread(ctx)
        sums = Counter()
        counts = Counter()
        own = {score: total.item() for score, total in self.sums.items()}
        for others, numbers in ctx.gather((own, self.counts)):
            sums.update(others)
            counts.update(numbers)
        if not counts:
            raise UserError(f"--val-list: no video could be read: {'; '.join(unread[:3])}")
        means = {f"{name}_{score}": total / counts[score] for score, total in sums.items()}
        return means | {f"{name}_clips": max(counts.values()), f"{name}_unread": len(unread)}


def print_result(cfg, ctx, result, how=""):
    """Print what --task eval found; how, in words."""
    if ctx.rank == 0:
        words = "  ".join(f"{name} {value:.4g}" for name, value in result.items())
        print(f"{cfg.init} on {cfg.val_list}{how}: {words}")


# ---- 11. Counting, for --plan --------------------------------------------------------------------
# What a training would cost, from a real model and without data or GPU. Multiply-adds are counted
# on the meta device; what a block keeps for its backward pass is measured on the CPU, on one real
# block. The rest of a GPU's memory is a few numbers of bytes a parameter and a pixel.


def count_macs(function, *args):
    """Multiply-adds of a call, in 1e9: linear layers, attention
    and convolutions, by torch's FlopCounterMode.

    Run it on `meta` tensors: nothing is computed. (Papers print multiply-adds as "GFLOPs"; real
    FLOPs are twice that.)
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() / 2 / 1e9


def clip_macs(net, frames, size, *args):
    """Multiply-adds, in 1e9, of net(clips, keys, *args) on one clip; `net` is on meta."""
    with torch.device("meta"):
        clips = torch.empty(1, frames, 3, size, size, dtype=torch.uint8)
        return count_macs(net, clips, torch.zeros(1, dtype=torch.int64), *args)


def saved_bytes(module, *args):
    """Bytes that module(*args) stores for its backward pass, parameters left out. Needs real
    tensors: on `meta`, SDPA takes its plain path and stores more than it would."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*args)
    del output  # alive until here: a freed storage's address would be given to the next one
    for parameter in module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def gpu_clips(gmacs):
    """Clips a second that an H100 trains, an estimate: 35 % of the 989 TFLOP/s in
    bf16 of its data sheet.

    gmacs: multiply-adds of a training step on one clip, in 1e9. The share is a little less than
    three steps give whose kernels were counted one by one, without a GPU: VideoMAE-B 38 %, AVION's
    ViT-B 46 %, Turbo 37 %.
    """
    return 0.35 * 989e12 / (2e9 * gmacs)


# What a step holds beside weights and activations, roughly: CUDA's own memory, and bytes of each
# pixel of a clip: see pixel_bytes.
CUDA_BYTES = 2**30
PIXEL_BYTES = 10


def pixel_bytes(augmented=False, mixup=False):
    """Bytes that a step holds of a value of a clip's pixels: one in this batch and one in the
    next; two more of the next while it is flipped; four as a normalised patch, and two as
    that patch in half precision.

    augmented: by RandAugment, erasing or colour jitter, which take up to 9 where flipping
    takes 2 (of 16 frames; of 2, RandAugment takes 29), on a stream whose memory no other
    gets. mixup: pixels in float.
    """
    return PIXEL_BYTES + (7 if augmented else 0) + (4 if mixup else 0)


class Phase(NamedTuple):
    """A phase of training as `print_memory` sees it."""

    name: str
    batch: int  # clips a step over all GPUs
    micro: int  # clips that a GPU holds at once; 0: batch / GPUs
    group: int  # clips that a micro-batch holds together
    state: float  # bytes whatever the batch: see state_bytes
    clip: float  # bytes more a clip: its pixels, and what is kept for backward: see block_bytes
    flag: str = "--micro-batch"  # that sets `micro`


def plan_phase(cfg, name, net, pixels, passed, repeated=1):
    """The Phase `name` of training `net`.

    pixels: bytes of a clip's, see pixel_bytes. passed: (blocks, shape, ...) of each stack of blocks
    that a clip passes, see block_bytes. repeated: clips of a video.
    """
    clip = pixels
    for blocks, shape, *args in passed:
        clip += block_bytes(cfg, blocks[0], len(blocks), shape, *args)
    group = clips_together(cfg, repeated)
    return Phase(name, cfg.batch_size, cfg.micro_batch, group, state_bytes(cfg, net), clip)


def millions(module, starts="", trained=None):
    """How many parameters a module has, in 1e6. starts: of those whose names start so; trained: of
    those that are trained, or are not."""
    found = 0
    for name, parameter in module.named_parameters():
        if name.startswith(starts) and trained in (None, parameter.requires_grad):
            found += parameter.numel()
    return found / 1e6


def state_bytes(cfg, net):
    """Bytes of a model's state: of a trained parameter weight, gradient, AdamW's two moments or
    SGD's one, autocast's copy of the weight in half precision (a bucket that GPUs exchange is the
    gradients themselves); of a frozen one the weight, in half precision the copy too."""
    moments = {"adamw": 8, "sgd": 4}[getattr(cfg, "optimizer", "adamw")]
    copy = 0 if cfg.precision == "fp32" else 2
    trained = millions(net, trained=True) * (8 + moments + copy)
    return 1e6 * (trained + millions(net, trained=False) * (4 + copy))


def on_cpu(module):
    """A copy of a module, which may be on the meta device, to measure on the CPU; its values are
    whatever they are."""
    return copy.deepcopy(module).to_empty(device="cpu")


def block_bytes(cfg, block, depth, shape, *args):
    """Bytes that `depth` blocks like `block` hold of one clip in training, inputs
    [1, *shape] with shape (N, D). args: what else they take.

    What one block saves for backward is measured on the CPU, as the growth from one clip to two, so
    that autocast's copies of weights don't count. Recomputed blocks keep their inputs. One block
    more is at work, in backward, with gradients that are a third of what it saved.
    """
    half = cfg.precision != "fp32"
    dtype = torch.bfloat16 if half else torch.float32  # of a block's input: see run_blocks
    block = on_cpu(block)
    saved = []
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for clips in (1, 2):
            x = torch.randn(clips, *shape, dtype=dtype, requires_grad=True)
            saved.append(saved_bytes(block, x, *args))
    one = saved[1] - saved[0]
    kept = dtype.itemsize * math.prod(shape) if cfg.grad_checkpoint else one
    return depth * kept + one * 4 / 3


def print_memory(cfg, phases):
    """Print GB a GPU (2**30 bytes, as of cards) of each Phase on --gpus GPUs, and the largest
    micro-batch that fits each of --gpu-gb."""
    for phase in phases:
        per_gpu, rest = divmod(phase.batch, cfg.gpus)
        micro = phase.micro or max(1, per_gpu)
        if rest or not per_gpu or per_gpu % micro:
            times = f" x {phase.flag} {phase.micro}" if phase.micro else ""
            why = f"is not divisible by --gpus {cfg.gpus}{times}"
            print(f"memory    {phase.name}: a batch of {phase.batch} {why}")
            continue
        gigabytes = (CUDA_BYTES + phase.state + micro * phase.clip) / 2**30
        fits = []
        for card in cfg.gpu_gb:
            room = float(card) * 2**30 - CUDA_BYTES - phase.state
            sizes = [n for n in range(phase.group, per_gpu + 1, phase.group) if per_gpu % n == 0]
            fitting = [n for n in sizes if n * phase.clip <= room]
            fits.append(f"{card} GB: {max(fitting, default='none')}")
        print(
            f"memory    {phase.name}: {micro} clips at once on each of {cfg.gpus} GPUs, "
            f"{per_gpu // micro} times a step: {gigabytes:.1f} GB a GPU, an estimate; "
            f"largest {phase.flag} in {', '.join(fits)}"
        )
