"""The path that a GPU takes, as far as a CPU can follow it: what is compiled, what a skipped update leaves behind, how
many kernels the augmentation begins, and that no step makes the host wait.

Nothing here needs a card or a C++ compiler: graphs are captured as for CUDA, and then run by PyTorch itself.
"""

import contextlib
import inspect
import json
import math
import os
import re
import weakref
from types import SimpleNamespace

import pytest
import small
import torch
from conftest import ROOT, command
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waits import Waits

import avion
import common
import data
import sfa_vivit
import tpt_mae
import turbo

CPU = common.Context(0, 1, torch.device("cpu"), "fp32")


@pytest.fixture
def filled_memory():
    """Memory that is allocated and not filled reads as NaN, in place of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- A skipped update ------------------------------------------------------------------------------------------------


def groups():
    """Two groups with rates of their own, of weights that are the same in every call."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,))]
    return [
        {"params": weights[:1], "weight_decay": 0.05, "lr_scale": 1.0},
        {"params": weights[1:], "weight_decay": 0.0, "lr_scale": 0.5},
    ]


def update(optimizer, scaler, factor):
    """A step as the scripts make it, with a gradient of factor * the parameter's place."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            place = torch.arange(weight.numel(), dtype=torch.float32).reshape(weight.shape) - 3.0
            weight.grad = place * factor
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def tensors(optimizer):
    """Weights, and all that the optimizer keeps of each."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = [value for weight in weights for _, value in sorted(optimizer.state[weight].items())]
    return [weight.detach().clone() for weight in weights], [value.clone() for value in kept]


REFERENCES = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False, fused=False),
    "adamw": lambda groups: torch.optim.AdamW(
        groups, lr=0.1, betas=(0.9, 0.95), foreach=False, fused=False
    ),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_skipped_first_update_leaves_nothing_behind(kind, filled_memory):
    """Weights stay, the state is finite, and what follows is the unfused optimizer's of the finite gradients alone."""
    ours = common.optimizer(kind, groups(), 0.1, betas=(0.9, 0.95))
    theirs = REFERENCES[kind](groups())
    scaler = common.loss_scaler(CPU)
    before, _ = tensors(ours)
    update(ours, scaler, math.inf)
    after, state = tensors(ours)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(value.isfinite().all() for value in state)
    for factor in (1.0, -0.5, math.nan, 2.0):
        update(ours, scaler, factor)
        if math.isfinite(factor):
            update(theirs, common.loss_scaler(CPU), factor)
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_momentum_of_an_older_checkpoint_is_completed(filled_memory):
    """SGD's state as torch alone would have saved it, before any step: nothing in it is taken from raw memory."""
    ours = common.optimizer("sgd", groups(), 0.1)
    saved = torch.optim.SGD(groups(), lr=0.1, momentum=0.9, fused=True).state_dict()
    assert not saved["state"]
    ours.load_state_dict(saved)
    update(ours, common.loss_scaler(CPU), math.inf)
    weights, state = tensors(ours)
    assert len(state) == 2 and all(value.isfinite().all() for value in weights + state)


@pytest.mark.parametrize("script", ["turbo", "avion", "tpt_mae", "sfa_vivit"])
def test_optimizers_are_made_in_one_place(script):
    assert "torch.optim" not in (ROOT / f"{script}.py").read_text()


