"""Augmentation on the device, against plain versions that take one image at a time: PIL, colorsys, loops."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from waits import Waits

import common
import data

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def keys_of(n, seed=0):
    return common.make_key(seed, torch.arange(n))


def photo(height, width, seed):
    """Something like a photograph [H, W, 3]: shading, edges, grain; seed 1 is dark, 2 of low contrast."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width][..., None]
    picture = 0.5 + 0.5 * np.sin(6 * rng.random(3) * x + 5 * rng.random(3) * y + 6 * rng.random(3))
    for _ in range(5):
        cx, cy, radius = rng.random(3)
        picture = np.where((x - cx) ** 2 + (y - cy) ** 2 < 0.1 * radius, rng.random(3), picture)
    picture += rng.normal(0, 0.03, picture.shape)
    picture = {1: 0.3 * picture, 2: 0.4 + 0.2 * picture}.get(seed, picture)
    return (picture * 255).clip(0, 255).astype(np.uint8)


def photos(batch=1, frames=4, height=61, width=83, seed=0):
    """uint8 [B, T, 3, H, W], all frames different."""
    seeds = range(seed, seed + batch * frames)
    clips = np.stack([photo(height, width, s) for s in seeds]).reshape(
        batch, frames, height, width, 3
    )
    return torch.from_numpy(clips).movedim(-1, 2).contiguous()


def by_pil(function, clip, *arguments):
    """function(image, *arguments) for each frame of a clip [T, C, H, W]."""
    images = [Image.fromarray(frame.movedim(0, -1).contiguous().numpy()) for frame in clip]
    return torch.stack(
        [torch.from_numpy(np.array(function(image, *arguments))).movedim(-1, 0) for image in images]
    )


def moved(image, *matrix):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(128,) * 3
    )


def brighten_dark(image, add):
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def posterized(image, bits):
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


# timm's operations with PIL, of a magnitude in 0 .. 10 and a sign.
PIL_OPS = {
    "AutoContrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, sign: ImageOps.equalize(image),
    "Invert": lambda image, m, sign: ImageOps.invert(image),
    "Rotate": lambda image, m, sign: image.rotate(
        sign * m / 10 * 30, resample=Image.Resampling.BICUBIC, fillcolor=(128,) * 3
    ),
    "Posterize": lambda image, m, sign: posterized(image, 4 - int(m / 10 * 4)),
    "Solarize": lambda image, m, sign: ImageOps.solarize(image, 256 - int(m / 10 * 256)),
    "SolarizeAdd": lambda image, m, sign: brighten_dark(image, int(m / 10 * 110)),
    "Color": lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * m / 10 * 0.9),
    "Contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(
        1 + sign * m / 10 * 0.9
    ),
    "Brightness": lambda image, m, sign: ImageEnhance.Brightness(image).enhance(
        1 + sign * m / 10 * 0.9
    ),
    "Sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(
        1 + sign * m / 10 * 0.9
    ),
    "ShearX": lambda image, m, sign: moved(image, 1, sign * m / 10 * 0.3, 0, 0, 1, 0),
    "ShearY": lambda image, m, sign: moved(image, 1, 0, 0, sign * m / 10 * 0.3, 1, 0),
    "TranslateX": lambda image, m, sign: moved(
        image, 1, 0, sign * m / 10 * 0.45 * image.width, 0, 1, 0
    ),
    "TranslateY": lambda image, m, sign: moved(
        image, 1, 0, 0, 0, 1, sign * m / 10 * 0.45 * image.height
    ),
}


def operate(operation, clip, v):
    """An entry of data.RAND_AUGMENT on one clip [T, C, H, W]."""
    function, values = operation
    height, width = clip.shape[-2:]
    row = torch.as_tensor(values(v, width, height), dtype=torch.float64)
    return function(clip[None], data.to_device(row[None], clip.device))[0]


