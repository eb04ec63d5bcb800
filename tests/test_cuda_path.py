"""The path that a GPU takes, as far as a CPU can follow it: what is compiled, what a skipped update leaves behind, and
how many kernels the augmentation begins.

Nothing here needs a card or a C++ compiler: graphs are captured as for CUDA, and then run by PyTorch itself.
"""

import json
import math

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import data

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
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), foreach=False, fused=False),
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
    size = ["--batch-size", 4, "--size", 32, "--workers", 0, "--log-every", 1, "--stages", "2:1,4:1", "--max-steps", 3]
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
    ids=["rand_augment 4", "rand_augment 2", "scenic", "erase", "colour_jitter", "flip", "mixup", "cutmix"],
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


def test_kernels_would_be_seen():
    with Kernels() as kernels:
        x = CLIPS.flatten(0, 1)[3:].float()  # one, of four bytes a pixel
        x.mul_(2)
        x.sum()
        torch.ones(3).to("meta")
    assert kernels.count == 4
    assert kernels.largest == 4 * (CLIPS.numel() - 3 * 3 * 32 * 32)