# sfa_vivit.py's own main(), whose first loss of each stage is not finite.
SKIPPING = """
import sys
sys.path.insert(0, {root!r})
import torch, common, sfa_vivit
torch.use_deterministic_algorithms(True, warn_only=True)
seen = set()
def loss(logits, targets, heads, real=sfa_vivit.vivit_loss):
    count = len(common.stages)
    first = count not in seen
    seen.add(count)
    return real(logits, targets, heads) * (float("nan") if first else 1.0)
def enter(self, stage, half=None, real=sfa_vivit.ViViT.enter):
    common.stages.add(stage.number)
    return real(self, stage, half)
common.stages = set()
sfa_vivit.vivit_loss, sfa_vivit.ViViT.enter = loss, enter
sfa_vivit.main(common.parse(sfa_vivit.Config, sfa_vivit.RECIPES))
"""


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_each_stage_may_begin_with_a_skipped_update(kind, toy, cli, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(SKIPPING.format(root=str(ROOT)))
    lists = ["--train-list", toy / "train.csv", "--val-list", toy / "val.csv", "--data-root", toy]
    size = [
        "--batch-size",
        4,
        "--size",
        32,
        "--workers",
        0,
        "--log-every",
        1,
        "--stages",
        "2:1,4:1",
        "--max-steps",
        3,
    ]
    rate = ["--optimizer", kind, "--lr", 0.1, "--out", tmp_path / "run"]
    code, out, err = cli(script, *lists, *size, *rate)
    assert code == 0, out + err
    assert out.count("updates skipped") == 2, out
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert all(x.isfinite().all() for x in state["model"].values())
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert [loss is None for loss in losses] == [True, False, False, True, False, False]


# ---- Kernels of the augmentation -------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts the operations on the meta device, which stands for a GPU, that would begin a kernel there or a copy to
    it; `largest` is the size in bytes of the largest tensor that one of them makes."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_meta]
        returns = function._schema.returns
        view = not function._schema.is_mutable and any(value.alias_info for value in returns)
        unfilled = "empty" in function.__name__
        if made and not view and not unfilled:
            self.count += 1
            self.largest = max([self.largest, *(x.numel() * x.element_size() for x in made)])
        return out


CLIPS = torch.empty(64, 8, 3, 32, 32, dtype=torch.uint8, device="meta")
LABELS = torch.empty(64, 10, device="meta")
KEYS = common.make_key(0, 0, torch.arange(64))


@pytest.mark.parametrize(
    ("augment", "most"),
    [
        (lambda: data.rand_augment(CLIPS, KEYS, 7, 4), 400),
        (lambda: data.rand_augment(CLIPS, KEYS, 9, 2), 260),
        (lambda: data.scenic_rand_augment(CLIPS, KEYS, 20), 200),
        (lambda: data.erase(CLIPS, KEYS), 110),
        (lambda: data.colour_jitter(CLIPS, KEYS, hue=0.2), 320),
        (lambda: data.flip(CLIPS, KEYS), 4),
        (lambda: data.mix(CLIPS, LABELS, (0, 0), 0.8, 0.0), 7),
        (lambda: data.mix(CLIPS, LABELS, (0, 0), 0.0, 0.8), 6),
    ],
    ids=[
        "rand_augment 4",
        "rand_augment 2",
        "scenic",
        "erase",
        "colour_jitter",
        "flip",
        "mixup",
        "cutmix",
    ],
)
def test_kernels_of_64_clips(augment, most):
    """A GPU takes some microseconds to begin a kernel, however small: by operation, not by clip."""
    with Kernels() as kernels:
        augment()
    assert 0 < kernels.count <= most


def test_colour_jitter_takes_little_memory():
    """Its hue takes 15 times the bytes of the frames that it is done for: not of all at once."""
    with Kernels() as kernels:
        data.colour_jitter(CLIPS, KEYS, hue=0.2)
    assert kernels.largest <= CLIPS.numel()


class Memory(TorchDispatchMode):
    """Bytes on the meta device of tensors that are made in here: `now`, and at their `peak`."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta:
                storage = x.untyped_storage()
                if id(storage) not in given and id(storage) not in self.held:
                    self.hold(id(storage), storage)
        return out

    def hold(self, name, storage):
        size = self.held[name] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, name)

    def drop(self, name):
        self.now -= self.held.pop(name)


SIXTEEN = torch.empty(64, 16, 3, 32, 32, dtype=torch.uint8, device="meta")


@pytest.mark.parametrize(
    ("augment", "least", "most"),
    [
        (lambda: data.flip(SIXTEEN, KEYS), 1.9, 2.1),
        (lambda: tpt_mae.augment(SIXTEEN, KEYS, 7, True, 0.25), 6, 9),
        (lambda: turbo.augment(SIXTEEN, KEYS, 9, True), 4, 9),
        (lambda: sfa_vivit.augment(SIXTEEN, KEYS, 0.8, 20, True), 7, 9),
    ],
    ids=["flip", "tpt_mae", "turbo", "sfa_vivit"],
)
def test_plan_counts_what_augmentation_holds(augment, least, most):
    """Bytes a pixel beside the batch: flipping's are in common.PIXEL_BYTES, 7 more in common.pixel_bytes."""
    with Memory() as memory:
        augment()
    assert least <= memory.peak / SIXTEEN.numel() <= most
    assert common.pixel_bytes(augmented=True) - common.pixel_bytes() == 9 - 2


def test_plan_counts_what_mixup_holds():
    with Memory() as memory:
        mixed = data.mix(SIXTEEN, LABELS, (0, 0), 0.8, 0.0)
    assert mixed[0].numel() * 4 <= memory.now <= 1.01 * mixed[0].numel() * 4
    assert common.pixel_bytes(mixup=True) - common.pixel_bytes() == 4


def test_kernels_would_be_seen():
    with Kernels() as kernels:
        x = CLIPS.flatten(0, 1)[3:].float()  # one, of four bytes a pixel
        x.mul_(2)
        x.sum()
        torch.ones(3).to("meta")
    assert kernels.count == 4
    assert kernels.largest == 4 * (CLIPS.numel() - 3 * 3 * 32 * 32)


# ---- What is compiled ------------------------------------------------------------------------------------------------
# Of the regions of a model, as common.compile_model compiles them. Graphs are kept from test to test, as from stage to
# stage of a run: a count is of those that are new.

BF16 = common.Context(0, 1, torch.device("cpu"), "bf16")


class Graphs:
    """A backend that runs a graph as it is, and keeps it; what has been compiled, and where Python was left."""

    def __init__(self):
        self.graphs, self.sizes = [], []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        self.sizes += [
            size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else [x])
        ]
        return graph.forward