def recorder(monkeypatch):
    """Put recorders in the place of the operations; the list fills with (name, v), and nothing is done to the clip."""
    seen = []

    def note(name):
        def function(x, values):
            seen.extend((name, v) for v in values.flatten().tolist())
            return x

        return function, lambda v, w, h: [v]

    monkeypatch.setattr(data, "RAND_AUGMENT", {name: note(name) for name in data.RAND_AUGMENT})
    return seen


# ---- RandAugment -----------------------------------------------------------------------------------------------------


def test_the_operations_are_timms():
    assert list(data.RAND_AUGMENT) == list(PIL_OPS)


@pytest.mark.parametrize("name", PIL_OPS)
@pytest.mark.parametrize("size", [(61, 83), (24, 17)])
def test_every_operation_equals_pil(name, size):
    clip = photos(1, 4, *size)[0]
    clip[3, :, 5:] = torch.tensor([0, 255, 77])[
        :, None, None
    ]  # a nearly flat frame, with white and black
    for m in (0.0, 0.4, 2.5, 5.0, 6.6, 7.0, 9.3, 10.0):
        for sign in (1, -1):
            ours = operate(data.RAND_AUGMENT[name], clip, sign * m / 10)
            pils = by_pil(PIL_OPS[name], clip, m, sign)
            assert ours.dtype == torch.uint8
            assert ours.shape == clip.shape
            gap = (ours.int() - pils.int()).abs()
            if name in GEOMETRIC:
                assert gap.max() <= 1, (m, sign)
                assert (gap > 0).float().mean() < 0.005, (m, sign)
            else:
                assert gap.max() == 0, (m, sign)


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Contrast"])
def test_statistics_of_flat_and_two_coloured_frames(name):
    """The cases in which PIL leaves a frame as it is, or its table goes beyond 255."""
    flat = torch.full((1, 3, 20, 28), 93, dtype=torch.uint8)
    two, few, many = flat.clone(), flat.clone(), flat.clone()
    two[..., :10, :] = 200
    few.view(-1)[:3] = 200  # fewer than 255 pixels below the last level: equalize gives up
    many.flatten(-2)[..., :51] = 255
    many.flatten(-2)[..., 51:60] = 0  # 509 pixels below the last level: PIL's table ends at 509
    for clip in (flat, two, few, many):
        pils = by_pil(PIL_OPS[name], clip, 7, 1)
        assert torch.equal(operate(data.RAND_AUGMENT[name], clip, 0.7), pils)


def test_equal_to_pil_from_end_to_end(monkeypatch):
    clips, keys, exact = photos(24, 2, 40, 52), keys_of(24), 0
    ours = data.rand_augment(clips, keys, 7, 4)
    for i, clip in enumerate(clips):
        with monkeypatch.context() as patch:
            plan = recorder(patch)
            data.rand_augment(clips[i : i + 1], keys[i : i + 1], 7, 4)
        pils = clip
        for name, v in plan:
            pils = by_pil(PIL_OPS[name], pils, abs(v) * 10, 1 if v > 0 else -1)
        if any(name in GEOMETRIC for name, _ in plan):
            assert ((ours[i].int() - pils.int()).abs() > 0).float().mean() < 0.03, plan
        else:
            exact += bool(plan)
            assert torch.equal(ours[i], pils), plan
    assert exact > 4


