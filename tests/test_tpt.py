"""tpt_mae.py: each idea against a slow version, VideoMAE's own numbers, the schedules of every table, a run's life."""

import dataclasses
import itertools
import json
import math
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
    spec = tpt_mae.MODELS["vit_toy"] | {"patch": 16, "position_scale": 1.0}
    monkeypatch.setitem(tpt_mae.MODELS, "vit_16", spec)
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
        0,
        256,
        (n, frames, 3, size, size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


# ---- the schedule ----------------------------------------------------------------------------------------------------


def test_budget_arithmetic_of_the_paper():
    """Uniform at 400 epochs; Sec. 3.2.1's "25 % at 2 frames -> 1600 epochs" needs 800; frames alone share evenly."""
    uniform = tpt_mae.plan_stages("2:25,4:25,8:25,16:25", 400)
    assert uniform == [(2, 25.0, 800), (4, 25.0, 400), (8, 25.0, 200), (16, 25.0, 100)]
    assert sum(frames * epochs for frames, _, epochs in uniform) == 400 * 16
    assert tpt_mae.plan_stages("2:25,16:75", 800)[0] == (2, 25.0, 1600)
    assert tpt_mae.plan_stages("16:100", 800) == [(16, 100.0, 800)]
    assert tpt_mae.plan_stages("2,4,16", 300) == [
        (2, 100 / 3, 800),
        (4, 100 / 3, 400),
        (16, 100 / 3, 100),
    ]
    assert tpt_mae.plan_stages("2:33.33,8:33.33,16:33.33", 3) == [
        (2, 33.33, 8),
        (8, 33.33, 2),
        (16, 33.33, 1),
    ]
    assert tpt_mae.plan_stages("1:50,8:50", 4, full=8) == [(1, 50.0, 16), (8, 50.0, 2)]
    assert [row[2] for row in tpt_mae.plan_stages("12:20,16:80", 400)] == [
        107,
        320,
    ]  # 106.67 is rounded


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
        assert (
            segment.start == (segments[i - 1].stop if i else 0)
            and segment.offset == own[segment.stage]
        )
        for _ in range(segment.start, segment.stop):
            seen.append(segment.stage)
            own[segment.stage] += 1
    assert own == steps
    return seen


def test_long_and_short_cycles():
    assert walk(tpt_mae.lay_out([4, 2, 1]), [4, 2, 1]) == [0, 0, 0, 0, 1, 1, 2]
    assert walk(tpt_mae.lay_out([8, 4, 2], rounds=2), [8, 4, 2]) == [0, 0, 0, 0, 1, 1, 2] * 2
    assert walk(tpt_mae.lay_out([3, 2], rounds=2), [3, 2]) == [
        0,
        1,
        0,
        0,
        1,
    ]  # what doesn't divide comes later
    walk(tpt_mae.lay_out([7, 5, 3], rounds=11, order="random"), [7, 5, 3])


def test_segments_of_the_docstrings():
    """The numbers that Segment's and lay_out's pictures show."""
    stages, segments = tpt_mae.schedule(config("--recipe", "ssv2"), 168913)
    assert [stage.steps for stage in stages] == [131200, 65600, 32800, 16400] and len(segments) == 4
    assert [segment.start for segment in segments] == [0, 131200, 196800, 229600]
    _, segments = tpt_mae.schedule(config("--recipe", "ssv2", "--cycle", "short"), 168913)
    assert segments[4][:4] == (0, 2460, 3772, 1312) and segments[8].start == 4920
    assert tpt_mae.lay_out([4, 2], rounds=2) == [
        (0, 0, 2, 0, (0, 6)),
        (1, 2, 3, 0, (0, 6)),
        (0, 3, 5, 2, (0, 6)),
        (1, 5, 6, 1, (0, 6)),
    ]


def test_random_order():
    """Never the progressive order of a long cycle; another one for another seed; short rounds differ."""
    orders = {
        tuple(s.stage for s in tpt_mae.lay_out([1] * 4, order="random", seed=seed))
        for seed in range(200)
    }
    assert (
        (0, 1, 2, 3) not in orders
        and len(orders) == 23
        and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    )
    assert [s.stage for s in tpt_mae.lay_out([1, 1], order="random", frames=[16, 2])] == [
        0,
        1,
    ]  # which is not 2, 16
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
    """Table 7's batches: rates follow VideoMAE's rule unless given; a pass with repeated clips shows that many."""
    stages, segments = tpt_mae.schedule(
        config("--recipe", "ssv2", "--stage-batch", "512,512,512,1024"), 168913
    )
    assert [s.batch for s in stages] == [512, 512, 512, 1024]
    assert [s.lr for s in stages] == pytest.approx([3e-4, 3e-4, 3e-4, 6e-4])
    assert [s.steps for s in stages] == [800 * 329, 400 * 329, 200 * 329, 100 * 164] and len(
        segments
    ) == 4
    stages, _ = tpt_mae.schedule(
        config("--recipe", "ssv2", "--repeated", "4,2,1,1", "--stage-lr", "1e-3"), 168913
    )
    assert [s.lr for s in stages] == [1e-3] * 4 and [s.repeated for s in stages] == [4, 2, 1, 1]
    assert [s.epoch_steps for s in stages] == [659, 329, 164, 164]
    assert [s.steps for s in stages] == [800 * 659 // 4, 400 * 329 // 2, 200 * 164, 100 * 164]
    stages, segments = tpt_mae.schedule(config("--recipe", "ssv2", "--cycle", "short"), 168913)
    assert (
        len(segments) == 400 and len({s.cycle for s in segments}) == 1
    )  # 100 rounds of 8, 4, 2, 1 epochs
    assert [s.stop - s.start for s in segments[:4]] == [8 * 164, 4 * 164, 2 * 164, 164]
    (stage,), _ = tpt_mae.schedule(config("--recipe", "k400_ft"), 241258)
    assert (stage.frames, stage.epochs, stage.steps) == (16, 75, 75 * (241258 // 384))
    stages, segments = tpt_mae.schedule(
        config("--recipe", "ssv2", "--cycle", "short", "--lr-cycles", 4), 168913
    )
    assert len({s.cycle for s in segments}) == 4
    stages, _ = tpt_mae.schedule(config("--recipe", "ssv2", "--max-steps", 150), 168913)
    assert [s.steps for s in stages] == [80, 40, 20, 10]


def test_search_space_by_brute_force():
    """All subsets and portions, filtered afterwards, as Sec. 3.2.1 puts it."""
    expected = set()
    for n in range(1, 5):
        for frames in itertools.product((2, 4, 8, 12, 16), repeat=n):
            for shares in itertools.product((0, 6.25, 12.5, 25, 50, 100), repeat=n):
                if (
                    sorted(set(frames)) == list(frames)
                    and frames[-1] == 16
                    and sum(shares) == 100
                    and min(shares)
                ):
                    expected.add(
                        ",".join(f"{f}:{p:g}" for f, p in zip(frames, shares, strict=True))
                    )
    space = tpt_mae.search_space()
    assert set(space) == expected and len(space) == len(expected) == 75
    assert [text.count(",") for text in space] == sorted(
        text.count(",") for text in space
    )  # from few to many
    assert "2:25,4:25,8:25,16:25" in space
    assert tpt_mae.search_space((8, 2), 1) == ["8:100"] and tpt_mae.search_space((8, 2)) == [
        "8:100",
        "2:50,8:50",
    ]
    for text in space:
        tpt_mae.plan_stages(text, 400)


# ---- sampling --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Film:
    info: data.VideoInfo


FILM = Film(data.VideoInfo(320, 240, 30.0, 100, 100 / 30, 0, "h264"))


def sample(cfg, frames, video, view, key, views=None):
    """(frames, box) of a clip as a run with this Config samples it."""
    return tpt_mae.clips_of(cfg, [], frames, views).plan(video, 0, view, key)


def test_sampling_of_both_data_sets():
    key = make_key(5)
    k400, ssv2 = config("--recipe", "k400"), config("--recipe", "ssv2")
    for frames in (2, 4, 8, 16):
        chosen, box = sample(k400, frames, FILM, 0, key)
        assert np.diff(chosen).tolist() == [4] * (frames - 1)  # the same stride at every length
        assert box == data.multi_scale_box(FILM.info, key)
        chosen, _ = sample(ssv2, frames, FILM, 0, key)
        assert all(
            i * 100 // frames <= f < (i + 1) * 100 // frames for i, f in enumerate(chosen)
        )  # one a segment
    first, second = (sample(ssv2, 4, FILM, 0, make_key(i))[0] for i in (1, 2))
    assert first != second
    chosen, _ = sample(k400, 1, FILM, 0, key)
    assert (
        chosen == data.stride_frames(FILM.info, 1, 4, common.uniform(key, "start").item()) * 2
    )  # fills the tubelet
    assert chosen[0] > 0
    box = sample(config("--recipe", "k400_ft"), 16, FILM, 0, key)[1]
    assert box == data.random_resized_box(FILM.info, key)


def test_test_views():
    """5 x 3: five starts, three squares; 2 x 3: VideoMAE's two interleaved clips of segments; a centre clip else."""
    cfg = config("--recipe", "k400_ft")
    views = [sample(cfg, 16, FILM, v, None, (5, 3)) for v in range(15)]
    assert [v[0][0] for v in views[::3]] == [0, 9, 18, 27, 36] and [v[1][0] for v in views[:3]] == [
        0,
        40,
        80,
    ]
    assert all(a[0] == b[0] for a, b in zip(views[::3], views[2::3], strict=True))
    cfg = config("--recipe", "ssv2_ft")
    views = [sample(cfg, 4, FILM, v, None, (2, 3))[0] for v in (0, 3)]
    assert views == [[0, 25, 50, 75], [12, 37, 62, 87]]
    assert sample(cfg, 4, FILM, 0, None, (1, 1)) == ([12, 37, 62, 87], (40, 0, 240, 240))
    assert common.two_numbers("--test-views", cfg.test_views) == (2, 3)
    for text in ("5", "5x", "x3", "0x3", "5x3x1", "5x-3"):
        with pytest.raises(UserError, match=f"--test-views {text} is not"):
            common.two_numbers("--test-views", text)


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
    assert torch.equal(
        target, tpt_mae.pixel_target(common.gather_tokens(patches, masked), "normalized")
    )
    hidden = torch.zeros(2, 32, dtype=torch.bool).scatter(1, masked, True)[..., None]
    swap = lambda where: common.unpatchify(
        torch.where(where, 255 - patches, patches), model.patch, model.grid
    )
    assert torch.equal(model(swap(hidden), KEYS, 0.75)[0], prediction)
    assert not torch.allclose(model(swap(~hidden), KEYS, 0.75)[0], prediction, atol=1e-3)


def test_normalised_target_and_loss_by_loops():
    patches = torch.randint(0, 256, (2, 3, 24), dtype=torch.uint8)
    target = tpt_mae.pixel_target(patches, "normalized")
    for b, n, c in itertools.product(range(2), range(3), range(3)):
        x = patches[b, n, c::3].double() / 255  # colours are fastest
        assert torch.allclose(
            target[b, n, c::3].double(), (x - x.mean()) / (x.std() + 1e-6), atol=1e-5
        )
    dull = torch.full(
        (1, 2, 24), 77.0
    )  # no detail, or one pixel's; mixup's clips are float, and must stay as they are
    dull[0, 1, 3] = 78
    before, flat = dull.clone(), tpt_mae.pixel_target(dull, "normalized")
    assert (flat[0, 0] == 0).all() and torch.equal(dull, before)
    x = dull[0, 1, ::3].double() / 255
    assert torch.allclose(flat[0, 1, ::3].double(), (x - x.mean()) / (x.std() + 1e-6), atol=1e-5)
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    expected = (patches / 255).unflatten(-1, (-1, 3)).sub(mean).div(std).flatten(-2)
    assert torch.allclose(tpt_mae.pixel_target(patches, "pixels"), expected, atol=1e-6)
    guess = torch.randn(2, 3, 24)
    assert torch.allclose(
        tpt_mae.mae_loss(guess, target), ((guess - target) ** 2).flatten(1).mean(1)
    )


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
    expected = hub(
        hub_pixels(clips()), torch.zeros(2, 32, dtype=torch.bool).scatter(1, masked, True)
    ).loss
    assert abs(loss / expected - 1) < 1e-5 and loss > 0.5
    same_gradients(net, hub_gradients(hub, expected, tmp_path / "gradients"))


def test_classifier_is_videomaes(tmp_path):
    """Mean pooling, fc_norm, head: logits and gradients of transformers' classification model to 1e-5."""
    hub = hub_model(tmp_path, "VideoMAEForVideoClassification", num_labels=5)
    net = tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=SIZE, drop_path=0.0)
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
    tuned = tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=SIZE)
    state = tpt_mae.videomae_state(tuned)
    assert state["patch_embed.proj.weight"].shape == (128, 3, 2, 16, 16)
    assert {"blocks.3.attn.q_bias", "fc_norm.weight", "head.bias"} <= state.keys() and len(
        state
    ) == 2 + 13 * 4 + 4
    learned = randomise(
        tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=SIZE, positions="learned")
    )
    torch.save({"model": tpt_mae.videomae_state(learned)}, tmp_path / "learned.pth")
    assert torch.equal(
        common.read_weights(tmp_path / "learned.pth")["pos_embed"], learned.positions
    )  # upstream's name
    again = tpt_mae.init_weights(tmp_path / "learned.pth", learned)
    assert (
        all(torch.equal(again[k], v) for k, v in learned.state_dict().items()) and hub is not None
    )


@pytest.mark.parametrize("kind", ["VideoMAEForPreTraining", "VideoMAEForVideoClassification"])
def test_transformers_loads_what_is_saved(kind, tmp_path):
    """videomae.pth under the hub's names, as its conversion script renames them: transformers' VideoMAE then gives our
    loss and logits; nothing is left over."""
    tuned = kind.endswith("Classification")
    options = {"num_labels": 5} if tuned else {"use_mean_pooling": False}
    hub = hub_model(tmp_path / "hub", kind, **options)
    net = randomise(tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=SIZE) if tuned else
                    tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=SIZE))  # fmt: skip
    names = {k: v for k, v in upstream_names({k: k for k in common.read_weights(tmp_path / "hub")} | {
        k: v for k, v in common.read_weights(tmp_path / "hub").items() if ".query." in k or ".key." in k or
        ".value." in k}).items() if isinstance(v, str)}  # fmt: skip
    if tuned:
        names = {k.removeprefix("encoder."): v for k, v in names.items()}
    state = {names[k]: v for k, v in tpt_mae.videomae_state(net).items() if k in names}
    for name, qkv in tpt_mae.videomae_state(net).items():
        if name.endswith("qkv.weight"):
            theirs = names[name.replace("qkv.weight", "q_bias")].removesuffix("q_bias")
            state |= {
                f"{theirs}{p}.weight": w
                for p, w in zip(("query", "key", "value"), qkv.chunk(3), strict=True)
            }
    layout = common.read_weights(tmp_path / "hub")
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in layout.items()}
    pytest.importorskip("safetensors.torch").save_file(
        {k: v.contiguous() for k, v in state.items()},
        tmp_path / "hub/model.safetensors",
        metadata={"format": "pt"},
    )
    again = type(hub).from_pretrained(tmp_path / "hub").eval()
    for module in again.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    with torch.no_grad():
        if tuned:
            assert relative(net(clips(), KEYS), again(hub_pixels(clips())).logits) < 1e-5
        else:
            _, masked = common.tube_split(KEYS, 2, 16, 0.75)
            bools = torch.zeros(2, 32, dtype=torch.bool).scatter(1, masked, True)
            loss = tpt_mae.mae_loss(*net(clips(), KEYS, 0.75)).mean()
            assert abs(loss / again(hub_pixels(clips()), bools).loss - 1) < 1e-5