@contextlib.contextmanager
def compiling():
    """Gives a list, in the end of the numbers of (graphs, breaks, graphs that were given up) within."""
    counters = torch._dynamo.utils.counters

    def count():
        given_up = counters["stats"]["cache_size_limit_hits"] + sum(
            counters["frames_skipped"].values()
        )
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), given_up

    found, before = [], count()
    yield found
    found += [b - a for a, b in zip(before, count(), strict=True)]


@pytest.mark.parametrize("name", small.SMALL)
def test_compiled_models_are_few_graphs_and_equal_to_eager(name, monkeypatch):
    """In bf16, with blocks stored and recomputed, over three steps of an accumulated batch: losses and gradients."""
    case = small.SMALL[name]
    scaler = common.loss_scaler(BF16)
    batches = [
        [small.clips_of(2, case.frames, first=first) for first in (4 * step, 4 * step + 2)]
        for step in range(3)
    ]

    def train(grad_checkpoint, wanted):
        net = small.build(name, grad_checkpoint)
        common.compile_model(net, BF16, wanted, "aot_eager")
        losses = [small.gradient(name, BF16, net, batch, scaler) for batch in batches]
        return losses, [p.grad for p in net.parameters() if p.grad is not None]

    expected = train(False, False)
    names = list(small.build(name).state_dict())
    if case.function:
        function = common.compiled(getattr(case.script, case.function), BF16, True, "aot_eager")
        monkeypatch.setattr(case.script, case.function, function)
    with compiling() as stored:
        results = train(False, True)
    with compiling() as recomputed:
        again = train(True, True)
    assert stored[0] <= 12 and stored[1:] == [0, 0], stored
    assert recomputed == [0, 0, 0], recomputed  # the same graphs
    for got in (results, again):
        for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert list(small.build(name).state_dict()) == names