@pytest.mark.parametrize(("magnitude", "layers"), [(7, 4), (9, 2)])
def test_draws_of_rand_augment(monkeypatch, magnitude, layers):
    n, seen = 4000, recorder(monkeypatch)
    clips = torch.zeros(n, 1, 3, 1, 1, dtype=torch.uint8)
    data.rand_augment(clips, keys_of(n), magnitude, layers)
    trials = n * layers
    assert abs(len(seen) - trials / 2) < 4 * math.sqrt(trials / 4)  # each with probability 0.5
    for name in PIL_OPS:  # any as likely
        share = sum(other == name for other, _ in seen) / len(seen)
        assert abs(share - 1 / 15) < 4 * math.sqrt(14 / 15 / 15 / len(seen)), name
    v = np.array([v for _, v in seen]) * 10
    assert abs((v > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(v))
    m = np.abs(v)
    reference = np.clip(np.random.default_rng(0).normal(magnitude, 0.5, 200_000), 0, 10)
    assert abs(m.mean() - reference.mean()) < 4 * 0.5 / math.sqrt(len(m))
    assert abs(m.std() - reference.std()) < 0.02
    assert abs((m == 10).mean() - (reference == 10).mean()) < 0.01
    for q in (5, 25, 75, 95):
        assert abs(np.percentile(m, q) - np.percentile(reference, q)) < 0.05
    low = recorder(monkeypatch)
    data.rand_augment(clips[:500], keys_of(500), 0.2, layers)
    assert min(abs(v) for _, v in low) == 0


def test_layers_are_drawn_independently_and_with_replacement(monkeypatch):
    n, plans = 3000, []
    seen = recorder(monkeypatch)
    clip = torch.zeros(1, 1, 3, 1, 1, dtype=torch.uint8)
    for key in keys_of(n):
        data.rand_augment(clip, key[None], 7, 2)
        plans.append([*seen])
        seen.clear()
    counts = np.bincount([len(plan) for plan in plans], minlength=3) / n
    assert np.abs(counts - [0.25, 0.5, 0.25]).max() < 0.035
    pairs = np.array([[abs(v) for _, v in plan] for plan in plans if len(plan) == 2])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4 / math.sqrt(len(pairs))
    twice = np.mean([plan[0][0] == plan[1][0] for plan in plans if len(plan) == 2])
    assert abs(twice - 1 / 15) < 4 * math.sqrt(1 / 15 / len(pairs))


# ---- colour jitter ---------------------------------------------------------------------------------------------------


def factors(n, i, x):
    """What the keys draw for argument i of colour_jitter, as PIL's float."""
    u = common.uniform(keys_of(n), "colour_jitter", 4)[:, i].tolist()
    return [max(0, 1 - x) + (1 + x - max(0, 1 - x)) * v for v in u]


def enhanced(image, pil, factor):
    return pil(image).enhance(factor)


def test_colour_jitter_equals_pil():
    clips, n = photos(12, 2, 40, 31), 12
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    off = dict.fromkeys(enhance, 0.0)
    for x in (0.4, 0.9, 1.5):
        for i, (name, pil) in enumerate(enhance.items()):
            ours = data.colour_jitter(clips, keys_of(n), **off | {name: x})
            for clip, out, factor in zip(clips, ours, factors(n, i, x), strict=True):
                gap = (out.int() - by_pil(enhanced, clip, pil, factor).int()).abs()
                assert gap.max() <= 1, (
                    name,
                    factor,
                )  # the factor's last bit differs, and is rounded down
                assert (gap > 0).float().mean() < 1e-3, (name, factor)
    chained = clips
    for name in enhance:
        chained = data.colour_jitter(chained, keys_of(n), **off | {name: 0.4})
    assert torch.equal(data.colour_jitter(clips, keys_of(n)), chained)
    assert torch.equal(data.colour_jitter(clips, keys_of(n), 0, 0, 0, 0), clips)


def test_factors_of_colour_jitter_are_uniform_and_independent():
    n, means = 3000, []
    clips = torch.full((n, 1, 3, 2, 2), 80, dtype=torch.uint8)
    clips[..., 1] = 20  # every frame: a bright and a dark column, grey, mean 50
    for x in (0.4, 1.4):
        factor = data.colour_jitter(clips, keys_of(n), x, 0, 0)[:, 0, 0, 0, 0] / 80
        low, high = max(0, 1 - x), 1 + x
        assert factor.min() >= low - 0.02
        assert factor.max() <= high
        assert abs(factor.mean() - (low + high) / 2) < 0.02 + 4 * (high - low) / math.sqrt(12 * n)
        assert abs(factor.std() - (high - low) / math.sqrt(12)) < 0.02
    for arguments in ((0.4, 0, 0), (0, 0.4, 0)):
        means.append(data.colour_jitter(clips, keys_of(n), *arguments)[:, 0, 0, 0, 0].double())
    assert abs(np.corrcoef(*means)[0, 1]) < 4 / math.sqrt(n)


def test_hue_turns_as_in_colorsys():
    clips, n = photos(6, 1, 9, 8), 6
    clips[:, :, :, 0] = torch.tensor([[255, 0, 9], [255, 255, 9], [0, 0, 9]])[
        :, [0, 1, 2, 2, 1, 0, 0, 0]
    ]
    ours = data.colour_jitter(clips, keys_of(n), 0, 0, 0, hue=0.5)
    turns = common.uniform(keys_of(n), "colour_jitter", 4)[:, 3] - 0.5
    for clip, out, turn in zip(clips, ours, turns.tolist(), strict=True):
        for pixel, got in zip(
            clip[0].flatten(1).T.tolist(), out[0].flatten(1).T.tolist(), strict=True
        ):
            h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in pixel))
            expected = [255 * c for c in colorsys.hsv_to_rgb((h + turn) % 1, s, v)]
            assert max(abs(a - b) for a, b in zip(expected, got, strict=True)) < 0.51, (pixel, turn)
    half = data.colour_jitter(clips, keys_of(n), 0, 0, 0, hue=0.1)
    assert (half.int() - clips.int()).abs().float().mean() < (
        ours.int() - clips.int()
    ).abs().float().mean() / 2


