"""common.py: each piece against a slow version written here, a closed form, or a value worked by hand."""

import argparse
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
from common import Block, UserError, opt

CPU = common.Context(rank=0, world=1, device=torch.device("cpu"), precision="fp32")
FP16 = common.Context(rank=0, world=1, device=torch.device("cpu"), precision="fp16")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape, seed=0, dtype=torch.float64, grad=False):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return values.requires_grad_(grad)


def randomize(module, dtype=torch.float64):
    """Random values for all parameters, biases and norms too, so that none can be left out unnoticed."""
    module = module.to(dtype)
    for i, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=i, dtype=dtype) + (
            0.5 if parameter.dim() == 1 else 0.0
        )
    return module


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- Keyed randomness ------------------------------------------------------------------------------------------------

U64 = 2**64 - 1


def slow_mix(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & U64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & U64
    return z ^ z >> 31


def slow_crc32(text):
    crc = 0xFFFFFFFF
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def slow_key(*parts):
    """The key as an unsigned Python integer."""
    key = 0x9E3779B97F4A7C15
    for part in parts:
        part = slow_crc32(part) if isinstance(part, str) else part
        key = slow_mix(key * 0xD1342543DE82EF95 + part + 0x9E3779B97F4A7C15 & U64)
    return key


def slow_uniform(*parts):
    return (slow_key(*parts) >> 40) / 2**24


def keys_of(*values):
    return torch.tensor(values, dtype=torch.int64)


def many_keys(n, *parts):
    return common.make_key(*parts, torch.arange(n))


def test_a_full_card_is_no_fault_of_the_checkpoint(tmp_path):
    cfg = common.RunConfig(init=tmp_path / "a.pt")
    torch.save({"model": {}, "config": {}}, cfg.init)

    def build(cfg, state):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        common.open_trained(cfg, "turbo.py", (), (), build)


def test_mix_is_splitmix64():
    """The first outputs of the published generator for seed 1234567 (Rosetta Code, Splitmix64)."""
    states = [1234567 + i * 0x9E3779B97F4A7C15 for i in (1, 2, 3)]
    mixed = common._mix(torch.tensor([common._int64(s) for s in states]))
    assert [v & U64 for v in mixed.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_make_key_against_python_integers():
    """Ints of any size and sign, strings and nothing hash as they do in unbounded integers."""
    assert slow_crc32("123456789") == 0xCBF43926  # CRC-32's check value
    ints = [0, 1, -1, 7, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64 + 5]
    for parts in [
        (),
        ("mask",),
        ("",),
        ("é",),
        *itertools.permutations(ints, 2),
        (3, "crop", -4, "flip", 5),
    ]:
        key = common.make_key(*parts)
        assert key.dtype == torch.int64 and key.shape == ()
        assert key.item() & U64 == slow_key(*parts), parts


def test_make_key_broadcasts():
    seeds, index = keys_of(0, -5, 2**63 - 1), keys_of(9, 8)
    keys = common.make_key("shuffle", seeds[:, None], 4, index)
    expected = [[slow_key("shuffle", s, 4, i) for i in index.tolist()] for s in seeds.tolist()]
    assert [[k & U64 for k in row] for row in keys.tolist()] == expected
    assert keys_of(1)[0].shape == common.make_key(keys_of(1)[0], "x").shape == ()


def test_order_of_parts_matters():
    assert (
        len({common.make_key(*parts).item() for parts in itertools.permutations(["a", 1, 2, 3])})
        == 24
    )


def test_uniform_and_permutation_against_python_integers():
    keys = keys_of(0, 1, -1, 2**63 - 1, -(2**63), 123456789)
    assert common.uniform(keys, "crop").tolist() == [slow_uniform(k, "crop") for k in keys.tolist()]
    rows = [[slow_uniform(slow_key(k, "crop"), i) for i in range(5)] for k in keys.tolist()]
    assert common.uniform(keys, "crop", 5).tolist() == rows
    signed = [[common._int64(slow_key(slow_key(k, 7), i)) for i in range(9)] for k in keys.tolist()]
    assert common.permutation(keys, 7, 9).tolist() == [
        sorted(range(9), key=row.__getitem__) for row in signed
    ]


def test_draws_do_not_depend_on_the_batch():
    """A key alone, in a batch, in a longer batch, in another shape: the same draws."""
    keys = many_keys(12)
    for draw in (
        lambda k: common.uniform(k, "a"),
        lambda k: common.uniform(k, "a", 3),
        lambda k: common.permutation(k, "a", 6),
    ):
        together = draw(keys)
        assert torch.equal(together, torch.cat([draw(key[None]) for key in keys]))
        assert torch.equal(together[5], draw(keys[5]))
        assert torch.equal(together, draw(keys.view(3, 4)).flatten(0, 1))
    assert torch.equal(common.uniform(keys, "a", 9)[:, :4], common.uniform(keys, "a", 4))


@pytest.mark.parametrize(
    "keys", [many_keys(2**17, 0, 3), torch.arange(2**17)], ids=["hashed", "consecutive"]
)
def test_uniform_is_uniform(keys):
    """256 bins within chi-square's five sigma, mean, variance and the ends of [0, 1); fixed keys, so it can't flake."""
    draws = common.uniform(keys, "x")
    assert draws.dtype == torch.float32 and 0 <= draws.min() < 1e-4 and 1 - 1e-4 < draws.max() < 1
    expected = len(keys) / 256
    chi2 = (
        (draws * 256).long().bincount(minlength=256) - expected
    ).square().sum().item() / expected
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    assert abs(draws.double().mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / len(keys))
    assert abs(draws.double().var() - 1 / 12) < 5 * math.sqrt(1 / 180 / len(keys))


def test_uniform_below_one():
    """The largest hash gives the largest float32 below 1, not 1; the smallest gives 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "make_key", lambda keys, purpose: keys)
        assert common.uniform(keys_of(-1, 0, 1 << 40), "x").tolist() == [1 - 2**-24, 0.0, 2**-24]


def correlation(a, b):
    """Of two uniforms, whose mean is 1/2 and variance 1/12."""
    return abs(((a - 0.5) * (b - 0.5)).double().mean().item()) * 12


def test_purposes_and_neighbours_are_uncorrelated():
    n = 2**15
    keys, bound = many_keys(n, 0, 0), 5 / math.sqrt(n)
    draws = {name: common.uniform(keys, name) for name in ("crop", "flip", "mask", 0, 1, 2)}
    for a, b in itertools.combinations(draws, 2):
        assert correlation(draws[a], draws[b]) < bound, (a, b)
    rows = common.uniform(keys, "row", 4)
    for a, b in itertools.combinations(range(4), 2):
        assert correlation(rows[:, a], rows[:, b]) < bound
    plain = common.uniform(torch.arange(n), "crop")
    for draw in (draws["crop"], plain):
        assert correlation(draw[:-1], draw[1:]) < bound  # the next index
        assert correlation(draw[: n // 2], draw[n // 2 :]) < 2 * bound
    assert (
        correlation(draws["crop"], common.uniform(many_keys(n, 0, 1), "crop")) < bound
    )  # the next epoch
    assert (
        correlation(draws["crop"], common.uniform(many_keys(n, 1, 0), "crop")) < bound
    )  # the next seed


def test_every_key_bit_changes_half_of_the_hash():
    keys = many_keys(256)
    for bit in range(64):
        changed = common.make_key(keys ^ common._int64(1 << bit), "x") ^ common.make_key(keys, "x")
        ones = sum((v & U64).bit_count() for v in changed.tolist()) / len(keys)
        assert 30 < ones < 34, bit


def test_permutation_is_an_unbiased_permutation():
    """All 24 orders of 4 come up equally often (chi-square); a longer one holds every number once."""
    orders = common.permutation(many_keys(24000, "p"), "shuffle", 4)
    counts = (orders * torch.tensor([64, 16, 4, 1])).sum(1).bincount()
    counts = counts[counts > 0].double()
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 23 + 5 * math.sqrt(46)
    order = common.permutation(common.make_key(0, 1), "shuffle", 10000)
    assert order.shape == (10000,) and torch.equal(order.sort().values, torch.arange(10000))
    assert not torch.equal(order, common.permutation(common.make_key(0, 2), "shuffle", 10000))


def test_draws_compile_whole():
    """torch.compile traces the hashing of strings and integers without leaving the graph; the draws are the same."""
    keys = many_keys(5)

    def draw(keys):
        return (
            common.uniform(keys, "crop", 3),
            common.uniform(keys, "flip"),
            *common.random_split(keys, 10, 4, 3),
        )

    compiled = torch.compile(draw, backend="eager", fullgraph=True)(keys)
    assert all(torch.equal(a, b) for a, b in zip(draw(keys), compiled, strict=True))


# ---- ViT blocks ------------------------------------------------------------------------------------------------------


def slow_attention(q, k, v, causal=False):
    """Vaswani et al., Eq. 1, one query of one head of one clip at a time. [B, N, H, d]."""
    B, N, H, d = q.shape
    rows = []
    for b, i, h in itertools.product(range(B), range(N), range(H)):
        seen = i + 1 if causal else N
        logits = torch.stack([(q[b, i, h] * k[b, j, h]).sum() / math.sqrt(d) for j in range(seen)])
        weights = (logits - logits.max()).exp()
        rows.append(sum(w * v[b, j, h] for j, w in enumerate(weights / weights.sum())))
    return torch.stack(rows).view(B, N, H, d)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["plain", "sdpa", "auto"])
def test_attention_and_its_gradient(kind, causal):
    inputs = [2 * randn(2, 5, 3, 4, seed=i) for i in range(3)]
    direction = randn(2, 5, 3, 4, seed=3)
    results = []
    for function in (
        slow_attention,
        lambda *x, causal: common.attention(*x, kind=kind, causal=causal),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves, causal=causal)
        results.append([output, *torch.autograd.grad((output * direction).sum(), leaves)])
    for ours, slow in zip(*results, strict=True):
        close(ours, slow)


def test_attention_auto_and_flash_without_flash_attn(monkeypatch):
    """auto is exactly sdpa on the CPU, also in half precision or with flash-attn there; flash is refused in a line."""
    monkeypatch.setattr(
        common, "flash_attn_func", lambda *a, **k: pytest.fail("flash-attn on the CPU")
    )
    x = randn(1, 4, 2, 8, dtype=torch.bfloat16)
    assert torch.equal(common.attention(x, x, x), common.attention(x, x, x, kind="sdpa"))
    monkeypatch.setattr(common, "flash_attn_func", None)
    with pytest.raises(UserError, match="--attention") as error:
        common.attention(x, x, x, kind="flash")
    assert len(str(error.value).splitlines()) == 1


def slow_self_attention(attn, x, key_bias):
    """Heads one by one; q, k and v each with a bias."""
    D = x.shape[-1]
    d = D // attn.heads
    wq, wk, wv = attn.qkv.weight[:D], attn.qkv.weight[D : 2 * D], attn.qkv.weight[2 * D :]
    heads = []
    for h in range(attn.heads):
        s = slice(h * d, (h + 1) * d)
        q, k, v = (
            x @ wq[s].T + attn.q_bias[s],
            x @ wk[s].T + key_bias[s],
            x @ wv[s].T + attn.v_bias[s],
        )
        heads.append(
            slow_attention(q[:, :, None], k[:, :, None], v[:, :, None], attn.causal)[:, :, 0]
        )
    return torch.cat(heads, -1) @ attn.proj.weight.T + attn.proj.bias


def slow_norm(norm, x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def slow_mlp(mlp, x, act=gelu):
    return act(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["plain", "sdpa"])
def test_attention_module(kind, causal):
    """Against loops over heads; a bias on the keys, which the reference has, changes nothing."""
    attn = randomize(common.Attention(8, 2, kind, causal))
    assert sorted(n for n, _ in attn.named_parameters()) == [
        "proj.bias",
        "proj.weight",
        "q_bias",
        "qkv.weight",
        "v_bias",
    ]
    x = randn(2, 5, 8)
    close(attn(x), slow_self_attention(attn, x, key_bias=torch.zeros(8, dtype=x.dtype)))
    close(attn(x), slow_self_attention(attn, x, key_bias=3 * randn(8, seed=9)))


def test_mlp_and_quick_gelu():
    x = randn(2, 5, 4)
    assert common.QuickGELU()(torch.tensor(1.0)).item() == pytest.approx(1 / (1 + math.exp(-1.702)))
    close(common.QuickGELU()(x), x / (1 + (-1.702 * x).exp()))
    for act, slow in ((nn.GELU, gelu), (common.QuickGELU, lambda v: v / (1 + (-1.702 * v).exp()))):
        mlp = randomize(common.MLP(4, 7, act))
        close(mlp(x), slow_mlp(mlp, x, slow))


def test_block_with_drop_path():
    """Against a from-scratch block whose drop path draws come from Python integers, one clip at a time."""
    block = randomize(Block(8, 2, mlp_ratio=3, drop_path=0.4, eps=1e-2, index=5))
    assert block.mlp.fc1.weight.shape == (24, 8)
    keys, x = many_keys(12), 0.1 * randn(12, 3, 8)
    kept, outputs = [], []
    for key, clip in zip(keys.tolist(), x, strict=True):
        y = clip[None]
        branches = (
            (
                "attn",
                lambda y: slow_self_attention(
                    block.attn, slow_norm(block.norm1, y, 1e-2), torch.zeros(8)
                ),
            ),
            ("mlp", lambda y: slow_mlp(block.mlp, slow_norm(block.norm2, y, 1e-2))),
        )
        for name, branch in branches:
            kept.append(slow_uniform(key, f"drop_path.5.{name}") >= 0.4)
            y = y + branch(y) / 0.6 * kept[-1]
        outputs.append(y)
    assert 6 < sum(kept) < 20  # both outcomes came up
    close(block(x, keys), torch.cat(outputs))
    assert not torch.allclose(block(x, keys), block(x))


def test_drop_path_per_clip_rate_and_scale():
    """A clip is dropped whole or scaled whole by 1 / (1 - rate); the share dropped is the rate, so the mean stays."""
    x, keys = 1 + randn(20000, 2, 3).abs(), many_keys(20000, "d")
    for rate in (0.1, 0.5):
        y = common.drop_path(x, rate, keys, "drop")
        dropped = (y == 0).all(2).all(1)
        close(y[~dropped], x[~dropped] / (1 - rate))
        assert abs(dropped.double().mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / len(keys))
        assert torch.equal(y[7:8], common.drop_path(x[7:8], rate, keys[7:8], "drop"))
    assert common.drop_path(x, 0.5, None, "drop") is x
    assert torch.equal(common.drop_path(x, 0.0, keys, "drop"), x)
    assert common.drop_path(x.half(), 0.5, keys, "drop").dtype == torch.half


def test_drop_path_differs_between_layers_and_branches():
    """Draws of the branches of three blocks: each pair agrees half of the time at rate 0.5, as independent draws do."""
    keys = many_keys(10000, "layers")
    purposes = [p for index in range(3) for p in Block(8, 2, index=index).purposes]
    drops = [common.uniform(keys, p) < 0.5 for p in purposes]
    for a, b in itertools.combinations(drops, 2):
        assert abs((a == b).double().mean() - 0.5) < 0.02


def test_grad_checkpoint_changes_nothing():
    """Output and gradients are identical with drop path on; blocks do run twice, and once without gradients."""
    blocks = nn.ModuleList(
        randomize(Block(8, 2, drop_path=0.5, index=i), torch.float32) for i in range(3)
    )
    keys, calls = many_keys(6), []
    blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for grad_checkpoint in (False, True):
        blocks.zero_grad()
        calls.clear()
        x = randn(6, 4, 8, dtype=torch.float32, grad=True)
        y = common.run_blocks(blocks, x, keys, grad_checkpoint)
        y.square().sum().backward()
        assert len(calls) == (2 if grad_checkpoint else 1)
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in blocks.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    calls.clear()
    with torch.no_grad():
        assert (
            torch.equal(common.run_blocks(blocks, x, keys, True), results[0][0]) and len(calls) == 1
        )


def slow_patchify(clip, patch):
    B, T, C, H, W = clip.shape
    pt, ph, pw = patch
    return torch.stack(
        [
            torch.stack(
                [
                    clip[b, t + i, c, h + j, w + k]
                    for i, j, k, c in itertools.product(range(pt), range(ph), range(pw), range(C))
                ]
            )
            for b in range(B)
            for t, h, w in itertools.product(range(0, T, pt), range(0, H, ph), range(0, W, pw))
        ]
    ).view(B, -1, pt * ph * pw * C)


@pytest.mark.parametrize("patch, channels", [((2, 2, 3), 3), ((1, 2, 3), 3), ((4, 4, 9), 1)])
def test_patchify(patch, channels):
    """Against loops in (t, h, w), (p_t, p_h, p_w, c) order on a grid of three different sizes; unpatchify undoes it."""
    clip = (torch.arange(2 * 4 * channels * 4 * 9) % 251).to(torch.uint8).view(2, 4, channels, 4, 9)
    patches = common.patchify(clip, patch)
    assert patches.dtype == torch.uint8 and torch.equal(patches, slow_patchify(clip, patch))
    grid = (4 // patch[0], 4 // patch[1], 9 // patch[2])
    back = common.unpatchify(patches, patch, grid, channels)
    assert back.dtype == torch.uint8 and torch.equal(back, clip)


def test_patches_times_linear_is_a_convolution():
    """patchify + linear with conv_to_linear's weight = Conv3d with stride = kernel, non-square; and back again."""
    patch, clip = (2, 3, 4), randn(2, 4, 3, 6, 12)
    conv = nn.Conv3d(3, 7, patch, patch).double()
    weight = common.conv_to_linear(conv.weight)
    expected = conv(clip.transpose(1, 2)).flatten(2).transpose(1, 2)  # [B, N, D], N in (t, h, w)
    close(F.linear(common.patchify(clip, patch), weight, conv.bias), expected)
    assert torch.equal(common.linear_to_conv(weight, patch), conv.weight)
    gray = randn(5, 1, 2, 3, 4)
    assert torch.equal(common.linear_to_conv(common.conv_to_linear(gray), patch, channels=1), gray)


def test_gather_tokens():
    """Against a loop, for [B, N], [B, N, D], [B, N, H, d] and a table [1, N, D] that all clips share."""
    index = common.permutation(many_keys(3), "g", 6)[:, :4]
    for x in (
        randn(3, 6),
        randn(3, 6, 5),
        randn(3, 6, 2, 2),
        randn(1, 6, 5),
        torch.arange(18).view(3, 6),
    ):
        picked = common.gather_tokens(x, index)
        assert picked.shape == (3, 4, *x.shape[2:]) and picked.dtype == x.dtype
        for b, k in itertools.product(range(3), range(4)):
            assert torch.equal(picked[b, k], x[b % len(x), index[b, k]])


def test_gather_tokens_gradient_of_a_shared_table():
    """A shared row's gradient is the number of times it was picked."""
    table, index = randn(1, 4, 2, grad=True), torch.tensor([[0, 1], [0, 3], [0, 1]])
    common.gather_tokens(table, index).sum().backward()
    assert table.grad[0, :, 0].tolist() == [3, 2, 0, 1]


def test_sinusoid_table():
    """table[p, j] = p / 10000^(2 (j // 2) / D), sin of it at even j, cos at odd j; fewer positions are a prefix."""
    table = common.sinusoid_table(1568, 6)
    assert table.shape == (1568, 6) and table.dtype == torch.float32
    for p, j in itertools.product((0, 1, 2, 777, 1567), range(6)):
        angle = p / 10000 ** (2 * (j // 2) / 6)
        assert table[p, j].item() == pytest.approx(
            math.cos(angle) if j % 2 else math.sin(angle), abs=1e-7
        )
    assert torch.equal(common.sinusoid_table(196, 6), table[:196])


def test_random_split():
    """Disjoint, ascending, of the sizes asked for; each token equally often in each part, and pairs too."""
    parts = common.random_split(many_keys(6000, "split"), 10, 4, 3, 3)
    assert [p.shape for p in parts] == [(6000, 4), (6000, 3), (6000, 3)]
    assert torch.equal(torch.cat(parts, 1).sort(1).values, torch.arange(10).expand(6000, 10))
    for part in parts:
        assert (part.diff(dim=1) > 0).all()
        expected = 6000 * part.shape[1] / 10
        assert (part.flatten().bincount(minlength=10) - expected).abs().max() < 4 * math.sqrt(
            expected
        )
    together = ((parts[0] == 0).any(1) & (parts[0] == 1).any(1)).sum().item()
    assert abs(together - 6000 * 4 * 3 / 90) < 4 * math.sqrt(800)
    assert [p.shape[1] for p in common.random_split(many_keys(2), 10, 2, 0)] == [
        2,
        0,
    ]  # not all are used


def test_tube_split():
    """The same places in every time step; int(ratio * places) of them masked (0.9 of 196: 176); all tokens once."""
    visible, masked = common.tube_split(many_keys(5), 8, 196, 0.9)
    assert visible.shape == (5, 8 * 20) and masked.shape == (5, 8 * 176)
    assert torch.equal(
        torch.cat([visible, masked], 1).sort(1).values, torch.arange(8 * 196).expand(5, -1)
    )
    for part in (visible, masked):
        places = part.view(5, 8, -1)
        assert torch.equal(places, places[:, :1] + 196 * torch.arange(8)[:, None])
    assert len({tuple(row) for row in visible.tolist()}) == 5
    counts = (
        common.tube_split(many_keys(4000, "tube"), 1, 9, 0.5)[1].flatten().bincount(minlength=9)
    )
    assert (counts - 4000 * 4 / 9).abs().max() < 4 * math.sqrt(4000 * 4 / 9)


def test_init_linear():
    """Xavier's bound sqrt(6 / (in + out)) is kept and nearly reached, biases are zero, norms are left alone."""
    model = nn.Sequential(
        nn.Linear(300, 100), nn.LayerNorm(100), nn.Linear(100, 5, bias=False)
    ).apply(common.init_linear)
    bound = math.sqrt(6 / 400)
    assert 0.99 * bound < model[0].weight.abs().max() <= bound and not model[0].bias.any()
    assert (model[1].weight == 1).all()


# ---- Optimisation ----------------------------------------------------------------------------------------------------


def test_cosine_by_hand():
    lr = [common.cosine(step, total=10, warmup=2, peak=1.0, floor=0.2) for step in range(11)]
    assert lr[:3] == [0.0, 0.5, 1.0]
    assert lr[4] == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert lr[6] == pytest.approx(0.6) and lr[10] == pytest.approx(0.2)
    assert lr[2:] == sorted(lr[2:], reverse=True)
    assert common.cosine(0, 10, 0, 3.0) == 3.0 and common.cosine(10, 10, 0, 3.0) == pytest.approx(0)
    assert common.cosine(1, 10, 2.5, 1.0) == pytest.approx(0.4)  # warm-up of a fraction of an epoch


class Named(nn.Module):
    """A model of bare parameters: {name: shape}."""

    def __init__(self, shapes, frozen=()):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(
                name, nn.Parameter(torch.ones(shape), requires_grad=name not in frozen)
            )


def groups_by_name(model, *args):
    """{parameter name: (weight decay, lr scale)}; each trainable parameter must be in one group, once."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = common.param_groups(model, *args)
    grouped = [
        (names[id(p)], (g["weight_decay"], g["lr_scale"])) for g in groups for p in g["params"]
    ]
    assert sorted(n for n, _ in grouped) == sorted(
        n for n, p in model.named_parameters() if p.requires_grad
    )
    return dict(grouped)


def test_param_groups_by_hand():
    """No decay on vectors, scalars and [1, 1, D] tokens; layer decay 0.5 over two blocks; frozen ones left out."""
    shapes = {
        "cls": (1, 1, 4),
        "embed": (4, 6),
        "block0": (4, 4),
        "bias0": (4,),
        "block1": (4, 4),
        "head": (3, 4),
    }
    shapes |= {"scale": (), "frozen": (4, 4)}
    layer = {"cls": 0, "embed": 0, "block0": 1, "bias0": 1, "block1": 2, "head": 3, "scale": 3}
    model = Named(shapes, frozen=["frozen"])
    flat = {
        "cls": 0.0,
        "embed": 0.1,
        "block0": 0.1,
        "bias0": 0.0,
        "block1": 0.1,
        "head": 0.1,
        "scale": 0.0,
    }
    assert groups_by_name(model, 0.1) == {name: (decay, 1.0) for name, decay in flat.items()}
    assert groups_by_name(model, 0.1, 0.5, layer.get, 2) == {
        "cls": (0.0, 0.125),
        "embed": (0.1, 0.125),
        "block0": (0.1, 0.25),
        "bias0": (0.0, 0.25),
        "block1": (0.1, 0.5),
        "head": (0.1, 1.0),
        "scale": (0.0, 1.0),
    }


class Trainer:
    """A parameter, fused AdamW and the loss scaler, stepped as the scripts do."""

    def __init__(self, ctx=CPU):
        self.weight = nn.Parameter(randn(5, dtype=torch.float32))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, weight_decay=0.1, fused=True)
        self.scaler = common.loss_scaler(ctx)

    def step(self, *gradient):
        self.optimizer.zero_grad()
        self.scaler.scale((self.weight * torch.tensor(gradient)).sum()).backward()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self

    def state(self):
        return [
            self.weight.detach().clone(),
            *(v.clone() for v in self.optimizer.state[self.weight].values()),
        ]


GOOD, OTHER = (1.0, -2.0, 3.0, 0.0, 1e-3), (0.3, 0.1, -7.0, 2.0, 1.0)
BAD = [
    (1.0, math.inf, 0.0, 0.0, 0.0),
    (math.nan, 1.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, -math.inf),
]


@pytest.mark.parametrize("ctx", [CPU, FP16], ids=["fp32", "fp16"])
def test_non_finite_update_is_skipped(ctx):
    """Parameters, both moments and the step count stay as they are; the next update is what it would have been."""
    clean, trainer = Trainer(ctx), Trainer(ctx)
    start = trainer.weight.detach().clone()
    trainer.step(*BAD[0])
    assert torch.equal(trainer.weight, start) and not any(v.any() for v in trainer.state()[1:])
    for step, good in enumerate((GOOD, OTHER), 1):
        clean.step(*good)
        trainer.step(*good)
        for bad in BAD:
            trainer.step(*bad)
            assert math.log2(trainer.scaler.get_scale()).is_integer()
        assert all(torch.equal(a, b) for a, b in zip(clean.state(), trainer.state(), strict=True))
        assert trainer.optimizer.state[trainer.weight]["step"] == step


def test_many_skipped_updates_leave_the_scale_usable():
    """A finite update after 200 skipped ones is the clean one: the scale has not shrunk away."""
    trainer = Trainer()
    for _ in range(200):
        trainer.step(*BAD[1])
    trainer.step(*GOOD)
    assert torch.equal(trainer.weight, Trainer().step(*GOOD).weight)


def test_scale_changes_only_in_fp16():
    trainer = Trainer()
    for _ in range(3):
        trainer.step(*GOOD)
    assert trainer.scaler.get_scale() == 1.0
    assert Trainer(FP16).scaler.get_scale() == 2.0**16
    assert Trainer(FP16).step(*BAD[0]).scaler.get_scale() == 2.0**15


# ---- Processes -------------------------------------------------------------------------------------------------------


def test_context_of_one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ctx = common.launch("bf16")
    assert (ctx.rank, ctx.world, ctx.precision) == (0, 1, "bf16")
    if not torch.cuda.is_available():
        assert common.launch().precision == "fp32" and ctx.device.type == "cpu"
    values, model = torch.ones(2), nn.Linear(2, 2)
    total = ctx.sum(values)
    total += 1
    assert values.tolist() == [1, 1] and ctx.gather([3]) == [[3]] and ctx.wrap(model) is model
    assert ctx.any(1) is True and ctx.any(False) is False
    with CPU.autocast():
        assert model(values).dtype == torch.float32
    with common.Context(0, 1, torch.device("cpu"), "bf16").autocast(), ctx.sync(model, last=False):
        assert model(values).dtype == torch.bfloat16


# ---- Command line ----------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    recipe: str = opt("toy", "which")
    frames: int = opt(16, "how many")
    lr: float = opt(1e-3, "peak, 100 % of it")
    mask_ratio: float = opt(0.5, "share")
    model: str = opt("vit_s", "size", choices=["vit_s", "vit_b"])
    flip: bool = opt(True, "mirror")
    compile: bool | None = opt(None, "by default where it pays")
    input: tuple = opt((), "files")


RECIPES = {"toy": {"lr": 0.1, "flip": False}, "full": {"model": "vit_b"}}


def parse(*words):
    return common.parse(Settings, RECIPES, list(words))


def test_parse_defaults_recipe_then_flags():
    """A flag beats the recipe, the recipe beats the class, in any order on the line."""
    assert parse() == Settings(lr=0.1, flip=False)
    assert parse("--recipe", "full") == Settings("full", model="vit_b")
    assert parse("--lr", "3", "--recipe", "toy", "--flip") == Settings(lr=3.0, flip=True)
    assert parse("--recipe=full", "--model=vit_s") == Settings("full", model="vit_s")
    assert isinstance(parse("--lr", "3").lr, float)


def test_parse_booleans_and_tuples():
    assert [parse(*w).flip for w in ((), ("--flip",), ("--no-flip",))] == [False, True, False]
    assert [parse(*w).compile for w in ((), ("--compile",), ("--no-compile",))] == [
        None,
        True,
        False,
    ]
    assert parse("--input", "a.mp4", "b c.mp4", "--frames", "8").input == ("a.mp4", "b c.mp4")
    assert parse().input == ()


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["--mask-ration", "0.5"],
            ["--mask-ration", "did you mean", "--mask-ratio", "--frames", "--no-flip"],
        ),
        (["--mask_ratio=0.5"], ["--mask_ratio", "did you mean --mask-ratio"]),
        (["--frame", "8"], ["--frame", "--frames"]),  # no abbreviations
        (["--zzz"], ["--zzz", "--frames", "--lr"]),
        (["--recipe", "big"], ["--recipe", "big", "toy", "full"]),
        (["--model", "vit_x"], ["--model", "vit_x", "vit_s", "vit_b"]),
        (["--frames", "eight"], ["--frames", "int", "eight"]),
        (["--frames", "8.5"], ["--frames", "int", "8.5"]),
        (["--lr", "fast"], ["--lr", "float", "fast"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["stray"], ["stray"]),
    ],
)
def test_parse_refuses(words, expected, capsys):
    """Status 2 and an error that names the flag and the choices; near misses are suggested."""
    with pytest.raises(SystemExit) as error:
        parse(*words)
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.startswith("error:")
    assert all(word in message for word in expected), message
    if "did you mean" in message:  # is read first where it stands last
        assert "did you mean" in message.splitlines()[-1]


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--help")
    out = capsys.readouterr().out
    assert error.value.code == 0 and "100 % of it" in out and "common.py: each piece" in out
    assert all("--" + name.replace("_", "-") in out for name in Settings.__dataclass_fields__)


def test_user_error_is_one_line_and_status_1(cli):
    code, out, err = cli("-c", "import common; raise common.UserError('no such thing')")
    assert (code, out, err) == (1, "", "error: no such thing\n")


def sizes(batch, micro, world, pairs=False):
    return common.micro_batches(
        SimpleNamespace(batch_size=batch, micro_batch=micro, mixup=float(pairs)),
        SimpleNamespace(world=world),
    )


def test_micro_batches():
    assert sizes(16, 0, 1) == (16, 1) and sizes(16, 0, 4) == (4, 1)
    assert (
        sizes(16, 4, 1) == (4, 4)
        and sizes(16, 2, 4) == (2, 2)
        and sizes(16, 2, 4, pairs=True) == (2, 2)
    )
    assert sizes(12, 3, 2) == (3, 2)


@pytest.mark.parametrize(
    "batch, micro, world", [(16, 0, 3), (16, 3, 1), (16, 8, 4), (2, 0, 4), (0, 1, 1), (16, -4, 1)]
)
def test_micro_batches_must_divide(batch, micro, world):
    with pytest.raises(UserError, match=f"--batch-size {batch} .* {world} ranks x --micro-batch"):
        sizes(batch, micro, world)


def test_micro_batches_hold_whole_pairs():
    for args in ((12, 3, 2), (15, 0, 1)):
        with pytest.raises(UserError, match="must be even"):
            sizes(*args, pairs=True)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


def crash(*args):
    raise Crash


def test_save_atomic_replaces(tmp_path):
    path = tmp_path / "last.pt"
    for step in (1, 2):
        common.save_atomic(path, {"step": step, "w": torch.ones(3)})
        assert common.load_checkpoint(path)["step"] == step
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def crash_in_write(patch):
    def save(state, file):
        file.write(b"half a file" * 1000)
        raise Crash

    patch.setattr(torch, "save", save)


@pytest.mark.parametrize(
    "inject",
    [
        crash_in_write,
        lambda p: p.setattr(os, "fsync", crash),
        lambda p: p.setattr(os, "replace", crash),
    ],
    ids=["in the write", "before the sync", "between sync and rename"],
)
def test_crash_while_saving_keeps_the_old_file(tmp_path, inject):
    """The old checkpoint is whole, and what the crash left behind does not disturb the next save."""
    path = tmp_path / "last.pt"
    common.save_atomic(path, {"step": 1, "w": torch.zeros(100)})
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        inject(patch)
        common.save_atomic(path, {"step": 2})
    assert path.read_bytes() == before and common.load_checkpoint(path)["step"] == 1
    common.save_atomic(path, {"step": 3})
    assert common.load_checkpoint(path)["step"] == 3 and len(list(tmp_path.iterdir())) == 1


def test_bytes_are_synced_before_the_rename(tmp_path, monkeypatch):
    """At fsync the temporary file already has all its bytes; the rename comes after it."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    common.save_atomic(tmp_path / "x.pt", {"w": torch.randn(1000)})
    assert events[:2] == [(tmp_path / "x.pt").stat().st_size, "rename"]


def saved(path, state, **options):
    torch.save(state, path, **options)
    return path.read_bytes()


def broken_files(folder):
    whole = saved(folder / "whole.pt", {"w": torch.randn(50)})
    foreign = pickle.dumps({"a": [1, 2.0, "x"], "b": (None, {"c": 3})}, protocol=2)
    yield from (
        ("empty", b""),
        ("one byte", whole[:1]),
        ("half", whole[: len(whole) // 2]),
        ("tail lost", whole[:-5]),
    )
    yield from (("tail only", whole[100:]), ("text", b"<!DOCTYPE html><html>404: Not Found</html>"))
    yield from (
        ("zeros", bytes(999)),
        ("a pickle", foreign),
        ("half a pickle", foreign[:20]),
        ("opcodes", b"(cos\nx\nR"),
    )
    yield from ((f"byte {i}", bytes([i])) for i in range(256))
    yield from (
        (f"pickle without byte {i}", foreign[:i] + foreign[i + 1 :]) for i in range(len(foreign))
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_unreadable_checkpoints(tmp_path):
    """Missing, empty, cut, garbage: one line that names the file, whatever torch.load makes of it."""
    path = tmp_path / "bad.pt"
    with pytest.raises(UserError, match=f"{path}: no such checkpoint"):
        common.load_checkpoint(path)
    for name, content in broken_files(tmp_path):
        path.write_bytes(content)
        print(name)
        with pytest.raises(UserError, match=str(path)) as error:
            common.load_checkpoint(path)
        assert len(str(error.value).splitlines()) == 1


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, how, path):
        self.call = {
            "system": (os.system, (f"touch '{path}'",)),
            "exec": (exec, (f"open({str(path)!r}, 'w')",)),
        }[how]

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("how", ["system", "exec"])
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle", "inside a Namespace"])
def test_malicious_checkpoint_is_refused(tmp_path, how, layout):
    """The message names the function that the file would call and doesn't advise to load it anyway; nothing has run."""
    made, path = tmp_path / "made", tmp_path / "evil.pt"
    evil = {"model": {"w": torch.ones(1)}, "x": Evil(how, made)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps(Evil(how, made), protocol=2))
    elif layout == "legacy":
        torch.save(evil, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(
            {"args": argparse.Namespace(**evil)} if layout == "inside a Namespace" else evil, path
        )
    with pytest.raises(UserError, match=f"{how}.*nothing in it was run") as error:
        common.load_checkpoint(path)
    assert not made.exists()
    assert "weights_only" not in str(error.value) and len(str(error.value)) < 300
    if layout == "zip":  # the payload works where it is let
        torch.load(path, weights_only=False)
        assert made.exists()


def test_checkpoint_with_a_namespace_is_accepted(tmp_path):
    """VideoMAE's and AVION's files carry one; the permission ends with the call."""
    state = {
        "model": {"w": torch.arange(3)},
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)),
        "epoch": 7,
    }
    saved(tmp_path / "a.pt", state)
    loaded = common.load_checkpoint(tmp_path / "a.pt")
    assert loaded["args"] == state["args"] and torch.equal(
        loaded["model"]["w"], state["model"]["w"]
    )
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_load_weights():
    """Loads by name, counts what was loaded, left and not used, with an example of each."""
    model = Named({"a": (2, 3), "b": (4,), "c": (1,)})
    weights = {
        "a": torch.full((2, 3), 5.0).half(),
        "b": torch.full((4,), 6.0),
        "x": torch.zeros(1),
        "y": torch.zeros(1),
    }
    text = common.load_weights(model, weights, "file.pt")
    assert text == "file.pt: loaded 2 (a ...), left at init 1 (c ...), not used 2 (x ...)"
    assert (
        (model.a == 5).all()
        and (model.b == 6).all()
        and (model.c == 1).all()
        and model.a.dtype == torch.float32
    )
    assert (
        common.load_weights(model, model.state_dict(), "f")
        == "f: loaded 3 (a ...), left at init 0, not used 0"
    )


def test_load_weights_refuses():
    """A shape that differs is named with the tensor and the file, and nothing is loaded; so is a file with no match."""
    model = Named({"a": (2,), "b": (4,)})
    with pytest.raises(UserError, match=r"file.pt: b is \(5,\), the model's is \(4,\)"):
        common.load_weights(model, {"a": torch.zeros(2), "b": torch.zeros(5)}, "file.pt")
    assert (model.a == 1).all()
    with pytest.raises(UserError, match="file.pt: no weight of this model.*z"):
        common.load_weights(model, {"z": torch.zeros(2)}, "file.pt")
    with pytest.raises(UserError, match="file.pt"):
        common.load_weights(model, {}, "file.pt")


# ---- A run -----------------------------------------------------------------------------------------------------------


@dataclass
class RunConfig:
    recipe: str = opt("toy", "which")
    out: str = opt("", "folder", free=True)
    resume: str = opt("auto", "from", free=True)
    overwrite: bool = opt(False, "anew", free=True)
    lr: float = opt(0.1, "rate")
    batch_size: int = opt(4, "clips")
    betas: tuple = opt((0.9, 0.95), "moments")
    workers: int = opt(2, "processes", free=True)
    tensorboard: bool = opt(False, "also there", free=True)
    save_minutes: float = opt(10.0, "minutes", free=True)
    max_skipped: int = opt(3, "updates", free=True)


@pytest.fixture
def start(tmp_path):
    """start(**settings): a Run in the test's folder. Signal handlers are put back at the end."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield lambda ctx=CPU, **settings: common.Run(
        RunConfig(**{"out": str(tmp_path / "run"), **settings}), ctx
    )
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def at(step):
    """A checkpoint's state as far as Run looks into it."""
    return {"at": {"step": step}, "w": torch.full((2,), float(step))}


def steps_logged(run):
    return [record.get("step") for record in run.records()]


def first_run(start, steps=4, saved_at=2, **settings):
    """A run that logged every step, saved one checkpoint, and is gone."""
    run = start(**settings)
    assert run.resume() is None
    for step in range(1, steps + 1):
        run.log({"value": step / 2}, step, 10)
        if step == saved_at:
            run.save(at(step), "best.pt", "last.pt")
    return run


def test_new_run_describes_itself(start):
    run = first_run(start)
    head, *rest = run.records()
    assert head["config"]["lr"] == 0.1 and head["ranks"] == 1 and head["argv"] == sys.argv
    assert head["versions"]["torch"] == torch.__version__ and head["device"]
    assert [r["value"] for r in rest] == [0.5, 1.0, 1.5, 2.0] and all(
        r["seconds"] >= 0 for r in rest
    )


def test_default_folder(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(out=common.settled(common.RunConfig(), "script").out)
    assert (tmp_path / "runs/script-toy/log.jsonl").exists()


def test_same_config_continues(start):
    """The state comes back; records after its step, and a last line cut by a kill, are dropped from the log."""
    run = first_run(start, steps=4, saved_at=2)
    with open(run.folder / "log.jsonl", "a") as file:
        file.write('{"step": 5, "val')
    assert steps_logged(run) == [None, 1, 2, 3, 4]
    run = start()
    state = run.resume()
    assert torch.equal(state["w"], at(2)["w"])
    assert steps_logged(run) == [None, 1, 2] and run.logged_step == 2
    assert (run.folder / "log.jsonl").read_text().endswith("}\n")
    run.log({"value": 9}, 3, 10)
    assert steps_logged(run) == [None, 1, 2, 3]
    names = [".lock", "best.pt", "last.pt", "log.jsonl"]
    assert sorted(p.name for p in run.folder.iterdir()) == names


def test_seconds_go_on_where_they_were(start):
    run = start()
    run.resume()
    run.started -= 5000
    run.save(at(1), "last.pt")
    run = start()
    run.resume()
    run.log({}, 2, 10)
    assert 5000 <= [*run.records()][-1]["seconds"] < 5600


def test_killed_before_the_first_checkpoint(start):
    """The same command starts at step 0 with a fresh log, also where a setting is a tuple, which JSON has not."""
    first_run(start, saved_at=None)
    run = start()
    assert run.resume() is None and steps_logged(run) == [None]


def test_another_run_in_the_folder_is_refused(start):
    """A field that is not free stops with its name and both values, and nothing is touched; free ones may differ."""
    run = first_run(start)
    before = {p.name: p.read_bytes() for p in run.folder.iterdir()}
    with pytest.raises(
        UserError, match=r"--lr 0.1 -> 0.2, --batch-size 4 -> 8\).*--init .*last.pt.*--overwrite"
    ):
        start(lr=0.2, batch_size=8, workers=0).resume()
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == before
    run = start(workers=0, save_minutes=1.0)
    assert run.resume()["at"]["step"] == 2 and next(run.records())["config"]["workers"] == 0


def test_another_run_without_checkpoint_is_refused(start):
    first_run(start, saved_at=None)
    with pytest.raises(UserError, match="--lr 0.1 -> 0.2"):
        start(lr=0.2).resume()


def test_a_run_that_failed_before_its_first_step_leaves_its_folder_to_another(start):
    assert start().resume() is None
    run = start(lr=0.2)
    assert run.resume() is None and next(run.records())["config"]["lr"] == 0.2
    (run.folder / "best.pt").touch()  # of a run whose last.pt was deleted
    with pytest.raises(UserError, match="--lr 0.2 -> 0.1"):
        start().resume()


HOLD = """
import fcntl, sys
lock = open(sys.argv[1] + "/.lock", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_in_a_folder(start):
    """The second is told, and leaves everything as it is; once the first was killed, its place is free."""
    run = first_run(start)
    run.lock.close()
    before = {p.name: p.read_bytes() for p in run.folder.iterdir()}
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"--out {run.folder}: another process trains there"):
        start()
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == before
    first.kill()
    first.wait()
    assert start().resume()["at"]["step"] == 2


def test_overwrite_starts_anew(start):
    first_run(start)
    run = start(lr=0.2, overwrite=True)
    assert run.resume() is None and steps_logged(run) == [None]
    assert sorted(p.name for p in run.folder.iterdir()) == [".lock", "log.jsonl"]


def test_overwrite_does_not_look_at_broken_files(start):
    run = first_run(start)
    (run.folder / "last.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="last.pt"):
        start().resume()
    assert start(overwrite=True).resume() is None


def test_best_is_not_lost_with_last(start):
    """Whoever deletes last.pt to save space starts anew, and keeps best.pt until a new best is written."""
    run = first_run(start)
    (run.folder / "last.pt").unlink()
    assert start().resume() is None and (run.folder / "best.pt").exists()


def test_resume_from_another_place(start, tmp_path):
    """--resume takes a checkpoint of the same settings; a file that is no run's checkpoint is a one-line error."""
    first_run(start)
    source = str(tmp_path / "run/last.pt")
    assert start(out=str(tmp_path / "second"), resume=source).resume()["at"]["step"] == 2
    with pytest.raises(UserError, match="--lr"):
        start(out=str(tmp_path / "third"), resume=source, lr=0.5).resume()
    with pytest.raises(UserError, match="no such checkpoint"):
        start(out=str(tmp_path / "fourth"), resume=str(tmp_path / "none.pt")).resume()
    saved(tmp_path / "videomae.pt", {"model": {"w": torch.ones(1)}})
    with pytest.raises(UserError, match="videomae.pt"):
        start(out=str(tmp_path / "fourth"), resume=str(tmp_path / "videomae.pt")).resume()


def test_resume_from_another_place_again(start, tmp_path):
    """The same command again goes on from its own last.pt, not from the old start; and never over a third run."""
    source = str(first_run(start).folder / "last.pt")
    run = start(out=str(tmp_path / "second"), resume=source)
    run.resume()
    run.save(at(5), "last.pt")
    assert start(out=str(tmp_path / "second"), resume=source).resume()["at"]["step"] == 5
    first_run(start, out=str(tmp_path / "third"), lr=0.5)
    with pytest.raises(UserError, match="--lr 0.5 -> 0.1"):
        start(out=str(tmp_path / "third"), resume=source).resume()


def test_unwritable_folder(start, tmp_path):
    """A folder below a file can't be made, whoever asks (root may write anywhere else)."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*file/run: can't write there"):
        start(out=str(tmp_path / "file/run"))


def test_full_disk_keeps_the_checkpoint_before(start, monkeypatch):
    run = first_run(start)

    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UserError, match="last.pt: can't write it .No space left.*the one before is kept"
    ):
        run.save(at(3), "last.pt")
    monkeypatch.undo()
    assert common.load_checkpoint(run.folder / "last.pt")["at"]["step"] == 2


def interrupt(run, number):
    assert signal.getsignal(number) == run._stop  # else the tests themselves would end here
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_between_two_steps(start, number, capsys):
    """The first signal only asks: a save is due, then leave() ends with 128 + number. A second Ctrl-C would kill."""
    run = start()
    assert not run.save_due()
    run.leave(3)
    interrupt(run, number)
    assert run.stopped == number
    assert (signal.getsignal(number) == signal.SIG_DFL) == (number == signal.SIGINT)
    assert run.save_due()
    with pytest.raises(SystemExit) as error:
        run.leave(3)
    assert error.value.code == 128 + number
    assert "stopped at step 3; the same command continues" in capsys.readouterr().out
    run.cfg = replace(run.cfg, overwrite=True)
    with pytest.raises(SystemExit):
        run.leave(3)
    assert "the same command without --overwrite continues" in capsys.readouterr().out


def test_signal_after_save_due_waits_for_the_next_step(start):
    """A signal that comes once save_due() has said no must not end the run: nothing was saved."""
    run = start()
    assert not run.save_due()
    interrupt(run, signal.SIGTERM)
    run.leave(3)
    assert run.save_due()
    with pytest.raises(SystemExit):
        run.leave(4)


def test_save_is_due_after_minutes(start):
    run = start(save_minutes=5.0)
    assert not run.save_due()
    run.saved -= 301
    assert run.save_due()
    run.save(at(1), "last.pt")
    assert not run.save_due()


def test_log_line(start, monkeypatch, capsys):
    """Speed, share of waiting and time left over the interval; three days left are shown as 72 hours."""
    run, now = start(), 1000.0
    run.started = run.logged = now
    monkeypatch.setattr(common.time, "time", lambda: now)
    run.wait(25)
    now += 100
    run.log({"loss": 0.123456, "lr": 1e-4}, 10, 10 + 25920)  # 100 s for 10 steps of 4 clips
    record = [*run.records()][-1]
    assert record == {
        "step": 10,
        "seconds": 100.0,
        "loss": 0.123456,
        "lr": 1e-4,
        "clips_per_second": 0.4,
        "data_wait": 0.25,
    }
    out = capsys.readouterr().out
    assert "step 10/25930" in out and "loss 0.1235" in out and "72:00:00" in out


def test_log_says_once_that_the_loader_is_too_slow(start, monkeypatch, capsys):
    """Waiting for 4 of 40 s is no more than a tenth, and neither is a long wait while loader processes start."""
    run, now = start(), 1000.0
    run.logged = now
    monkeypatch.setattr(common.time, "time", lambda: now)

    def interval(step, *waits):
        nonlocal now
        for wait in waits:
            run.wait(wait)
        now += 40
        run.log({"loss": 1.0}, step, 100)
        return capsys.readouterr().out

    assert "data.py chunk" not in interval(10, 30, 0.9)  # 0.9 of the other 10 s
    assert "data.py chunk" not in interval(20, 1, 1, 1, 1)
    lines = interval(30, *[1] * 6).splitlines()
    assert lines[0].startswith("step 30/100") and len(lines) == 2
    for words in (
        "more than a tenth",
        "--workers",
        "--repeated",
        "data.py chunk",
        "--stages",
        "--speed",
    ):
        assert words in lines[1]
    assert len(interval(40, *[1] * 20).splitlines()) == 1


def test_tensorboard(start, monkeypatch):
    """Where it is missing --tensorboard is refused in a line; else it gets the log's numbers at their step."""
    with monkeypatch.context() as patch, pytest.raises(UserError, match="pip install tensorboard"):
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        start(tensorboard=True)
    scalars = []
    writer = SimpleNamespace(add_scalar=lambda *args: scalars.append(args))
    monkeypatch.setattr(common, "tensorboard_writer", lambda folder: writer)
    start(tensorboard=True).log({"value": 0.5}, 3, 10)
    assert ("value", 0.5, 3) in scalars


def test_guard_counts_and_stops(start, capsys):
    """Counts skipped updates and names clips; stops above --max-skipped; fp16's overflowing gradients don't count."""
    run = start()
    assert run.guard([], 0, 0, 1.0) == 0 and capsys.readouterr().out == ""
    assert run.guard(["a.mp4"], 1, 0, 1.0) == 1 and "a.mp4" in capsys.readouterr().out
    assert run.guard([], 2, 1, 1.0) == 2
    with pytest.raises(UserError, match="--max-skipped 3"):
        run.guard(["a.mp4"], 1, 3, 1.0)
    assert start(FP16).guard([], 100, 0, 65536.0) == 0
    with pytest.raises(UserError):  # no scale is small enough: this is no overflow
        start(FP16).guard([], 100, 0, 0.5)
    with pytest.raises(UserError):
        start(FP16).guard(["a.mp4"], 4, 0, 65536.0)


def fill(meter):
    """Two steps: clips 10, 11, 12 with a NaN loss at 11, and 13, 14 with an infinite second value at 14."""
    meter.add(
        torch.tensor([10, 11, 12]),
        torch.tensor([1.0, math.nan, 3.0]),
        torch.tensor([5.0, 6.0, 7.0]),
    )
    meter.step(torch.tensor(math.inf))
    meter.add(torch.tensor([13, 14]), torch.tensor([4.0, 9.0]), torch.tensor([9.0, math.inf]))
    meter.step(torch.tensor(0.5))


def test_meter():
    """Means over finite clips only, the others by index, skipped steps, the last gradient norm; then empty again."""
    meter = common.Meter(torch.device("cpu"), "loss", "ce")
    fill(meter)
    means, clips, steps = meter.read(CPU)
    assert means == {"loss": pytest.approx(8 / 3), "ce": 7.0, "grad_norm": 0.5}
    assert clips == [11, 14] and steps == 1
    meter.add(torch.tensor([1]), torch.tensor([2.0]), torch.tensor([3.0]))
    meter.step(torch.tensor(1.0))
    assert meter.read(CPU) == ({"loss": 2.0, "ce": 3.0, "grad_norm": 1.0}, [], 0)


def test_meter_of_nothing_finite():
    """A loss of 0 would read as a perfect one."""
    meter = common.Meter(torch.device("cpu"), "loss")
    meter.add(torch.tensor([1]), torch.tensor([math.nan]))
    meter.step(torch.tensor(math.nan))
    means, clips, steps = meter.read(CPU)
    assert means["loss"] is None or math.isnan(means["loss"])
    assert clips == [1] and steps == 1


def test_meter_state_round_trip():
    """Sums taken over into a new meter give the means of an interval that was never cut; only rank 0 takes them."""
    whole, first, second = (common.Meter(torch.device("cpu"), "loss", "ce") for _ in range(3))
    fill(whole), fill(first)
    second.load(first.state(CPU), CPU)
    for meter in (whole, second):
        meter.add(torch.tensor([1]), torch.tensor([0.1]), torch.tensor([0.2]))
        meter.step(torch.tensor(1.0))
    assert whole.read(CPU)[0] == second.read(CPU)[0]
    other = common.Meter(torch.device("cpu"), "loss", "ce")
    other.load(first.state(CPU), common.Context(1, 2, torch.device("cpu"), "fp32"))
    assert not other.sums.any()


def test_meter_keeps_no_graph():
    meter, x = common.Meter(torch.device("cpu"), "loss"), randn(3, grad=True)
    meter.add(torch.arange(3), x * 2)
    assert not meter.sums.requires_grad


def test_healthy():
    """fp32: the latest gradient; fp16: the latest loss, for there an overflowing gradient is routine."""
    meter = common.Meter(torch.device("cpu"), "loss")
    assert meter.healthy(CPU) and meter.healthy(FP16)
    for loss, norm, fp32, fp16 in (
        (1.0, math.inf, False, True),
        (math.nan, math.nan, False, False),
        (1.0, 1.0, True, True),
    ):
        meter.add(torch.tensor([0]), torch.tensor([loss]))
        meter.step(torch.tensor(norm))
        assert (meter.healthy(CPU), meter.healthy(FP16)) == (fp32, fp16)


def test_healthy_sees_every_micro_batch():
    """In fp16 too: a NaN loss in the first of two micro-batches makes the step unhealthy, until the next step."""
    meter = common.Meter(torch.device("cpu"), "loss")
    meter.add(torch.tensor([0]), torch.tensor([math.nan]))
    meter.add(torch.tensor([1]), torch.tensor([1.0]))
    meter.step(torch.tensor(math.nan))
    assert not meter.healthy(FP16)
    meter.add(torch.tensor([2]), torch.tensor([1.0]))
    meter.step(torch.tensor(1.0))
    assert meter.healthy(FP16)


def test_log_is_strict_json(start):
    """A run that meets NaN or infinity writes a log that parsers other than Python's can read."""
    run = start()
    run.resume()
    run.log({"value": math.nan, "grad_norm": math.inf}, 1, 10)
    for line in (run.folder / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


class Joins(TorchDispatchMode):
    """Notes the sizes of all tensors that are put together from others."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.stack):
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_projection_to_qkv(frozen):
    """Values and gradients are those of one linear layer, cut in three; none of the size of its output is put together
    in backward, where only the weight's gradient is."""
    B, N, D, H = 2, 50, 8, 2
    ours = randomize(common.Attention(D, H))
    ours.qkv.weight.requires_grad_(not frozen)
    x = randn(B, N, D, grad=True)
    parameters = [p for p in (ours.qkv.weight, ours.q_bias, ours.v_bias) if p.requires_grad]
    weights = [randn(B, N, H, D // H, seed=seed) for seed in (1, 2, 3)]
    total = lambda parts: sum(
        (part * weight).sum() for part, weight in zip(parts, weights, strict=True)
    )

    bias = torch.cat([ours.q_bias, torch.zeros(D, dtype=torch.float64), ours.v_bias])
    expected = F.linear(x, ours.qkv.weight, bias).reshape(B, N, 3, H, D // H).unbind(2)
    gradients = torch.autograd.grad(total(expected), [x, *parameters])
    found = ours.project(x)
    loss = total(found)
    with Joins() as joins:
        got = torch.autograd.grad(loss, [x, *parameters])
    for a, b in zip([*found, *got], [*expected, *gradients], strict=True):
        close(a, b)
    assert joins.sizes == ([] if frozen else [3 * D * D])


def test_gradients_of_biases_are_sums_in_float32():
    """Of 3 x 257 tokens in bf16, whose gradients are 1: neither 257 nor 771 is a bf16. A frozen bias has none."""
    weight = randn(7, 4, grad=True)
    for frozen in (False, True):
        bias = torch.zeros(7, requires_grad=not frozen)
        with torch.autocast("cpu", torch.bfloat16):
            (out,) = common.Project.apply(torch.randn(3, 257, 4), weight, bias)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert bias.grad is None if frozen else bias.grad.tolist() == [771.0] * 7


# ---- Counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "sdpa"])
def test_count_macs_of_a_block(kind):
    """12 N D^2 for the linear layers (qkv 3, proj 1, MLP 4 + 4) and 2 N^2 D for attention's two products."""
    B, N, D = 2, 50, 64
    with torch.device("meta"):
        block, x = Block(D, 4, kind=kind), torch.zeros(B, N, D)
    assert common.count_macs(block, x) * 1e9 == pytest.approx(B * (12 * N * D**2 + 2 * N**2 * D))


def test_count_macs_of_a_patch_embedding():
    with torch.device("meta"):
        linear, conv = nn.Linear(2 * 16 * 16 * 3, 768), nn.Conv3d(3, 768, (2, 16, 16), (2, 16, 16))
        clip = torch.zeros(1, 16, 3, 224, 224)
    macs = common.count_macs(linear, common.patchify(clip, (2, 16, 16))) * 1e9
    assert macs == pytest.approx(1568 * 1536 * 768)
    assert common.count_macs(conv, clip.transpose(1, 2)) * 1e9 == pytest.approx(macs)


def stored(kind, n, width=32, heads=2):
    return common.saved_bytes(
        Block(width, heads, kind=kind), torch.randn(1, n, width, requires_grad=True)
    )


def test_saved_bytes_of_a_block():
    """Linear in N with SDPA; plain attention adds the weights [H, N, N] in float32 (their softmax), and no less."""
    n = 64
    curve = {kind: [stored(kind, k * n) for k in (1, 2, 3)] for kind in ("sdpa", "plain")}
    bend = {kind: c - 2 * b + a for kind, (a, b, c) in curve.items()}
    assert bend["sdpa"] == 0 and bend["plain"] == 2 * 2 * n**2 * 4
    assert curve["plain"][2] > curve["sdpa"][2]


def test_saved_bytes_by_hand():
    """Two linear layers and a ReLU on [5, 8]: the input and the ReLU's output, each counted once; no parameters."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert common.saved_bytes(model, torch.randn(5, 8, requires_grad=True)) == 4 * (5 * 8 + 5 * 16)
    assert common.saved_bytes(model.requires_grad_(False), torch.randn(5, 8)) == 0