def test_graphs_grow_neither_with_depth_nor_with_frames(monkeypatch):
    """ViViT's second stage: four times the images, in four times the chunks, through three times the blocks."""
    counts = []
    for frames, depth in ((8, 2), (32, 6)):
        monkeypatch.setitem(sfa_vivit.MODELS, "two", sfa_vivit.MODELS["two"] | {"depth": depth})
        backend = Graphs()
        net = small.staged(sfa_vivit.Stage(1, frames, 0, 1, ("spatial",), True), False).train()
        common.compile_model(net, CPU, True, backend)
        with compiling() as found:
            for first in (0, 1):
                net(*small.clips_of(2, frames, first=first)).sum().backward()
        counts.append((found, sum(len(graph.graph.nodes) for graph in backend.graphs)))
    assert counts[0] == counts[1] and counts[0][0][0] <= 6, counts


def test_each_stage_has_graphs_of_its_own_sizes(monkeypatch):
    """5 stages of one model: as many graphs in each, none with a symbolic size. PyTorch's own limit is 8 graphs of a
    region; here blocks have 10."""
    net = tpt_mae.VideoMAE("two", frames=10, size=32)
    backend = Graphs()
    common.compile_model(net, CPU, True, backend)
    counts = []
    for frames in range(2, 12, 2):
        with compiling() as found:
            for first in (0, 2):
                tpt_mae.mae_loss(
                    *net(*small.clips_of(2, frames, first=first), 0.75)
                ).sum().backward()
        counts.append(found)
    assert counts == [[counts[0][0], 0, 0]] * 5 and 3 <= counts[0][0] <= 6, counts
    assert backend.sizes and not any(isinstance(size, torch.SymInt) for size in backend.sizes)


def test_a_block_keeps_the_sum_between_its_branches():
    """Of tokens, [B, N, D], its backward pass is handed the gradient, the block's input and that sum: it isn't handed
    what attention gave, a product [B N, D], to add it to the input again."""
    B, N, D = 2, 24, 64
    handed = []

    def note(graph, inputs):
        handed.extend(tuple(x.shape) for x in inputs)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        bw_compiler=note,
        partition_fn=lambda *args, **options: min_cut_rematerialization_partition(
            *args, **options | {"compiler": "inductor"}
        ),
        decompositions=select_decomp_table(),
    )
    block = common.Block(D, 2).train()
    common.compile_model(block, BF16, True, backend)
    x = torch.randn(B, N, D, dtype=torch.bfloat16, requires_grad=True)
    with BF16.autocast():
        block(x, None).float().sum().backward()
    assert handed.count((B, N, D)) == 3, handed


def test_evaluation_is_not_compiled():
    """Its batches end with a smaller one."""
    net = small.build("mae, joint").eval()
    common.compile_model(net, CPU, True, "eager")
    with compiling() as found, torch.no_grad():
        for count in (3, 1):
            net(*small.clips_of(count, 4), 0.75)
    assert found == [0, 0, 0]


# One process pair: every model under DistributedDataParallel, compiled, two micro-batches a rank.
TWO_RANKS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import warnings
warnings.simplefilter("error", FutureWarning)
import torch, common, small
ctx = common.launch("fp32")
alone = common.Context(0, 1, ctx.device, "fp32")
for name, case in small.SMALL.items():
    whole = [small.clips_of(2, case.frames, first=first) for first in (0, 2, 4, 6)]
    net = small.build(name)
    expected = small.gradient(name, alone, net, whole, common.loss_scaler(alone))
    gradients = [p.grad for p in net.parameters()]
    # The second rank's graphs would be the first's. Compiled on both are a model of clips, and
    # one of pairs.
    compiled = ctx.rank == 0 or name in ("turbo", "avion")
    for grad_checkpoint in (False, True):
        net = small.build(name, grad_checkpoint)
        common.compile_model(net, ctx, compiled, "eager")
        model = ctx.wrap(net)
        for step in range(2):
            net.zero_grad()
            got = small.gradient(name, ctx, model, whole[2 * ctx.rank :][:2], common.loss_scaler(ctx))
        torch.testing.assert_close(got, expected[4 * ctx.rank :][:4], rtol=1e-5, atol=1e-6)
        for (place, p), g in zip(net.named_parameters(), gradients, strict=True):
            assert (p.grad is None) == (g is None), (name, place)
            if g is not None:
                torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6, msg=lambda m: f"{{name}} {{place}}: {{m}}")
        del model