# ---- random erasing --------------------------------------------------------------------------------------------------


def test_boxes_of_erase():
    n, boxes, rng, plain = 1500, [], np.random.default_rng(0), []
    clips = torch.full(
        (n, 2, 3, 48, 64), 255, dtype=torch.uint8
    )  # a value that noise seldom has in all colours
    for frames in (data.erase(clips, keys_of(n), 1.0) != 255).any(2):  # [T, H, W]
        ys, xs = (frames.any(0).any(d).nonzero().flatten().tolist() for d in (1, 0))
        y, x, h, w = ys[0], xs[0], len(ys), len(xs)
        assert (
            frames[:, y : y + h, x : x + w].float().mean() > 0.99
        )  # all of one rectangle, in every frame
        boxes.append((h * w, math.log(h / w), y / (48 - h), x / (64 - w)))
    while len(plain) < 40_000:  # one box after the other, as timm draws them
        area, ratio = (
            48 * 64 * rng.uniform(0.02, 1 / 3),
            math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3))),
        )
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < 48 and w < 64:
            y, x = rng.integers(0, 48 - h, endpoint=True), rng.integers(0, 64 - w, endpoint=True)
            plain.append((h * w, math.log(h / w), y / (48 - h), x / (64 - w)))
    boxes, plain = np.array(boxes), np.array(plain)
    spread = plain.std(0)
    assert (np.abs(boxes.mean(0) - plain.mean(0)) < 4 * spread / math.sqrt(n)).all()
    assert (np.abs(boxes.std(0) - spread) < 0.06 * spread).all()
    assert (boxes[:, 2:].min(0) == 0).all()  # at all four edges of the frame
    assert (boxes[:, 2:].max(0) == 1).all()
    assert (plain.min(0) <= boxes.min(0)).all()
    assert (boxes.max(0) <= plain.max(0)).all()
    assert (np.abs(np.corrcoef(boxes.T) - np.corrcoef(plain.T)) < 4 / math.sqrt(n)).all()


