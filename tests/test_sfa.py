"""sfa_vivit.py: the model and its parts against slow versions and other libraries, the paper's numbers, the stages."""

import csv
import dataclasses
import json
import math
import re
import shlex
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, command
from test_headers import rows

import common
import data
import sfa_vivit as sfa
from common import UserError, make_key
from sfa_vivit import Stage

KEYS = make_key(torch.arange(4))
FULL = Stage(0, 8, 0, 10, (), False)
SECOND = Stage(1, 8, 10, 20, ("spatial",), True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(*argv):
    return common.parse(sfa.Config, sfa.RECIPES, list(map(str, argv)))


def init_weights(cfg, net):
    """What --init and --init-temporal of a Config give."""
    return sfa.init_weights(cfg.init, cfg.init_temporal, net, cfg.inflate)


def small(stage=FULL, classes=5, **changes):
    """A tiny ViViT on 8 x 32 x 32 clips (4 time steps of 2 x 2 tokens), eval mode, every parameter random."""
    torch.manual_seed(0)
    net = sfa.ViViT(classes, "vivit_toy", **({"frames": stage.frames, "size": 32} | changes)).eval()
    net.enter(stage)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def clips(n=4, frames=8, seed=0, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, frames, 3, size, size), dtype=torch.uint8, generator=generator)


# ---- the model -------------------------------------------------------------------------------------------------------


def slow_transformer(encoder, x):
    """Tokens [n, N, D] through a pre-norm transformer, attention written out with softmax; the normed CLS [n, D]."""
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], 1) + encoder.positions
    for block in encoder.blocks:
        zero = torch.zeros(x.shape[-1])
        bias = torch.cat([block.attn.q_bias, zero, block.attn.v_bias])
        q, k, v = F.linear(block.norm1(x), block.attn.qkv.weight, bias).chunk(3, -1)
        heads = []
        for h in range(2):
            s = slice(64 * h, 64 * h + 64)
            heads.append((q[..., s] @ k[..., s].transpose(1, 2) / 8).softmax(-1) @ v[..., s])
        x = x + block.attn.proj(torch.cat(heads, -1))
        y = block.norm2(x)
        x = x + F.linear(
            F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias)),
            *block.mlp.fc2.parameters(),
        )
    return encoder.norm(x)[:, 0]


@torch.no_grad()
def test_eq_1_by_loops():
    """Each time step alone through the spatial transformer, its CLS through the temporal one; a Conv3d embeds."""
    net, video = small(), clips()
    pixels = video.transpose(1, 2).float() / 127.5 - 1
    kernel = common.linear_to_conv(net.patch_embed.weight, net.patch)
    grid = F.conv3d(pixels, kernel, net.patch_embed.bias, stride=net.patch)  # [B, D, S, 2, 2]
    steps = [
        slow_transformer(net.spatial, grid[:, :, s].flatten(2).transpose(1, 2)) for s in range(4)
    ]
    expected = net.head(slow_transformer(net.temporal, torch.stack(steps, 1)))
    assert torch.allclose(net(video, KEYS), expected, atol=1e-5) and expected.std() > 0.05


@torch.no_grad()
def test_eq_2_adapter():
    """Between the transformers, for each time step alone, in stage 2; zero at first, so that nothing has changed."""
    net, video = small(SECOND), clips()
    x, a = net.over_space(video), net.adapter
    y = torch.stack([x[:, s] + F.linear(F.gelu(F.linear(x[:, s], a.fc1.weight, a.fc1.bias)), *a.fc2.parameters())
                     for s in range(4)], 1)  # fmt: skip
    assert torch.allclose(net.encode(video), slow_transformer(net.temporal, y), atol=1e-5)
    first = small()
    before = first(video, KEYS)
    first.enter(SECOND)
    assert torch.allclose(first(video, KEYS), before, atol=1e-6) and first.adapter is not None


def test_frozen_is_the_same_function_in_any_chunks():
    """No autograd, 1, 3 or all 16 images at a time: the same features as the trained path's, and no gradient."""
    net, video = small(), clips()
    expected = net.over_space(video)
    assert expected.requires_grad
    net.enter(SECOND._replace(adapter=False))
    for net.spatial_chunk in (1, 3, 16, 1000):
        features = net.over_space(video)
        assert not features.requires_grad and torch.allclose(features, expected, atol=1e-5)
    net.enter(FULL)
    net.spatial_chunk, sizes = 3, []
    net.spatial.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with torch.no_grad():  # evaluation
        assert torch.allclose(net.over_space(video), expected, atol=1e-5)
    assert sizes == [3, 3, 3, 3, 3, 1] and net.over_space(video).requires_grad and sizes[-1] == 16


def test_only_what_trains_has_gradients_and_optimizer_state():
    """Stage 2: embedding, CLS, positions and blocks of the spatial transformer are in no group and get no gradient."""
    net = small(SECOND)
    groups = common.param_groups(net, 0.0)
    ids = {id(p) for group in groups for p in group["params"]}
    net(clips(), KEYS).square().sum().backward()
    for name, p in net.named_parameters():
        frozen = name.startswith(("spatial.", "patch_embed."))
        assert (
            (id(p) in ids) != frozen and (p.grad is None) == frozen and p.requires_grad != frozen
        ), name
    net = small(Stage(0, 8, 0, 1, ("temporal",), False))
    net(clips(), KEYS).square().sum().backward()
    assert {n.split(".")[0] for n, p in net.named_parameters() if p.grad is None} == {
        "temporal"
    }  # Table 1, row II
    assert net.patch_embed.weight.grad.abs().sum() > 0


def test_enter_unfreezes_and_drops_the_adapter():
    net = small(SECOND)
    net.enter(FULL)
    assert all(p.requires_grad for p in net.parameters()) and net.adapter is None


@torch.no_grad()
def test_half_precision_keeps_the_frozen_matrices_in_half():
    net, video = small(), clips()
    before = net(video, KEYS)
    net.enter(SECOND, torch.bfloat16)
    types = {name: p.dtype for name, p in net.named_parameters()}
    assert types["spatial.blocks.3.mlp.fc1.weight"] == types["patch_embed.weight"] == torch.bfloat16
    assert types["spatial.positions"] == types["temporal.blocks.0.mlp.fc1.weight"] == torch.float32
    assert types["adapter.fc1.weight"] == types["head.weight"] == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        after = net(video, KEYS)
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()


def test_drop_path_only_in_training_and_alike_over_time():
    """Eval: none. Training: keyed by clip; all time steps of a clip drop the same layers."""
    net = small(drop_path=0.5)
    assert torch.allclose(net(clips(), KEYS), net(clips(), KEYS + 1), atol=1e-6)
    net.train()
    still = clips()[:, :1].expand(-1, 8, -1, -1, -1)
    features = net.over_space(still, KEYS)
    assert torch.allclose(features, features[:, :1].expand_as(features), atol=1e-5)
    assert not torch.allclose(net(clips(), KEYS), net(clips(), KEYS + 1), atol=1e-3)


@torch.no_grad()
def test_attention_picture_is_the_last_blocks_cls_row():
    net = small()
    x = net.embed(net.tubelets(clips(1)))
    shown, weights = net.spatial.attention(x), []
    common.attention, original = (
        lambda q, k, v, **_: weights.append((q, k)) or original(q, k, v),
        common.attention,
    )
    try:
        net.spatial(x)
    finally:
        common.attention = original
    q, k = weights[-1]  # [4, 5, 2, 64]
    rows = [
        (q[:, 0, h, None] @ k[:, :, h].transpose(1, 2) / 8).softmax(-1)[:, 0, 1:] for h in range(2)
    ]
    assert torch.allclose(shown, sum(rows) / 2, atol=1e-5)


# ---- positions, inflation, stages ------------------------------------------------------------------------------------


def test_temporal_positions_by_numpy():
    """8 -> 32 frames: np.interp over the same span, corners on corners; CLS's row kept. One step spreads to all."""
    table = torch.randn(1, 5, 6)
    new = sfa.resize_positions(table, (4,), (16,))
    expected = np.stack(
        [np.interp(np.linspace(0, 3, 16), range(4), table[0, 1:, d].numpy()) for d in range(6)], 1
    )
    assert np.allclose(new[0, 1:], expected, atol=1e-6) and torch.equal(new[:, 0], table[:, 0])
    assert sfa.resize_positions(table, (4,), (4,)) is table
    one = sfa.resize_positions(table[:, :2], (1,), (3,))
    assert torch.equal(one[:, 1:], table[:, 1:2].expand(-1, 3, -1))


def test_spatial_positions_by_numpy():
    table, x = torch.randn(1, 10, 2), np.linspace(0, 2, 5)
    new = sfa.resize_positions(table, (3, 3), (5, 5))[0, 1:].reshape(5, 5, 2)
    for d in range(2):
        rows = np.stack(
            [np.interp(x, range(3), row) for row in table[0, 1:, d].reshape(3, 3).numpy()]
        )
        expected = np.stack([np.interp(x, range(3), column) for column in rows.T], 1)
        assert np.allclose(new[..., d], expected, atol=1e-6)


def test_inflation():
    kernel = torch.randn(4, 3, 2, 2)
    central, average = sfa.inflate(kernel, 2, "central"), sfa.inflate(kernel, 2, "average")
    assert torch.equal(central[:, :, 1], kernel) and not central[:, :, 0].any()
    assert torch.allclose(average, torch.stack([kernel, kernel], 2) / 2)


STAGES = {  # flags: (frames, steps, frozen, adapter) of each stage, at 10 steps an epoch
    ("--stages", "32:3"): [(32, 30, "", False)],  # base
    ("--stages", "32:3", "--freeze", "spatial", "--no-adapter"): [(32, 30, "spatial", False)],  # I
    ("--stages", "32:3", "--freeze", "temporal"): [(32, 30, "temporal", False)],  # II
    ("--stages", "32:3", "--freeze", "spatial"): [(32, 30, "spatial", True)],  # III, IV
    ("--stages", "8:3,32:2"): [(8, 30, "", False), (32, 20, "spatial", True)],  # V
    ("--stages", "8:3,32:2", "--freeze", "none"): [
        (8, 30, "", False),
        (32, 20, "", False),
    ],  # App. F
    ("--stages", "8:1,32:1,128:1"): [
        (8, 10, "", False),
        (32, 10, "spatial", True),
        (128, 10, "spatial", True),
    ],  # A
}


@pytest.mark.parametrize("flags", STAGES)
def test_stages(flags):
    stages = sfa.stages_of(config(*flags), 10)
    assert [(s.frames, s.stop - s.start, ",".join(s.frozen), s.adapter) for s in stages] == STAGES[
        flags
    ]
    assert stages[0].start == 0 and all(a.stop == b.start for a, b in pairwise(stages))
    assert [s.number for s in stages] == list(range(len(stages)))