for name in ("turbo, all tokens", "vivit, stage 1"):  # a class token's gradient of one clip is a piece of the tokens'
    net = small.build(name)
    clip = small.clips_of(1, small.SMALL[name].frames, first=ctx.rank)
    small.gradient(name, ctx, ctx.wrap(net), [clip], common.loss_scaler(ctx))
if ctx.rank == 0:
    found = torch._dynamo.utils.counters
    print(len(small.SMALL), "models,", found["stats"]["unique_graphs"], "graphs,", dict(found["graph_break"]), "breaks")
"""


def test_two_ranks_compiled(tmp_path):
    """The gradient of one process with the whole batch, uncompiled; no warning, no unused parameter, few graphs."""
    script = tmp_path / "driver.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT)))
    process = command("-m", "torch.distributed.run", "--nproc-per-node=2", script)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0 and "Warning" not in err, out + err
    models, graphs = (int(word.split()[0]) for word in out.split(",")[:2])
    assert models == 14 and graphs <= 6 * models and "{} breaks" in out, out


# ---- Attention's kernels ---------------------------------------------------------------------------------------------


class Flash:
    """flash-attn's function as it looks from outside: notes what it is handed, and does nothing."""

    def __init__(self):
        self.shapes = []

    def __call__(self, q, k, v, causal=False):
        self.shapes.append(tuple(q.shape))
        return torch.empty_like(q)


class OnCard(torch.Tensor):
    """A CPU tensor that says it is on a card."""

    is_cuda = True
    device = torch.device("cuda", 0)


def on_card(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype).as_subclass(OnCard)


