"""tpt_mae.py: each idea against a slow version, VideoMAE's own numbers, the schedules of every table, a run's life."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command
from test_weights import hub_model, relative, upstream_names

import common
import data
import tpt_mae
from common import UserError, make_key

KEYS = make_key(torch.arange(2))
FRAMES, SIZE = 4, 64  # of the hub's models in test_weights


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """On tensors this small threads only wait for each other. And a tiny model with VideoMAE's patches."""
    monkeypatch.setitem(tpt_mae.MODELS, "vit_16", tpt_mae.MODELS["vit_toy"] | {"patch": (2, 16, 16)})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(*argv):
    return common.parse(tpt_mae.Config, tpt_mae.RECIPES, list(map(str, argv)))


def randomise(model):
    """No zeros and ones in biases, norms or zero-initialised layers, which would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def clips(n=2, frames=FRAMES, size=SIZE, seed=0):
    return torch.randint(
        0, 256, (n, frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# ---- the schedule ----------------------------------------------------------------------------------------------------


def test_budget_arithmetic_of_the_paper():
    """Uniform at 400 epochs; Sec. 3.2.1's "25 % at 2 frames -> 1600 epochs" needs 800; frames alone share evenly."""
    uniform = tpt_mae.plan_stages("2:25,4:25,8:25,16:25", 400)
    assert uniform == [(2, 25.0, 800), (4, 25.0, 400), (8, 25.0, 200), (16, 25.0, 100)]
    assert sum(frames * epochs for frames, _, epochs in uniform) == 400 * 16
    assert tpt_mae.plan_stages("2:25,16:75", 800)[0] == (2, 25.0, 1600)
    assert tpt_mae.plan_stages("16:100", 800) == [(16, 100.0, 800)]
    assert tpt_mae.plan_stages("2,4,16", 300) == [(2, 100 / 3, 800), (4, 100 / 3, 400), (16, 100 / 3, 100)]
    assert tpt_mae.plan_stages("2:33.33,8:33.33,16:33.33", 3) == [(2, 33.33, 8), (8, 33.33, 2), (16, 33.33, 1)]
    assert tpt_mae.plan_stages("1:50,8:50", 4, full=8) == [(1, 50.0, 16), (8, 50.0, 2)]
    assert [row[2] for row in tpt_mae.plan_stages("12:20,16:80", 400)] == [107, 320]  # 106.67 is rounded


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2:25,4:25,8:25,16:20", "sum to 100, not 95"),
        ("2:0,16:100", "above 0"),
        ("2:-20,16:120", "above 0"),
        ("3:50,16:50", "3 frames are not a multiple of the token's 2"),
        ("0:50,16:50", "0 frames"),
        ("4:50,2:50", "must rise"),
        ("16:50,16:50", "must rise"),
        ("2:99.9,16:0.1", "no epoch of 16 frames"),
        ("2;25", "frames:percent"),
        ("2:nan,16:50", "sum to 100"),
        ("2:25,", "frames:percent"),
    ],
)
def test_impossible_stages(text, words):
    """In the pure function a ValueError; on the command line one line with the flag."""
    with pytest.raises(ValueError, match=words):
        tpt_mae.plan_stages(text, 400)
    with pytest.raises(UserError, match=rf"^error: --stages {re.escape(text)}: .*{words}") as error:
        tpt_mae.check(config("--recipe", "ssv2", "--stages", text))
    assert "\n" not in str(error.value)


def walk(segments, steps):
    """What a run does, step by step: (stage, that stage's own step count); asserts that nothing is lost or repeated."""
    seen, own = [], [0] * len(steps)
    for i, segment in enumerate(segments):
        assert segment.start == (segments[i - 1].stop if i else 0) and segment.offset == own[segment.stage]
        for _ in range(segment.start, segment.stop):
            seen.append(segment.stage)
            own[segment.stage] += 1
    assert own == steps
    return seen