def test_near_peak():
    """First epoch within one point of the best, and the best's first."""
    curve = [[1, 40.0], [2, 62.9], [3, 63.0], [4, 61.0], [5, 64.0], [6, 64.0]]
    assert sfa.near_peak(curve) == (3, 5) and sfa.near_peak(curve[:1]) == (1, 1)


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_clip_frames_by_hand():
    """4 frames, 2 apart, of 20 reach 6 further than their start: the last start is 13."""
    assert sfa.last_start(20, 4, 2) == 13
    assert sfa.clip_frames(20, 4, 2, 0) == [0, 2, 4, 6] and sfa.clip_frames(20, 4, 2, 13) == [
        13,
        15,
        17,
        19,
    ]
    assert sfa.last_start(10, 4, 8) == 0 and sfa.clip_frames(10, 4, 8, 0) == [
        0,
        3,
        6,
        9,
    ]  # too short: spread
    assert sfa.clip_frames(3, 6, 2, 0) == [
        0,
        0,
        0,
        1,
        1,
        2,
    ]  # too short for the frames: repeated, in order
    assert sfa.clip_frames(1, 2, 1, 0) == [0, 0]
    for count in range(1, 60):
        for start in {0, sfa.last_start(count, 8, 3)}:
            frames = sfa.clip_frames(count, 8, 3, start)
            assert frames == sorted(frames) and 0 <= frames[0] and frames[-1] < count


class FakeVideo:
    info = data.VideoInfo(*[{"width": 90, "height": 60, "num_frames": 100, "fps": 10.0, "duration": 10.0}.get(f, 0)
                            for f in data.VideoInfo._fields])  # fmt: skip

    def clamp(self, second):
        return min(second, self.info.duration)

    def at(self, seconds):
        return [int(s * 10 + 1e-3) for s in seconds]


def sample(cfg, frames, videos, views, video, index, view, key):
    """(frames, box) of a clip as a Config has it."""
    share = cfg.crop_share if cfg.crop else None
    plan = sfa.clips_of(cfg, videos, frames, views).plan
    assert plan.keywords["crop_share"] == share
    return plan(video, index, view, key)


def test_test_views_are_clips_by_squares():
    """4 x 3: starts evenly spread over the video, squares left, centre, right; 1 x 1 the centre of both. A square is
    scenic's: 224 of a short side of 256, here 52 of 60 pixels, in the middle of it."""
    cfg = config("--recipe", "k400")
    plans = [sample(cfg, 8, None, (4, 3), FakeVideo(), 0, view, KEYS[0]) for view in range(12)]
    assert [frames[0] for frames, _ in plans[::3]] == [0, 28, 56, 85] and plans[0][0] == list(
        range(0, 16, 2)
    )
    assert [box for _, box in plans[:3]] == [(0, 4, 52, 52), (18, 4, 52, 52), (38, 4, 52, 52)]
    assert plans[9:] == [(plans[9][0], box) for _, box in plans[:3]]
    frames, box = sample(cfg, 8, None, (1, 1), FakeVideo(), 0, 0, KEYS[0])
    assert frames[0] == 42 and box == (18, 4, 52, 52)