def test_fine_tunings_parameter_groups():
    """Layer decay by BEiT's ids, the embedding the lowest; no weight decay on norms, biases and learned positions."""
    net = tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=SIZE, positions="learned")
    groups = common.param_groups(net, 0.05, 0.75, net.layer_of, len(net.blocks), ("positions",))
    found = {id(p): (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    expected = {"patch_embed.weight": (0.05, 5), "patch_embed.bias": (0, 5), "positions": (0, 5), "head.bias": (0, 0),
                "blocks.0.attn.qkv.weight": (0.05, 4), "blocks.3.mlp.fc2.weight": (0.05, 1), "head.weight": (0.05, 0),
                "blocks.3.norm1.weight": (0, 1), "blocks.0.attn.q_bias": (0, 4), "fc_norm.weight": (0, 0)}  # fmt: skip
    parameters = dict(net.named_parameters())
    for name, (decay, power) in expected.items():
        assert found[id(parameters[name])] == (decay, pytest.approx(0.75**power)), name
    assert len(found) == len(parameters)
    net = tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=SIZE, drop_path=0.3)
    assert [block.drop_path for block in net.blocks] == [pytest.approx(0.1 * i) for i in range(4)]
    mask_token = tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=SIZE).mask_token
    assert 0.015 < mask_token.abs().max() <= 0.02  # VideoMAE cuts it at one deviation


def test_fine_tuning_takes_the_encoder_only(tmp_path):
    """From pretraining weights: blocks and embedding; not the final norm, the decoder, or another task's classifier."""
    pretrained = randomise(tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=SIZE))
    torch.save({"model": pretrained.state_dict()}, tmp_path / "p.pt")
    net = tpt_mae.Classifier(5, "vit_16", frames=2 * FRAMES, size=SIZE)
    weights = tpt_mae.init_weights(tmp_path / "p.pt", net)
    assert weights.keys() == net.state_dict().keys() - {
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    }
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], pretrained.blocks[0].attn.qkv.weight)
    torch.save(
        {"model": tpt_mae.Classifier(7, "vit_16", frames=FRAMES, size=SIZE).state_dict()},
        tmp_path / "seven.pt",
    )
    assert "head.weight" not in tpt_mae.init_weights(tmp_path / "seven.pt", net)
    torch.save({"model": net.state_dict()}, tmp_path / "five.pt")
    assert "head.weight" in tpt_mae.init_weights(tmp_path / "five.pt", net)


def test_weights_of_another_backbone_are_refused(tmp_path):
    for a, b in itertools.permutations(tpt_mae.BLOCKS, 2):
        path = tmp_path / f"{a}.pt"
        net = tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=SIZE, backbone=a)
        torch.save({"model": net.state_dict()}, path)
        with pytest.raises(
            UserError, match=f"^error: {path}: weights of another backbone than this --backbone"
        ):
            net = tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=SIZE, backbone=b)
            tpt_mae.init_weights(path, net)


def test_the_layer_between_encoder_and_decoder_starts_as_videomaes():
    """VideoMAE leaves it at nn.Linear's own start, uniform in +-1 / sqrt(inputs): a spread of 1 / sqrt(3 x 384)."""
    torch.manual_seed(0)
    weight = tpt_mae.VideoMAE("vit_s", frames=2).encoder_to_decoder.weight.detach()  # [192, 384]
    assert weight.abs().max() <= 0.051032  # 1 / sqrt(384)
    assert abs(weight.std().item() - 0.029463) < 0.0003  # Xavier's is 0.058926


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