def test_long_and_short_cycles():
    assert walk(tpt_mae.lay_out([4, 2, 1]), [4, 2, 1]) == [0, 0, 0, 0, 1, 1, 2]
    assert walk(tpt_mae.lay_out([8, 4, 2], rounds=2), [8, 4, 2]) == [0, 0, 0, 0, 1, 1, 2] * 2
    assert walk(tpt_mae.lay_out([3, 2], rounds=2), [3, 2]) == [0, 1, 0, 0, 1]  # what doesn't divide comes later
    walk(tpt_mae.lay_out([7, 5, 3], rounds=11, order="random"), [7, 5, 3])


def test_random_order():
    """Never the progressive order of a long cycle; another one for another seed; short rounds differ."""
    orders = {tuple(s.stage for s in tpt_mae.lay_out([1] * 4, order="random", seed=seed)) for seed in range(40)}
    assert (0, 1, 2, 3) not in orders and len(orders) > 10 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    rounds = tpt_mae.lay_out([6] * 4, rounds=6, order="random")
    assert len({tuple(s.stage for s in rounds[i : i + 4]) for i in range(0, 24, 4)}) > 2


def test_learning_rate_cycles():
    """Table 6: 1, 2, 4 cycles over 4 stages, each with its own warm-up; a step a third of a cycle long."""
    bounds = lambda n: [s.cycle for s in tpt_mae.lay_out([8, 4, 2, 1], cycles=n)]
    assert bounds(1) == [(0, 15)] * 4 and bounds(4) == [(0, 8), (8, 12), (12, 14), (14, 15)]
    assert bounds(2) == [(0, 12), (0, 12), (12, 15), (12, 15)]
    rate = lambda step, **kind: tpt_mae.learning_rate(step, (100, 200), 1.0, 0.1, 0.1, **kind)
    assert [rate(100 + i) for i in (0, 5, 10)] == pytest.approx([0, 0.5, 1.0])
    for i in (10, 30, 55, 99):
        assert rate(100 + i) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (i - 10) / 90)))
    steps = [rate(100 + i, decay="step") for i in (5, 10, 33, 34, 66, 67, 99)]
    assert steps == pytest.approx([0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_schedule_of_a_config():
    """Table 7's batches: rates follow VideoMAE's rule unless given; a pass with repeats shows that many clips."""
    stages, segments = tpt_mae.schedule(config("--recipe", "ssv2", "--stage-batch", "512,512,512,1024"), 168913)
    assert [s.batch for s in stages] == [512, 512, 512, 1024]
    assert [s.lr for s in stages] == pytest.approx([3e-4, 3e-4, 3e-4, 6e-4])
    assert [s.steps for s in stages] == [800 * 329, 400 * 329, 200 * 329, 100 * 164] and len(segments) == 4
    stages, _ = tpt_mae.schedule(config("--recipe", "ssv2", "--repeats", "4,2,1,1", "--stage-lr", "1e-3"), 168913)
    assert [s.lr for s in stages] == [1e-3] * 4 and [s.repeats for s in stages] == [4, 2, 1, 1]
    assert [s.epoch_steps for s in stages] == [659, 329, 164, 164]
    assert [s.steps for s in stages] == [800 * 659 // 4, 400 * 329 // 2, 200 * 164, 100 * 164]
    stages, segments = tpt_mae.schedule(config("--recipe", "ssv2", "--cycle", "short"), 168913)
    assert len(segments) == 400 and len({s.cycle for s in segments}) == 1  # 100 rounds of 8, 4, 2, 1 epochs
    assert [s.stop - s.start for s in segments[:4]] == [8 * 164, 4 * 164, 2 * 164, 164]
    (stage,), _ = tpt_mae.schedule(config("--recipe", "k400_ft"), 241258)
    assert (stage.frames, stage.epochs, stage.steps) == (16, 75, 75 * (241258 // 384))
    stages, _ = tpt_mae.schedule(config("--recipe", "ssv2", "--max-steps", 150), 168913)
    assert [s.steps for s in stages] == [80, 40, 20, 10]


def test_search_space_by_brute_force():
    """All subsets and portions, filtered afterwards, as Sec. 3.2.1 puts it."""
    expected = set()
    for n in range(1, 5):
        for frames in itertools.product((2, 4, 8, 12, 16), repeat=n):
            for shares in itertools.product((0, 6.25, 12.5, 25, 50, 100), repeat=n):
                if sorted(set(frames)) == list(frames) and frames[-1] == 16 and sum(shares) == 100 and min(shares):
                    expected.add(",".join(f"{f}:{p:g}" for f, p in zip(frames, shares, strict=True)))
    space = tpt_mae.search_space()
    assert set(space) == expected and len(space) == len(expected) == 75
    assert [text.count(",") for text in space] == sorted(text.count(",") for text in space)  # from few to many
    assert "2:25,4:25,8:25,16:25" in space
    assert tpt_mae.search_space((8, 2), 1) == ["8:100"] and tpt_mae.search_space((8, 2)) == ["8:100", "2:50,8:50"]
    for text in space:
        tpt_mae.plan_stages(text, 400)


# ---- sampling --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Film:
    info: data.VideoInfo


FILM = Film(data.VideoInfo(320, 240, 30.0, 100, 100 / 30, 0, "h264"))


def test_sampling_of_both_data_sets():
    key = make_key(5)
    k400, ssv2 = config("--recipe", "k400"), config("--recipe", "ssv2")
    for frames in (2, 4, 8, 16):
        chosen, box = tpt_mae.sample_clip(k400, frames, True, (1, 1), FILM, 0, 0, key)
        assert np.diff(chosen).tolist() == [4] * (frames - 1)  # the same stride at every length
        assert box == data.multi_scale_box(FILM.info, key)
        chosen, _ = tpt_mae.sample_clip(ssv2, frames, True, (1, 1), FILM, 0, 0, key)
        assert all(i * 100 // frames <= f < (i + 1) * 100 // frames for i, f in enumerate(chosen))  # one a segment
    first, second = (tpt_mae.sample_clip(ssv2, 4, True, (1, 1), FILM, 0, 0, make_key(i))[0] for i in (1, 2))
    assert first != second
    chosen, _ = tpt_mae.sample_clip(k400, 1, True, (1, 1), FILM, 0, 0, key)
    assert len(chosen) == 2 and chosen[0] == chosen[1]  # a single frame fills the tubelet
    box = tpt_mae.sample_clip(config("--recipe", "k400_ft"), 16, True, (1, 1), FILM, 0, 0, key)[1]
    assert box == data.random_resized_box(FILM.info, key)


def test_test_views():
    """5 x 3: five starts, three squares; 2 x 3: VideoMAE's two interleaved clips of segments; a centre clip else."""
    cfg = config("--recipe", "k400_ft")
    views = [tpt_mae.sample_clip(cfg, 16, False, (5, 3), FILM, 0, v, None) for v in range(15)]
    assert [v[0][0] for v in views[::3]] == [0, 9, 18, 27, 36] and [v[1][0] for v in views[:3]] == [0, 40, 80]
    assert all(a[0] == b[0] for a, b in zip(views[::3], views[2::3], strict=True))
    cfg = config("--recipe", "ssv2_ft")
    views = [tpt_mae.sample_clip(cfg, 4, False, (2, 3), FILM, 0, v, None)[0] for v in (0, 3)]
    assert views == [[0, 25, 50, 75], [12, 37, 62, 87]]
    assert tpt_mae.sample_clip(cfg, 4, False, (1, 1), FILM, 0, 0, None) == ([12, 37, 62, 87], (40, 0, 240, 240))
    with pytest.raises(UserError, match="--test-views 5"):
        tpt_mae.parse_views(config("--test-views", "5"))


# ---- VideoMAE --------------------------------------------------------------------------------------------------------


def test_positions_of_a_short_clip_are_a_prefix():
    """The table of f frames is a prefix of the 16-frame one, and a 4-frame clip in the model of 16 frames gives what
    it gives in a model of 4: nothing is interpolated between stages."""
    long = randomise(tpt_mae.VideoMAE("vit_16", frames=16, size=SIZE))
    for frames in (2, 4, 8, 12):
        short = tpt_mae.VideoMAE("vit_16", frames=frames, size=SIZE).eval()
        n = frames // 2 * 16
        assert torch.equal(short.positions, long.positions[:, :n])
        assert torch.equal(short.decoder_positions, long.decoder_positions[:, :n])
    short = tpt_mae.VideoMAE("vit_16", frames=4, size=SIZE).eval()
    short.load_state_dict(long.state_dict())
    for a, b in zip(short(clips(), KEYS, 0.75), long(clips(), KEYS, 0.75), strict=True):
        assert torch.equal(a, b)


def test_mask_is_a_tube_and_hidden_pixels_do_not_leak():
    model, video = randomise(tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=SIZE)), clips()
    visible, masked = common.tube_split(KEYS, 2, 16, 0.75)
    assert visible.shape == (2, 8) and torch.equal(visible[:, :4] + 16, visible[:, 4:])
    patches = common.patchify(video, model.patch)
    prediction, target = model(video, KEYS, 0.75)
    assert torch.equal(target, tpt_mae.pixel_target(common.gather_tokens(patches, masked), "normalized"))
    hidden = torch.zeros(2, 32, dtype=torch.bool).scatter(1, masked, True)[..., None]
    swap = lambda where: common.unpatchify(torch.where(where, 255 - patches, patches), model.patch, model.grid)
    assert torch.equal(model(swap(hidden), KEYS, 0.75)[0], prediction)
    assert not torch.allclose(model(swap(~hidden), KEYS, 0.75)[0], prediction, atol=1e-3)


def test_normalised_target_and_loss_by_loops():
    patches = torch.randint(0, 256, (2, 3, 24), dtype=torch.uint8)
    target = tpt_mae.pixel_target(patches, "normalized")
    for b, n, c in itertools.product(range(2), range(3), range(3)):
        x = patches[b, n, c::3].double() / 255  # colours are fastest
        assert torch.allclose(target[b, n, c::3].double(), (x - x.mean()) / (x.std() + 1e-6), atol=1e-5)
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    expected = (patches / 255).unflatten(-1, (-1, 3)).sub(mean).div(std).flatten(-2)
    assert torch.allclose(tpt_mae.pixel_target(patches, "pixels"), expected, atol=1e-6)
    guess = torch.randn(2, 3, 24)
    assert torch.allclose(tpt_mae.mae_loss(guess, target), ((guess - target) ** 2).flatten(1).mean(1))


def hub_gradients(model, loss, folder):
    """The gradients by our names: saved as if they were weights, which the hub's own code then names."""
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(folder)
    return common.videomae_weights(common.read_weights(folder))


def hub_pixels(video):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return (video / 255 - mean) / std


def same_gradients(net, expected):
    for name, parameter in net.named_parameters():
        assert relative(parameter.grad, expected[name]) < 1e-5, name
        assert expected[name].norm() > 0


@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_loss_and_gradients_are_videomaes(ratio, tmp_path):
    """Same weights, tube mask and clip as transformers' VideoMAE: loss and every gradient to 1e-5."""
    hub = hub_model(tmp_path, use_mean_pooling=False)
    net = tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=SIZE)
    message = common.load_weights(net, tpt_mae.init_weights(tmp_path, net), tmp_path)
    assert "loaded 88 " in message and "left at init 0, not used 0" in message
    loss = tpt_mae.mae_loss(*net(clips(), KEYS, ratio)).mean()
    loss.backward()
    _, masked = common.tube_split(KEYS, 2, 16, ratio)
    expected = hub(hub_pixels(clips()), torch.zeros(2, 32, dtype=torch.bool).scatter(1, masked, True)).loss
    assert abs(loss / expected - 1) < 1e-5 and loss > 0.5
    same_gradients(net, hub_gradients(hub, expected, tmp_path / "gradients"))


def test_classifier_is_videomaes(tmp_path):
    """Mean pooling, fc_norm, head: logits and gradients of transformers' classification model to 1e-5."""
    hub = hub_model(tmp_path, "VideoMAEForVideoClassification", num_labels=5)
    net = tpt_mae.Classifier(5, "vit_16", FRAMES, SIZE, drop_path=0.0)
    message = common.load_weights(net, tpt_mae.init_weights(tmp_path, net), tmp_path)
    assert "left at init 0, not used 0" in message
    labels = torch.tensor([3, 0])
    output = hub(hub_pixels(clips()), labels=labels)
    logits = net(clips(), KEYS)
    assert relative(logits, output.logits) < 1e-5
    F.cross_entropy(logits, labels).backward()
    same_gradients(net, hub_gradients(hub, output.loss, tmp_path / "gradients"))


def test_saved_in_videomaes_format(tmp_path):
    """Names and shapes of upstream's files, values that come back, for pretraining and fine-tuning."""
    hub = hub_model(tmp_path, use_mean_pooling=False)
    net = tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=SIZE)
    common.load_weights(net, tpt_mae.init_weights(tmp_path, net), tmp_path)
    ours, expected = tpt_mae.videomae_state(net), upstream_names(common.read_weights(tmp_path))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours)
    torch.save({"model": ours}, tmp_path / "videomae.pth")
    again = tpt_mae.init_weights(tmp_path / "videomae.pth", net)
    assert all(torch.equal(again[k], v) for k, v in net.state_dict().items())
    tuned = tpt_mae.Classifier(5, "vit_16", FRAMES, SIZE)
    state = tpt_mae.videomae_state(tuned)
    assert state["patch_embed.proj.weight"].shape == (128, 3, 2, 16, 16)
    assert {"blocks.3.attn.q_bias", "fc_norm.weight", "head.bias"} <= state.keys() and len(state) == 2 + 13 * 4 + 4
    assert hub is not None


def test_fine_tuning_takes_the_encoder_only(tmp_path):
    """From pretraining weights: blocks and embedding; not the final norm, the decoder, or another task's classifier."""
    pretrained = randomise(tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=SIZE))
    torch.save({"model": pretrained.state_dict()}, tmp_path / "p.pt")
    net = tpt_mae.Classifier(5, "vit_16", 2 * FRAMES, SIZE)
    weights = tpt_mae.init_weights(tmp_path / "p.pt", net)
    assert weights.keys() == net.state_dict().keys() - {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], pretrained.blocks[0].attn.qkv.weight)
    torch.save({"model": tpt_mae.Classifier(7, "vit_16", FRAMES, SIZE).state_dict()}, tmp_path / "seven.pt")
    assert "head.weight" not in tpt_mae.init_weights(tmp_path / "seven.pt", net)
    torch.save({"model": net.state_dict()}, tmp_path / "five.pt")
    assert "head.weight" in tpt_mae.init_weights(tmp_path / "five.pt", net)