@pytest.fixture
def card(monkeypatch):
    """set(major, minor): flash-attn is installed, and the card has that capability."""
    flash = Flash()
    monkeypatch.setattr(common, "flash_attn_func", flash)

    def set(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return flash

    return set


@pytest.mark.parametrize(
    "capability, calls", [((7, 0), 0), ((7, 5), 0), ((8, 0), 1), ((9, 0), 1), ((12, 0), 1)]
)
def test_flash_is_chosen_where_it_runs(card, capability, calls):
    """Its README: Ampere, Ada and later, in half precision. Asked for on another card, it is refused in one line."""
    flash, x = card(*capability), on_card(2, 8, 2, 16)
    assert common.attention(x, x, x).shape == x.shape and len(flash.shapes) == calls
    common.attention(*[x.float()] * 3)
    assert len(flash.shapes) == calls
    if not calls:
        with pytest.raises(common.UserError, match="capability 8.0"):
            common.attention(x, x, x, kind="flash")


@pytest.mark.parametrize("kind", ["auto", "flash"])
@pytest.mark.parametrize("backbone, calls", [("joint", 2), ("divided", 0), ("trajectory", 0)])
def test_flash_is_kept_from_a_token_a_sequence(card, backbone, calls, kind):
    """Encoder of two blocks: those that attend over time have a sequence a token."""
    flash = card(9, 0)
    net = tpt_mae.Classifier(8, "two", frames=4, size=32, backbone=backbone, attention=kind).to(
        torch.bfloat16
    )
    steps = [] if backbone == "joint" else [2]
    common.run_blocks(net.blocks, on_card(2, 32, 64), None, False, *steps)
    assert len(flash.shapes) == calls


@pytest.mark.parametrize("causal", [False, True])
def test_large_batches_go_in_pieces(monkeypatch, causal):
    """No call is over either limit, each is as large as they allow, and all of it is what one call gives."""
    q, k, v = torch.randn(
        3, 11, 3, 2, 4, dtype=torch.float64, requires_grad=True
    ).unbind()  # [B, N, H, d]
    expected = common.attention(q, k, v, "plain", causal)
    sizes = []

    def fused(q, k, v, is_causal, real=torch.nn.functional.scaled_dot_product_attention):
        sizes.append(len(q))
        return real(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    for limit, value, pieces in (
        ("SDPA_ROWS", 9, [4, 4, 3]),  # 2 heads: 8 of 9
        ("SDPA_ELEMENTS", 5 * 24 + 1, [5, 5, 1]),
        ("SDPA_ROWS", 1, [1] * 11),  # never none
    ):
        with monkeypatch.context() as patch:
            patch.setattr(common, limit, value)
            torch.testing.assert_close(common.attention(q, k, v, "sdpa", causal), expected)
        assert sizes == pieces
        sizes.clear()
    torch.testing.assert_close(common.attention(q, k, v, "sdpa", causal), expected)
    assert sizes == [11]


def test_trajectories_of_many_clips_stay_below_the_limit(monkeypatch):
    """64 clips of 16 frames at 224 x 224, as fine-tuned: 100,352 sequences of 12 heads."""
    rows = []

    def fused(q, k, v, is_causal):
        rows.append(len(q) * q.shape[1])
        assert max(x.numel() for x in (q, k, v)) < 2**31
        return torch.empty_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    block = tpt_mae.TrajectoryBlock(768, 12).to("meta")
    assert block(torch.empty(64, 1568, 768, device="meta"), None, 8).shape == (64, 1568, 768)
    assert max(rows) <= 65_535 and sum(rows) == 64 * 8 * 12 + 64 * 1568 * 12


# ---- What a machine lacks --------------------------------------------------------------------------------------------


@common.in_one_line
def fail(error):
    raise error


def test_out_of_memory_names_the_flags():
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free."
    with pytest.raises(common.UserError) as found:
        fail(torch.OutOfMemoryError(text))
    line = str(found.value)
    assert line.startswith("error: CUDA out of memory. Tried to allocate 2.50 GiB: ")
    assert "--micro-batch" in line and "--grad-checkpoint" in line and "\n" not in line


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("shape mismatch"), ValueError("x")):
        with pytest.raises(type(error)) as found:
            fail(error)
        assert found.value is error


def test_no_compiler_names_the_flag(monkeypatch):
    """As inductor raises it where there is none; and Triton, for a card."""
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    double = common.compiled(lambda x: 2 * x + 1.5, CPU, True)
    with pytest.raises(common.UserError, match="C.. compiler.*--no-compile"):
        common.in_one_line(double)(torch.ones(3))
    triton = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
    with pytest.raises(common.UserError, match="CC environment variable.*--no-compile"):
        fail(
            RuntimeError(
                f"backend='inductor' raised:\nRuntimeError: {triton}\n\nSet TORCHDYNAMO_VERBOSE=1"
            )
        )


PYPI = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"  # torch.cuda.get_arch_list() of 2.13.0 from PyPI


@pytest.mark.parametrize(
    "capability, builds, word",
    [((7, 0), PYPI, "cu126"), ((6, 1), PYPI, "cu126"), ((7, 5), PYPI, ""), ((8, 0), PYPI, ""), ((8, 9), PYPI, ""),
     ((9, 0), PYPI, ""), ((12, 1), PYPI, ""), ((13, 0), PYPI, "newer"), ((13, 0), f"{PYPI} compute_120", ""),
     ((9, 0), "sm_80 sm_90a", ""), ((7, 0), "sm_50 sm_60 sm_70 sm_75", ""), ((11, 0), PYPI, "newer")],
)  # fmt: skip
def test_a_card_that_the_build_has_no_code_for(monkeypatch, capability, builds, word):
    """NVIDIA: code of sm_XY runs on cards of that X whose minor version is at least Y."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", builds.split)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card")
    if not word:
        return common.check_card(torch.device("cuda", 0))
    with pytest.raises(common.UserError) as found:
        common.check_card(torch.device("cuda", 0))
    assert (
        word in str(found.value)
        and "Some Card" in str(found.value)
        and "\n" not in str(found.value)
    )


@pytest.mark.parametrize("script", ["turbo", "avion", "tpt_mae", "sfa_vivit"])
def test_mains_end_in_one_line(script):
    assert "@common.in_one_line\ndef main(cfg):" in (ROOT / f"{script}.py").read_text()


def test_tests_hide_the_gpu():
    """Also from a run that they start."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


# A script's own main(), which must have let go of the checkpoint that it went on from by the end of its first step.
GOING_ON = """
import gc, sys, weakref
sys.path.insert(0, {root!r})
import common, {script} as script
loaded = []
def load(path, real=common.load_checkpoint):
    state = real(path)
    loaded.extend(weakref.ref(x) for x in state["model"].values())
    return state
def advance(self, *args, real=common.Run.advance):
    gc.collect()
    print(len(loaded), "loaded,", sum(x() is not None for x in loaded), "kept")
    return real(self, *args)
common.load_checkpoint, common.Run.advance = load, advance
script.main(common.parse(script.Config, script.RECIPES))
"""


@pytest.mark.parametrize(
    "script, stages", [("turbo", []), ("tpt_mae", ["2:100"]), ("sfa_vivit", ["2:1"])]
)
def test_a_resumed_run_keeps_no_checkpoint(script, stages, toy_args, cli, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(GOING_ON.format(root=str(ROOT), script=script))
    args = [
        driver,
        *toy_args[:6],
        "--batch-size",
        4,
        "--size",
        32,
        "--workers",
        0,
        "--save-minutes",
        0,
    ]
    args += [flag for flag in ("--stages", *stages) if stages]
    args += ["--then", ""] if script == "tpt_mae" else []
    args += ["--max-steps", 4, "--out", tmp_path / "run"]
    first = cli(*args)
    assert first[0] == 0 and "0 loaded" in first[1], first
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["at"]["step"] == 4
    state["at"] |= {"step": 2, "evaluated": 0}
    state["records"] = 0
    torch.save(state, tmp_path / "run/last.pt")
    code, out, err = cli(*args)
    assert code == 0, out + err
    assert f"{len(state['model'])} loaded, 0 kept" in out and "steps 2 to 4" in out, out


# ---- Host waits ------------------------------------------------------------------------------------------------------
# A GPU is kept busy by a host that is ahead of it. The meta device stands for the GPU: to ask for a value there raises,
# and `Waits` notes copies to it that block.

META = common.Context(0, 1, torch.device("meta"), "fp32")
UNSCALED = SimpleNamespace(
    scale=lambda loss: loss,
    unscale_=lambda optimizer: None,
    step=lambda optimizer: optimizer.step(),
    update=lambda: None,
)


class StepEnds(Exception):
    """Ends a run after its first update: what comes then may need values, once an epoch or an interval."""


@pytest.fixture
def step_waits(monkeypatch):
    """Run a script's main() on the meta device for a step; returns what would wait within, from the loader on."""

    def run(script, *flags):
        waits, make_loader, stack = Waits(), data.make_loader, contextlib.ExitStack()

        def begin(*args, **kwargs):
            stack.enter_context(waits)
            return make_loader(*args, **kwargs)

        def advance(self, step, total):
            raise StepEnds

        def optimizer(kind, groups, lr, *rest, **options):
            return torch.optim.SGD(groups, lr=lr, momentum=0.9, foreach=True)

        monkeypatch.setattr(common, "launch", lambda precision: META)
        monkeypatch.setattr(common, "loss_scaler", lambda ctx: UNSCALED)
        monkeypatch.setattr(
            common, "optimizer", optimizer
        )  # torch's fused ones know no meta device
        monkeypatch.setattr(common.Run, "advance", advance)
        monkeypatch.setattr(data, "make_loader", begin)
        args = [str(flag) for flag in flags]
        with pytest.raises(StepEnds), stack:
            script.main(common.parse(script.Config, script.RECIPES, args))
        return waits.found

    return run


AUGMENTED = ["--rand-augment", 9, "--flip", "--mixup", 0.8]
RANDOM = ["--init", "random"]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (turbo, [*AUGMENTED, "--cutmix", 1]),
        (turbo, ["--recipe", "toy_vl", "--repeated", 2, "--flip"]),
        (avion, ["--flip", "--no-skip-duplicates"]),
        (avion, ["--skip-duplicates"]),
        (avion, ["--recipe", "toy_mir", *RANDOM]),
        (avion, ["--recipe", "toy_cls", *RANDOM, "--flip", "--mixup", 0.8]),
        (tpt_mae, ["--then", ""]),
        (tpt_mae, ["--recipe", "toy_ft", *RANDOM, *AUGMENTED, "--cutmix", 1, "--erase", 0.9]),
        (sfa_vivit, ["--colour-jitter", 0.8, *AUGMENTED]),
    ],
)
def test_no_step_waits_for_the_device(script, flags, toy, narrated, step_waits, tmp_path):
    """A step of the script's own main(), of two micro-batches, from the loader to the update."""
    suffix, folder, root = ".csv", toy, toy
    if script is avion or "toy_vl" in flags:
        suffix, folder, root = ".jsonl", narrated, narrated / "videos"
    if script is avion:
        root = narrated / "chunks"
    lists = ["--train-list", folder / f"train{suffix}", "--val-list", folder / f"val{suffix}"]
    size = ["--workers", 0, "--size", 32, "--clip-grad", 1, "--batch-size", 8, "--micro-batch", 4]
    found = step_waits(script, *flags, *lists, "--data-root", root, *size, "--out", tmp_path)
    assert not found


