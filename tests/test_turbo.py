"""turbo.py: each idea against a slow version, the paper's numbers, the model's parts, and the tasks' command line."""

import dataclasses
import json
import math
import re
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import common
import data
import turbo
from common import UserError, make_key

KEYS = make_key(torch.arange(4))


def config(*argv):
    return common.parse(turbo.Config, turbo.RECIPES, list(map(str, argv)))


def test_size_is_whole_patches_of_the_model():
    init = ["--init", "random"]
    turbo.check(config("--recipe", "toy_tpt", "--size", "24", *init))  # patches of 4 pixels
    for recipe, patch in (("toy_tpt", 4), ("toy", 16)):
        with pytest.raises(UserError, match=rf"--size.* {patch} pixels"):
            turbo.check(config("--recipe", recipe, "--size", "22", *init))


def small(**changes):
    """A tiny Turbo on 4 x 32 x 32 clips (2 x 2 x 2 = 8 tokens), in eval mode, with non-trivial biases and norms."""
    torch.manual_seed(0)
    model = turbo.Turbo(5, "vit_toy", frames=4, size=32, **({"drop_path": 0.0} | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def clips(n=4, seed=0):
    return torch.randint(
        0, 256, (n, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# ---- token dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "r", "visible", "recon"),  # facts of Table 1's rows and of Sec. 4.3's three settings
    [
        (0.0, 0.0, 1568, 0),
        (0.5, 0.5, 784, 784),
        (0.75, 0.75, 392, 1176),
        (0.75, 0.25, 392, 392),
        (0.9, 0.9, 156, 1412),
        (0.9, 0.1, 156, 156),
    ],
)
def test_token_counts_of_table_1(m, r, visible, recon):
    shown, made = turbo.token_dropout(KEYS, 1568, m, r)
    assert shown.shape == (4, visible) and made.shape == (4, recon)
    both = torch.cat([shown, made], 1).sort(1).values
    assert (
        (both.diff(dim=1) > 0).all() and both.min() >= 0 and both.max() < 1568
    )  # disjoint, in range
    assert (shown.diff(dim=1) > 0).all() and (made.diff(dim=1) > 0).all()  # ascending


@pytest.mark.parametrize(("frames", "m"), [(16, 0.5), (32, 0.75), (64, 0.875)])
def test_long_video_settings_keep_784_tokens(frames, m):
    assert turbo.token_counts(frames // 2 * 196, m, 1 - m if frames > 16 else m) == (784, 784)


def test_floor_is_exact_where_floating_point_is_not():
    assert turbo.token_counts(100, 0.9, 0.1) == (10, 10)  # 100 * (1 - 0.9) is 9.99...98


def test_every_token_is_dropped_equally_often():
    shown, made = turbo.token_dropout(make_key(torch.arange(4000)), 16, 0.75, 0.25)
    for picked in (shown, made):
        counts = torch.bincount(picked.flatten(), minlength=16)
        assert (
            counts - 1000
        ).abs().max() < 130  # 4.7 standard deviations; the keys are fixed, so this can't flake


def test_dropout_belongs_to_the_clip_alone():
    """The same key gives the same tokens alone, in another batch, in another place."""
    whole, alone = (
        turbo.token_dropout(KEYS, 64, 0.5, 0.25),
        turbo.token_dropout(KEYS[2:3], 64, 0.5, 0.25),
    )
    assert all(torch.equal(a[2:3], b) for a, b in zip(whole, alone, strict=True))
    assert not torch.equal(whole[0][0], whole[0][1])


@pytest.mark.parametrize(("m", "r"), [(0.5, 0.6), (1.0, 0.5), (-0.1, 0.0), (0.5, -0.1)])
def test_token_dropout_refuses_impossible_ratios(m, r):
    with pytest.raises(ValueError, match="0 <= r <= m < 1"):
        turbo.token_dropout(KEYS, 64, m, r)


# ---- target and loss -------------------------------------------------------------------------------------------------


def test_normalised_target_by_loops():
    patches = torch.randint(0, 256, (2, 3, 24), dtype=torch.uint8)
    target = turbo.pixel_target(patches, "normalized")
    for b in range(2):
        for n in range(3):
            for c in range(3):
                x = patches[b, n, c::3].double() / 255  # colours are fastest
                expected = (x - x.mean()) / (x.var(unbiased=True).sqrt() + 1e-6)
                assert torch.allclose(target[b, n, c::3].double(), expected, atol=1e-5)


def test_pixel_target_is_what_the_encoder_sees():
    patches = torch.randint(0, 256, (2, 3, 24), dtype=torch.uint8)
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    expected = (patches.float() / 255).unflatten(-1, (-1, 3)).sub(mean).div(std).flatten(-2)
    assert torch.allclose(turbo.pixel_target(patches, "pixels"), expected, atol=1e-6)


def test_eq_1():
    logits, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    prediction, target = torch.randn(3, 7, 24), torch.randn(3, 7, 24)
    loss, ce, pmae = turbo.turbo_loss(logits, F.one_hot(labels, 5).float(), prediction, target)
    expected = F.cross_entropy(logits, labels, reduction="none") / math.log(5) + (
        (prediction - target) ** 2
    ).mean((1, 2))
    assert torch.allclose(loss, expected, atol=1e-6) and torch.allclose(
        loss, ce / math.log(5) + pmae
    )
    uniform_guess, _, _ = turbo.turbo_loss(
        torch.zeros(1, 101), torch.eye(101)[:1], *[torch.zeros(1, 0, 24)] * 2
    )
    assert uniform_guess.item() == pytest.approx(1.0)  # what lambda_CE = 1 / ln(classes) is for


# ---- model -----------------------------------------------------------------------------------------------------------


def test_dropping_equals_dense_attention_over_the_kept_tokens():
    """Encoder on gathered tokens = the dense encoder where dropped tokens are masked out of every attention."""
    model, video = small(), clips()
    visible, _ = turbo.token_dropout(KEYS, 8, 0.5, 0.0)
    sparse = model.encode(common.patchify(video, model.patch), visible)

    keep = torch.zeros(4, 9, dtype=torch.bool)
    keep[:, 0] = True
    keep.scatter_(1, visible + 1, True)
    pixels = (video.float() / 255 - torch.tensor(data.IMAGENET_MEAN)[:, None, None]) / torch.tensor(
        data.IMAGENET_STD
    )[:, None, None]
    kernel = common.linear_to_conv(model.patch_embed.weight, model.patch)
    x = (
        F.conv3d(pixels.transpose(1, 2), kernel, model.patch_embed.bias, stride=model.patch)
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([model.cls_token.expand(4, -1, -1), x + common.sinusoid_table(8, 128)], 1)
    for block in model.blocks:
        q, k, v = (
            F.linear(
                block.norm1(x),
                block.attn.qkv.weight,
                torch.cat([block.attn.q_bias, torch.zeros(128), block.attn.v_bias]),
            )
            .reshape(4, 9, 3, 2, 64)
            .permute(2, 0, 3, 1, 4)
        )
        weights = (
            (q @ k.transpose(-1, -2) / 8).masked_fill(~keep[:, None, None], -math.inf).softmax(-1)
        )
        x = x + block.attn.proj((weights @ v).transpose(1, 2).reshape(4, 9, 128))
        x = x + block.mlp(block.norm2(x))
    dense = model.norm(x)
    expected = torch.stack([dense[b][keep[b]] for b in range(4)])
    assert torch.allclose(sparse, expected, atol=1e-5)


def test_decoder_places_tokens_and_ignores_the_rest():
    """Reconstruction doesn't depend on dropped pixels that are not reconstructed, nor on those that are; it does on
    visible ones; and the target is the reconstructed tokens' pixels."""
    model, video = small(), clips()
    visible, recon = turbo.token_dropout(KEYS, 8, 0.5, 0.25)
    patches = common.patchify(video, model.patch)
    _, prediction, target = model(video, KEYS, 0.5, 0.25)
    assert torch.allclose(
        target, turbo.pixel_target(common.gather_tokens(patches, recon), "normalized")
    )

    hidden = torch.ones(4, 8, dtype=torch.bool).scatter(1, visible, False)
    changed = torch.where(hidden[..., None], 255 - patches, patches)
    again = common.unpatchify(changed, model.patch, model.grid)
    assert torch.equal(model(again, KEYS, 0.5, 0.25)[1], prediction)
    changed = torch.where(hidden[..., None], patches, 255 - patches)
    other = common.unpatchify(changed, model.patch, model.grid)
    assert not torch.allclose(model(other, KEYS, 0.5, 0.25)[1], prediction, atol=1e-3)


def test_decoder_is_a_plain_transformer_on_ordered_tokens():
    """decode() on [visible; reconstructed] = the same blocks on tokens put back in place (attention is a set)."""
    model = small()
    visible, recon = turbo.token_dropout(KEYS, 8, 0.5, 0.5)
    tokens = torch.randn(4, 4, 128)
    full = model.mask_token.expand(4, 8, -1).clone()
    full.scatter_(1, visible[..., None].expand(-1, -1, 64), model.encoder_to_decoder(tokens))
    x = full + model.decoder_positions
    for block in model.decoder.blocks:
        x = block(x)
    expected = common.gather_tokens(model.decoder.head(model.decoder.norm(x)), recon)
    assert torch.allclose(model.decode(tokens, visible, recon), expected, atol=1e-5)


def test_the_layer_between_encoder_and_decoder_starts_as_the_toy_needs(monkeypatch):
    """Xavier's, a spread of sqrt(2 / (768 + 384)), twice that of nn.Linear's own, 1 / sqrt(3 x 768)."""
    monkeypatch.setitem(turbo.MODELS, "vit_b", turbo.MODELS["vit_b"] | {"depth": 2})
    torch.manual_seed(0)
    weight = turbo.Turbo(2, "vit_b", frames=2).encoder_to_decoder.weight.detach()  # [384, 768]
    assert abs(weight.std().item() - 0.041667) < 0.0003


def test_drop_path_only_in_training():
    model = small(drop_path=0.5)
    a, b = (model(clips(), KEYS + i, 0.0, 0.0)[0] for i in (0, 1))
    assert torch.allclose(a, b, atol=1e-5)  # evaluation: keys don't matter at m = 0
    model.train()
    a, b = (model(clips(), KEYS + i, 0.0, 0.0)[0] for i in (0, 1))
    assert not torch.allclose(a, b, atol=1e-3)


# ---- the paper's numbers ---------------------------------------------------------------------------------------------

TABLE_1 = {
    (0, 0): 180.6,
    (0.5, 0.5): 99.3,
    (0.75, 0.75): 57.6,
    (0.75, 0.25): 45.9,
    (0.9, 0.9): 35.2,
    (0.9, 0.1): 18.3,
}


@pytest.fixture(scope="module")
def counted():
    """turbo.count_gmacs, once for each model and pair of ratios that the tests below share."""
    known, count = {}, turbo.count_gmacs

    def look_up(cfg, outputs, m, r):
        key = (cfg.model, cfg.decoder, cfg.frames, cfg.size, outputs, m, r)
        if key not in known:
            known[key] = count(cfg, outputs, m, r)
        return known[key]

    return look_up


def test_table_1_gflops(counted):
    """All six within 0.2 %, with the embedding of dropped patches added; ours alone are lower by exactly that."""
    cfg = config("--recipe", "ucf101", "--drop-path", 0)  # its draws are no multiply-adds
    assert turbo.TABLE_1 == TABLE_1
    for (m, r), paper in TABLE_1.items():
        here, embedded = counted(cfg, 101, m, r)
        assert embedded == pytest.approx(paper, rel=2e-3), (m, r)
        assert embedded - here == pytest.approx(
            (1568 - turbo.token_counts(1568, m, r)[0]) * 1536 * 768 / 1e9
        ), (m, r)


def test_stated_decoder_misses_table_1():
    """The 8 x 512 decoder of Table 6: the numbers of the DECISION note in the header."""
    cfg = config("--recipe", "ucf101", "--decoder", "8x512", "--drop-path", 0)
    counted = [turbo.count_gmacs(cfg, 101, m, r)[1] for m, r in TABLE_1]
    assert counted == pytest.approx([180.5, 140.5, 98.8, 63.3, 76.5, 24.5], abs=0.1)
    with torch.device("meta"):
        model = turbo.build(cfg, 101)
    assert turbo.saved_megabytes(model, 1568, 0.5, 0.5) > 0.8 * turbo.saved_megabytes(
        model, 1568, 0.0, 0.0
    )


def test_plan_prints_the_table_without_data(capsys, counted, monkeypatch):
    """What is printed; the README's --plan counts all of it anew."""
    monkeypatch.setattr(turbo, "count_gmacs", counted)
    monkeypatch.setattr(turbo, "saved_megabytes", lambda *args: 1.0)
    turbo.main(config("--plan", "--recipe", "ucf101"))
    out = capsys.readouterr().out
    rows = [line.split() for line in re.findall(r"^ +0\.\d\d .*", out, re.MULTILINE)]
    for (m, r), row in zip(TABLE_1, rows, strict=True):
        assert [float(x) for x in row[:2]] == [m, r] and float(row[6]) == TABLE_1[m, r]
        assert abs(float(row[5]) / TABLE_1[m, r] - 1) < 2e-3
    assert "59600 steps" in out and out.count("<- this run") == 1  # 9,537 // 16 * 100


def memory(capsys, *flags):
    """(GB a GPU, {GB of a card: largest micro-batch}) of --plan's line."""
    turbo.main(config("--plan", *flags))
    line = re.search(r"^memory +training: .*", capsys.readouterr().out, re.MULTILINE)[0]
    fits = dict(re.findall(r"([\d.]+) GB: (\w+)", line.split("largest")[1]))
    return float(re.search(r"([\d.]+) GB a GPU", line)[1]), fits


def test_plan_memory_by_hand(capsys, monkeypatch):
    """Without the blocks: CUDA's 1 GiB, 22 bytes a parameter on several GPUs and 18 on one, and of a pixel of a
    clip 10, 7 for RandAugment, 4 for mixup."""
    monkeypatch.setattr(common, "block_bytes", lambda *args, **kwargs: 0)
    monkeypatch.setattr(common, "saved_bytes", lambda *args: 1)
    monkeypatch.setattr(turbo, "count_gmacs", lambda *args: (1.0, 1.0))
    parameters = 94.3e6  # of ViT-B (86 M) with a decoder of 4 x 384 (8 M)
    for flags, gpus, per_parameter, micro in (
        (["--recipe", "ucf101"], 8, 18, 2),
        (["--recipe", "ucf101", "--gpus", 1], 1, 18, 16),
        (["--recipe", "ucf101", "--gpus", 2, "--micro-batch", 4], 2, 18, 4),
        (["--recipe", "ucf101", "--precision", "fp32"], 8, 16, 2),
    ):
        expected = 1 + (parameters * per_parameter + micro * 21 * 16 * 3 * 224 * 224) / 2**30
        assert memory(capsys, *flags)[0] == pytest.approx(expected, abs=0.06), flags
    assert memory(capsys, "--recipe", "breakfast", "--gpus", 1, "--gpu-gb", 3.7)[1] == {
        "3.7": "8"
    }  # 2 videos x 4 clips


@pytest.mark.parametrize(
    "flags", [["--gpus", 3], ["--gpus", 32], ["--micro-batch", 3], ["--micro-batch", 4]]
)
def test_plan_of_a_batch_that_does_not_divide(flags, capsys, monkeypatch):
    """16 clips by 8 GPUs are 2. That is said in a line, and the rest of the plan printed: nobody asked for those GPUs."""
    monkeypatch.setattr(common, "block_bytes", lambda *args: 2**20)
    monkeypatch.setattr(turbo, "count_gmacs", lambda *args: (1.0, 1.0))
    monkeypatch.setattr(turbo, "saved_megabytes", lambda *args: 1.0)
    turbo.main(config("--plan", "--recipe", "ucf101", *flags))
    out = capsys.readouterr().out
    assert re.search("memory .* a batch of 16 is not divisible by --gpus", out) and "GMACs" in out
    assert ("--micro-batch" in out) == ("--micro-batch" in flags)


def test_plan_memory_is_what_a_step_saves(capsys, monkeypatch):
    """Beside the tensors that a whole step in bf16 saves for backward, decoder, embedding and target with it."""
    monkeypatch.setattr(turbo, "count_gmacs", lambda *args: (1.0, 1.0))
    monkeypatch.setattr(turbo, "saved_megabytes", lambda *args: 1.0)
    flags = [
        "--recipe",
        "ucf101",
        "--model",
        "vit_s",
        "--gpus",
        1,
        "--num-classes",
        5,
        "--frames",
        8,
        "--batch-size",
        512,
    ]
    net = turbo.build(config(*flags), 5).train()
    x = torch.randint(0, 256, (2, 8, 3, 224, 224), dtype=torch.uint8)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    saved = []
    for n in (1, 2):
        storages.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", torch.bfloat16),
        ):
            logits, prediction, target = net(x[:n], KEYS[:n], 0.5, 0.5)
            loss = turbo.turbo_loss(logits, torch.full((n, 5), 0.2), prediction, target)[0].sum()
        saved.append(sum(storages.values()))
        del logits, prediction, target, loss
    step = (saved[1] - saved[0]) / 2**30
    many, half = (memory(capsys, *flags, "--micro-batch", n)[0] for n in (512, 256))
    assert 0.9 * step < (many - half) / 256 < 1.6 * step
    recomputed = memory(capsys, *flags, "--micro-batch", 512, "--grad-checkpoint")[0]
    assert recomputed < 0.6 * many


def test_plan_of_every_recipe_fits_its_cards(blocks_by_hand, capsys, monkeypatch):
    """As printed: video-language training, also without dropout (Table 3), on one A40 of 48 GB; the rest on 8 of 24."""
    monkeypatch.setattr(turbo, "count_gmacs", lambda *args: (1.0, 1.0))
    monkeypatch.setattr(turbo, "saved_megabytes", lambda *args: 1.0)
    gigabytes, fits = memory(capsys, "--recipe", "htm_aa", "--mask-ratio", 0, "--recon-ratio", 0)
    assert gigabytes < 48 and fits["48"] == "32"
    for recipe, clips in (("breakfast", "8"), ("ucf101", "2")):  # as coin, as hmdb51
        assert memory(capsys, "--recipe", recipe)[1] == {"24": clips, "80": clips}


# ---- header, flags, recipes ------------------------------------------------------------------------------------------


def test_header_map_names_exist():
    """The second column of the header's table: every symbol is in the file."""
    table = turbo.__doc__.split("paper  ")[1].split("\n\n")[0]
    cells = [re.split(r"\s{2,}", line.strip())[-1] for line in table.splitlines()[1:]]
    names = [name for cell in cells for name in re.sub(r" \(.*?\)", "", cell).split(", ")]
    assert len(names) >= 10
    for name in names:
        owner = turbo
        for part in name.split("."):
            owner = getattr(owner, part)


def test_decisions_of_the_header_are_tagged_where_they_are_made():
    """One `DECISION (word)` in the code for each word of the header's list, and none besides."""
    listed = re.findall(
        r"^    (\w+) ", turbo.__doc__.split("DECISIONS")[1].split("Missing")[0], re.MULTILINE
    )
    tagged = re.findall(r"# DECISION \((\w+)\)", (ROOT / "turbo.py").read_text())
    assert set(listed) == set(tagged) and len(listed) == 18


def test_every_flag_is_read():
    """Each field of Config is read as cfg.<field>, in the script or where common.py and data.py take the config."""
    names = "turbo.py", "common.py", "data.py"
    source = "".join((ROOT / name).read_text() for name in names)
    for field in dataclasses.fields(turbo.Config):
        assert re.search(rf"\bcfg\.{field.name}\b", source), field.name


def test_recipes_only_set_known_fields_of_the_right_type():
    types = {field.name: field.type for field in dataclasses.fields(turbo.Config)}
    for name, recipe in turbo.RECIPES.items():
        for key, value in recipe.items():
            assert isinstance(value, types[key]), (name, key)
        turbo.check(config("--recipe", name, "--init", "x.pth"))


def test_recipes_of_the_paper_need_weights():
    """Every one but the toys starts from VideoMAE (Sec. 4.2, 5.1.1, 5.3): random weights only where they are asked for.
    So does the toy that goes on from tpt_mae.py's."""
    for name in turbo.RECIPES:
        flags = ["--recipe", name]
        if name.startswith("toy") and name != "toy_tpt":
            turbo.check(config(*flags))
            continue
        source = "tpt_mae.py's toy" if name == "toy_tpt" else "VideoMAE's weights"
        with pytest.raises(
            UserError, match=f"--recipe {name} starts from {source}.*--init random"
        ) as error:
            turbo.main(config(*flags))
        assert "\n" not in str(error.value)
        turbo.check(config(*flags, "--init", "random"))
        turbo.check(config(*flags, "--init", "videomae.pth"))
        turbo.check(config(*flags, "--plan"))
        turbo.check(config(*flags, "--task", "eval", "--val-list", "val.csv"))


def test_random_weights_are_none(toy_args, tmp_path):
    """--init random is a run without --init, and continues one."""
    turbo.main(config(*toy_args, "--max-steps", 2, "--out", tmp_path, "--init", "random"))
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    turbo.main(config(*toy_args, "--max-steps", 2, "--out", tmp_path / "none"))
    lines = (tmp_path / "none/log.jsonl").read_text().splitlines()
    assert (
        losses == [json.loads(line)["loss"] for line in lines if '"loss"' in line]
        and len(losses) == 2
    )
    turbo.main(config(*toy_args, "--max-steps", 2, "--out", tmp_path / "none", "--init", "random"))


CHOICES = [
    [f"--{field.name.replace('_', '-')}", choice]
    for field in dataclasses.fields(turbo.Config)
    for choice in field.metadata["choices"] or ()
    if field.name not in ("task", "objective")
    and choice not in ("flash", "vit_b", "vit_l")  # no GPU here; too large for a test
]


@pytest.mark.parametrize(
    "flags",
    [
        *CHOICES,
        ["--decoder", "1x128"],
        ["--mask-ratio", "0", "--recon-ratio", "0"],
        ["--recon-ratio", "0"],
        ["--mixup", "0.8", "--cutmix", "1"],
        ["--flip", "--crop", "resized"],
        ["--crop", "multi-scale"],
        ["--grad-checkpoint"],
        ["--drop-path", "0.3", "--label-smoothing", "0.1", "--clip-grad", "1"],
        ["--eval-mask-ratios", "0,0.5"],
    ],
)
def test_every_choice_trains_a_step(flags, toy_args, tmp_path, monkeypatch):
    monkeypatch.setitem(turbo.MODELS, "vit_toy", turbo.MODELS["vit_toy"] | {"depth": 2})
    turbo.main(config(*map(str, toy_args), "--max-steps", "2", "--out", str(tmp_path), *flags))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records[1:]] == [1, 2, 2] and all(
        math.isfinite(r["loss"]) for r in records[1:3]
    )


# ---- the real command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A run folder of a few dozen steps on the small toy set, through the real command line."""
    from conftest import TINY, command

    out = tmp_path_factory.mktemp("trained")
    flags = [
        "--train-list",
        toy / "train.csv",
        "--val-list",
        toy / "val.csv",
        "--data-root",
        toy,
        *TINY,
    ]
    process = command(
        "turbo.py", *flags, "--epochs", 10, "--eval-every", 5, "--lr", "3e-3", "--out", out
    )
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return out, stdout


def test_training_lowers_the_loss_and_says_so(trained):
    out, stdout = trained
    head, *records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 40 and np.mean(losses[-8:]) < 0.85 * np.mean(losses[:8])
    assert head["config"]["lr"] == 3e-3 and {"python", "torch"} <= set(head["versions"])
    assert [r["step"] for r in records if "val_top1" in r] == [20, 40]
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(records))
    assert re.search(r"left [\d:]+", stdout) and "chance 12.5 %" in stdout


def test_pictures(trained):
    """recon.png: original, seen, reconstruction for each of 4 clips; the animation has all 16 frames."""
    out, _ = trained
    with av.open(str(out / "recon.png")) as file:
        strip = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert strip.shape == (4 * 3 * 68, 8 * 68, 3)
    original, seen, recon = (strip[i * 68 : (i + 1) * 68].astype(int) for i in range(3))
    grey = (seen == 128).all(-1)
    assert 0.4 < grey.mean() < 0.55  # half of the tokens, without the frames
    assert (seen == original).all(-1)[~grey].all() and (recon == original).all(-1)[~grey].all()
    assert (recon != original).any(-1)[
        grey
    ].mean() > 0.9  # dropped places show the model's own pixels
    with av.open(str(out / "recon_animated.png")) as file:
        assert len(list(file.decode(video=0))) == 16


def test_borrowed_panel_is_marked(tmp_path):
    """A normalised target has a fourth panel, framed red, that differs from the model's own."""
    model = small()
    cfg = dataclasses.replace(config("--recipe", "ucf101"), frames=4, size=32)
    turbo.write_recon(model, clips(2), KEYS[:2], cfg.mask_ratio, cfg.fps, tmp_path / "r.png")
    with av.open(str(tmp_path / "r.png")) as file:
        strip = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert strip.shape == (2 * 4 * 36, 4 * 36, 3)
    rows = strip.reshape(2, 4, 36, 4, 36, 3)
    assert (rows[:, 3, 0] == [255, 0, 0]).all() and (rows[:, :3, 0] == 255).all()
    assert (rows[:, 2] != rows[:, 3]).any()


def test_own_reconstruction_borrows_nothing(tmp_path):
    """The first three panels don't change with the dropped pixels' values (original aside): no leak."""
    model, video = small(), clips(1)
    cfg = dataclasses.replace(config("--recipe", "ucf101"), frames=4, size=32)
    _, masked = turbo.token_dropout(KEYS[:1], 8, 0.5, 0.5)
    patches = common.patchify(video, model.patch)
    darker = patches.scatter(
        1,
        masked[..., None].expand(-1, -1, 1536),
        patches.gather(1, masked[..., None].expand(-1, -1, 1536)) // 3,
    )
    pictures = []
    for x in (patches, darker):
        video = common.unpatchify(x, model.patch, model.grid)
        turbo.write_recon(model, video, KEYS[:1], cfg.mask_ratio, cfg.fps, tmp_path / "r.png")
        with av.open(str(tmp_path / "r.png")) as file:
            pictures.append(
                next(file.decode(video=0)).to_ndarray(format="rgb24").reshape(4, 36, -1)
            )
    assert (pictures[0][1:3] == pictures[1][1:3]).all()  # seen, own
    assert (pictures[0][0] != pictures[1][0]).any() and (
        pictures[0][3] != pictures[1][3]
    ).any()  # original, borrowed


def test_eval_predict_features(trained, toy, capsys):
    out, _ = trained
    lists = ["--val-list", toy / "val.csv", "--data-root", toy, "--workers", 0, "--out", out]
    turbo.main(config("--task", "eval", *lists))
    stdout, last = (
        capsys.readouterr().out,
        json.loads((out / "log.jsonl").read_text().splitlines()[-1]),
    )
    best = torch.load(out / "best.pt", weights_only=True)["at"]["best"]
    assert "val_clips 8" in stdout and f"val_top1 {best:.4g}" in stdout and best >= last["val_top1"]

    videos = sorted((toy / "videos").glob("val_*.mp4"))[:2]
    turbo.main(config("--task", "predict", "--out", out, "--workers", 0, "--input", *videos))
    for video, line in zip(videos, capsys.readouterr().out.splitlines(), strict=True):
        assert line.startswith(f"{video}: ")
        shares = [float(x) for x in re.findall(r"([\d.]+) %", line)]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.1

    turbo.main(config("--task", "features", *lists))
    features = np.load(out / "features.npy")
    assert features.shape == (8, 128) and np.isfinite(features).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": None}, "not a checkpoint of turbo.py"),
        ({"text_width": None}, "not a checkpoint of turbo.py"),  # as another script's
        ({"config": {}}, "not a checkpoint of this version of turbo.py"),
        ({"config": {"frames": 15}}, "--frames 15 is not a multiple"),
        ({"config": {"model": "vit_s"}}, "not a checkpoint of this version of turbo.py"),
        ({"config": {"model": "vit_x"}}, "not a checkpoint of this version of turbo.py"),
        ({"classes": ["one"]}, "not a checkpoint of this version of turbo.py"),
        ({"classes": 3}, "not a checkpoint of this version of turbo.py"),
        ({"model": {}}, "not a checkpoint of this version of turbo.py"),
        ({"model": 3}, "not a checkpoint of this version of turbo.py"),
    ],
)
@pytest.mark.parametrize("task", ["eval", "predict"])
def test_a_foreign_checkpoint_is_one_line(change, words, task, trained, toy, tmp_path):
    """Of another script, an older version, another shape: the file's name and why, whatever is wrong with it."""
    state = torch.load(trained[0] / "best.pt", weights_only=True)
    for key, value in change.items():
        if value is None:
            del state[key]
        elif key == "config" and value:
            state[key] = state[key] | value
        else:
            state[key] = value
    torch.save(state, tmp_path / "other.pt")
    args = [
        "--task",
        task,
        "--init",
        tmp_path / "other.pt",
        "--val-list",
        toy / "val.csv",
        "--data-root",
        toy,
        "--input",
        "a.mp4",
    ]
    with pytest.raises(UserError) as error:
        turbo.main(config(*args))
    message = str(error.value)
    assert message.startswith(f"error: {tmp_path / 'other.pt'}: {words}") and "\n" not in message