def test_divided_attention_is_timesformers():
    """transformers' TimesformerLayer, all parameters random. Ours has no CLS; so theirs is one that no query looks at:
    in one channel of each head all queries are large, by their bias, and the CLS token's key is very negative."""
    timesformer = pytest.importorskip("transformers.models.timesformer.modeling_timesformer")
    dim, side = 64, 4
    config = timesformer.TimesformerConfig(
        image_size=16 * side, num_frames=S, hidden_size=dim, num_attention_heads=H, intermediate_size=4 * dim,
        num_hidden_layers=1, layer_norm_eps=1e-6, attention_type="divided_space_time")  # fmt: skip
    theirs = randomise(timesformer.TimesformerLayer(config, 0))
    cls = torch.ones(dim).index_fill(0, torch.arange(0, dim, 2), -1.0)  # as its norm leaves it
    with torch.no_grad():
        torch.nn.init.ones_(theirs.layernorm_before.weight)
        torch.nn.init.zeros_(theirs.layernorm_before.bias)
        qkv, first = theirs.attention.attention.qkv, torch.arange(0, dim, dim // H)
        qkv.bias[first], qkv.weight[dim + first] = 10.0, -0.5 * cls
    ours, names = tpt_mae.DividedBlock(dim, H), {"temporal_norm": theirs.temporal_layernorm}
    names |= {
        "temporal_fc": theirs.temporal_dense,
        "norm1": theirs.layernorm_before,
        "norm2": theirs.layernorm_after,
    }
    names |= {"mlp.fc1": theirs.intermediate.dense, "mlp.fc2": theirs.output.dense}
    state = {
        f"{name}.{k}": v for name, module in names.items() for k, v in module.state_dict().items()
    }
    for name, module in (("temporal_attn", theirs.temporal_attention), ("attn", theirs.attention)):
        q_bias, _, v_bias = module.attention.qkv.bias.chunk(3)  # a key's bias changes nothing
        state |= {
            f"{name}.q_bias": q_bias,
            f"{name}.v_bias": v_bias,
            f"{name}.qkv.weight": module.attention.qkv.weight,
        }
        state |= {f"{name}.proj.{k}": v for k, v in module.output.dense.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(2, S, side * side, dim)
    swapped = x.transpose(1, 2).flatten(1, 2)  # their tokens: places, and in each the frames
    with torch.no_grad():
        expected = theirs(torch.cat([cls.expand(2, 1, dim), swapped], 1))[0][:, 1:]
        found = ours(x.flatten(1, 2), steps=S).unflatten(1, (S, -1)).transpose(1, 2).flatten(1, 2)
    assert relative(found, expected) < 1e-5 and relative(found, swapped) > 0.1


def test_trajectory_attention_by_loops():
    attn = randomise(tpt_mae.TrajectoryAttention(32, H))
    x = torch.randn(1, S * K, 32)
    q, k, v = heads_of(attn, x[0])
    out = torch.zeros(S * K, 32)
    for i in range(S * K):
        steps = [[j for j in range(S * K) if j // K == t] for t in range(S)]
        y = torch.stack(
            [torch.cat([attend(q[i, h], k[t, h], v[t, h]) for h in range(H)]) for t in steps]
        )  # [S, D]
        query = attn.trajectory_q(y[i // K]).reshape(H, -1)
        keys, values = attn.trajectory_kv(y).reshape(S, 2, H, -1).unbind(1)
        out[i] = torch.cat([attend(query[h], keys[:, h], values[:, h]) for h in range(H)])
    assert torch.allclose(attn(x, S)[0], attn.proj(out), atol=1e-5)


@pytest.mark.parametrize("backbone", ["joint", "divided", "trajectory"])
def test_backbones_depend_on_visible_tokens_only(backbone):
    """Each works on the visible tokens of any number of frames, and mixes clips with nothing."""
    model = randomise(tpt_mae.VideoMAE("vit_16", frames=8, size=SIZE, backbone=backbone))
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
    options = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    }
    model = transformers.ViTModel(
        transformers.ViTConfig(image_size=SIZE, layer_norm_eps=1e-6, **options),
        add_pooling_layer=False,
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
            npz[f"{ours}/{b}/scale"], npz[f"{ours}/{b}/bias"] = (
                hub[f"{theirs}.{a}.weight"],
                hub[f"{theirs}.{a}.bias"],
            )
        for a, b in (
            ("intermediate.dense", "MlpBlock_3/Dense_0"),
            ("output.dense", "MlpBlock_3/Dense_1"),
        ):
            npz[f"{ours}/{b}/kernel"] = hub[f"{theirs}.{a}.weight"].T
            npz[f"{ours}/{b}/bias"] = hub[f"{theirs}.{a}.bias"]
        attention = f"{ours}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            npz[f"{attention}/{part}/kernel"] = hub[
                f"{theirs}.attention.attention.{part}.weight"
            ].T.reshape(128, 2, 64)
            npz[f"{attention}/{part}/bias"] = hub[
                f"{theirs}.attention.attention.{part}.bias"
            ].reshape(2, 64)
        npz[f"{attention}/out/kernel"] = hub[f"{theirs}.attention.output.dense.weight"].T.reshape(
            2, 64, 128
        )
        npz[f"{attention}/out/bias"] = hub[f"{theirs}.attention.output.dense.bias"]
    np.savez(
        folder / "vit.npz", **{name: tensor.contiguous().numpy() for name, tensor in npz.items()}
    )
    return model


def test_image_weights_start_all_backbones(tmp_path):
    """Hub and .npz give the same; a clip of one repeated image is embedded as the image ViT embeds it; and the divided
    model's space, trajectories through a still clip, and the joint model of a single step, do with it what the image
    ViT without CLS does."""
    vit = image_vit(tmp_path)
    hub, npz = (
        common.vit_weights(common.read_weights(path)) for path in (tmp_path, tmp_path / "vit.npz")
    )
    assert (
        hub.keys() == npz.keys()
        and all(torch.equal(hub[k], npz[k]) for k in hub)
        and len(hub) == 6 + 13 * 4
    )
    image = clips(2, 1)
    video = image.repeat(1, FRAMES, 1, 1, 1)
    embedded = vit.embeddings(image[:, 0].float() / 127.5 - 1)[:, 1:]  # [2, 16, D], without CLS
    expected = embedded
    layers = vit.encoder.layer if hasattr(vit, "encoder") else vit.layers
    for layer in layers:
        expected = layer(expected)
        expected = expected[0] if isinstance(expected, tuple) else expected
    for backbone in tpt_mae.BLOCKS:
        net = tpt_mae.Classifier(
            5, "vit_16", frames=FRAMES, size=SIZE, backbone=backbone, positions="learned"
        ).eval()
        message = common.load_weights(net, tpt_mae.init_weights(tmp_path / "vit.npz", net), "vit")
        assert "left at init 4 " in message if backbone == "joint" else "loaded" in message
        normalised = data.normalize(
            common.patchify(video, net.patch), data.IMAGENET_MEAN, data.IMAGENET_STD
        )
        x = net.patch_embed(normalised) + net.positions
        assert torch.allclose(x, embedded.repeat(1, 2, 1), atol=1e-4)
        if backbone == "divided":  # temporal_fc is zero at first: each step by itself
            assert torch.equal(
                net.blocks[0].temporal_attn.qkv.weight, net.blocks[0].attn.qkv.weight
            )
            assert (
                relative(net.encode(common.patchify(video, net.patch)), expected.repeat(1, 2, 1))
                < 1e-4
            )
        if (
            backbone == "trajectory"
        ):  # each token's values along it are the same, and pass as they are
            assert (
                relative(net.encode(common.patchify(video, net.patch)), expected.repeat(1, 2, 1))
                < 1e-5
            )
            keys = net.blocks[0].attn.trajectory_kv.weight[:128]
            assert keys.std() > 0.01 and net.blocks[0].attn.trajectory_q.weight.std() > 0.01
        if backbone == "joint":
            assert relative(net.encode(common.patchify(video[:, :2], net.patch)), expected) < 1e-4
    with pytest.raises(UserError, match="--positions learned"):
        tpt_mae.init_weights(
            tmp_path / "vit.npz", tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=SIZE)
        )
    with pytest.raises(UserError, match="16 places, --size makes 4"):
        tpt_mae.init_weights(
            tmp_path / "vit.npz",
            tpt_mae.Classifier(5, "vit_16", frames=FRAMES, size=32, positions="learned"),
        )


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
    torch.save({"model": {"a": torch.zeros(100)}}, path)  # a zip archive too, of another kind
    whole = path.read_bytes()
    assert common.read_weights(path)["a"].shape == (100,)
    refused = 0
    for place in range(-120, -8, 4):  # in its directory, not all of which torch heeds
        path.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
        try:
            assert common.read_weights(path)["a"].shape == (100,)
        except UserError as error:
            refused += str(path) in str(error)
    assert refused > 10


# ---- the papers' numbers ---------------------------------------------------------------------------------------------

GMACS = {  # forward, all patches embedded; encoder and decoder of VideoMAE, 90 % tube mask, 224 x 224
    ("vit_b", "4x384"): {2: 3.552, 4: 7.355, 8: 15.714, 12: 25.075, 16: 35.440},
    ("vit_l", "4x512"): {2: 9.140, 4: 18.635, 8: 38.685, 12: 60.152, 16: 83.035},
}


@pytest.fixture(scope="module")
def counted():
    """count_gmacs, once for each model and length that the tests below share."""
    known, count = {}, tpt_mae.count_gmacs

    def look_up(cfg, classes, frames):
        longest = bool(cfg.stages) and tpt_mae.longest(cfg)
        head = None if cfg.pretraining else classes
        depth = tpt_mae.MODELS[cfg.model]["depth"]
        net = (cfg.model, depth, cfg.decoder, cfg.backbone, cfg.size, cfg.mask_ratio)
        key = (*net, cfg.pretraining, head, frames, longest)
        if key not in known:
            known[key] = count(cfg, classes, frames)
        return known[key]

    return look_up


@pytest.mark.parametrize(("model", "decoder"), GMACS)
def test_gmacs(model, decoder, counted):
    """Counted on the real model; ours are lower by the masked patches, which are not embedded."""
    cfg = config("--recipe", "ssv2", "--model", model, "--decoder", decoder)
    for frames, expected in GMACS[model, decoder].items():
        here, embedded = counted(cfg, 174, frames)
        assert embedded == pytest.approx(expected, rel=2e-3)
        width = tpt_mae.MODELS[model]["width"]
        assert embedded - here == pytest.approx(frames // 2 * 176 * 1536 * width / 1e9)
    assert counted(cfg, 174, 1) == counted(cfg, 174, 2)


def test_inference_cost_and_size_of_table_1(counted):
    """598 and 1193 GMACs, 304 M and 632 M parameters, ViT-L and -H fine-tuned on K400: the paper's, within 0.2 %."""
    for model, gmacs, parameters in (("vit_l", 598, 304), ("vit_h", 1193, 632)):
        cfg = config("--recipe", "k400_ft", "--model", model)
        assert counted(cfg, 400, 16)[0] == pytest.approx(gmacs, rel=2e-3)
        with torch.device("meta"):
            net = tpt_mae.build(cfg, 400)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(parameters, rel=2e-3)


def plan(capsys, *argv):
    tpt_mae.main(config("--plan", *argv))
    return capsys.readouterr().out


def test_plan_of_the_headline(capsys, counted, monkeypatch):
    """Half the frame budget on ViT-L (decoder 4 x 512): 54 % fewer multiply-adds (Sec. 5.1), 7.5 % at equal frames."""
    monkeypatch.setattr(tpt_mae, "count_gmacs", counted)
    monkeypatch.setattr(common, "block_bytes", block_by_hand)
    out = plan(
        capsys,
        "--recipe",
        "k400",
        "--model",
        "vit_l",
        "--decoder",
        "4x512",
        "--clips-per-second",
        "500",
    )
    equal, half = (
        list(map(float, re.findall(r"([\d.]+) %", line))) for line in out.splitlines()[-2:]
    )
    assert all(53 <= x <= 55 for x in half) and all(7 <= x <= 8 for x in equal)
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+ +25.00", line)]
    assert [row[0] for row in rows] == ["2", "4", "8", "16"]
    assert [row[2] for row in rows] == ["3200", "1600", "800", "400"]
    for row in rows:
        assert float(row[10]) == pytest.approx(GMACS["vit_l", "4x512"][int(row[0])], rel=2e-3)
    clips = 400 * (241258 // 1024) * 1024
    assert float(rows[3][12]) == pytest.approx(
        clips / 500 / 3600, abs=0.06
    )  # hours at the measured rate
    hours = float(re.search(r"([\d.]+) hours", out)[1])
    assert hours == pytest.approx(sum(float(row[12]) for row in rows), abs=0.3)
    out = plan(capsys, "--recipe", "ssv2", "--then", "ssv2_ft", "--clips-per-second", 500)
    assert (
        "- hours" in out.split("model ")[-1] and "- hours" not in out.split("model ")[1]
    )  # measured in pretraining
    out = plan(capsys, "--recipe", "toy")
    assert (
        "- hours by --clips-per-second" in out and out.count("model ") == 2
    )  # pretraining, then fine-tuning
    short = plan(
        capsys, "--recipe", "ssv2", "--stages", "2:100"
    )  # Fig. 3's last bar: against 16 frames, not its own 2
    assert "against   16 frames only at equal frames" in short
    (two, _), (sixteen, _) = (
        tpt_mae.count_gmacs(config("--recipe", "ssv2"), 174, frames) for frames in (2, 16)
    )
    saved = re.search(r"equal frames: ([\d.]+) %", short)[1]
    assert float(saved) == pytest.approx(100 * (1 - 8 * two / sixteen), abs=0.06)


def block_by_hand(cfg, block, depth, shape, *args):
    """Of each token and channel 32 bytes a block, all in half precision: the inputs of the two norms and their outputs, 2
    each, q, k and v, 6, attention's output, 2, the MLP before and after GELU, 8 each. One block more is in backward: its
    32, its output, 2, and the gradients of that, 2, and of the MLP after GELU, 8, less its input, which is kept already.
    """
    assert cfg.precision != "fp32" and block.mlp.fc1.in_features == shape[1]
    return (depth * (2 if cfg.grad_checkpoint else 32) + 42) * shape[0] * shape[1]


MEMORY = re.compile(
    r"memory    (.*) on (\d+) frames: (\d+) clips .* (\d+) times a step: ([\d.]+) GB .* (--\S+) in (.*)"
)


def printed_memory(capsys, *argv):
    """What print_memory says of each phase of a command, --then's too."""
    cfg = config(*argv, "--out", "run")
    for one in (cfg, tpt_mae.following(cfg)):
        common.print_memory(one, tpt_mae.memory(one))
    return [MEMORY.fullmatch(line).groups() for line in capsys.readouterr().out.splitlines()]


def test_memory_of_every_phase(capsys, monkeypatch):
    """Each stage and --then's fine-tuning, of ViT-L on 64 and on 8 GPUs; all by hand.
    A pixel of a fine-tuning's clip takes 7 bytes more for RandAugment and 4 for mixup."""
    cfg = config("--recipe", "k400")
    real = common.block_bytes(cfg, common.Block(128, 2, kind="sdpa"), 4, (64, 128))
    assert real == pytest.approx(block_by_hand(cfg, common.Block(128, 2), 4, (64, 128)), rel=0.05)
    monkeypatch.setattr(common, "block_bytes", block_by_hand)
    flags = ["--recipe", "k400", "--model", "vit_l", "--then", "ssv2_ft"]
    *found, last = printed_memory(capsys, *flags)
    pixels = lambda frames, each=10: each * frames * 3 * 224 * 224
    for (kind, frames, clips_, times, gigabytes, flag, fits), steps in zip(
        found, (1, 2, 4, 8), strict=True
    ):
        assert (kind, int(frames), clips_, times, flag) == (
            "pretraining",
            2 * steps,
            "16",
            "1",
            "--micro-batch",
        )
        encoder = steps * 20 * 1024 * (24 * 32 + 42)
        decoder = steps * 196 * 512 * (12 * 32 + 42)
        expected = 2**30 + 343.0e6 * 18 + 16 * (encoder + decoder + 2 * pixels(2 * steps))
        assert (
            float(gigabytes) == pytest.approx(expected / 2**30, abs=0.06)
            and fits == "24 GB: 16, 80 GB: 16"
        )
    assert last[:4] == ("fine-tuning", "16", "4", "3") and last[5] == "--then-micro-batch"
    tuned = 2**30 + 304.3e6 * 18 + 4 * (1568 * 1024 * (24 * 32 + 42) + pixels(16, 21))
    assert float(last[4]) == pytest.approx(tuned / 2**30, abs=0.06)
    many = printed_memory(
        capsys, *flags, "--gpus", 8, "--gpu-gb", 32, 80, "--then-micro-batch", 96
    )[-1]
    assert many[2] == "96" and float(many[4]) > 100
    assert many[6] == "32 GB: 16, 80 GB: 48"  # multiples of 4: pairs of videos of 2 clips
    recomputed = printed_memory(capsys, *flags, "--grad-checkpoint")[-1]
    tuned = 2**30 + 304.3e6 * 18 + 4 * (1568 * 1024 * (24 * 2 + 42) + pixels(16, 21))
    assert float(recomputed[4]) == pytest.approx(tuned / 2**30, abs=0.06)


def test_recipes_fit_the_papers_cards(capsys, monkeypatch):
    """V100s of 32 GB: every recipe, of the largest model, at any number of GPUs."""
    monkeypatch.setattr(common, "block_bytes", block_by_hand)
    for recipe in tpt_mae.RECIPES.keys() - {"toy", "toy_ft"}:
        cfg = config("--recipe", recipe, "--model", "vit_h", "--gpus", 8)
        common.print_memory(cfg, tpt_mae.memory(cfg))
        found = [
            float(match[5]) for match in map(MEMORY.fullmatch, capsys.readouterr().out.splitlines())
        ]
        assert len(found) in (1, 4) and 16 < max(found) < 30, (recipe, found)


UNIFORM = "2:25,4:25,8:25,16:25"
EIGHT = ["--budget-frames", 8, "--stages", "2,4,8"]
ROWS = {  # each system, table or figure of the paper, as flags
    "T1 pretrain L": ["k400", "--model", "vit_l"],
    "T1 pretrain H": ["k400", "--model", "vit_h"],
    "T1 K400 L": ["k400_ft", "--model", "vit_l", "--epochs", 35],
    "T1 K400 H": ["k400_ft", "--model", "vit_h", "--epochs", 50, "--head-dropout", 0.5, "--drop-path", 0.2],
    "T1 SSv2 L": ["ssv2_ft", "--model", "vit_l", "--init", "runs/tpt_mae-k400/last.pt"],
    "T1 K400 to SSv2 L": ["k400", "--model", "vit_l", "--then", "ssv2_ft", "--then-train-list", "s.csv",
                          "--then-val-list", "v.csv"],
    "T1 SSv2 H": ["ssv2_ft", "--model", "vit_h", "--init", "runs/tpt_mae-k400/last.pt"],
    "T2": ["ssv2", "--then", "ssv2_ft"],
    "T3 joint sup": ["ssv2_sup", "--init", "B_16.npz"],
    "T3 joint VideoMAE": ["ssv2", "--stages", "16:100"],
    "T3 joint TPT": ["ssv2"],
    "T3 divided sup": ["ssv2_sup", "--backbone", "divided", "--frames", 8],
    "T3 divided VideoMAE": ["ssv2", "--backbone", "divided", "--budget-frames", 8, "--stages", "8:100"],
    "T3 divided TPT": ["ssv2", "--backbone", "divided", *EIGHT],
    "T3 trajectory sup": ["ssv2_sup", "--backbone", "trajectory", "--frames", 8],
    "T3 trajectory VideoMAE": ["ssv2", "--backbone", "trajectory", "--budget-frames", 8, "--stages", "8:100"],
    "T3 trajectory TPT": ["ssv2", "--backbone", "trajectory", *EIGHT],
    **{f"T4 {frames}": ["ssv2", "--stages", frames]
       for frames in ("16", "2,16", "2,4,16", "2,8,16", "4,8,16", "2,4,8,16", "2,4,8,12,16")},
    **{f"T5 {cycle} {order}": ["ssv2", "--cycle", cycle, "--order", order]
       for cycle in ("long", "short") for order in ("progressive", "random")},
    **{f"T6 {cycles} {decay}": ["ssv2", "--lr-cycles", cycles, "--decay", decay]
       for cycles, decay in ((1, "cosine"), (2, "cosine"), (4, "cosine"), (4, "step"))},
    **{f"T7 {early}": ["ssv2", "--stage-batch", ",".join([str(64 * early)] * 3 + ["1024"])]
       for early in (8, 16, 32, 64)},
    **{f"F2 {epochs}": ["k400", "--budget", epochs] for epochs in (400, 800, 1600)},
    "F2 VideoMAE S": ["videomae_k400", "--model", "vit_s"],
    "T1 VideoMAE L": ["videomae_k400", "--model", "vit_l", "--budget", 1600],
    **{f"F3 {first}": ["k400", "--budget", 400, "--stages", f"2:{first},16:{100 - first}"]
       for first in (6.25, 12.5, 25, 50)},
    "F3 16f": ["k400", "--budget", 400, "--stages", "16:100"],
    "F3 budget 2f": ["k400", "--budget", 400, "--stages", "2:100", "--budget-frames", 16],
    "AVION Sec. 5.5": ["videomae_k400"],
    "single frame": ["ssv2", "--stages", "1:25,4:25,16:50"],
    "search": ["ssv2", "--task", "search_schedule", "--then", "ssv2_ft"],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_paper_has_a_plan(name, capsys, counted, monkeypatch):
    """Of encoders two layers deep, which are counted in a tenth of the time."""
    shallow = {model: spec | {"depth": 2} for model, spec in tpt_mae.MODELS.items()}
    monkeypatch.setattr(tpt_mae, "MODELS", shallow)
    monkeypatch.setattr(tpt_mae, "count_gmacs", counted)
    monkeypatch.setattr(common, "block_bytes", block_by_hand)
    out = plan(capsys, "--recipe", *ROWS[name])
    if name == "search":
        assert UNIFORM in out.splitlines() and len(out.splitlines()) == 78
        assert (
            "memory    pretraining on 16 frames" in out
            and "memory    fine-tuning on 16 frames" in out
        )
        return
    last = out.split("model ")[-1]
    assert "nan" not in out and float(re.search(r"([\d.]+) PMACs,", out)[1]) > 50
    assert int(re.search(r"total +(\d+) steps", out)[1]) > 5000
    assert ("--then" in ROWS[name]) == (out.count("model ") == 2)
    phases = len(re.findall("^ +\\d+ +[0-9.]+ +\\d+ ", out, re.MULTILINE))
    assert phases == sum(bool(MEMORY.fullmatch(line)) for line in out.splitlines()) > 0
    if "s.csv" in ROWS[name]:  # SSv2's size, 30 epochs
        assert f"total     {30 * (168913 // 384)} steps" in last and "174" not in out


# ---- header, flags, recipes ------------------------------------------------------------------------------------------


def test_header_map_names_exist():
    """The second column of the header's table: every symbol is in the file."""
    table = tpt_mae.__doc__.split("paper  ")[1].split("\n\n")[0]
    cells = [re.split(r"\s{2,}", line.strip())[-1] for line in table.splitlines()[1:]]
    names = [name for cell in cells for name in re.sub(r" \(.*?\)", "", cell).split(", ")]
    assert len(names) >= 15
    for name in names:
        owner = tpt_mae
        for part in name.split("."):
            owner = getattr(owner, part)


def test_decisions_of_the_header_are_tagged_where_they_are_made():
    """One `DECISION (word)` in the code for each word of the header's list, and none besides."""
    listed = re.findall(
        r"^    (\w+) ", tpt_mae.__doc__.split("DECISIONS")[1].split("Missing")[0], re.MULTILINE
    )
    tagged = re.findall(r"DECISION \((\w+)\)", (ROOT / "tpt_mae.py").read_text())
    assert set(listed) == set(tagged) and len(listed) == len(set(listed)) == 19


def test_what_comes_after():
    """--then: this run's weights, backbone, machine and length; its videos, or another data set's with its classes."""
    same = ["--recipe", "k400", "--then", "ssv2_ft", "--backbone", "divided", "--budget-frames", 8, "--stages", "2,8",
            "--train-list", "k.csv", "--val-list", "kv.csv", "--data-root", "k", "--out", "run"]  # fmt: skip
    new = tpt_mae.following(config(*same))
    assert (new.init, new.out, new.frames, new.backbone) == ("run/last.pt", "run_ft", 8, "divided")
    assert (new.train_list, new.data_root, new.num_classes, new.sampling, new.epochs) == (
        "k.csv",
        "k",
        400,
        "segments",
        30,
    )
    other = ["--then-train-list", "s.csv", "--then-val-list", "sv.csv", "--then-data-root", "s"]
    new = tpt_mae.following(config(*same, *other))
    assert (new.train_list, new.val_list, new.data_root, new.num_classes) == (
        "s.csv",
        "sv.csv",
        "s",
        0,
    )
    assert new.train_clips == 168913 and new.then == ""


def test_digest_of_a_pretraining_stays():
    """Of every setting that makes another run, in the order of before: a folder that --then began goes on."""
    fixed = [
        field.name for field in dataclasses.fields(tpt_mae.Config) if not field.metadata["free"]
    ]
    assert sorted(tpt_mae.SETTINGS.split()) == sorted(fixed)
    flags = ["--recipe", "ssv2", "--then", "ssv2_ft", "--out", "run"]
    assert tpt_mae.following(config(*flags)).then_of == "2dd512c21ce3ca86"


@pytest.mark.parametrize(
    ("flags", "micro", "grad_checkpoint"),
    [
        ([], 4, False),  # the recipe's, not the 16 of k400
        (["--micro-batch", 2], 2, False),  # a card that holds 2 short clips holds no 4 whole ones
        (["--micro-batch", 64], 4, False),
        (["--micro-batch", 0], 4, False),
        (["--micro-batch", 2, "--then-micro-batch", 12], 12, False),
        (["--grad-checkpoint"], 4, True),
    ],
)
def test_micro_batch_of_what_comes_after(flags, micro, grad_checkpoint):
    new = tpt_mae.following(config("--recipe", "k400", "--then", "ssv2_ft", "--out", "run", *flags))
    assert (new.micro_batch, new.grad_checkpoint) == (micro, grad_checkpoint)


def test_every_flag_is_read():
    """Each field of Config is read as cfg.<field>, in the script or where common.py and data.py take the config."""
    names = "tpt_mae.py", "common.py", "data.py"
    source = "".join((ROOT / name).read_text() for name in names)
    for field in dataclasses.fields(tpt_mae.Config):
        if not field.name.startswith("then_"):  # by name: test_what_comes_after
            assert re.search(rf"\bcfg\.{field.name}\b", source), field.name


def test_recipes_only_set_known_fields_of_the_right_type():
    types = {field.name: field.type for field in dataclasses.fields(tpt_mae.Config)}
    for name, recipe in tpt_mae.RECIPES.items():
        for key, value in recipe.items():
            assert isinstance(value, (int, float) if types[key] is float else types[key]), (
                name,
                key,
            )
        tpt_mae.check(config("--recipe", name, "--init", "random"))
    assert all(
        tpt_mae.RECIPES[name]["stages"] == ""
        for name in tpt_mae.RECIPES
        if name.endswith(("_ft", "_sup"))
    )


def test_recipes_are_the_papers():
    """Sec. 4 and, where it is silent, VideoMAE's scripts; a rate is VideoMAE's at 256 clips (videos, in fine-tuning)."""
    pretrain = {"lr": 1.5e-4, "min_lr": 1e-5, "warmup_epochs": 40, "weight_decay": 0.05, "beta2": 0.95, "layer_decay": 1,
                "mask_ratio": 0.9, "target": "normalized", "size": 224, "stride": 4, "flip": False, "mixup": 0,
                "drop_path": 0, "stages": "2:25,4:25,8:25,16:25", "decay": "cosine", "batch_size": 1024}  # fmt: skip
    tune = {"lr": 5e-4, "min_lr": 1e-6, "warmup_epochs": 5, "weight_decay": 0.05, "beta2": 0.999, "layer_decay": 0.75,
            "drop_path": 0.1, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1, "rand_augment": 7, "erase": 0.25,
            "repeated": "2", "frames": 16, "stages": "", "batch_size": 768}  # fmt: skip
    expected = {
        "ssv2": pretrain | {"budget": 400, "sampling": "segments"},
        "k400": pretrain | {"budget": 1600, "sampling": "stride"},
        "videomae_k400": pretrain
        | {"budget": 800, "stages": "16:100", "batch_size": 2048, "sampling": "stride"},
        "ssv2_ft": tune
        | {"epochs": 30, "flip": False, "test_views": "2x3", "sampling": "segments"},
        "ssv2_sup": tune
        | {"epochs": 30, "flip": False, "test_views": "2x3", "positions": "learned"},
        "k400_ft": tune | {"epochs": 75, "flip": True, "test_views": "5x3", "sampling": "stride"},
    }
    assert expected.keys() == {name for name in tpt_mae.RECIPES if not name.startswith("toy")}
    for name, values in expected.items():
        found = dataclasses.asdict(config("--recipe", name))
        scale = found["batch_size"] / int(found["repeated"]) / 256
        for key, value in values.items():
            value = pytest.approx(value * scale) if key in ("lr", "min_lr") else value
            assert found[key] == value, (name, key)


@pytest.fixture
def lists(toy):
    return ["--train-list", toy / "train.csv", "--val-list", toy / "val.csv", "--data-root", toy, "--workers", 0,
            "--batch-size", 4, "--log-every", 1, "--size", 16, "--repeated", 1]  # fmt: skip


PRETRAIN = ["--recipe", "toy", "--stages", "8:100", "--then", ""]
FINETUNE = ["--recipe", "toy_ft"]
FREE = ("task", "then", "model", "positions")  # tested elsewhere, or too large for a test
CHOICES = [
    [*PRETRAIN, f"--{field.name.replace('_', '-')}", choice]
    for field in dataclasses.fields(tpt_mae.Config)
    for choice in field.metadata["choices"] or ()
    if field.name not in FREE and choice != "flash"
]
PATHS = [
    *CHOICES,
    [*FINETUNE, "--backbone", "divided", "--grad-checkpoint"],
    [*FINETUNE, "--backbone", "trajectory", "--attention", "plain"],
    [
        *FINETUNE,
        "--mixup",
        0.8,
        "--cutmix",
        1,
        "--label-smoothing",
        0.1,
        "--rand-augment",
        7,
        "--erase",
        0.5,
        "--flip",
    ],
    [
        *FINETUNE,
        "--repeated",
        2,
        "--drop-path",
        0.3,
        "--head-dropout",
        0.5,
        "--clip-grad",
        1,
        "--sampling",
        "segments",
    ],
    [*FINETUNE, "--positions", "learned", "--no-crop"],
    [*FINETUNE, "--test-views", "2x3", "--precision", "bf16"],
    [*PRETRAIN, "--decoder", "1x128", "--no-crop", "--micro-batch", 2],
    [*PRETRAIN, "--repeated", 4, "--micro-batch", 4],
    [*PRETRAIN, "--stages", "1:12.5,8:87.5"],
    [
        *PRETRAIN,
        "--stages",
        "2:50,8:50",
        "--stage-batch",
        "8,4",
        "--stage-lr",
        "1e-3,5e-4",
        "--repeated",
        "2,1",
    ],
    [*PRETRAIN, "--stages", "4:50,8:50", "--cycle", "short", "--order", "random", "--lr-cycles", 2],
    [*PRETRAIN, "--backbone", "divided", "--grad-checkpoint"],
]


@pytest.mark.parametrize("flags", PATHS, ids=lambda flags: " ".join(map(str, flags[1:])))
def test_every_path_trains_two_steps(flags, lists, tmp_path, monkeypatch):
    monkeypatch.setitem(tpt_mae.MODELS, "vit_toy", tpt_mae.MODELS["vit_toy"] | {"depth": 2})
    tpt_mae.main(config(*lists, "--max-steps", 2, "--out", tmp_path, *flags))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert records[-1]["val_clips"] == 8 and records[-1]["clips"] in (8, 12)
    assert ("test_top1" in records[-1]) == ("2x3" in flags)
    stages = [r["stage"] for r in records if "loss" in r]
    assert len(set(stages)) == (2 if any("," in str(flag) for flag in flags) else 1)


@pytest.mark.parametrize(("flags", "beta2", "layers"), [(PRETRAIN, 0.95, 1), (FINETUNE, 0.999, 6)])
def test_optimizer_of_a_run(flags, beta2, layers, lists, tmp_path):
    """Both betas; weight decay on matrices only; --layer-decay a layer (the embedding, 4 blocks, the head)."""
    decay = ["--layer-decay", 0.75] if layers > 1 else []
    tpt_mae.main(
        config(*lists, *flags, *decay, "--max-steps", 2, "--warmup-epochs", 0, "--out", tmp_path)
    )
    groups = torch.load(tmp_path / "last.pt")["optimizer"]["param_groups"]
    settings = {
        (g["betas"], g["weight_decay"], round(g["lr"] / max(g["lr"] for g in groups), 6))
        for g in groups
    }
    assert settings == {
        ((0.9, beta2), w, round(0.75**k, 6)) for w in (0, 0.05) for k in range(layers)
    }


def test_augmentation_is_of_training_only_and_in_order(lists, tmp_path, monkeypatch):
    """RandAugment, flip, erasing, mixup: each gets what the one before made; evaluation sees the clips as they are."""
    calls, seen = [], []
    for number, name in enumerate(("rand_augment", "flip", "erase", "mix")):

        def change(clips, *rest, number=number, **options):
            calls.append(number)
            assert (clips[:, 0, 0, 0, :number] == torch.arange(number)).all()
            clips = clips.clone()
            clips[..., number] = number
            return (clips, rest[0]) if number == 3 else clips

        monkeypatch.setattr(data, name, change)
    forward = tpt_mae.Classifier.forward
    monkeypatch.setattr(
        tpt_mae.Classifier,
        "forward",
        lambda net, clips, keys=None: (
            seen.append((net.training, (clips[..., :4] == torch.arange(4)).all().item())),
            forward(net, clips, keys),
        )[1],
    )
    flags = [
        "--rand-augment",
        7,
        "--flip",
        "--erase",
        0.5,
        "--mixup",
        0.8,
        "--max-steps",
        2,
        "--out",
        tmp_path,
    ]
    tpt_mae.main(config(*lists, *FINETUNE, *flags))
    assert calls == [0, 1, 2, 3] * 2 and {kind for kind in seen} == {(True, True), (False, False)}


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_views_are_merged_by_video(lists, toy, tmp_path, capsys):
    """The classes of the mean softmax over a video's views, taken here one by one, are top-1 of 100 %. Two videos of
    one file name are two. A video that fails in one of its views is counted, once, and left out."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "val_00000.mp4").write_bytes((toy / "videos" / "val_00001.mp4").read_bytes())
    cut = tmp_path / "cut.mp4"  # its head decodes; its last packets are zeros
    with av.open(str(cut), "w", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", rate=10, options={"g": "8", "bf": "0"})
        stream.width = stream.height = 64
        for image in np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) * 3 // 4] + bytes(len(whole) - len(whole) * 3 // 4))
    flags = ["--size", 32, "--stride", 2, "--micro-batch", 60]
    cfg, ctx = config(*lists, *FINETUNE, *flags), common.launch()
    plan = lambda video, views, view: sample(cfg, 8, video, view, None, views)
    with data.Video(cut) as video:
        first, last = (plan(video, (5, 3), view)[0] for view in (0, 14))
    assert data.read_clip(cut, first, 32).shape[0] == 8
    with pytest.raises(data.VideoError):
        data.read_clip(cut, last, 32)

    torch.manual_seed(0)
    net = tpt_mae.build(cfg, 8).eval()
    good = [*sorted((toy / "videos").glob("val_*.mp4")), tmp_path / "a" / "val_00000.mp4"]
    with torch.no_grad():  # a head that tells these videos apart
        centre = torch.stack([data.read_clip(path, range(8), 32) for path in good])
        net.head.weight.normal_(std=30.0)
        net.head.bias.copy_(-net.head.weight @ net.features(centre).mean(0))
    for views in ((2, 3), (5, 3)):
        found = []
        for path in good:
            with data.Video(path) as video, torch.no_grad():
                plans = [plan(video, views, view) for view in range(math.prod(views))]
                shares = [
                    net(video.read(frames, 32, box)[None], KEYS[:1]).softmax(-1)[0]
                    for frames, box in plans
                ]
            found.append(sum(shares).argmax().item())
        assert len(set(found)) > 2
        rows = [f"{path} {label}" for path, label in zip(good, found, strict=True)]
        for labels, top1 in (
            (rows, 100),
            ([*rows[1:], f"{good[0]} {(found[0] + 1) % 8}"], 100 * 8 / 9),
        ):
            (tmp_path / "val.csv").write_text("\n".join([*labels, f"{cut} 0"]))
            videos = data.VideoList(tmp_path / "val.csv", num_classes=8)
            result = tpt_mae.validate(cfg, ctx, net, videos, views)
            assert re.search(
                rf"^unreadable, not scored: {cut}: .+", capsys.readouterr().out, re.MULTILINE
            )
            assert (result["val_clips"], result["val_unread"]) == (9, 1)
            assert result["val_top1"] == pytest.approx(top1) and result["val_top5"] >= top1


def test_fewer_than_five_classes(lists, toy, tmp_path):
    """Top-k over all there are, named so."""
    lines = [
        line
        for line in (toy / "train.csv").read_text().splitlines()
        if line.endswith((",left", ",up", ",grow"))
    ]
    (tmp_path / "three.csv").write_text("\n".join(lines))
    few = [
        "--train-list",
        tmp_path / "three.csv",
        "--val-list",
        tmp_path / "three.csv",
        "--num-classes",
        0,
    ]
    result = tpt_mae.main(
        config(*lists, *FINETUNE, *few, "--max-steps", 1, "--out", tmp_path / "run")
    )
    assert result["val_top3"] == 100 and "val_top5" not in result and result["val_clips"] == 6


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stages", "2:50,8:40"], ["--stages", "sum to 100"]),
        (["--stages", "8:50,2:50"], ["must rise", "--order"]),
        (["--stages", "3:50,8:50"], ["3 frames", "token's 2"]),
        (["--stages", "2:99,8:1"], ["no epoch of 8 frames"]),
        (["--stages", "8:50,80:50", "--budget", 80], ["has 40 frames, a clip needs 80"]),
        (["--stages", "2:50,8:50", "--frames", 8], ["--stages", "--frames"]),
        (["--epochs", 3], ["--stages", "--epochs"]),
        (["--stages", ""], ["--epochs 0", "--frames 0"]),
        (["--stages", "", "--epochs", 3, "--frames", 7], ["--frames 7"]),
        (["--stage-batch", "4,4"], ["--stage-batch 4,4", "each of 3 stages"]),
        (["--stage-batch", "4,0,4"], ["--stage-batch 4,0,4"]),
        (["--stage-lr", "fast"], ["--stage-lr fast"]),
        (["--stage-lr", "nan"], ["--stage-lr nan"]),
        (["--repeated", 2, "--batch-size", 15], ["--repeated 2", "15 clips", "--repeated 1"]),
        (["--lr", "-1"], ["--lr must be above 0"]),
        (["--gpus", 0], ["--gpus"]),
        (["--gpu-gb", "large"], ["--gpu-gb large"]),
        (["--then-micro-batch", "-1"], ["--then-micro-batch"]),
        (["--then-micro-batch", 3], ["--batch-size 16", "--micro-batch 3"]),
        (["--lr", "1e-7"], ["--min-lr 1e-06", "--lr 1e-07"]),
        (["--num-classes", "-1"], ["--num-classes must be at least 0"]),
        (["--budget", "1e300"], ["--budget must be above 0 and at most"]),
        (["--beta2", 1], ["--beta2 must be in [0, 1)"]),
        (["--weight-decay", "-1"], ["--weight-decay must be at least 0"]),
        (["--decoder", "2x96"], ["--decoder 2x96", "64"]),
        (["--repeated", "3"], ["--repeated 3", "4 clips"]),
        (["--repeated", "4", "--micro-batch", "2"], ["--micro-batch 2", "--repeated"]),
        (["--batch-size", 32], ["train.csv", "16 videos", "32 clips"]),
        (["--max-steps", 2], ["--max-steps 2", "3 stages"]),
        (["--size", 32, "--mask-ratio", "0.001"], ["--mask-ratio 0.001", "64 places"]),
        (["--mask-ratio", "1"], ["--mask-ratio"]),
        (["--size", 30], ["--size 30"]),
        (["--decoder", "big"], ["--decoder big"]),
        (["--budget", 0], ["--budget must be above 0"]),
        (["--budget", "inf"], ["--budget must be above 0"]),
        (["--mask-ratio", "nan"], ["--mask-ratio must be in [0, 1)"]),
        (["--warmup-epochs", 8], ["--warmup-epochs 8", "--budget 8"]),
        (["--lr-cycles", 4], ["--lr-cycles 4", "3 segments"]),
        (["--search-stages", 0], ["--search-stages must be at least 1"]),
        (
            ["--budget-frames", 7, "--stages", "2:50,4:50"],
            ["--frames 7"],
        ),  # of the fine-tuning to come
        (["--then-train-list", "gone.csv"], ["--then-train-list", "--then-val-list"]),
        (["--then-train-list", "gone.csv", "--then-val-list", "gone.csv"], ["gone.csv"]),
        (["--positions", "learned"], ["--positions learned"]),
        (["--test-views", "5by3"], ["--test-views 5by3"]),
        (["--erase", "1.5"], ["--erase"]),
        (["--train-list", ""], ["--train-list"]),
        (["--val-list", "gone.csv"], ["gone.csv"]),
        (
            ["--task", "predict", "--input", "v", "--init", "none.pt"],
            ["none.pt", "no such checkpoint"],
        ),
        (
            ["--task", "search_schedule", "--search-frames", "2;4", "--then", "toy_ft"],
            ["--search-frames 2;4"],
        ),
        (["--task", "search_schedule", "--then", ""], ["--then"]),
        (
            ["--task", "search_schedule", "--budget", "0.5", "--then", "toy_ft"],
            ["no epoch", "--budget 0.5"],
        ),
    ],
)
def test_impossible_flags(flags, words, lists, tmp_path):
    with pytest.raises(UserError) as error:
        tpt_mae.main(config(*lists, "--out", tmp_path / "run", "--search-frames", "2,4,8", *flags))
    message = str(error.value)
    assert (
        message.startswith("error: ")
        and "\n" not in message
        and all(word in message for word in words)
    ), message


def test_what_comes_after_is_refused_before_pretraining(lists, tmp_path):
    """Micro-batches that divide the pretraining's batch, but not the fine-tuning's of 16 clips: nothing is trained."""
    flags = ["--recipe", "toy", "--batch-size", 12, "--micro-batch", 3, "--out", tmp_path / "run"]
    with pytest.raises(UserError, match="--batch-size 16 .* --micro-batch 3"):
        tpt_mae.main(config(*lists, *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["ssv2_ft", "ssv2_sup", "k400_ft"])
def test_fine_tuning_from_nothing_is_asked_for(recipe, lists, tmp_path):
    """These recipes start from weights; --init random trains without, and needs no file of that name."""
    small = [
        "--model",
        "vit_toy",
        "--size",
        32,
        "--frames",
        4,
        "--num-classes",
        8,
        "--sampling",
        "segments",
    ]
    flags = [
        *lists,
        *small,
        "--recipe",
        recipe,
        "--micro-batch",
        4,
        "--max-steps",
        1,
        "--out",
        tmp_path / "run",
    ]
    with pytest.raises(UserError, match=f"--recipe {recipe} starts from .*--init"):
        tpt_mae.main(config(*flags))
    assert not (tmp_path / "run").exists()
    assert "val_top1" in tpt_mae.main(config(*flags, "--init", "random", "--test-views", "1x1"))


def test_videos_of_evaluation_are_there_before_training(lists, toy, tmp_path):
    """A wrong folder, of this run or of --then's, would be found after an epoch or after all of pretraining."""
    rows = (toy / "val.csv").read_text().splitlines()
    (tmp_path / "val.csv").write_text("\n".join(f"gone/{row}" for row in rows))
    for flags, root in (
        (["--val-list", tmp_path / "val.csv"], "--data-root"),
        (
            ["--then-train-list", lists[1], "--then-val-list", tmp_path / "val.csv"],
            "--then-data-root",
        ),
    ):
        with pytest.raises(
            UserError, match=f"{tmp_path}/val.csv: 8 of its 8 videos are missing .* is {root} right"
        ):
            tpt_mae.main(config(*lists, "--recipe", "toy", *flags, "--out", tmp_path / "run"))
        assert not (tmp_path / "run").exists()


BROKEN = {  # what became of a checkpoint: what is said of it
    "another script's": (lambda state: state.pop("classes"), "not a checkpoint of tpt_mae.py"),
    "a list": (
        lambda state: state.update(config=[]),
        "not a checkpoint of this version of tpt_mae.py",
    ),
    "an old one": (
        lambda state: state["config"].pop("target"),
        "not a checkpoint of this version of tpt_mae.py",
    ),
    "no such size": (
        lambda state: state["config"].update(model="vit_x"),
        "not a checkpoint of this version",
    ),
    "no such stages": (lambda state: state["config"].update(stages="2;8"), "--stages "),
    "no such patch": (lambda state: state["config"].update(size=33), "--size 33"),
    "another width": (
        lambda state: state["model"].update({"patch_embed.bias": torch.zeros(7)}),
        "not a checkpoint of this version of tpt_mae.py (RuntimeError: ",
    ),
    "another depth": (
        lambda state: state["model"].pop("blocks.3.norm1.bias"),
        "not a checkpoint of this version",
    ),
    "no class": (
        lambda state: state.update(classes=None),
        "not a checkpoint of this version of tpt_mae.py",
    ),
}


@pytest.mark.parametrize("broken", [*BROKEN, "cut"])
@pytest.mark.parametrize("recipe", ["toy", "toy_ft"])
def test_a_checkpoint_that_is_none_is_refused(recipe, broken, lists, tmp_path):
    """In one line that names the file, whatever is wrong with it; the whole one is opened."""
    cfg = config("--recipe", recipe)
    state = {"model": tpt_mae.build(cfg, 8).state_dict(), "classes": list("abcdefgh")}
    state["config"] = dataclasses.asdict(cfg)
    argv = [
        *lists,
        "--recipe",
        recipe,
        "--task",
        "features",
        "--init",
        tmp_path / "x.pt",
        "--out",
        tmp_path / "out",
    ]
    argv += ["--val-list", tmp_path / "gone.csv"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="gone.csv"):
        tpt_mae.main(config(*argv))
    if broken == "cut":
        (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:5000])
        words = "x.pt: not a readable checkpoint"
    else:
        change, words = BROKEN[broken]
        change(state)
        torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError) as error:
        tpt_mae.main(config(*argv))
    message = str(error.value)
    assert (
        message.startswith(f"error: {tmp_path}/x.pt: ") and words in message and "\n" not in message
    ), message


# ---- the real command line -------------------------------------------------------------------------------------------


def records_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][1:]


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """`python tpt_mae.py`, small: pretrained in stages, then fine-tuned, by one command. -> folder, what it printed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    lists = [
        "--train-list",
        toy / "train.csv",
        "--val-list",
        toy / "val.csv",
        "--data-root",
        toy,
        "--workers",
        0,
    ]
    flags = ["--batch-size", 4, "--log-every", 1, "--budget", 6, "--eval-every", 4]
    flags += ["--repeated", 1, "--out", out]
    process = command("tpt_mae.py", *lists, *flags)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return out, stdout


def test_pretraining_then_fine_tuning(trained):
    """The loss falls in each phase; every stage is there, at its share of the frames; the weights move on."""
    out, stdout = trained
    pretrained, tuned = records_of(out), records_of(out.with_name("run_ft"))
    losses = [r["loss"] for r in pretrained if "loss" in r]
    assert len(losses) == 48 and np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])
    ends = {r["stage"]: (r["step"], r["frames"]) for r in pretrained if "loss" in r}
    assert ends == {
        0: (24, 192),
        1: (36, 384),
        2: (48, 768),
    }  # 25, 25 and 50 % of 6 epochs of 16 x 8 frames
    assert [r["step"] for r in pretrained if "val_mae" in r] == [16, 24, 36, 48]
    assert [r["step"] for r in tuned if "val_top1" in r] == [1, 2, 3]  # batches of 16, one a pass
    assert (
        next(r["loss"] for r in tuned if "loss" in r) < math.log(8) + 0.5
        and tuned[-1]["val_clips"] == 8
    )
    peak = config("--recipe", "toy").lr
    for stage in range(3):  # a full cosine with its own warm-up each (Table 6)
        rates = [r["lr"] for r in pretrained if r.get("stage") == stage]
        assert rates[0] == 0 and rates[-1] < 0.1 * peak and 0.9 * peak < max(rates) <= peak
    before, after = (
        torch.load(folder / "last.pt")["optimizer"] for folder in (out, out.with_name("run_ft"))
    )
    assert (
        before["state"][0]["step"] == 48 and after["state"][0]["step"] == 3
    )  # AdamW's moments are of all stages
    assert "left at init 4" in stdout and "not used 0" in stdout and "run_ft" in stdout
    assert stdout.count("complete: ") == 2 and "2-frame clips" in stdout


def test_weights_come_out_in_videomaes_format(trained, tmp_path):
    out, _ = trained
    state = torch.load(out / "videomae.pth", weights_only=True)["model"]
    assert {
        "encoder.patch_embed.proj.weight",
        "encoder.norm.bias",
        "decoder.head.weight",
        "mask_token",
    } <= state.keys()
    net = tpt_mae.VideoMAE("vit_toy", frames=8, size=32, target="pixels")
    again = tpt_mae.init_weights(out / "videomae.pth", net)
    assert equal(again, weights(out))


def test_pictures(trained):
    """recon.png: original, seen, reconstruction of 4 clips; the same places are grey in all frames of a tubelet."""
    out, _ = trained
    with av.open(str(out / "recon.png")) as file:
        strip = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert strip.shape == (4 * 3 * 36, 8 * 36, 3)
    original, seen, recon = (
        strip[i * 36 : (i + 1) * 36].reshape(36, 8, 36, 3)[2:34, :, 2:34].astype(int)
        for i in range(3)
    )
    grey = (seen == 128).all(-1)  # [32, 8, 32]
    assert 0.74 < grey.mean() < 0.77
    tubes = grey.all(1)  # grey by mask is grey in all frames
    assert 0.74 < tubes.mean() < 0.77
    assert (seen == original).all(-1)[~grey].all() and (recon == original).all(-1)[~grey].all()
    assert (recon != original).any(-1)[grey].mean() > 0.9
    with av.open(str(out / "recon_animated.png")) as file:
        assert len(list(file.decode(video=0))) == 8


def test_borrowed_panel(tmp_path):
    """A normalised target has a fourth panel, framed red; the model's own panel doesn't change with hidden pixels."""
    net, video = randomise(tpt_mae.VideoMAE("vit_16", frames=FRAMES, size=32)), clips(1, FRAMES, 32)
    patches = common.patchify(video, net.patch)
    _, masked = common.tube_split(KEYS[:1], 2, 4, 0.75)
    hidden = torch.zeros(1, 8, dtype=torch.bool).scatter(1, masked, True)[..., None]
    pictures = []
    for x in (patches, torch.where(hidden, patches // 3, patches)):
        pixels = common.unpatchify(x, net.patch, net.grid)
        tpt_mae.write_recon(net, pixels, KEYS[:1], 0.75, tmp_path / "r.png")
        with av.open(str(tmp_path / "r.png")) as file:
            pictures.append(
                next(file.decode(video=0)).to_ndarray(format="rgb24").reshape(4, 36, 4, 36, 3)
            )
    assert (pictures[0][3, 0] == [255, 0, 0]).all() and (pictures[0][:3, 0] == 255).all()
    assert (pictures[0][1:3] == pictures[1][1:3]).all()  # seen, own
    assert (pictures[0][0] != pictures[1][0]).any() and (
        pictures[0][3] != pictures[1][3]
    ).any()  # original, borrowed


def test_eval_predict_features(trained, toy, tmp_path, capsys):
    """Of both phases, their shapes read from the checkpoints."""
    out, _ = trained
    tuned = out.with_name("run_ft")
    rest = ["--val-list", toy / "val.csv", "--data-root", toy, "--workers", 0]
    run = lambda *argv: (tpt_mae.main(config(*rest, *argv)), capsys.readouterr().out)[1]
    best = max(r["val_top1"] for r in records_of(tuned) if "val_top1" in r)
    assert f"val_top1 {best:.4g}" in run("--task", "eval", "--init", tuned / "best.pt")
    assert "val_clips 8" in run("--task", "eval", "--out", tuned, "--test-views", "2x3")
    error = min(r["val_mae"] for r in records_of(out) if "val_mae" in r)
    assert f"val_mae {error:.4g}" in run("--task", "eval", "--out", out)
    videos = sorted((toy / "videos").glob("val_*.mp4"))[:2]
    lines = run("--task", "predict", "--out", tuned, "--input", *videos).splitlines()
    for video, line in zip(videos, lines, strict=True):
        shares = [float(x) for x in re.findall(r"([\d.]+) %", line)]
        assert (
            line.startswith(f"{video}: ")
            and len(shares) == 5
            and shares == sorted(shares, reverse=True)
        )
    run("--task", "predict", "--init", out / "best.pt", "--out", tmp_path, "--input", *videos)
    assert (tmp_path / "predict_0.png").exists()
    for source in (out, tuned):
        run("--task", "features", "--init", source / "last.pt", "--out", tmp_path)
        features = np.load(tmp_path / "features.npy")
        assert (
            features.shape == (8, 128) and np.isfinite(features).all() and features.std(0).min() > 0
        )
    others = re.sub(",.*", ",a label of another set", (toy / "val.csv").read_text())
    (tmp_path / "val.csv").write_text(f"none.mp4,0\n{others}")
    text = run(
        "--task",
        "features",
        "--init",
        tuned / "last.pt",
        "--out",
        tmp_path,
        "--val-list",
        tmp_path / "val.csv",
    )
    rows = np.load(tmp_path / "features.npy")
    assert (
        "none.mp4" in text
        and np.isnan(rows[0]).all()
        and np.allclose(rows[1:], features, atol=1e-5)
    )


def test_each_stages_rate(lists, tmp_path):
    """Peak and end of a stage's cosine, in the log: both in proportion to its batch (VideoMAE's rule)."""
    flags = [
        "--stages",
        "4:50,8:50",
        "--stage-batch",
        "2,4",
        "--lr",
        "4e-3",
        "--min-lr",
        "1e-3",
        "--then",
        "",
    ]
    tpt_mae.main(config(*lists, *flags, "--budget", 2, "--warmup-epochs", 0, "--out", tmp_path))
    rates = [[r["lr"] for r in records_of(tmp_path) if r.get("stage") == i] for i in (0, 1)]
    assert [len(r) for r in rates] == [16, 4] and [r[0] for r in rates] == pytest.approx(
        [2e-3, 4e-3]
    )
    last = [
        0.5 * (1 + math.cos(math.pi * (n - 1) / n)) for n in (16, 4)
    ]  # of the way from the end to the peak
    assert [r[-1] for r in rates] == pytest.approx([5e-4 + 1.5e-3 * last[0], 1e-3 + 3e-3 * last[1]])


def test_evaluations_of_a_short_cycle(lists, tmp_path):
    """Once after each --eval-every epochs of a stage's own, and at the end: none before a stage's first step."""
    flags = [
        *lists,
        "--stages",
        "4:50,8:50",
        "--cycle",
        "short",
        "--budget",
        4,
        "--warmup-epochs",
        0,
        "--then",
        "",
    ]
    for every, expected in (
        (2, [8, 20, 24]),
        (4, [20, 24]),
    ):  # two rounds of 8 steps, then 4; 4 steps an epoch
        tpt_mae.main(config(*flags, "--eval-every", every, "--out", tmp_path / str(every)))
        assert [r["step"] for r in records_of(tmp_path / str(every)) if "val_mae" in r] == expected


def test_fine_tuning_of_another_pretraining_is_refused(lists, tmp_path):
    """Pretrained anew in the same folder: what an earlier one was fine-tuned to is not taken for the new one's."""
    flags = [*lists, *PRETRAIN, "--max-steps", 3, "--warmup-epochs", 0, "--out", tmp_path / "run"]
    first = tpt_mae.main(config(*flags, "--then", "toy_ft"))
    assert tpt_mae.main(config(*flags, "--then", "toy_ft")) == first  # complete
    other = [*flags, "--mask-ratio", "0.5"]
    tpt_mae.main(config(*other, "--then", "", "--overwrite"))
    with pytest.raises(UserError, match="run_ft holds another run .--then-of .*--overwrite"):
        tpt_mae.main(config(*other, "--then", "toy_ft"))


def test_another_schedule_is_refused(trained, lists):
    """But what comes after may be decided later: no step is taken again."""
    args = [
        "--train-list",
        lists[1],
        "--val-list",
        lists[3],
        "--data-root",
        lists[5],
        "--workers",
        0,
        "--log-every",
        1,
    ]
    before = weights(trained[0])
    same = [
        "--batch-size",
        4,
        "--budget",
        6,
        "--repeated",
        1,
        "--eval-every",
        4,
        "--out",
        trained[0],
    ]
    assert "val_mae" in tpt_mae.main(config(*args, *same, "--then", "")) and equal(
        weights(trained[0]), before
    )
    with pytest.raises(
        UserError, match=r"holds another run \(--stages 2:25,4:25,8:50 -> 4:50,8:50"
    ):
        tpt_mae.main(
            config(
                *lists,
                "--size",
                32,
                "--budget",
                6,
                "--eval-every",
                4,
                "--out",
                trained[0],
                "--stages",
                "4:50,8:50",
            )
        )


def test_search_ranks_and_resumes(lists, tmp_path, capsys, monkeypatch):
    """Every schedule is trained, fine-tuned and ranked; the same command again only reads."""
    argv = [
        *lists,
        "--task",
        "search_schedule",
        "--search-frames",
        "4,8",
        "--budget",
        2,
        "--out",
        tmp_path / "s",
    ]
    ranking = tpt_mae.main(config(*argv, "--then", "toy_ft"))
    out = capsys.readouterr().out
    assert {text for _, text in ranking} == {"8:100", "4:50,8:50"} and ranking[0][0] >= ranking[1][
        0
    ]
    assert out.splitlines()[-1].endswith(f"--stages {ranking[0][1]}")
    for _, text in ranking:
        folder = tmp_path / "s" / (text.replace(":", "-") + "_ft")
        assert {"val_top1"} <= records_of(folder)[-1].keys()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("best.pt")}
    assert tpt_mae.main(config(*argv, "--then", "toy_ft")) == ranking and len(before) == 4
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("best.pt")}
    top1 = {"8:100": 1.0, "2:50,8:50": 3.0}
    monkeypatch.setattr(
        tpt_mae, "train_then", lambda cfg, ctx: {"val_top1": top1.get(cfg.stages, 2.0)}
    )
    ranking = tpt_mae.search_schedule(
        config(*argv, "--search-frames", "2,4,8", "--then", "toy_ft"), common.launch()
    )
    assert [text for _, text in ranking[:1] + ranking[-1:]] == ["2:50,8:50", "8:100"] and len(
        ranking
    ) == 6
    assert capsys.readouterr().out.splitlines()[-1].endswith("--stages 2:50,8:50")


def test_search_has_a_folder_of_its_own(monkeypatch):
    """Its trials are not among the files of the training that comes after it."""
    monkeypatch.setattr(tpt_mae, "search_schedule", lambda cfg, ctx: cfg.out)
    search = config("--task", "search_schedule")
    assert tpt_mae.main(search) == "runs/tpt_mae-toy-search"
    assert tpt_mae.main(dataclasses.replace(search, out="mine")) == "mine"


def test_copying_three_files_runs(cli, lists, tmp_path):
    """tpt_mae.py + common.py + data.py in an empty folder are enough."""
    for name in ("tpt_mae.py", "common.py", "data.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    code, _, err = cli("tpt_mae.py", *lists, *PRETRAIN, "--max-steps", 1, cwd=tmp_path)
    assert code == 0 and (tmp_path / "runs/tpt_mae-toy/videomae.pth").exists(), err


# ---- a run's life ----------------------------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, common, tpt_mae
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
{patch}
tpt_mae.main(common.parse(tpt_mae.Config, tpt_mae.RECIPES))
"""
DIE = """
save = common.Run.save
def save_and_die(self, state, *names):
    save(self, state, *names)
    if (self.folder.name.endswith("_ft"), state["at"]["step"]) == {when}:
        die()
common.Run.save = save_and_die
"""
SAVE_GRADIENTS = """
def dump(gradients):
    if common.os.environ["RANK"] == "0":
        torch.save(gradients, sys.argv[sys.argv.index("--out") + 1] + "/gradients.pt")
    torch.distributed.barrier()  # no rank leaves while another still talks to it
    os._exit(0)
torch.nn.utils.get_total_norm = dump
"""


def drive(folder, *args, patch="", ranks=1):
    script = folder / f"driver_{abs(hash(patch))}.py"
    script.write_text(DRIVER.format(root=str(ROOT), patch=patch))
    torchrun = (
        ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        if ranks > 1
        else []
    )
    process = command(*torchrun, script, *args)
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


@pytest.mark.parametrize("cycle", ["long", "short"])
def test_killed_run_resumes_in_the_right_stage(cycle, lists, tmp_path):
    """Killed at the end of the second stage and in fine-tuning, or amid a short cycle: the same weights and logged
    losses, bit for bit, as never killed; with repeated sampling, another batch a stage, log intervals across epochs."""
    args = [*lists, "--log-every", 3, "--cycle", cycle, "--budget", 4, "--save-minutes", 0, "--eval-every", 1,
            "--stage-batch", "8,4,4", "--repeated", "2,1,1"]  # fmt: skip
    tpt_mae.main(config(*args, "--out", tmp_path / "whole"))
    kills = [(False, 12), (True, 1)] if cycle == "long" else [(False, 9)]
    for when in kills:
        code, text = drive(tmp_path, *args, "--out", tmp_path / "cut", patch=DIE.format(when=when))
        assert code == -signal.SIGKILL, text
        folder = tmp_path / ("cut_ft" if when[0] else "cut")
        assert torch.load(folder / "last.pt", weights_only=True)["at"]["step"] == when[1]
    tpt_mae.main(config(*args, "--out", tmp_path / "cut"))
    for name in ("", "_ft"):
        a, b = tmp_path / f"whole{name}", tmp_path / f"cut{name}"
        assert equal(weights(a), weights(b)) and equal(weights(a, "best.pt"), weights(b, "best.pt"))
        timing = {"seconds", "clips_per_second", "data_wait"}
        a, b = (
            [{k: r[k] for k in r.keys() - timing} for r in records_of(folder)] for folder in (a, b)
        )
        assert a == b
    stages = {r["stage"] for r in records_of(tmp_path / "cut") if "loss" in r}
    assert stages == {0, 1, 2}


def test_signal_in_the_last_evaluation(lists, tmp_path, monkeypatch):
    """What comes after the run is not begun; the same command goes on with it."""
    evaluate = tpt_mae.evaluate_masked
    signalled = lambda *args, **more: (
        signal.raise_signal(signal.SIGTERM),
        evaluate(*args, **more),
    )[1]
    monkeypatch.setattr(tpt_mae, "evaluate_masked", signalled)
    args = [*lists, *PRETRAIN, "--then", "toy_ft", "--max-steps", 1, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as end:
        tpt_mae.main(config(*args))
    assert end.value.code == 128 + signal.SIGTERM and not (tmp_path / "run_ft").exists()
    assert (tmp_path / "run" / "videomae.pth").exists()
    monkeypatch.setattr(tpt_mae, "evaluate_masked", evaluate)
    assert "val_top1" in tpt_mae.main(config(*args))


@pytest.mark.parametrize(
    "flags", [PRETRAIN, [*FINETUNE, "--drop-path", 0.3, "--mixup", 0.8, "--head-dropout", 0.5]]
)
def test_ranks_and_micro_batches_give_the_same_gradient(flags, lists, tmp_path, monkeypatch):
    """1 process = 2 processes x 2 micro-batches, with two clips of each decode: 1e-6 overall."""
    args = [*lists, *flags, "--batch-size", 16, "--repeated", 2, "--out", tmp_path]
    code, text = drive(tmp_path, *args, "--micro-batch", 4, patch=SAVE_GRADIENTS, ranks=2)
    assert code == 0, text

    def keep(gradients):
        torch.save(gradients, tmp_path / "alone.pt")
        raise SystemExit

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", keep)
    with pytest.raises(SystemExit):
        tpt_mae.main(config(*args, "--overwrite"))
    alone, four = (
        torch.load(tmp_path / name, weights_only=True) for name in ("alone.pt", "gradients.pt")
    )
    norm = lambda tensors: sum(t.double().square().sum() for t in tensors).sqrt().item()
    assert (
        norm([a - b for a, b in zip(alone, four, strict=True)]) <= 1e-6 * norm(alone)
        and len(alone) > 50
    )