def test_a_quarter_of_the_clips_is_erased():
    clips, keys = torch.zeros(3000, 1, 3, 16, 16, dtype=torch.uint8), keys_of(3000)
    out = data.erase(clips, keys)
    size = (out != 0).any(2).flatten(1).sum(1)  # [B]
    erased = size > 0
    assert abs(erased.sum() - 750) < 4 * math.sqrt(3000 / 4 * 3 / 4)
    everywhere = data.erase(clips, keys, 1.0)
    assert torch.equal(out[erased], everywhere[erased])
    sizes = (everywhere != 0).any(2).flatten(1).sum(1).float()  # whether and where are independent
    assert abs(sizes[erased].mean() - sizes[~erased].mean()) < 4 * sizes.std() / math.sqrt(
        750 * 3 / 4
    )


def test_noise_of_erase():
    clips, keys = photos(1, 3, 96, 96).expand(6, -1, -1, -1, -1), keys_of(6)
    out, parts = data.erase(clips, keys, 1.0), []
    mean, std = (torch.tensor(v)[:, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    for clip, before in zip(out, clips, strict=True):
        changed = (clip != before).any(1).any(0)
        ys, xs = (changed.any(d).nonzero().flatten().tolist() for d in (1, 0))
        box = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
        untouched = torch.ones_like(changed)
        untouched[box] = False
        assert torch.equal(clip[..., untouched], before[..., untouched])
        noise = clip[..., box[0], box[1]].float()  # [T, 3, h, w]
        parts.append(noise.movedim(1, 0).flatten(1))
        # its own for each frame, colour, row and column; and for each clip, below
        for a, b in [
            (noise[0], noise[1]),
            (noise[:, 0], noise[:, 1]),
            (noise[..., 1:], noise[..., :-1]),
            (noise[..., 1:, :], noise[..., :-1, :]),
        ]:
            correlation = np.corrcoef(a.flatten(), b.flatten())[0, 1]
            assert abs(correlation) < 5 / math.sqrt(a.numel())
    n = min(part.shape[1] for part in parts)
    assert np.abs(np.corrcoef([part[0, :n] for part in parts]) - np.eye(6)).max() < 5 / math.sqrt(n)
    pixels = torch.cat(parts, 1)  # [3, N]
    plain = (
        torch.randn(3, 400_000, generator=torch.Generator().manual_seed(0)) * std + mean
    ).clamp(0, 1) * 255
    assert (pixels.mean(1) - plain.mean(1)).abs().max() < 5 * 58 / math.sqrt(pixels.shape[1]) + 0.1
    assert (pixels.std(1) - plain.std(1)).abs().max() < 1
    for value in (0, 255):  # what is cut off
        share = ((plain - value).abs() < 0.5).float().mean(1)
        assert ((pixels == value).float().mean(1) - share).abs().max() < 0.006
    for q in (0.05, 0.25, 0.5, 0.75, 0.9):
        assert (pixels.quantile(q, 1) - plain.quantile(q, 1)).abs().max() < 1.5


def test_erase_always_never_and_other_pixels():
    clips, keys = photos(20, 1, 24, 24), keys_of(20)
    assert torch.equal(data.erase(clips, keys, 0.0), clips)
    assert (data.erase(clips, keys, 1.0) != clips).flatten(1).any(1).all()
    black = torch.zeros_like(clips)
    grey = data.erase(black, keys, 1.0, mean=(0.5,) * 3, std=(0.0,) * 3)
    assert grey.unique().tolist() == [0, 128]


# ---- flip, labels, mixup, cutmix, normalise --------------------------------------------------------------------------


def test_flip_mirrors_half_of_the_clips():
    clips = photos(1, 1, 4, 5).repeat(1000, 2, 1, 1, 1)
    out = data.flip(clips, keys_of(1000))
    mirrored = torch.from_numpy(clips.numpy()[..., ::-1].copy())
    chosen = [torch.equal(a, b) for a, b in zip(out, mirrored, strict=True)]
    assert all(
        torch.equal(a, b) for a, b, flipped in zip(out, clips, chosen, strict=True) if not flipped
    )
    assert abs(sum(chosen) - 500) < 4 * math.sqrt(250)
    assert torch.equal(data.flip(clips, keys_of(1000), 1.0), mirrored)


def test_soft_labels():
    got = data.soft_labels(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(
        got, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]])
    )


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_is_mixup_or_cutmix_of_the_pair(mixup, cutmix):
    clips, labels = photos(4, 2, 20, 30), torch.eye(4)
    partner, cut, lams, corners = [1, 0, 3, 2], 0, [], set()
    for step in range(400):
        out, targets = data.mix(clips, labels, (0, step), mixup, cutmix)
        lam = targets[0, 0].item()
        for i, j in enumerate(partner):
            assert targets[i].tolist() == pytest.approx(
                [lam if k == i else 1 - lam if k == j else 0 for k in range(4)], abs=1e-6
            )
        if (
            out.dtype == torch.uint8
        ):  # cutmix: one box of all frames from the partner, and lambda its area
            cut += 1
            taken = torch.zeros(20, 30, dtype=torch.bool)
            for i, j in enumerate(partner):
                taken |= (out[i] != clips[i]).any(1).any(0)
            ys, xs = (taken.any(d).nonzero().flatten().tolist() for d in (1, 0))
            box = (
                (slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1))
                if ys
                else (slice(0, 0), slice(0, 0))
            )
            assert lam == pytest.approx(1 - taken[box].numel() / 600, abs=1e-6)
            corners |= {(box[0].start > 0, box[1].start > 0)}
            for i, j in enumerate(partner):
                expected = clips[i].clone()
                expected[..., box[0], box[1]] = clips[j][..., box[0], box[1]]
                assert torch.equal(out[i], expected)
        else:
            lams.append(lam)
            for i, j in enumerate(partner):
                plain = lam * clips[i].double() + (1 - lam) * clips[j].double()
                assert (out[i] - plain).abs().max() < 1e-3
    if mixup and cutmix:
        assert abs(cut - 200) < 4 * 10
    else:
        assert cut == (400 if cutmix else 0)
    if mixup:  # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 * 0.8 + 1))
        assert abs(np.mean(lams) - 0.5) < 4 * math.sqrt(1 / 10.4 / len(lams))
        assert abs(np.var(lams) - 1 / 10.4) < 0.02
    if cutmix:
        assert len(corners) == 4