@pytest.mark.parametrize(
    ("recipe", "size", "side"),
    [("k400", 224, 224), ("k600", 224, 224), ("mit", 224, 224), ("epic", 224, 224), ("ssv2", 256, 228),
     ("selse", 256, 228), ("toy", 32, 256)],
)  # fmt: skip
def test_crops_of_a_video_of_340_by_256(recipe, size, side):
    """scenic: 224 of 256 pixels, on SSv2 256 of 288; in training that over the jitter. The toy's are the whole side."""
    cfg, video = config("--recipe", recipe, "--labels", "classes"), FakeVideo()
    video.info = video.info._replace(width=340, height=256)
    assert cfg.size == size
    for views, view, x in (((1, 1), 0, 170 - side // 2), ((4, 3), 0, 0), ((4, 3), 2, 340 - side)):
        _, box = sample(cfg, 8, None, views, video, 0, view, KEYS[0])
        assert box == (x, 128 - side // 2, side, side)
    video.info = video.info._replace(width=256, height=340)
    assert sample(cfg, 8, None, (4, 3), video, 0, 2, KEYS[0])[1] == (
        128 - side // 2,
        340 - side,
        side,
        side,
    )
    drawn = [
        sample(cfg, 8, None, None, video, 0, 0, key)[1][2] for key in make_key(torch.arange(300))
    ]
    low, high = (side, side) if recipe == "toy" else (side / 1.33, side / 0.9)
    assert low - 2 <= min(drawn) < low + 4 and high - 5 < max(drawn) <= high + 2


# ---- RandAugment -----------------------------------------------------------------------------------------------------

# What a pixel of grey becomes at magnitude 15 and at 20, worked out by hand from scenic's code: a bit mask of 6 and of
# 8 bits; thresholds 384 and 512 as bytes, 128 and 0; 165 and 220 added below 128; factors 2.8 and 3.7, from black,
# from white (the "mean", pixels / 256, is above 255), and from grey itself.
BY_HAND = {
    "Invert": {10: (245, 245), 100: (155, 155), 201: (54, 54)},
    "Posterize": {10: (8, 10), 100: (100, 100), 201: (200, 201)},
    "Solarize": {10: (10, 245), 100: (100, 155), 201: (54, 54)},
    "SolarizeAdd": {10: (175, 230), 100: (255, 255), 201: (201, 201)},
    "Brightness": {10: (28, 37), 100: (255, 255), 201: (255, 255)},
    "Contrast": {10: (0, 0), 100: (0, 0), 201: (103, 55)},
    "Color": {10: (10, 10), 100: (100, 100), 201: (201, 201)},
}


def scenic(name, tall, v):
    """An operation of data.SCENIC_AUGMENT on a clip as it sees it, uint8 [C, T H, W]."""
    function, values = data.SCENIC_AUGMENT[name]
    row = torch.as_tensor(values(v, tall.shape[2], tall.shape[1]), dtype=torch.float64)
    return function(tall[None, None], row[None])[0, 0]


@pytest.mark.parametrize("name", BY_HAND)
def test_scenic_operations_by_hand(name):
    for pixel, expected in BY_HAND[name].items():
        x = torch.full((3, 300, 300), pixel, dtype=torch.uint8)
        for magnitude, value in zip((15, 20), expected, strict=True):
            assert scenic(name, x, magnitude / 10).unique().tolist() == [value], (pixel, magnitude)


def test_scenic_operations_see_the_whole_clip():
    """Stretched and equalised over all frames at once, each colour alone; colour moves away from luma; the middle of
    a sharpened pixel's 3 x 3 has 5 of 13 parts."""
    tall = torch.zeros(3, 4, 5, dtype=torch.uint8)  # two frames of 2 x 5
    tall[0], tall[1] = torch.tensor([0, 0, 51, 51])[:, None], 7
    stretched = scenic("AutoContrast", tall, 2.0)
    assert stretched[0, :, 0].tolist() == [0, 0, 255, 255] and stretched[1:].unique().tolist() == [
        0,
        7,
    ]
    ramp = (
        torch.arange(512)
        .repeat_interleave(2)
        .div(4, rounding_mode="floor")
        .byte()
        .view(1, 16, 64)
        .expand(3, -1, -1)
    )
    assert scenic("Equalize", torch.cat([ramp // 2, ramp // 2], 1), 2.0).max() == 255
    red = torch.tensor([200, 100, 100], dtype=torch.uint8)[:, None, None].expand(
        3, 9, 9
    )  # luma 129.9
    assert scenic("Color", red, 2.0)[:, 0, 0].tolist() == [
        255,
        19,
        19,
    ]  # 130 + 3.7 * (70, -30, -30)
    dot = torch.zeros(3, 9, 9, dtype=torch.uint8)
    dot[:, 4, 4] = 26  # smoothed 10, beside it 2
    sharp = scenic("Sharpness", dot, 1.0)[0]  # factor 1.9
    assert sharp[4, 4] == 40 and sharp.sum() == 40


def test_scenic_rand_augment_draws(monkeypatch):
    """Two of 12 outcomes a clip, any as likely, with replacement: the 11 operations, and nothing; without a sign."""
    seen = []

    def note(name):
        def function(x, values):
            seen.extend((name, v) for v in values.flatten().tolist())
            return x

        return function, lambda v, w, h: [v]

    for name in data.SCENIC_AUGMENT:
        if name != "Cutout":
            monkeypatch.setitem(data.SCENIC_AUGMENT, name, note(name))
    n = 3000
    white = torch.full((n, 1, 3, 1, 1), 255, dtype=torch.uint8)
    cut = (
        (data.scenic_rand_augment(white, make_key(torch.arange(n)), 15) == 0)
        .flatten(1)
        .any(1)
        .sum()
        .item()
    )
    names = [*BY_HAND, "AutoContrast", "Equalize", "Sharpness"]
    assert {name for name, _ in seen} == set(names) and {v for _, v in seen} == {1.5}
    spread = 4 * math.sqrt(2 * n * 11 / 144)
    for name in names:
        assert abs(sum(other == name for other, _ in seen) - 2 * n / 12) < spread, name
    assert abs(len(seen) - 2 * n * 10 / 12) < 2 * spread
    assert abs(cut - n * (1 - (11 / 12) ** 2)) < spread


def test_scenic_cutout(monkeypatch):
    """A black square of 160 pixels at magnitude 20, 120 at 15, the same in all frames, its middle anywhere in the frame,
    from the first pixel to the last; what is outside is lost."""
    monkeypatch.setattr(data, "SCENIC_AUGMENT", {"Cutout": None})
    keys = make_key(torch.arange(40))
    for magnitude, side in ((20, 160), (15, 120)):
        white = torch.full((40, 2, 3, 224, 250), 255, dtype=torch.uint8)
        out = data.scenic_rand_augment(white, keys, magnitude, layers=1)
        black = out == 0
        assert torch.equal(black.any(1), black.all(1)) and torch.equal(black.any(2), black.all(2))
        tops, heights = [], []
        for clip in black[:, 0, 0]:
            rows, columns = clip.any(1).nonzero().flatten(), clip.any(0).nonzero().flatten()
            if len(rows):
                assert clip[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
                tops.append(rows[0].item())
                heights.append(len(rows))
                assert side / 2 <= len(rows) <= side and side / 2 <= len(columns) <= side
        assert 10 < len(heights) < 30 and max(heights) == side  # half of the draws are nothing
        assert min(tops) == 0 and max(tops) > 224 - side
    assert torch.equal(out, data.scenic_rand_augment(white, keys, 15, layers=1))


def test_the_recipes_clips_are_augmented_as_scenic(monkeypatch):
    """augment() with --rand-augment: scenic's, at the magnitude given, and each clip by its own key."""
    x, calls = clips(3, 2), []
    keys, real = make_key(torch.arange(3)), data.scenic_rand_augment
    monkeypatch.setattr(
        data, "scenic_rand_augment", lambda *a, **k: (calls.append((a[2], k)), real(*a, **k))[1]
    )
    cfg = config("--recipe", "ssv2", "--no-flip")
    out = sfa.augment(x, keys, cfg.colour_jitter, cfg.rand_augment, cfg.flip)
    assert calls == [(20.0, {"layers": 2})] and not torch.equal(out, x)
    for i in range(3):
        assert torch.equal(out[i : i + 1], real(x[i : i + 1], keys[i : i + 1], 20, layers=2))


def test_training_clips_vary_in_place_and_scale():
    cfg, videos = config("--recipe", "k400"), FakeVideo()
    drawn = [sample(cfg, 8, None, None, videos, 0, 0, key) for key in make_key(torch.arange(300))]
    starts, sides = {f[0] for f, _ in drawn}, [box[2] for _, box in drawn]
    assert min(starts) == 0 and max(starts) >= 83 and len(starts) > 60
    # 16 frames are one more than 8 frames, 2 apart, span: both starts are drawn, as often.
    short = FakeVideo()
    short.info = FakeVideo.info._replace(num_frames=16)
    starts = [
        sample(cfg, 8, None, None, short, 0, 0, key)[0][0] for key in make_key(torch.arange(300))
    ]
    assert set(starts) == {0, 1} and 110 < sum(starts) < 190
    low, high = 60 * 224 / 256 / 1.33, 60 * 224 / 256 / 0.9
    assert low - 2 <= min(sides) < low + 3 and high - 3 < max(sides) <= high + 2
    assert {box[1] for _, box in drawn} != {0}


def test_epic_clips_stay_in_the_action():
    cfg = config("--recipe", "epic")
    videos = data.Captions([("a", 2.0, 4.0, ""), ("a", 9.0, 12.0, ""), ("a", 11.0, 12.0, "")])
    for key in KEYS:
        frames, _ = sample(cfg, 8, videos, None, FakeVideo(), 0, 0, key)
        assert 20 <= frames[0] and frames[-1] < 40 and np.diff(frames).tolist() == [1] * 7
    frames, _ = sample(cfg, 12, videos, (1, 1), FakeVideo(), 1, 0, KEYS[0])
    assert frames[0] == 90 and frames[-1] == 99  # of 3 s there is 1: 10 frames, repeated
    with pytest.raises(ValueError, match="nothing from second 11"):
        sample(cfg, 8, videos, None, FakeVideo(), 2, 0, KEYS[0])


# ---- loss and scores -------------------------------------------------------------------------------------------------


def test_loss_by_loops():
    """One head: cross entropy of smoothed labels. Verb and noun: the mean of the two."""
    logits, labels = torch.randn(3, 7), torch.tensor([0, 9, 11])
    targets = sfa.soft_targets(labels, (3, 4), 0.2)
    for b, label in enumerate(labels.tolist()):
        verb, noun = divmod(label, 4)
        a = F.cross_entropy(logits[b, :3], torch.tensor(verb), label_smoothing=0.2)
        c = F.cross_entropy(logits[b, 3:], torch.tensor(noun), label_smoothing=0.2)
        assert sfa.vivit_loss(logits, targets, (3, 4))[b].item() == pytest.approx(
            (a + c).item() / 2, rel=1e-5
        )
    one = sfa.vivit_loss(logits, sfa.soft_targets(labels % 7, (7,), 0.1), (7,))
    assert torch.allclose(
        one, F.cross_entropy(logits, labels % 7, label_smoothing=0.1, reduction="none"), atol=1e-5
    )


def test_action_is_the_best_pair():
    logits = torch.randn(4, 7)
    scores = sfa.joint_scores(logits, (3, 4)).exp()
    for b in range(4):
        verbs, nouns = logits[b, :3].softmax(0), logits[b, 3:].softmax(0)
        assert torch.allclose(
            scores[b], torch.stack([v * n for v in verbs for n in nouns]), atol=1e-6
        )
    assert torch.allclose(sfa.joint_scores(logits, (7,)).exp(), logits.softmax(1), atol=1e-6)


# ---- weights of image models -----------------------------------------------------------------------------------------


def vit_arrays(form, seed=0, size=2):
    """A random Google ViT of vivit_toy's size by its names: "original", "big_vision", or that with "stacked" layers."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(0, 0.2, shape).astype(np.float32)
    mha, norm2, mlp = (1, 2, 3) if form == "original" else (0, 1, 0)
    arrays = {"cls": draw(1, 1, 128), "embedding/kernel": draw(16, 16, 3, 128) / 5, "embedding/bias": draw(128),
              "Transformer/encoder_norm/scale": 1 + draw(128), "Transformer/encoder_norm/bias": draw(128),
              "head/kernel": draw(128, 5), "head/bias": draw(5)}  # fmt: skip
    arrays["Transformer/posembed_input/pos_embedding"] = draw(1, size**2 + 1, 128)
    for i in range(4):
        block = {f"MultiHeadDotProductAttention_{mha}/{x}/{y}": draw(*shape) for x in ("query", "key", "value")
                 for y, shape in (("kernel", (128, 2, 64)), ("bias", (2, 64)))}  # fmt: skip
        block |= {
            f"MultiHeadDotProductAttention_{mha}/out/kernel": draw(2, 64, 128) / 2,
            f"MultiHeadDotProductAttention_{mha}/out/bias": draw(128),
            f"MlpBlock_{mlp}/Dense_0/kernel": draw(128, 512) / 2,
            f"MlpBlock_{mlp}/Dense_0/bias": draw(512),
            f"MlpBlock_{mlp}/Dense_1/kernel": draw(512, 128) / 4,
            f"MlpBlock_{mlp}/Dense_1/bias": draw(128),
        }
        for n in (0, norm2):
            block |= {f"LayerNorm_{n}/scale": 1 + draw(128), f"LayerNorm_{n}/bias": draw(128)}
        arrays |= {f"Transformer/encoderblock_{i}/{name}": x for name, x in block.items()}
    if form == "original":
        arrays |= {"pre_logits/kernel": draw(128, 128), "pre_logits/bias": draw(128)}
    else:
        positions = arrays.pop("Transformer/posembed_input/pos_embedding")
        arrays["cls"] = arrays["cls"] + positions[:, :1]  # there CLS has no position of its own
        arrays["pos_embedding"] = positions[:, 1:]
    if form == "stacked":
        names = [n for n in arrays if "encoderblock_0/" in n]
        for name in names:
            parts = [arrays.pop(name.replace("block_0", f"block_{i}")) for i in range(4)]
            arrays[name.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
    prefix = {"original": "", "big_vision": "params/", "stacked": "opt/target/"}[form]
    return {prefix + name: x for name, x in arrays.items()}


def slow_vit(arrays, pixels, gelu="none"):
    """The original form's ViT in numpy einsums, key biases and all: pixels [B, 3, H, W] in [-1, 1] -> CLS [B, D]."""
    norm = lambda x, w: (
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * w["scale"]
        + w["bias"]
    )
    at = lambda prefix: {
        n[len(prefix) + 1 :]: x for n, x in arrays.items() if n.startswith(prefix + "/")
    }
    B, _, H, W = pixels.shape
    cut = pixels.reshape(B, 3, H // 16, 16, W // 16, 16)
    x = (
        np.einsum("bchiwj,ijcd->bhwd", cut, arrays["embedding/kernel"]).reshape(B, -1, 128)
        + arrays["embedding/bias"]
    )
    x = (
        np.concatenate([np.repeat(arrays["cls"], B, 0), x], 1)
        + arrays["Transformer/posembed_input/pos_embedding"]
    )
    for i in range(4):
        w = at(f"Transformer/encoderblock_{i}")
        y = norm(x, {k: w[f"LayerNorm_0/{k}"] for k in ("scale", "bias")})
        q, k, v = (np.einsum("bnd,dhe->bnhe", y, w[f"MultiHeadDotProductAttention_1/{z}/kernel"])
                   + w[f"MultiHeadDotProductAttention_1/{z}/bias"] for z in ("query", "key", "value"))  # fmt: skip
        scores = np.einsum("bnhe,bmhe->bhnm", q, k) / 8
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("bhnm,bmhe->bnhe", scores / scores.sum(-1, keepdims=True), v)
        x = x + np.einsum("bnhe,hed->bnd", y, w["MultiHeadDotProductAttention_1/out/kernel"])
        x = x + w["MultiHeadDotProductAttention_1/out/bias"]
        y = norm(x, {k: w[f"LayerNorm_2/{k}"] for k in ("scale", "bias")})
        y = torch.from_numpy(y @ w["MlpBlock_3/Dense_0/kernel"] + w["MlpBlock_3/Dense_0/bias"])
        y = F.gelu(y, approximate=gelu).numpy()
        x = x + y @ w["MlpBlock_3/Dense_1/kernel"] + w["MlpBlock_3/Dense_1/bias"]
    return norm(x, {k: arrays[f"Transformer/encoder_norm/{k}"] for k in ("scale", "bias")})[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("how", ["central", "average"])
@pytest.mark.parametrize(
    ("form", "gelu"),
    [("original", "exact"), ("original", "tanh"), ("big_vision", "exact"), ("stacked", "exact")],
)
def test_npz_features_of_a_still_clip(form, gelu, how, tmp_path):
    """Every form of the same weights: the features of a still clip are the image model's, to 1e-5 of their scale."""
    np.savez(tmp_path / "vit.npz", **vit_arrays(form))
    net = sfa.ViViT(8, "vivit_toy", frames=4, size=32, gelu=gelu).eval()
    cfg = config("--init", tmp_path / "vit.npz", "--inflate", how)
    message = common.load_weights(net, init_weights(cfg, net), cfg.init)
    image = clips(3, 1)
    pixels = image[:, 0].numpy().astype(np.float64) / 127.5 - 1
    expected = slow_vit(vit_arrays("original"), pixels, {"exact": "none"}.get(gelu, gelu))
    features = net.over_space(image.expand(-1, 4, -1, -1, -1))
    assert (features[:, 0] - torch.from_numpy(expected)).abs().max() < 1e-5 * np.abs(expected).max()
    assert torch.equal(features[:, 0], features[:, 1]) and np.std(expected) > 0.1
    assert "loaded 58 (" in message and "left at init 34 (spatial.eps" in message, message


@torch.no_grad()
@pytest.mark.parametrize("how", ["central", "average"])
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
@pytest.mark.parametrize("eps", [{}, {"layer_norm_eps": 1e-3}], ids=["1e-12", "1e-3"])
def test_hub_features_of_a_still_clip(eps, kind, how, tmp_path):
    """transformers' ViT of a random configuration, saved as the hub's: the same, with and without the prefix vit."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=128, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=512, **eps)).eval()  # fmt: skip
    if eps:
        for name, p in model.named_parameters():
            torch.nn.init.normal_(p, float("norm" in name and "weight" in name), 0.1)
    model.save_pretrained(tmp_path)
    net = sfa.ViViT(8, "vivit_toy", frames=4, size=32).eval()
    cfg = config("--init", tmp_path, "--inflate", how)
    common.load_weights(net, init_weights(cfg, net), cfg.init)
    image = clips(3, 1)
    pixels = image[:, 0] / 127.5 - 1
    expected = (model if kind == "ViTModel" else model.vit)(pixels).last_hidden_state[:, 0]
    features = net.over_space(image.expand(-1, 4, -1, -1, -1))
    assert (
        features - expected[:, None]
    ).abs().max() < 1e-5 * expected.abs().max() and expected.std() > 0.1
    torch.save(
        {"model": net.state_dict()}, tmp_path / "ours.pt"
    )  # the epsilon goes with the weights
    again = sfa.ViViT(8, "vivit_toy", frames=4, size=32).eval()
    common.load_weights(again, init_weights(config("--init", tmp_path / "ours.pt"), again), "x")
    assert torch.equal(again.over_space(image.expand(-1, 4, -1, -1, -1)), features)


def test_image_weights_fit_another_size(tmp_path):
    """Positions of 2 x 2 patches spread over 4 x 4; the rest is the same."""
    np.savez(tmp_path / "vit.npz", **vit_arrays("original"))
    net = sfa.ViViT(8, "vivit_toy", frames=4, size=64)
    weights = init_weights(config("--init", tmp_path / "vit.npz"), net)
    old = torch.from_numpy(vit_arrays("original")["Transformer/posembed_input/pos_embedding"])
    assert torch.allclose(weights["spatial.positions"], sfa.resize_positions(old, (2, 2), (4, 4)))
    assert common.load_weights(net, weights, "x").count("loaded 58 ") == 1


def test_own_weights_fit_other_frames_and_classes(tmp_path):
    """Table 2: another data set's stage 1 goes on, its classifier stays behind; a spatial-only file is enough for I."""
    source = small(classes=5)
    torch.save({"model": source.state_dict()}, tmp_path / "8.pt")
    net = sfa.ViViT(9, "vivit_toy", frames=32, size=32)
    weights = init_weights(config("--init", tmp_path / "8.pt"), net)
    assert weights["temporal.positions"].shape == (1, 17, 128) and "head.weight" not in weights
    same = init_weights(config("--init", tmp_path / "8.pt"), small())
    assert same.keys() == source.state_dict().keys()
    with pytest.raises(
        UserError,
        match=r"8.pt: its temporal transformer has 2 layers, this one 3; .*--temporal-depth 2",
    ):
        init_weights(config("--init", tmp_path / "8.pt"), small(temporal_depth=3))


def test_temporal_transformer_from_videomae(tmp_path):
    """Row IV: the first layers of VideoMAE's encoder, and its norm; spatial and the rest untouched."""
    block = small().spatial.blocks[0].state_dict()
    state = {
        f"encoder.blocks.{i}.{k}": torch.full_like(v, i + 1.0)
        for i in range(3)
        for k, v in block.items()
    }
    state |= {"encoder.norm.weight": torch.full((128,), 7.0), "encoder.norm.bias": torch.zeros(128)}
    torch.save(
        {"model": state | {"decoder.blocks.0.norm1.weight": torch.zeros(3)}}, tmp_path / "mae.pth"
    )
    net = small()
    before = net.spatial.positions.clone()
    message = common.load_weights(
        net, init_weights(config("--init-temporal", tmp_path / "mae.pth"), net), "x"
    )
    assert "loaded 28 (" in message and message.endswith("not used 0")
    with pytest.raises(UserError, match="vit.npz: no temporal transformer"):
        np.savez(tmp_path / "vit.npz", **vit_arrays("original"))
        init_weights(config("--init-temporal", tmp_path / "vit.npz"), net)
    with pytest.raises(UserError, match=r"mae.pth: no image ViT's .* \(it holds encoder.blocks.0"):
        init_weights(config("--init", tmp_path / "mae.pth"), net)
    assert all((p == i + 1).all() for i in range(2) for p in net.temporal.blocks[i].parameters())
    assert (net.temporal.norm.weight == 7).all() and torch.equal(net.spatial.positions, before)
    torch.save({"model": net.state_dict()}, tmp_path / "ours.pt")
    weights = init_weights(config("--init-temporal", tmp_path / "ours.pt"), net)
    assert weights and all(name.startswith("temporal.") for name in weights)


def test_a_frozen_encoder_needs_all_of_its_weights(tmp_path):
    """A ViT without CLS is fine to start from, not to freeze. Positions must be a square's."""
    np.savez(tmp_path / "vit.npz", **vit_arrays("original"))
    arrays = vit_arrays("original")
    arrays.pop("cls")
    np.savez(tmp_path / "gap.npz", **arrays)
    first = Stage(0, 8, 0, 1, ("spatial",), True)
    init_weights(config("--init", tmp_path / "vit.npz"), small(first))
    init_weights(config("--init", tmp_path / "gap.npz"), small())
    with pytest.raises(UserError, match=r"gap.npz: no spatial.cls_token in it; --freeze spatial"):
        init_weights(config("--init", tmp_path / "gap.npz"), small(first))
    positions = np.zeros((1, 6, 128), np.float32)  # CLS, a token of distillation, 2 x 2 patches
    np.savez(
        tmp_path / "deit.npz", **arrays | {"Transformer/posembed_input/pos_embedding": positions}
    )
    with pytest.raises(UserError, match=r"deit.npz: its 6 positions"):
        init_weights(config("--init", tmp_path / "deit.npz"), small())


# ---- the paper's numbers ---------------------------------------------------------------------------------------------

MILLIONS = {"vivit_b": (86.4, 28.7, 1.2), "vivit_l": (304.1, 50.8, 2.1), "vivit_h": (631.9, 79.2, 3.3),
            "vivit_g": (1012.5, 101.6, 4.0)}  # fmt: skip


@pytest.mark.parametrize("model", MILLIONS)
def test_parameters(model):
    """Spatial; temporal of 4 layers with 400 classes; adapter; 0.2 %. (The paper's "1.5B" of g is not this.)"""
    with torch.device("meta"):
        net = sfa.ViViT(400, model, frames=32)
        net.enter(SECOND)
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    spatial, temporal, adapter = MILLIONS[model]
    assert count(net.patch_embed, net.spatial) == pytest.approx(spatial, rel=2e-3)
    assert count(net.patch_embed, net.spatial, net.temporal, net.head) == pytest.approx(
        spatial + temporal, rel=2e-3
    )
    assert count(net.adapter) == pytest.approx(adapter, abs=0.05)


@pytest.mark.parametrize(
    ("recipe", "model", "depth", "millions"),
    [("k400", "vivit_b", 4, 115.1), ("k400", "vivit_l", 24, 606.8), ("k600", "vivit_l", 24, 607.0),
     ("ssv2", "vivit_l", 4, 354.7), ("epic", "vivit_l", 4, 354.9), ("k600", "vivit_h", 4, 710.9),
     ("k400", "vivit_g", 4, 1113.6)],
)  # fmt: skip
def test_temporal_depth_of_model_and_data_set(recipe, model, depth, millions):
    """scenic: 4 layers but for L on Kinetics; ViViT-B of the ViViT paper's Table 4 has 115.1 M parameters."""
    cfg = config("--recipe", recipe, "--model", model)
    heads = sfa.EPIC if recipe == "epic" else (cfg.num_classes,)
    with torch.device("meta"):
        net = sfa.build(cfg, heads, FULL)
        assert len(net.temporal.blocks) == depth
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=3e-3)
        assert (
            len(sfa.build(dataclasses.replace(cfg, temporal_depth=2), heads, FULL).temporal.blocks)
            == 2
        )


def whole_gmacs(model, stage, **changes):
    """Forward and backward of the whole model on meta, not by layers or time steps."""
    with torch.device("meta"):
        net = sfa.ViViT(174, model, stage.frames, attention="sdpa", spatial_chunk=10**6, **changes)
        net.enter(stage)
        clip = torch.empty(1, stage.frames, 3, 224, 224, dtype=torch.uint8)
        return common.count_macs(
            lambda: net(clip, torch.zeros(1, dtype=torch.int64)).sum().backward()
        )


def test_cost_of_the_stages():
    """Counted on the real model: stage 2 is a third of full training, stage 1 is 8 / F of it; a frozen temporal
    transformer (Table 1's "0.5x") saves nothing; count_gmacs agrees with the whole count."""
    model = "vivit_b"
    at = lambda frames, frozen=(), adapter=False: Stage(0, frames, 0, 0, frozen, adapter)
    full, stage_2 = whole_gmacs(model, at(32)), whole_gmacs(model, at(32, ("spatial",), True))
    assert 0.330 < stage_2 / full < 0.340
    assert whole_gmacs(model, at(8)) / full == pytest.approx(8 / 32, abs=1e-3)
    row_ii, plain = at(32, ("temporal",)), at(8, ("spatial",))
    costs = {at(32): full, at(32, ("spatial",), True): stage_2} | {
        s: whole_gmacs(model, s) for s in (row_ii, plain)
    }
    assert 0.998 < costs[row_ii] / full < 1
    with torch.device("meta"):
        net = sfa.ViViT(174, model, 32, attention="sdpa")
    for stage, expected in costs.items():
        assert sfa.count_gmacs(net, stage) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("model", ["vivit_l", "vivit_h", "vivit_g"])
def test_cost_of_the_large_models(model):
    with torch.device("meta"):
        net = sfa.ViViT(400, model, 8, attention="sdpa")
    for frames in (32, 64, 128):
        full = sfa.count_gmacs(net, Stage(0, frames, 0, 0, (), False))
        assert (
            0.330 < sfa.count_gmacs(net, Stage(0, frames, 0, 0, ("spatial",), True)) / full < 0.340
        )
        assert sfa.count_gmacs(net, Stage(0, 8, 0, 0, (), False)) / full == pytest.approx(
            8 / frames, abs=1e-3
        )


def test_saved_activations():
    """Real CPU tensors, B's width with 2 + 2 layers: stage 2 saves under 5 % of full training; with more frames only
    what the temporal transformer, adapter and clip need is more."""
    sfa.MODELS["test"] = sfa.MODELS["vivit_b"] | {"depth": 2, "temporal": 2}
    try:
        saved = {}
        for frames in (8, 16):
            for name, stage in (("full", FULL), ("second", SECOND)):
                net = sfa.ViViT(8, "test", frames)
                net.enter(stage._replace(frames=frames))
                saved[name, frames] = common.saved_bytes(net, clips(1, frames, size=224), KEYS[:1])
            x = torch.randn(1, frames // 2, 768)  # of the last net, in stage 2
            saved["temporal", frames] = sum(
                common.saved_bytes(m, x) for m in (net.temporal, net.adapter)
            )
    finally:
        del sfa.MODELS["test"]
    print({k: f"{v / 1e6:.2f} MB" for k, v in saved.items()})
    assert (
        saved["second", 8] < 0.05 * saved["full", 8]
        and saved["second", 16] < 0.05 * saved["full", 16]
    )
    assert 1.9 < saved["full", 16] / saved["full", 8] < 2.1
    growth = {name: saved[name, 16] - saved[name, 8] for name in ("second", "temporal")}
    assert growth["second"] == pytest.approx(growth["temporal"], rel=0.05)


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_model_is_what_the_whole_model_saves(frozen):
    """Bytes a time step, measured on one block, against the whole toy model with 16 frames more, and what saved tensors
    leave out: 10 bytes a pixel (of which full training saves 4, the embedding's input), and the blocks at work."""
    flags = ["--precision", "fp32", "--model", "vivit_toy", "--size", 64]
    cfg, stage = config(*flags), SECOND if frozen else FULL
    nets, saved = [], []
    for frames in (16, 32):
        net = sfa.ViViT(8, "vivit_toy", frames, 64)
        net.enter(stage._replace(frames=frames))
        nets.append(net)
        saved.append(common.saved_bytes(net, clips(1, frames, size=64), KEYS[:1]))
    memory = sfa.memory_model(cfg, nets[0], stage, sfa.block_memory(cfg, nets[0]))
    block = nets[0].temporal.blocks[0]
    grown = lambda tokens: [
        common.saved_bytes(block, torch.randn(n, tokens, 128, requires_grad=True)) for n in (1, 2)
    ]
    at_work = {n: high - low for n, (low, high) in ((n, grown(n)) for n in (17, 64))}
    expected = (saved[1] - saved[0]) / 8 + at_work[64] / 64
    expected += 10 * 2 * 3 * 64 * 64 if frozen else 6 * 2 * 3 * 64 * 64 + at_work[17]
    assert memory[1] == pytest.approx(expected, rel=0.05)
    assert (
        sfa.largest_frames((2**30, 2**20), 2) == 2 * 1024
        and sfa.largest_frames((2**30, 2**20), 0.5) == 0
    )
    trained = sum(p.numel() for p in nets[0].parameters() if p.requires_grad)
    kept = sum(p.numel() for p in nets[0].parameters()) - trained
    work = memory[0] - 16 * trained - 4 * kept
    assert (work > 0) == frozen and work < 50e6


# Each row of the paper's tables and figures as flags.
IMAGE = ["--init", "L_16.npz"]
ROWS = {
    "T1 base": ["ssv2", "--stages", "32:35", *IMAGE],
    "T1 I": ["ssv2", "--stages", "32:35", "--freeze", "spatial", "--no-adapter", *IMAGE],
    "T1 II": ["ssv2", "--stages", "32:35", "--freeze", "temporal", *IMAGE],
    "T1 III": ["ssv2", "--stages", "32:35", "--freeze", "spatial", *IMAGE],
    "T1 IV": ["ssv2", "--stages", "32:35", "--freeze", "spatial", *IMAGE, "--init-temporal", "videomae.pth"],
    "T1 V": ["ssv2", "--stages", "8:35,32:35", *IMAGE],
    "T1 V, B": ["ssv2", "--stages", "8:35,32:35", "--model", "vivit_b", "--init", "B_16.npz"],
    "T2 K400 to SSv2": ["ssv2", "--stages", "64:35", "--freeze", "spatial", "--init", "k400.pt"],
    "T2 SSv2 to K400": ["k400", "--stages", "128:30", "--freeze", "spatial", "--init", "ssv2.pt", "--temporal-depth", 4],
    "T4 2080 Ti": ["k400", "--precision", "fp16", "--gpu-gb", "11"],
    "T5 K400": ["k400"],
    "T5 K600": ["k600"],
    "T6 SSv2": ["ssv2"],
    "T6 Selse": ["selse"],
    "T6 EK": ["epic"],
    "T5 K600, base": ["k600", "--stages", "128:30"],
    **{f"T6 {name}, base": [name, "--stages", stages] for name, stages in (("ssv2", "64:35"), ("selse", "64:35"),
                                                                           ("epic", "64:50"))},
    "F1, F4, T5 base": ["k400", "--stages", "128:30"],
    "F1 B": ["k400", "--model", "vivit_b"],
    "F1 B, base": ["k400", "--stages", "128:30", "--model", "vivit_b"],
    "F4 64": ["k400", "--stages", "8:30,64:30"],
    "F4 64, base": ["k400", "--stages", "64:30"],
    "F3 image": ["k400", "--stages", "64:30", "--freeze", "spatial", *IMAGE],
    "T8 L": ["k400", "--stages", "48:30", "--freeze", "spatial", "--no-adapter", *IMAGE],
    "F5 A": ["k400", "--stages", "8:10,32:10,128:10"],
    "F5 B": ["k400", "--stages", "8:10,128:20"],
    "F5 C": ["k400", "--stages", "8:10,128:30"],
    "F5 D": ["k400", "--stages", "8:30,128:30"],
    "F5 E": ["k400", "--stages", "128:30"],
    "T10": ["k400", "--stages", "8:30,128:30", "--freeze", "none"],
    **{f"F3 {n}": ["k400", "--stages", f"{n}:30,96:30"] for n in (2, 4, 16, 32, 48)},
    "T3 L": ["k400", "--stages", "8:30,48:30", "--views", 1, "--crops", 1],
    **{f"{t} {m}": ["k400", "--stages", stages, "--model", f"vivit_{m}", *extra]
       for t, m, stages, *extra in (("T3", "h", "8:30,48:30", "--views", 1, "--crops", 1), ("T4", "g", "8:30,48:30"),
                                    ("T3", "g", "8:30,48:30", "--views", 1, "--crops", 1),
                                    ("T4, T5", "h", "8:30,128:30"), ("T5, base", "h", "128:30"),
                                    ("T10", "h", "8:30,128:30", "--freeze", "none"))},
    "T5 MiT": ["mit", "--model", "vivit_h"],
    "T5 MiT, base": ["mit", "--model", "vivit_h", "--stages", "128:10"],
    "T5 K600 H": ["k600", "--model", "vivit_h"],
    "T5 K600 H, base": ["k600", "--model", "vivit_h", "--stages", "128:30"],
    "T8 H": ["k400", "--model", "vivit_h", "--stages", "16:30", "--freeze", "spatial",
             "--no-adapter", "--init", "H_14.npz"],
}  # fmt: skip


def gmacs_by_hand(net, stage):
    """Of a training step on a clip: a product's forward pass and the gradients of its two factors, as far as they are
    needed. The pixels' is not, nor, of a frozen layer, that of its weights; nothing of a frozen encoder is."""
    width, hidden, steps = net.width, net.spatial.blocks[0].mlp.fc1.out_features, stage.frames // 2

    def layer(tokens, linear, attention):
        return tokens * width * (linear * (4 * width + 2 * hidden) + attention * 2 * tokens)

    times = 1 if "spatial" in stage.frozen else 3
    space = len(net.spatial.blocks) * layer(1 + net.tokens, times, times)
    space += min(times, 2) * net.tokens * net.patch_embed.weight.numel()
    time = layer(1 + steps, 2 if "temporal" in stage.frozen else 3, 3)
    time *= len(net.temporal.blocks)
    adapter = 5 * steps * width**2 if stage.adapter else 0  # its input's gradient is not needed
    return (steps * space + adapter + time + 3 * net.head.weight.numel()) / 1e9


@pytest.fixture(scope="module")
def quick_counts(by_hand):
    """The plan's counts and measurements worked out, which are seen to be the same on a small model."""
    with torch.device("meta"):
        net = sfa.ViViT(8, "vivit_toy", 8, 64, attention="sdpa")
    no_time = Stage(0, 8, 0, 1, ("temporal",), False)
    for stage in (FULL, SECOND, no_time, SECOND._replace(frames=32)):
        assert gmacs_by_hand(net, stage) == pytest.approx(sfa.count_gmacs(net, stage), rel=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sfa, "count_gmacs", gmacs_by_hand)
        patch.setattr(common, "block_bytes", by_hand)
        yield


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_paper_plans(row, quick_counts, capsys):
    """--plan: stages as written, their cost as shares of full training, memory and frames for each card."""
    recipe, *flags = ROWS[row]
    cfg = config("--recipe", recipe, "--plan", *flags)
    sfa.main(cfg)
    out = capsys.readouterr().out
    stages = sfa.stages_of(cfg, cfg.train_clips // cfg.batch_size)
    printed = re.findall(
        r"^stage (\d)   (\d+) frames, (\d+) steps.*frozen: ([\w, ]+);", out, re.MULTILINE
    )
    assert [(int(n), int(f), int(s)) for n, f, s, _ in printed] == [
        (s.number + 1, s.frames, s.stop - s.start) for s in stages
    ]
    total, *parts = map(float, re.findall(r" ([\d.]+)(?= M parameters| \+|;)", out.splitlines()[0]))
    assert total == pytest.approx(sum(parts), abs=0.25) and len(parts) == 4
    assert parts[0] == pytest.approx(MILLIONS[cfg.model][0], rel=2e-3)
    shares = [float(x) for x in re.search(r"cost +([\d.+ ]+) = ", out)[1].split(" + ")]
    for stage, share in zip(stages, shares, strict=True):
        steps = (stage.stop - stage.start) / (stages[-1].stop - stages[-1].start)
        expected = (
            stage.frames / stages[-1].frames * steps * (0.335 if "spatial" in stage.frozen else 1)
        )
        assert share == pytest.approx(expected, rel=0.035), out
    table = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +(0\.\d+) +(\d+) +(\d+)$", out, re.MULTILINE)
    assert {int(r[0]) for r in table} >= {s.frames for s in stages} and all(
        0.330 < float(r[3]) < 0.3405 for r in table
    )
    assert all(int(r[5]) < int(r[4]) for r in table) and out.count(" GB: full ") == len(cfg.gpu_gb)
    depth = 24 if recipe in ("k400", "k600") and cfg.model == "vivit_l" else 4
    assert f"temporal ({cfg.temporal_depth or depth} layers)" in out
    assert [number for number, _ in gigabytes(out)] == [s.number + 1 for s in stages]
    if (
        len(stages) > 1
        and cfg.freeze == "later"
        and cfg.model != "vivit_g"
        and stages[0].frames <= 16
    ):
        assert all(size < 16 for _, size in gigabytes(out)), out  # on the paper's 64 cards


def gigabytes(out):
    """(stage, GB a GPU) as --plan prints them for 2 clips on each of 64 GPUs."""
    lines = re.findall(
        r"^memory +stage (\d): 2 clips at once on each of 64 GPUs.*: ([\d.]+) GB a",
        out,
        re.MULTILINE,
    )
    return [(int(number), float(size)) for number, size in lines]


def test_rows_of_the_header_fit_the_papers_cards(quick_counts, monkeypatch, capsys):
    """Each command of the header's table, as printed, on 64 cards of 16 GB; of g only stage 2, as the header says."""
    monkeypatch.setattr(sfa, "count_gmacs", lambda net, stage: 1.0)
    for name, flags in rows("sfa_vivit.py"):
        sfa.main(config(*shlex.split(flags), "--plan"))
        sizes = dict(gigabytes(capsys.readouterr().out))
        if "vivit_g" in flags:
            assert 16 < sizes.pop(1) < 24, name
        assert sizes and max(sizes.values()) < 16, (name, sizes)


def test_plan_of_the_paper_beside_ours(quick_counts, capsys):
    """Table 4: the frames that the paper fits into 16 GB stand beside those counted here, and what isn't counted."""
    for model, words in (("vivit_h", "full 96, frozen 128"), ("vivit_g", "full 8, frozen 48")):
        sfa.main(config("--recipe", "k400", "--model", model, "--plan", "--gpu-gb", "16", "24"))
        out = capsys.readouterr().out
        assert re.search(rf"^ +16 GB: full \S+, frozen \d+; the paper: {words}$", out, re.MULTILINE)
        assert "not the paper's" in out and "Not counted" in out and out.count("the paper: ") == 1


def test_micro_batches_that_fit(capsys):
    """8 GPUs have 16 clips a step each, in pairs for mixup; with recomputation stage 1 holds more of them."""
    fits = []
    for extra in ([], ["--grad-checkpoint"]):
        sfa.main(config("--recipe", "ssv2", "--plan", "--gpus", 8, "--gpu-gb", "11", "12", *extra))
        line = re.search(
            r"memory +stage 1: 16 clips .* in 11 GB: (\d+), 12 GB", capsys.readouterr().out
        )
        fits.append(int(line[1]))
    assert fits[0] in (2, 4, 8) and fits[1] == 16


# ---- header, flags, recipes ------------------------------------------------------------------------------------------


def test_header_map_names_exist():
    """The second column of the header's table: every symbol is in the file, every flag a field."""
    table = sfa.__doc__.split("paper  ")[1].split("\n\n")[0]
    cells = [re.split(r"\s{2,}", line.strip())[-1] for line in table.splitlines()[1:]]
    names = [name for cell in cells for name in re.sub(r" \(.*?\)", "", cell).split(", ")]
    assert len(names) >= 15
    for name in names:
        owner = sfa
        for part in name.split("."):
            owner = getattr(owner, part)
    fields = {field.name for field in dataclasses.fields(sfa.Config)}
    flags = {
        flag.replace("-", "_") for flag in re.findall(r"--(?:no-)?([a-z][a-z_-]+)", sfa.__doc__)
    }
    flags.remove("nproc_per_node")
    assert flags and flags <= fields


def test_decisions_of_the_header_are_tagged_where_they_are_made():
    """One `DECISION (word)` or more in the code for each word of the header's list, and none besides."""
    listed = re.findall(
        r"^    (\w+) ", sfa.__doc__.split("DECISIONS")[1].split("Missing")[0], re.MULTILINE
    )
    tagged = re.findall(r"# DECISION \((\w+)\)", (ROOT / "sfa_vivit.py").read_text())
    assert set(listed) == set(tagged) and len(listed) == len(set(listed)) >= 15


def test_every_flag_is_read():
    """Each field of Config is read as cfg.<field>, in the script or where common.py and data.py take the config."""
    names = "sfa_vivit.py", "common.py", "data.py"
    source = "".join((ROOT / name).read_text() for name in names)
    for field in dataclasses.fields(sfa.Config):
        assert re.search(rf"\bcfg\.{field.name}\b", source), field.name


def test_recipes_are_table_7():
    """Types of all values; what the columns of Table 7 say, by name."""
    types = {field.name: field.type for field in dataclasses.fields(sfa.Config)}
    for name, recipe in sfa.RECIPES.items():
        for key, value in recipe.items():
            assert isinstance(value, types[key]), (name, key)
        sfa.check(config("--recipe", name, "--init", "L_16.npz"))
    keys = "lr", "colour_jitter", "rand_augment", "drop_path", "label_smoothing", "mixup"
    table = {"k400": (0.1, 0.8, 0, 0, 0, 0), "k600": (0.1, 0.8, 0, 0, 0, 0), "mit": (0.25, 0.8, 0, 0, 0, 0),
             "epic": (0.5, 0, 15, 0.2, 0.2, 0.1), "ssv2": (0.5, 0, 20, 0.3, 0.3, 0.3),
             "selse": (0.5, 0, 0, 0, 0, 0)}  # fmt: skip
    sizes = {"k400": (235693, 400), "k600": (380735, 600), "mit": (791297, 339), "epic": (67217, 0),
             "ssv2": (168913, 174), "selse": (54919, 174)}  # fmt: skip
    epochs = {"k400": 30, "k600": 30, "mit": 10, "epic": 50, "ssv2": 35, "selse": 35}
    for name, values in table.items():
        cfg = config("--recipe", name)
        assert tuple(getattr(cfg, key) for key in keys) == values, name
        assert (cfg.optimizer, cfg.batch_size, cfg.warmup_epochs, cfg.clip_grad, cfg.flip) == (
            "sgd",
            128,
            2.5,
            1,
            True,
        )
        assert {int(part.split(":")[1]) for part in cfg.stages.split(",")} == {epochs[name]}
        assert (cfg.train_clips, cfg.num_classes) == sizes[name] and (cfg.views, cfg.crops) == (
            4,
            3,
        )


# ---- training on toy videos ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folder of a small toy set: 16 training and 8 validation videos."""
    return data.make_toy(tmp_path_factory.mktemp("toy"), "pairs", counts={"train": 16, "val": 8})


def flags_of(folder):
    rest = TINY[TINY.index("--batch-size") :]  # without --epochs, which --stages say
    return [
        "--train-list",
        folder / "train.csv",
        "--val-list",
        folder / "val.csv",
        "--data-root",
        folder,
        "--model",
        "vivit_toy",
        "--size",
        64,
        *rest,
    ]


def test_missing_validation_videos_are_said_before_training(pairs, tmp_path):
    lines = (pairs / "val.csv").read_text().splitlines()
    label = lines[0].partition(",")[2]
    (tmp_path / "val.csv").write_text(
        "\n".join([*lines, f"gone/a.mp4,{label}", f"gone/b.mp4,{label}"])
    )
    args = [*flags_of(pairs), "--val-list", tmp_path / "val.csv", "--out", tmp_path / "run"]
    with pytest.raises(
        UserError, match="val.csv: 2 of its 10 videos are missing .*gone/a.mp4 .*--data-root"
    ):
        sfa.main(config(*args))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pairs_args(pairs):
    """On clips of 32 x 32: with those of 64, half the time of a run is its pictures."""
    return [*flags_of(pairs), "--size", 32]


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][1:]


def train(folder, *flags):
    sfa.main(config("--out", folder, *flags))
    return records(folder)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


PATHS = {
    "V": ["--stages", "8:1,16:1"],
    "A": ["--stages", "2:1,4:1,8:1"],
    "I": ["--stages", "8:1", "--freeze", "spatial", "--no-adapter", "--init", "random"],
    "II": ["--stages", "8:1", "--freeze", "temporal"],
    "III": ["--stages", "8:1", "--freeze", "spatial", "--init", "VIT"],
    "III, average": [
        "--stages",
        "8:1",
        "--freeze",
        "spatial",
        "--init",
        "VIT",
        "--inflate",
        "average",
    ],
    "IV": ["--stages", "8:1", "--freeze", "spatial", "--init", "VIT", "--init-temporal", "OURS"],
    "App. F": ["--stages", "4:1,8:1", "--freeze", "none"],
    "sgd": ["--stages", "4:1,8:1", "--optimizer", "sgd", "--lr", "0.1", "--weight-decay", "0.001"],
    "regularised": [
        "--stages",
        "4:1,8:1",
        "--mixup",
        "0.3",
        "--drop-path",
        "0.3",
        "--label-smoothing",
        "0.3",
    ],
    "randaug": ["--stages", "4:1", "--rand-augment", "20", "--flip", "--crop"],
    "colour": ["--stages", "4:1", "--colour-jitter", "0.8", "--clip-grad", "0"],
    "bf16": ["--stages", "4:1,8:1", "--precision", "bf16"],
    "fp16": ["--stages", "4:1,8:1", "--precision", "fp16"],
    "checkpoint": ["--stages", "4:1,8:1", "--grad-checkpoint", "--attention", "plain"],
    "sdpa": [
        "--stages",
        "4:1,8:1",
        "--attention",
        "sdpa",
        "--spatial-chunk",
        "3",
        "--temporal-depth",
        "1",
    ],
    "views": ["--stages", "4:1", "--views", "2", "--crops", "3", "--stride", "2"],
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_trains_two_steps(path, pairs_args, tmp_path):
    """2 steps a stage, each logged and finite; an evaluation at each stage's end."""
    np.savez(tmp_path / "vit.npz", **vit_arrays("original"))
    torch.save({"model": small().state_dict()}, tmp_path / "ours.pt")
    places = {"VIT": tmp_path / "vit.npz", "OURS": tmp_path / "ours.pt"}
    flags = [places.get(flag, flag) for flag in PATHS[path]]
    log = train(tmp_path / "run", *pairs_args, "--max-steps", 2, "--warmup-epochs", 0, *flags)
    stages = sfa.stages_of(config("--max-steps", 2, *flags), 4)
    expected = [step for s in stages for step in (s.start + 1, s.start + 2, s.stop)]
    assert [r["step"] for r in log] == expected
    assert all(math.isfinite(r["loss"]) for r in log if "loss" in r)
    ends = [r for r in log if "val_top1" in r]
    assert [r["stage"] for r in ends] == [s.number + 1 for s in stages] and all(
        r["val_clips"] == 8 for r in ends
    )
    assert all(
        r["best_step"] == r["step"] and r["near_peak_epoch"] == r["best_epoch"] for r in ends
    )
    assert ("test_top1" in ends[-1]) == (path == "views") and not any(
        "test_top1" in r for r in ends[:-1]
    )
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert Stage(*state["stage"]) == stages[-1] and state["at"]["skipped"] == 0
    moments = {
        tuple(s[k].shape)
        for s in state["optimizer"]["state"].values()
        for k in s
        if k != "step" and s[k] is not None
    }
    kept = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(path, torch.float32)
    assert (
        state["model"]["patch_embed.weight"].dtype == kept
        and state["model"]["head.weight"].dtype == torch.float32
    )
    big = state["model"]["patch_embed.weight"].shape
    assert (big in moments) == (
        "spatial" not in stages[-1].frozen
    )  # no optimizer state of what is frozen


def test_stage_2_leaves_the_spatial_transformer_alone(pairs_args, tmp_path):
    """After it, spatial weights are stage 1's bit for bit; temporal ones, adapter and classifier have moved."""
    train(tmp_path, *pairs_args, "--stages", "8:1,16:1", "--warmup-epochs", 0)
    first, last = weights(tmp_path / "stage1.pt"), weights(tmp_path / "last.pt")
    for name in last:
        if name.startswith(("spatial.", "patch_embed.")):
            assert torch.equal(first[name], last[name]), name
    assert last["temporal.positions"].shape[1] == 9 and first["temporal.positions"].shape[1] == 5
    for name in ("temporal.blocks.0.mlp.fc1.weight", "head.weight", "temporal.cls_token"):
        assert not torch.equal(first[name], last[name]), name
    assert last["adapter.fc2.weight"].abs().sum() > 0 and "adapter.fc2.weight" not in first


def test_stage_2_starts_where_stage_1_ended(pairs_args, tmp_path):
    """--stages 8,16 in one go = stage 1 in its folder, then --freeze spatial --init its checkpoint, without the first's
    data order: the same model at the start of stage 2."""
    args = [*pairs_args, "--warmup-epochs", 0, "--lr", 0]
    train(tmp_path / "both", *args, "--stages", "8:1,16:1")
    train(
        tmp_path / "second",
        *args,
        "--stages",
        "16:1",
        "--freeze",
        "spatial",
        "--init",
        tmp_path / "both/stage1.pt",
    )
    a, b = weights(tmp_path / "both/last.pt"), weights(tmp_path / "second/last.pt")
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a if not k.startswith("adapter.fc1"))


class Died(BaseException):
    """What a test puts in the place of a SIGKILL."""


def test_resume_is_exact(pairs_args, tmp_path, monkeypatch):
    """4 + 4 steps = the same, dying after a step's checkpoint, in either stage or between them: bit for bit."""
    args = [*pairs_args, "--stages", "4:1,8:1", "--save-minutes", 0, "--mixup", "0.8", "--drop-path", "0.2",
            "--log-every", 3, "--warmup-epochs", 0]  # fmt: skip
    whole = train(tmp_path / "whole", *args)
    save = common.Run.save
    for when, cut in ((2, "in stage 1"), (4, "between"), (6, "in stage 2")):

        def die(self, state, *names, when=when):
            save(self, state, *names)
            if state["at"]["step"] == when and (
                when != 4 or "stage1.pt" in names
            ):  # 4: stage 1's evaluation is done
                raise Died

        with monkeypatch.context() as patch, pytest.raises(Died):
            patch.setattr(common.Run, "save", die)
            train(tmp_path / cut, *args)
        state = torch.load(tmp_path / cut / "last.pt", weights_only=True)
        assert state["at"]["step"] == when, cut
        resumed = train(tmp_path / cut, *args)
        for name in ("last.pt", "stage1.pt"):
            a, b = weights(tmp_path / "whole" / name), weights(tmp_path / cut / name)
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), (cut, name)
        timed = ("seconds", "clips_per_second", "data_wait")
        a, b = ([{k: r[k] for k in r if k not in timed} for r in log] for log in (whole, resumed))
        assert a == b, cut
        assert train(tmp_path / cut, *args) == resumed  # complete: nothing is added


def test_ranks_and_micro_batches_do_not_change_the_run(pairs_args, tmp_path):
    """Both stages on 2 processes, and in micro-batches of 2: the weights of 1 process, to rounding."""
    args = [*pairs_args, "--stages", "4:1,8:1", "--mixup", "0.8", "--drop-path", "0.2", "--warmup-epochs", 0,
            "--optimizer", "sgd", "--lr", "0.01", "--clip-grad", 0]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    two = command(*torchrun, "sfa_vivit.py", *args, "--out", tmp_path / "two")
    train(tmp_path / "one", *args)
    train(tmp_path / "micro", *args, "--micro-batch", 2)
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, out + err
    one = weights(tmp_path / "one/last.pt")
    for name in ("two", "micro"):
        other = weights(tmp_path / name / "last.pt")
        change = max(
            (one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-3) for k in one
        )
        print(name, "largest relative difference", change.item())
        assert change < 2e-4
    moved = (
        one["temporal.blocks.0.mlp.fc1.weight"]
        - weights(tmp_path / "one/stage1.pt")["temporal.blocks.0.mlp.fc1.weight"]
    )
    assert moved.abs().max() > 1e-5


# ---- the real command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    """A run folder of two short stages on the small toy set, through the real command line."""
    out = tmp_path_factory.mktemp("trained")
    flags = [
        *flags_of(pairs),
        "--stages",
        "8:12,16:6",
        "--eval-every",
        6,
        "--warmup-epochs",
        1,
        "--out",
        out,
    ]
    process = command("sfa_vivit.py", *flags)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return out, stdout


def test_the_first_step_reaches_the_encoder():
    """Not with a classifier of zeros (scenic), which learns alone at first; in the toy, where nothing is pretrained."""
    for head_std, reached in ((0.0, False), (config().head_std, True)):
        torch.manual_seed(0)
        net = sfa.ViViT(8, "vivit_toy", frames=4, size=32, head_std=head_std)
        targets = sfa.soft_targets(torch.arange(4), (8,), 0.0)
        sfa.vivit_loss(net(clips(4, 4), KEYS), targets, (8,)).mean().backward()
        assert (
            net.patch_embed.weight.grad.norm() > 1e-3
        ) == reached and net.head.weight.grad.norm() > 0.1


def test_training_lowers_the_loss_and_says_so(trained):
    out, stdout = trained
    log = records(out)
    losses = [r["loss"] for r in log if "loss" in r]
    assert len(losses) == 72 and np.mean(losses[40:48]) < 0.95 * np.mean(losses[:8])
    assert np.mean(losses[-8:]) < 0.95 * np.mean(losses[:8])  # stage 2 goes on from there
    lr = {
        r["step"]: r["lr"] for r in log if "loss" in r
    }  # of both stages: 4 steps of warm-up, half a cosine
    peak = config().lr
    assert (
        lr[1] == lr[49] == 0
        and lr[5] == lr[53] == peak
        and max(lr[48], lr[72]) < 0.02 * peak < 0.5 * peak < lr[24]
    )
    ends = [(r["step"], r["stage"]) for r in log if "val_top1" in r]
    assert ends == [(24, 1), (48, 1), (72, 2)] and {
        "near_peak_epoch",
        "best_epoch",
        "best_step",
    } <= set(log[-1])
    assert (
        "stage 1: 8 frames, frozen: nothing" in stdout
        and "stage 2: 16 frames, frozen: spatial" in stdout
    )
    parts = re.search(
        r"chance 12\.5 %\).* (\d+) \+ (\d+) = (\d+) seconds, with", stdout
    )  # cost: stage 1 + stage 2
    assert (
        abs(int(parts[1]) + int(parts[2]) - int(parts[3])) <= 1
        and int(parts[3]) <= log[-1]["seconds"] + 1
    )
    assert (out / "stage1.pt").exists() and (out / "best.pt").exists()


def test_pictures(trained):
    """attention.png: 4 clips and, below each, the same lit: nowhere brighter; the animation has all 16 frames."""
    with av.open(str(trained[0] / "attention.png")) as file:
        strip = next(file.decode(video=0)).to_ndarray(format="rgb24")
    rows = strip.reshape(4, 2, 68, 8 * 68, 3)[:, :, 2:-2].astype(int)
    assert (rows[:, 1] <= rows[:, 0]).all() and (rows[:, 1] < 0.7 * rows[:, 0]).mean() > 0.05
    with av.open(str(trained[0] / "attention_animated.png")) as file:
        assert len(list(file.decode(video=0))) == 16


def test_eval_predict_features(trained, pairs, cli, tmp_path):
    out, _ = trained
    lists = ["--val-list", pairs / "val.csv", "--data-root", pairs, "--workers", 0, "--out", out]
    code, stdout, err = cli("sfa_vivit.py", "--task", "eval", *lists)
    best = torch.load(out / "best.pt", weights_only=True)["at"]["best"]
    assert code == 0 and "16 frames, 1 x 1 views" in stdout and f"test_top1 {best:.4g}" in stdout, (
        err
    )
    sfa.main(config("--task", "eval", "--views", 2, "--crops", 3, *lists))

    videos = sorted((pairs / "videos").glob("val_*.mp4"))[:2]
    code, stdout, err = cli(
        "sfa_vivit.py", "--task", "predict", "--out", out, "--workers", 0, "--input", *videos
    )
    assert code == 0, err
    for video, line in zip(videos, stdout.splitlines(), strict=True):
        assert line.startswith(f"{video}: ")
        shares = [float(x) for x in re.findall(r"([\d.]+) %", line)]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.1

    others = re.sub(",.*", ",a label of another set", (pairs / "val.csv").read_text())
    (tmp_path / "val.csv").write_text(others)
    sfa.main(config("--task", "features", *lists, "--val-list", tmp_path / "val.csv"))
    features = np.load(out / "features.npy")
    assert features.shape == (8, 128) and np.isfinite(features).all()


BROKEN = {  # what a file is -> what is wrong with it, made from the state of a run
    "cut": lambda state: None,
    "turbo's": lambda state: {key: state[key] for key in ("model", "config", "at")},
    "no state": lambda state: [1, 2],
    "older": lambda state: (
        state | {"config": {k: v for k, v in state["config"].items() if k != "crop_share"}}
    ),
    "no size of ours": lambda state: state | {"config": state["config"] | {"model": "vivit_x"}},
    "stage": lambda state: state | {"stage": (1, 16)},
    "width": lambda state: state | {"model": state["model"] | {"head.weight": torch.zeros(8, 192)}},
    "frames": lambda state: state | {"stage": (1, 8, *state["stage"][2:])},
    "weights": lambda state: state | {"model": {}},
}


@pytest.mark.parametrize("what", BROKEN)
def test_checkpoints_that_are_not_this_versions(what, trained, pairs, tmp_path):
    """One line that names the file, whatever of it is damaged, old or another script's."""
    whole, path = trained[0] / "best.pt", tmp_path / "best.pt"
    state = BROKEN[what](torch.load(whole, weights_only=True))
    torch.save(state, path) if state else path.write_bytes(whole.read_bytes()[:30_000])
    lists = [
        "--val-list",
        pairs / "val.csv",
        "--data-root",
        pairs,
        "--input",
        pairs / "videos/val_00000.mp4",
    ]
    for task in ("eval", "features", "predict"):
        assert str(path) in refused("--task", task, "--init", path, *lists)
    assert str(path) in refused(
        "--task", "eval", "--init", "random", "--out", tmp_path, *lists
    )  # names none: best.pt


@torch.no_grad()
def test_a_checkpoint_keeps_its_crops(trained, pairs, tmp_path, monkeypatch):
    """--task eval of a recipe that crops: the checkpoint's own share of the short side, whatever the command's is."""
    state = torch.load(trained[0] / "best.pt", weights_only=True)
    torch.save(
        state | {"config": state["config"] | {"crop": True, "crop_share": 0.5}},
        tmp_path / "best.pt",
    )
    boxes, real = [], data.crop_box
    monkeypatch.setattr(data, "crop_box", lambda *a: (boxes.append(real(*a)), boxes[-1])[1])
    lists = ["--val-list", pairs / "val.csv", "--data-root", pairs, "--workers", 0]
    for task in (["eval"], ["features"], ["predict", "--input", pairs / "videos/val_00000.mp4"]):
        sfa.main(
            config(
                "--init", tmp_path / "best.pt", "--out", tmp_path / task[0], *lists, "--task", *task
            )
        )
        with data.Video(pairs / "videos/val_00000.mp4") as video:
            half = round(min(video.info.width, video.info.height) / 4) * 2
        assert boxes and {box[2] for box in boxes} == {half}, task
        boxes.clear()


@torch.no_grad()
def test_views_are_averaged_as_logits(trained, pairs):
    """evaluate on 2 x 1 views = by hand: the mean of both clips' logits, its argmax against the label."""
    state = torch.load(trained[0] / "best.pt", weights_only=True)
    lists = ["--val-list", pairs / "val.csv", "--data-root", pairs]
    cfg = config(*lists, "--workers", 0, "--batch-size", 6, "--model", "vivit_toy", "--size", 64)
    net = sfa.build(cfg, (8,), Stage(*state["stage"]))
    net.load_state_dict(state["model"])
    videos, ctx, hits, loss = data.VideoList(pairs / "val.csv", pairs), common.launch("fp32"), 0, 0
    result = sfa.validate(cfg, ctx, net, videos, (8,), 16, (2, 1), "test")
    net.eval()
    for i in range(8):
        with data.Video(videos.video(i)) as video:
            n = video.info.num_frames
            views = [
                video.read(
                    sfa.clip_frames(n, 16, cfg.stride, start), 64, data.centre_box(video.info)
                )
                for start in (0, n - 1 - 15 * cfg.stride)
            ]
        logits = net(torch.stack(views), None).mean(0)
        hits += (logits.argmax() == videos.labels[i]).item()
        loss += F.cross_entropy(logits, torch.tensor(int(videos.labels[i]))).item() / 8
    assert result["test_top1"] == 100 * hits / 8 and result["test_clips"] == 8
    assert result["test_loss"] == pytest.approx(loss, rel=1e-4)


def write_epic(path, rows):
    """A file of EPIC_100_train.csv's columns; rows: (participant, video, start, stop, verb, noun)."""
    columns = ["narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp", "stop_timestamp",
               "start_frame", "stop_frame", "narration", "verb", "verb_class", "noun", "noun_class", "all_nouns",
               "all_noun_classes"]  # fmt: skip
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for i, (who, video, start, stop, verb, noun) in enumerate(rows):
            table.writerow([f"{video}_{i}", who, video, start, start, stop, 1, 2, "take, plate", "take", verb, "plate",
                            noun, "['plate']", "[2]"])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def kitchen(pairs, tmp_path_factory):
    """Two toy videos by EPIC's names, one in chunks of a few seconds as AVION keeps them, and annotations."""
    root = tmp_path_factory.mktemp("epic")
    (root / "P01").mkdir()
    (root / "P01/P01_01.MP4").symlink_to(pairs / "videos/train_00000.mp4")
    chunks = root / "P01/P01_02.MP4"
    chunks.mkdir()
    for second in (0, 15):
        data._toy_write(
            chunks / f"{second}.mp4", np.zeros((15 * 8, 64, 64, 3), np.uint8) + 9 * second, 8
        )
    rows = [
        ("P01", f"P01_0{1 + i % 2}", f"00:00:0{i % 5}.50", f"00:00:1{i}.00", i % 97, 7 * i % 300)
        for i in range(8)
    ]
    return root, write_epic(root / "train.csv", rows)


def test_epic_reads_verbs_and_nouns(kitchen):
    root, path = kitchen
    videos = sfa.read_epic(path, root)
    assert (
        videos.labels.tolist() == [300 * i + 7 * i for i in range(8)]
        and len(videos.classes) == 29100
    )
    assert videos.video(0) == f"{root}/P01/P01_01.MP4" and (videos.start[3], videos.end[3]) == (
        3.5,
        13.0,
    )
    assert videos.classes[videos.labels[2]] == "verb 2 noun 14"


def test_epic_trains_and_scores(kitchen, tmp_path):
    """Two heads, both stages, videos whole and in chunks; accuracy of the pair and of each head."""
    root, path = kitchen
    log = train(tmp_path, "--train-list", path, "--val-list", path, "--data-root", root, *TINY[2:], "--labels", "epic",
                "--stages", "4:2,8:2", "--num-classes", 0, "--stride", 1, "--warmup-epochs", 0,
                "--head-std", 0)  # fmt: skip
    assert log[-1]["val_clips"] == 8 and {"val_top1", "val_top5", "val_verb", "val_noun"} <= set(
        log[-1]
    )
    losses = [r["loss"] for r in log if "loss" in r]
    assert (
        losses[0] == pytest.approx((math.log(97) + math.log(300)) / 2, rel=1e-4)
        and losses[-1] < losses[0]
    )
    assert weights(tmp_path / "last.pt")["head.weight"].shape == (397, 128)
    sfa.main(
        config(
            "--task",
            "predict",
            "--out",
            tmp_path,
            "--workers",
            0,
            "--input",
            root / "P01/P01_01.MP4",
        )
    )


def test_epic_scores_by_hand(kitchen, tmp_path):
    """The same logits for all: the best pairs are (1, 6), (1, 5), (2, 6), (2, 5), (1, 8)."""
    root, _ = kitchen
    pairs = [(1, 5), (1, 6), (1, 7), (2, 6)]
    rows = [("P01", "P01_01", "00:00:01.00", "00:00:02.00", *pair) for pair in pairs]
    cfg = config("--labels", "epic", "--data-root", root, "--workers", 0)
    videos = sfa.read_list(cfg, common.launch(), write_epic(tmp_path / "val.csv", rows))
    logits = torch.full((397,), -20.0)
    logits[[1, 2, 97 + 6, 97 + 5, 97 + 8]] = torch.tensor([3.0, 2.0, 3.0, 2.5, -10.0])

    class Fixed(torch.nn.Module):
        def forward(self, clips):
            assert not self.training
            return logits.expand(len(clips), -1)

    net = Fixed()
    result = sfa.validate(cfg, common.launch("fp32"), net, videos, sfa.EPIC, 4)
    assert net.training
    shares = [result[f"val_{word}"] for word in ("top1", "top5", "verb", "noun", "clips", "unread")]
    assert shares == [25, 75, 75, 50, 4, 0]


def test_copying_three_files_runs(cli, pairs_args, tmp_path):
    """sfa_vivit.py + common.py + data.py in an empty folder are enough."""
    for name in ("sfa_vivit.py", "common.py", "data.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    code, _, err = cli(
        "sfa_vivit.py", *pairs_args, "--stages", "2:1,4:1", "--max-steps", 1, cwd=tmp_path
    )
    assert code == 0 and (tmp_path / "runs/sfa-toy/last.pt").exists(), err


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(*argv):
    """The one line that sfa_vivit.py's main ends with."""
    with pytest.raises(UserError) as error:
        sfa.main(config(*argv))
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--stages", "16:1", "--freeze", "spatial"],
            ["--freeze spatial", "nothing has initialised", "--init"],
        ),
        (["--stages", "7:1"], ["--stages 7:1", "multiple of the tubelet's 2"]),
        (["--stages", "8:1,9:1"], ["--stages 8:1,9:1", "9 frames"]),
        (
            ["--freeze", "spatial,temporal", "--init", "random"],
            ["--freeze spatial,temporal", "everything"],
        ),
        (["--freeze", "adapter"], ["--freeze adapter", "temporal"]),
        (["--stages", "8"], ["--stages 8", "8:30,128:30"]),
        (["--stages", "8:0"], ["--stages 8:0"]),
        (["--stages", ""], ["--stages"]),
        (["--stages", "8:1,,8:1"], ["--stages 8:1,,8:1"]),
        (["--size", "60"], ["--size 60"]),
        (["--model", "vivit_g", "--size", "64"], ["--size 64", "14"]),
        (
            ["--plan", "--model", "vivit_b", "--size", "224", "--gpu-gb", "0.2"],
            ["--gpu-gb 0.2", "vivit_b", "GB"],
        ),
        (["--plan", "--gpu-gb", "big"], ["--gpu-gb big"]),
        (["--spatial-chunk", "0"], ["--spatial-chunk"]),
        (["--stride", "0"], ["--stride"]),
        (["--min-lr", "1"], ["--min-lr 1", "--lr"]),
        (["--plan", "--batch-size", "0"], ["--batch-size"]),
        (["--plan", "--num-classes", "-1"], ["--num-classes"]),
        (["--views", "0"], ["--views"]),
        (["--temporal-depth", "-1"], ["--temporal-depth"]),
        (["--rand-augment", "21"], ["--rand-augment", "20"]),
        (["--crop-share", "0"], ["--crop-share", "not 0"]),
        (["--crop-share", "1.1"], ["--crop-share", "not 1.1"]),
        (["--plan", "--gpus", "0"], ["--gpus"]),
        (["--colour-jitter", "2"], ["--colour-jitter"]),
        (["--drop-path", "1"], ["--drop-path"]),
        (["--train-list", ""], ["--train-list"]),
        (["--labels", "epic"], ["train.csv:2", "EPIC_100"]),
        (["--init", "none.npz"], ["none.npz", "no such checkpoint"]),
        (["--batch-size", "6", "--micro-batch", "3", "--mixup", "0.3"], ["--micro-batch", "mixup"]),
        (["--task", "predict", "--input", "a.mp4", "--init", "none.pt"], ["none.pt"]),
    ],
)
def test_impossible_flags(flags, words, pairs_args, tmp_path):
    message = refused(*pairs_args, "--out", tmp_path, *flags)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("recipe", ["k400", "k600", "mit", "epic", "ssv2", "selse"])
def test_the_papers_recipes_start_from_weights(recipe, tmp_path):
    """All of the paper's start from an image model; --init random means none. The missing list is the next to be said."""
    message = refused("--recipe", recipe, "--out", tmp_path)
    assert f"--recipe {recipe}" in message and "--init random" in message and "image" in message
    for init in ("random", "L_16.npz"):
        assert "--train-list" in refused("--recipe", recipe, "--init", init, "--out", tmp_path)


def test_frames_and_epochs_are_the_stages_to_say(fails):
    fails(["sfa_vivit.py", "--frames", "8", "--epochs", "3"], "--frames", "--stages", status=2)


def test_weights_of_another_patch_or_width(pairs_args, tmp_path):
    arrays = vit_arrays("original")
    np.savez(
        tmp_path / "p8.npz", **arrays | {"embedding/kernel": np.zeros((8, 8, 3, 128), np.float32)}
    )
    message = refused(*pairs_args, "--out", tmp_path / "a", "--init", tmp_path / "p8.npz")
    assert "p8.npz" in message and "8 pixels" in message and "16" in message
    np.savez(
        tmp_path / "wide.npz",
        **arrays | {"embedding/kernel": np.zeros((16, 16, 3, 192), np.float32)},
    )
    message = refused(*pairs_args, "--out", tmp_path / "b", "--init", tmp_path / "wide.npz")
    assert "wide.npz" in message and "--model" in message
    ours = {
        "spatial.positions": torch.zeros(1, 5, 128),
        "patch_embed.weight": torch.zeros(128, 2 * 14 * 14 * 3),
    }
    torch.save({"model": ours}, tmp_path / "p14.pt")
    assert "14 pixels" in refused(
        *pairs_args, "--out", tmp_path / "c", "--init", tmp_path / "p14.pt"
    )


def test_damaged_npz(pairs_args, tmp_path):
    np.savez(tmp_path / "a.npz", **vit_arrays("original"))
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    whole[2000:2400] = b"x" * 400  # inside an array: its checksum is wrong
    (tmp_path / "a.npz").write_bytes(whole)
    assert "a.npz" in refused(*pairs_args, "--out", tmp_path / "a", "--init", tmp_path / "a.npz")
    (tmp_path / "cut.npz").write_bytes(whole[:5000])
    assert "cut.npz" in refused(
        *pairs_args, "--out", tmp_path / "b", "--init", tmp_path / "cut.npz"
    )
    np.savez(tmp_path / "code.npz", cls=np.array([{"a": 1}], dtype=object))
    message = refused(*pairs_args, "--out", tmp_path / "c", "--init", tmp_path / "code.npz")
    assert "code.npz" in message and "allow_pickle" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            ("P01", "P01_01", "00:00:01.00", "00:00:02.00", 97, 3),
            ["train.csv:3", "verb_class 97", "0 ... 96"],
        ),
        (
            ("P01", "P01_01", "00:00:01.00", "00:00:02.00", 3, 300),
            ["train.csv:3", "noun_class 300", "0 ... 299"],
        ),
        (("P01", "P01_01", "00:00:01.00", "00:00:02.00", -1, 3), ["train.csv:3", "verb_class -1"]),
        (("P01", "P01_01", "00:00:01.00", "00:00:02.00", "take", 3), ["train.csv:3", "EPIC_100"]),
        (("P01", "P01_01", "now", "00:00:02.00", 1, 3), ["train.csv:3", "EPIC_100"]),
        (
            ("P01", 'P"\n01', "now", "00:00:02.00", 1, 3),
            ["train.csv:5", "EPIC_100"],
        ),  # a row of lines 3 to 5
    ],
)
def test_epic_classes_and_rows(row, words, tmp_path):
    good = ("P01", "P01_01", "00:00:01.00", "00:00:02.00", 0, 0)
    with pytest.raises(UserError) as error:
        sfa.read_epic(write_epic(tmp_path / "train.csv", [good, row]), tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_epic_rows_that_end_before_they_start(tmp_path, capsys):
    """Left out and counted, as unreadable videos are: one always, then --max-bad of all; all of them are refused."""
    good = [("P01", "P01_01", "00:00:01.00", "00:00:02.00", i, i) for i in range(5)]
    bad = ("P01", "P01_01", "00:00:05.00", "00:00:04.00", 9, 9)
    why = "train.csv:4: its time is 5 to 4 s: the start must be before the end"
    cfg = common.parse(sfa.Config, sfa.RECIPES, ["--labels", "epic", "--max-bad", "0"])
    videos = sfa.read_list(
        cfg, common.launch(), write_epic(tmp_path / "train.csv", [*good[:2], bad, *good[2:]])
    )
    assert videos.labels.tolist() == [300 * i + i for i in range(5)] and len(videos) == 5
    assert f"left out: {tmp_path}/{why} (1 such of 6 rows)" in capsys.readouterr().out
    for listed, count in (([*good[:2], bad, bad], "2 such of 4"), ([bad], "1 such of 1")):
        with pytest.raises(UserError, match=rf"{count} rows, --max-bad 0.01"):
            sfa.read_epic(write_epic(tmp_path / "train.csv", listed), "")


def test_epic_file_missing_or_empty(tmp_path):
    with pytest.raises(UserError, match=r"none.csv: can't read"):
        sfa.read_epic(tmp_path / "none.csv", "")
    with pytest.raises(UserError, match=r"e.csv: no annotation"):
        sfa.read_epic(write_epic(tmp_path / "e.csv", []), "")