def test_weights_of_another_backbone_are_refused(tmp_path):
    for a, b in itertools.permutations(tpt_mae.BLOCKS, 2):
        path = tmp_path / f"{a}.pt"
        torch.save({"model": tpt_mae.VideoMAE("vit_16", "", FRAMES, SIZE, backbone=a).state_dict()}, path)
        with pytest.raises(UserError, match=f"^error: {path}: weights of another backbone than this --backbone"):
            tpt_mae.init_weights(path, tpt_mae.Classifier(5, "vit_16", FRAMES, SIZE, b))


# ---- backbones -------------------------------------------------------------------------------------------------------

S, K, H = 3, 5, 2  # time steps, kept places, heads


def heads_of(attn, x):
    """(q, k, v), each [N, H, d], of one clip's tokens [N, D]."""
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    return F.linear(x, attn.qkv.weight, bias).reshape(len(x), 3, H, -1).unbind(1)


def attend(q, k, v):
    """Plain attention of one query [d] over keys and values [n, d]."""
    return (k @ q / len(q) ** 0.5).softmax(0) @ v


def test_divided_attention_by_loops():
    block = randomise(tpt_mae.DividedBlock(32, H))
    x = torch.randn(1, S * K, 32)
    y = x[0].clone()
    q, k, v = heads_of(block.temporal_attn, block.temporal_norm(y))
    out = torch.zeros_like(y)
    for i in range(S * K):  # the same place in every step
        same = [j for j in range(S * K) if j % K == i % K]
        out[i] = torch.cat([attend(q[i, h], k[same, h], v[same, h]) for h in range(H)])
    y = y + block.temporal_fc(block.temporal_attn.proj(out))
    q, k, v = heads_of(block.attn, block.norm1(y))
    for i in range(S * K):  # all places of the same step
        same = [j for j in range(S * K) if j // K == i // K]
        out[i] = torch.cat([attend(q[i, h], k[same, h], v[same, h]) for h in range(H)])
    y = y + block.attn.proj(out)
    y = y + block.mlp(block.norm2(y))
    assert torch.allclose(block(x, steps=S)[0], y, atol=1e-5)


def test_trajectory_attention_by_loops():
    attn = randomise(tpt_mae.TrajectoryAttention(32, H))
    x = torch.randn(1, S * K, 32)
    q, k, v = heads_of(attn, x[0])
    out = torch.zeros(S * K, 32)
    for i in range(S * K):
        steps = [[j for j in range(S * K) if j // K == t] for t in range(S)]
        y = torch.stack([torch.cat([attend(q[i, h], k[t, h], v[t, h]) for h in range(H)]) for t in steps])  # [S, D]
        query = attn.trajectory_q(y[i // K]).reshape(H, -1)
        keys, values = attn.trajectory_kv(y).reshape(S, 2, H, -1).unbind(1)
        out[i] = torch.cat([attend(query[h], keys[:, h], values[:, h]) for h in range(H)])
    assert torch.allclose(attn(x, S)[0], attn.proj(out), atol=1e-5)


@pytest.mark.parametrize("backbone", ["joint", "divided", "trajectory"])
def test_backbones_depend_on_visible_tokens_only(backbone):
    """Each works on the visible tokens of any number of frames, and mixes clips with nothing."""
    model = randomise(tpt_mae.VideoMAE("vit_16", "", 8, SIZE, backbone=backbone))
    for frames in (2, 4, 8):
        prediction, target = model(clips(2, frames), KEYS, 0.75)
        assert prediction.shape == target.shape == (2, frames // 2 * 12, 1536)
        alone, _ = model(clips(2, frames)[1:], KEYS[1:], 0.75)
        assert torch.allclose(alone, prediction[1:], atol=1e-5)
    assert not torch.allclose(prediction[0], prediction[1], atol=1e-2)
    assert not torch.allclose(prediction[:, :12], prediction[:, 12:24], atol=1e-2)  # time is seen


def image_vit(folder):
    """transformers' image ViT of vit_16's size, all parameters random, in the hub's layout; and Google's .npz of it."""
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}
    model = transformers.ViTModel(
        transformers.ViTConfig(image_size=SIZE, layer_norm_eps=1e-6, **options), add_pooling_layer=False
    )
    randomise(model).save_pretrained(folder)
    hub = common.read_weights(folder)
    hub = {name.removeprefix("vit."): tensor for name, tensor in hub.items()}
    npz = {"cls": hub["embeddings.cls_token"], "embedding/bias": hub["embeddings.patch_embeddings.projection.bias"],
           "embedding/kernel": hub["embeddings.patch_embeddings.projection.weight"].permute(2, 3, 1, 0),
           "Transformer/posembed_input/pos_embedding": hub["embeddings.position_embeddings"],
           "Transformer/encoder_norm/scale": hub["layernorm.weight"],
           "Transformer/encoder_norm/bias": hub["layernorm.bias"], "head/kernel": torch.zeros(128, 3),
           "pre_logits/kernel": torch.zeros(128, 128)}  # fmt: skip
    for i in range(4):
        theirs, ours = f"encoder.layer.{i}", f"Transformer/encoderblock_{i}"
        for a, b in (("layernorm_before", "LayerNorm_0"), ("layernorm_after", "LayerNorm_2")):
            npz[f"{ours}/{b}/scale"], npz[f"{ours}/{b}/bias"] = hub[f"{theirs}.{a}.weight"], hub[f"{theirs}.{a}.bias"]
        for a, b in (("intermediate.dense", "MlpBlock_3/Dense_0"), ("output.dense", "MlpBlock_3/Dense_1")):
            npz[f"{ours}/{b}/kernel"] = hub[f"{theirs}.{a}.weight"].T
            npz[f"{ours}/{b}/bias"] = hub[f"{theirs}.{a}.bias"]
        attention = f"{ours}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            npz[f"{attention}/{part}/kernel"] = hub[f"{theirs}.attention.attention.{part}.weight"].T.reshape(128, 2, 64)
            npz[f"{attention}/{part}/bias"] = hub[f"{theirs}.attention.attention.{part}.bias"].reshape(2, 64)
        npz[f"{attention}/out/kernel"] = hub[f"{theirs}.attention.output.dense.weight"].T.reshape(2, 64, 128)
        npz[f"{attention}/out/bias"] = hub[f"{theirs}.attention.output.dense.bias"]
    np.savez(folder / "vit.npz", **{name: tensor.contiguous().numpy() for name, tensor in npz.items()})
    return model


def test_image_weights_start_all_backbones(tmp_path):
    """Hub and .npz give the same; a clip of one repeated image is embedded as the image ViT embeds it; and the divided
    model's space, and the joint model of a single step, do with it what the image ViT without CLS does."""
    vit = image_vit(tmp_path)
    hub, npz = (common.vit_weights(common.read_weights(path)) for path in (tmp_path, tmp_path / "vit.npz"))
    assert hub.keys() == npz.keys() and all(torch.equal(hub[k], npz[k]) for k in hub) and len(hub) == 6 + 13 * 4
    image = clips(2, 1)
    video = image.repeat(1, FRAMES, 1, 1, 1)
    embedded = vit.embeddings(image[:, 0].float() / 127.5 - 1)[:, 1:]  # [2, 16, D], without CLS
    expected = embedded
    layers = vit.encoder.layer if hasattr(vit, "encoder") else vit.layers
    for layer in layers:
        expected = layer(expected)
        expected = expected[0] if isinstance(expected, tuple) else expected
    for backbone in tpt_mae.BLOCKS:
        net = tpt_mae.Classifier(5, "vit_16", FRAMES, SIZE, backbone, positions="learned", drop_path=0.0).eval()
        message = common.load_weights(net, tpt_mae.init_weights(tmp_path / "vit.npz", net), "vit")
        assert "left at init 4 " in message if backbone == "joint" else "loaded" in message
        normalised = data.normalize(common.patchify(video, net.patch), data.IMAGENET_MEAN, data.IMAGENET_STD)
        x = net.patch_embed(normalised) + net.positions
        assert torch.allclose(x, embedded.repeat(1, 2, 1), atol=1e-4)
        if backbone == "divided":  # temporal_fc is zero at first: each step by itself
            assert torch.equal(net.blocks[0].temporal_attn.qkv.weight, net.blocks[0].attn.qkv.weight)
            assert relative(net.encode(common.patchify(video, net.patch)), expected.repeat(1, 2, 1)) < 1e-4
        if backbone == "joint":
            assert relative(net.encode(common.patchify(video[:, :2], net.patch)), expected) < 1e-4
    with pytest.raises(UserError, match="--positions learned"):
        tpt_mae.init_weights(tmp_path / "vit.npz", tpt_mae.Classifier(5, "vit_16", FRAMES, SIZE))
    with pytest.raises(UserError, match="16 places, --size makes 4"):
        tpt_mae.init_weights(tmp_path / "vit.npz", tpt_mae.Classifier(5, "vit_16", FRAMES, 32, positions="learned"))


def test_damaged_npz(tmp_path):
    """Cut, or with a pickled object: one line with the name, nothing is run."""
    path = tmp_path / "w.npz"
    np.savez(path, a=np.arange(400.0), b=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="w.npz: not a readable .npz file"):
        common.read_weights(path)
    np.savez(path, a=np.arange(400.0))
    assert common.read_weights(path)["a"].tolist() == list(range(400))
    broken = bytearray(path.read_bytes())
    broken[300:400] = bytes(100)
    path.write_bytes(broken)
    with pytest.raises(UserError, match="w.npz"):
        common.read_weights(path)