def test_a_cut_checkpoint_is_one_line(trained, tmp_path):
    whole = (trained[0] / "best.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"^error: {tmp_path / 'cut.pt'}: ") as error:
            turbo.main(config("--task", "eval", "--init", tmp_path / "cut.pt"))
        assert "\n" not in str(error.value)


def test_missing_validation_videos_are_said_before_training(toy, toy_args, tmp_path):
    """Not at the first evaluation: no run folder is made. One missing video of eight is forgiven, and counted."""
    lines = (toy / "val.csv").read_text().splitlines()
    (tmp_path / "val.csv").write_text("\n".join([*lines, "gone/a.mp4,left", "gone/b.mp4,left"]))
    args = [
        *toy_args,
        "--val-list",
        tmp_path / "val.csv",
        "--max-steps",
        1,
        "--out",
        tmp_path / "run",
    ]
    with pytest.raises(
        UserError, match="val.csv: 2 of its 10 videos are missing .*gone/a.mp4 .*--data-root"
    ):
        turbo.main(config(*args))
    assert not (tmp_path / "run").exists()
    (tmp_path / "val.csv").write_text("\n".join([*lines, "gone/a.mp4,left"]))
    turbo.main(config(*args))
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert last["val_clips"] == 8 and last["val_unread"] == 1


def test_features_of_an_unreadable_video_are_nan(trained, toy, capsys, tmp_path):
    out = trained[0]
    lines = re.sub(",.*", ",a label of another set", (toy / "val.csv").read_text()).splitlines()
    (tmp_path / "val.csv").write_text("\n".join([lines[0], "videos/none.mp4,0", *lines[1:]]))
    turbo.main(config("--task", "features", "--val-list", tmp_path / "val.csv", "--data-root", toy,
                      "--init", out / "best.pt", "--out", tmp_path / "f", "--workers", 0))  # fmt: skip
    features = np.load(tmp_path / "f" / "features.npy")
    assert "none.mp4" in capsys.readouterr().out
    assert np.isnan(features[1]).all() and np.isfinite(np.delete(features, 1, 0)).all()


def test_init_from_own_checkpoint(trained, toy_args, tmp_path, capsys):
    """Weights carry over; a classifier of another size is left at init."""
    out = trained[0]
    argv = [
        *map(str, toy_args),
        "--init",
        str(out / "best.pt"),
        "--out",
        str(tmp_path),
        "--max-steps",
        "1",
    ]
    turbo.main(config(*argv, "--num-classes", "8"))
    assert "left at init 0, not used 0" in capsys.readouterr().out
    state = torch.load(out / "best.pt", weights_only=True)
    torch.save(
        {
            "model": state["model"]
            | {"head.weight": torch.zeros(3, 128), "head.bias": torch.zeros(3)}
        },
        tmp_path / "3.pt",
    )
    net = turbo.Turbo(8, "vit_toy", "1x32", 16, 64)
    message = turbo.init_weights(tmp_path / "3.pt", net)  # its decoder and head are of other sizes
    assert (
        "decoder is not used: --decoder 2x64 would fit it; its classifier is not used: of another size"
        in message
    )
    assert torch.equal(net.blocks[3].norm1.weight, state["model"]["blocks.3.norm1.weight"])
    for part in ("norm.", "patch_embed."):  # half an encoder is no start
        torch.save(
            {"model": {k: v for k, v in state["model"].items() if k.startswith(part)}},
            tmp_path / "half.pt",
        )
        with pytest.raises(
            common.UserError, match="half.pt: .* weights of the encoder are not in it"
        ):
            turbo.init_weights(tmp_path / "half.pt", net)


def test_copying_three_files_runs(cli, toy_args, tmp_path):
    """turbo.py + common.py + data.py in an empty folder are enough."""
    for name in ("turbo.py", "common.py", "data.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    code, _, err = cli("turbo.py", *toy_args, "--max-steps", 1, cwd=tmp_path)
    assert code == 0 and (tmp_path / "runs/turbo-toy/last.pt").exists(), err


def test_user_error_is_one_line():
    with pytest.raises(UserError, match="^error: --size 60 is not a multiple"):
        turbo.check(config("--size", "60"))