def test_mix_by_pairs_in_any_micro_batch_and_off():
    clips, labels = photos(6, 1, 20, 30), torch.eye(6)
    for step in range(6):
        whole = data.mix(clips, labels, (3, step), 0.8, 1.0)
        pairs = [
            data.mix(clips[i : i + 2], labels[i : i + 2], (3, step), 0.8, 1.0) for i in (0, 2, 4)
        ]
        assert all(
            torch.equal(a, torch.cat(b))
            for a, b in zip(whole, zip(*pairs, strict=True), strict=True)
        )
    assert data.mix(clips, labels, (3, 0), 0.0, 0.0)[0] is clips


def test_normalize_each_colour():
    patches = torch.randint(
        0, 256, (2, 5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    got = data.normalize(patches, data.IMAGENET_MEAN, data.IMAGENET_STD)
    for index, value in np.ndenumerate(patches.numpy()):
        c = index[-1] % 3
        expected = (value / 255 - data.IMAGENET_MEAN[c]) / data.IMAGENET_STD[c]
        assert got[index].item() == pytest.approx(expected, abs=1e-5)


# ---- what all of them keep -------------------------------------------------------------------------------------------

KEYED = {
    "flip": lambda clips, keys: data.flip(clips, keys),
    "rand_augment": lambda clips, keys: data.rand_augment(clips, keys, 7, 4),
    "colour_jitter": lambda clips, keys: data.colour_jitter(clips, keys, 0.4, 0.4, 0.4, 0.1),
    "erase": lambda clips, keys: data.erase(clips, keys, 0.5),
}


@pytest.mark.parametrize("name", KEYED)
def test_a_clip_gets_the_same_bits_in_any_micro_batch(name):
    clips, keys = photos(8, 2, 33, 40), keys_of(8)
    whole = KEYED[name](clips, keys)
    alone = torch.cat([KEYED[name](clips[i : i + 1], keys[i : i + 1]) for i in range(8)])
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    assert torch.equal(whole, alone)
    assert torch.equal(whole[order], KEYED[name](clips[order], keys[order]))


@pytest.mark.parametrize("name", KEYED)
def test_keys_decide_and_the_input_stays(name):
    clips = photos(1, 2, 33, 40).repeat(16, 1, 1, 1, 1)
    before, out = clips.clone(), KEYED[name](clips, keys_of(16))
    assert out.dtype == torch.uint8
    assert out.shape == clips.shape
    assert torch.equal(clips, before)
    assert torch.equal(out, KEYED[name](clips, keys_of(16)))
    assert not torch.equal(out, KEYED[name](clips, keys_of(16, seed=1)))
    different = {clip.numpy().tobytes() for clip in out}
    assert len(different) == 2 if name == "flip" else len(different) > 5  # one clip, 16 keys


@pytest.mark.parametrize("name", ["flip", "rand_augment", "colour_jitter"])
def test_all_frames_of_a_clip_alike(name):
    clips = photos(8, 1, 33, 40).expand(-1, 3, -1, -1, -1)
    out = KEYED[name](clips, keys_of(8))
    assert (out != clips).any()
    assert torch.equal(out, out[:, :1].expand_as(out))


@pytest.mark.parametrize("name", KEYED)
@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (3, 1, 9, 4), (2, 3, 16, 16)])
def test_small_odd_and_strided_clips(name, shape):
    clips = photos(*shape)
    keys = keys_of(len(clips), seed=4)
    expected = KEYED[name](clips, keys)
    strided = clips.permute(1, 3, 4, 2, 0).contiguous().permute(4, 0, 3, 1, 2)
    wider = torch.cat([clips, clips], -1)[..., ::2]
    assert torch.equal(KEYED[name](strided, keys), expected)
    assert torch.equal(KEYED[name](wider, keys), KEYED[name](wider.contiguous(), keys))