@pytest.mark.parametrize(("flag", "calls"), [("--skip-duplicates", 2), ("--no-skip-duplicates", 0)])
def test_texts_are_hashed_only_where_duplicates_are_asked_about(
    flag, calls, narrated, step_waits, tmp_path, monkeypatch
):
    """A hash of 77 tokens is some hundred operations of the host, a micro-batch."""
    hashed, text_ids = [], avion.text_ids
    monkeypatch.setattr(avion, "text_ids", lambda tokens: hashed.append(1) or text_ids(tokens))
    lists = ["--train-list", narrated / "train.jsonl", "--val-list", narrated / "val.jsonl"]
    size = ["--workers", 0, "--size", 32, "--batch-size", 8, "--micro-batch", 4]
    step_waits(avion, flag, *lists, "--data-root", narrated / "chunks", *size, "--out", tmp_path)
    assert len(hashed) == calls


WAITS = re.compile(
    r"\.(item|tolist|cpu|numpy|nonzero|to|cuda)\(|\bprint\(|non_blocking|synchronize"
)


@pytest.mark.parametrize("script", [turbo, avion, tpt_mae, sfa_vivit])
def test_no_loop_asks_the_device(script):
    """Also on the paths that the runs above don't take: what a step hands to the device goes through data.to_device."""
    loop = inspect.getsource(tpt_mae.train if script is tpt_mae else script.main)
    begin = re.search(r"next\(batches\)|micro_batches\(\):", loop).start()
    step = loop[begin : re.compile(r"zero_grad|run\.update\(").search(loop, begin).start()]
    assert "backward" in step or "note(" in step, step
    assert not WAITS.search(step), step


def test_no_chore_of_a_step_asks_the_device():
    trainer, meter = common.Trainer, common.Meter
    chores = [
        trainer.micro_batches,
        trainer.forward,
        trainer.backward,
        trainer.note,
        trainer.update,
    ]
    for function in [*chores, meter.add, meter.step, common.cached_step, data.join, data._ahead]:
        found = WAITS.search(inspect.getsource(function).replace("piece.to(device)", ""))
        assert not found, (function, found)


def test_copies_to_the_device_come_from_pinned_memory(monkeypatch):
    """Once: `to_device` and Batch.to, whose tensors the loader has pinned; nothing else begins a copy of its own."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, device, non_blocking=False: (device.type, non_blocking)
    )
    assert data.to_device([1, 2], torch.device("cuda")) == ("cuda", True) and len(pinned) == 1
    assert data.to_device(torch.ones(2), torch.device("cpu")) == ("cpu", True) and len(pinned) == 1
    sources = [
        (ROOT / f"{name}.py").read_text()
        for name in ("turbo", "avion", "tpt_mae", "sfa_vivit", "common")
    ]
    assert not any("non_blocking" in source for source in sources)
    assert (ROOT / "data.py").read_text().count("non_blocking=True") == 2