PIXELS = torch.zeros(4, 2, 3, 16, 20, dtype=torch.uint8, device="meta")
WITHOUT_WAITING = {
    **{name: lambda name=name: KEYED[name](PIXELS, keys_of(4)) for name in KEYED},
    "erase all": lambda: data.erase(PIXELS, keys_of(4), 1.0),
    "normalize": lambda: data.normalize(
        PIXELS.flatten(2).float(), data.IMAGENET_MEAN, data.IMAGENET_STD
    ),
    "mixup": lambda: data.mix(PIXELS, torch.zeros(4, 5, device="meta"), (0, 0), 0.8, 0.0)[0],
    "cutmix": lambda: data.mix(PIXELS, torch.zeros(4, 5, device="meta"), (0, 0), 0.0, 1.0)[0],
    **{
        f"op {name}": lambda op=op: operate(op, PIXELS[0], 0.7)
        for name, op in data.RAND_AUGMENT.items()
    },
}


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_nothing_waits_for_the_device(name):
    with Waits() as waits:
        out = WITHOUT_WAITING[name]()
    assert out.is_meta
    assert not waits.found


def test_waiting_would_be_seen():
    with Waits() as waits:
        torch.tensor([1.0], device="meta")
        torch.ones(2).to("meta")
        torch.ones(2).to("meta", non_blocking=True)
        PIXELS.float().mul(torch.tensor(2.0))
        PIXELS[0] = torch.zeros(2, 3, 16, 20, dtype=torch.uint8)
    assert len(waits.found) == 3
    for needs_a_value in (
        PIXELS.nonzero,
        PIXELS.tolist,
        lambda: PIXELS[PIXELS > 0],
        lambda: bool(PIXELS.any()),
    ):
        with pytest.raises((NotImplementedError, RuntimeError)):
            needs_a_value()
