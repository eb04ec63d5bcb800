"""The contrastive step: loss and gradients of the whole global batch, at any ranks x micro-batches, by autograd."""

import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common

BATCH, WIDTH, TOKENS, FEATURES, WORDS = 8, 32, 5, 6, 7
CPU = common.Context(rank=0, world=1, device=torch.device("cpu"), precision="fp32")
IDS = torch.tensor([3, 5, 3, 9, 5, 5, 1, 2])  # clips 0 and 2 carry one text, 1, 4 and 5 another


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TwoTowers(nn.Module):
    """Blocks with drop path for the video, a linear text tower, a learned temperature, and a head for a second loss."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            common.Block(WIDTH, 2, drop_path=0.4, index=i) for i in range(2)
        )
        self.video = nn.Linear(WIDTH, FEATURES)
        self.text = nn.Linear(WORDS, FEATURES)
        self.pixels = nn.Linear(WIDTH, 3)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, clips, words, keys, recon=True):
        """-> video and text features [B, D], scale [], reconstruction error [B] or None."""
        x = common.run_blocks(self.blocks, clips, keys)  # [B, N, W]
        video, text = (
            F.normalize(self.video(x.mean(1)), dim=-1),
            F.normalize(self.text(words), dim=-1),
        )
        error = (self.pixels(x) - clips[..., :3]).square().mean((1, 2)) if recon else None
        return video, text, self.logit_scale.exp(), error


def make_model():
    torch.manual_seed(0)
    model = TwoTowers()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def make_batch():
    """clips [B, N, W], words [B, V], ids and keys [B]; clips of one id have one text."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(10, WORDS, generator=generator)[IDS]
    return (
        torch.randn(BATCH, TOKENS, WIDTH, generator=generator),
        words,
        IDS,
        common.make_key(torch.arange(BATCH), 5),
    )


def slow_loss(video, text, scale, ids):
    """A pair at a time, a negative at a time: log-sum-exp over the pair itself and all pairs of another id."""
    losses = []
    for i in range(len(video)):
        pairs = [j for j in range(len(video)) if j == i or ids[j] != ids[i]]
        to_text = [scale * (video[i] * text[j]).sum() for j in pairs]
        to_video = [scale * (video[j] * text[i]).sum() for j in pairs]
        own = scale * (video[i] * text[i]).sum()
        losses.append(
            -(own - torch.stack(to_text).logsumexp(0) + own - torch.stack(to_video).logsumexp(0))
            / 2
        )
    return torch.stack(losses)


@functools.cache
def reference():
    """(losses [B], extras [B], gradients by name) of the whole batch in one graph, without anything of the step."""
    model, (clips, words, ids, keys) = make_model(), make_batch()
    video, text, scale, error = model(clips, words, keys)
    losses = slow_loss(video, text, scale, ids) / math.log(BATCH)
    (losses.mean() + error.mean()).backward()
    return losses.detach(), error.detach(), {name: p.grad for name, p in model.named_parameters()}


def step(ctx, micro, batch=None, scaler=None, calls=None, extra=lambda error: error):
    """One cached step of `micro` micro-batches a rank: what it returns, and the gradients by name."""
    net = make_model()
    model = ctx.wrap(net)
    rank = slice(ctx.rank * BATCH // ctx.world, (ctx.rank + 1) * BATCH // ctx.world)
    parts = zip(*(x[rank].chunk(micro) for x in batch or make_batch()), strict=True)

    def encode(part):
        clips, words, ids, keys = part
        graph = torch.is_grad_enabled()
        video, text, scale, error = model(clips, words, keys, recon=graph)
        if calls is not None:
            calls.append((graph, ids.tolist(), video.detach().clone()))
        outputs = {"video": video, "text": text, "scale": scale, "ids": ids}
        if graph and extra:
            outputs["own_loss"] = extra(error)
        return outputs

    def loss_fn(video, text, scale, ids):
        assert not torch.is_autocast_enabled("cpu") and video.dtype == scale.dtype == torch.float32
        return common.contrastive_loss(video, text, scale, ids[:, None] == ids) / math.log(BATCH)

    scaler = scaler or common.loss_scaler(ctx)
    losses, errors = common.cached_step(ctx, model, encode, parts, loss_fn, scaler)
    scaler.unscale_(torch.optim.SGD(net.parameters(), lr=1.0))
    return losses, errors, {name: p.grad for name, p in net.named_parameters()}


def norm(tensors):
    return sum(t.double().square().sum() for t in tensors).sqrt().item()


def check(result, overall=1e-6, each=1e-5):
    """Losses, extras and gradients (of a whole batch, in order) are the reference's."""
    for name, value, expected in zip(
        ("losses", "extras"), result[:2], reference()[:2], strict=True
    ):
        difference = norm([value - expected]) / norm([expected])
        assert difference <= overall, (name, difference)
    gradients, expected = result[2], reference()[2]
    assert gradients.keys() == expected.keys()
    difference = {name: gradients[name] - expected[name] for name in expected}
    relative = {name: norm([difference[name]]) / norm([expected[name]]) for name in expected}
    print("gradient, overall", norm(difference.values()) / norm(expected.values()), "worst tensor",
          max(relative.values()))  # fmt: skip
    assert norm(difference.values()) <= overall * norm(expected.values())
    assert all(value <= each for value in relative.values()), relative


def test_loss_by_hand():
    """Two orthogonal pairs at scale ln 3: 3 / (3 + 1) of the weight on the right one. Then three, two of them alike."""
    eye = torch.eye(2)
    loss = common.contrastive_loss(eye, eye, math.log(3))
    torch.testing.assert_close(loss, torch.full((2,), math.log(4 / 3)))
    video, text = torch.eye(3)[[0, 1, 1]], torch.eye(3)[[0, 1, 1]]
    same = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 1]]).bool()
    alike = common.contrastive_loss(
        video, text, math.log(3), same
    )  # 3 / (1 + 3); without the mask 3 / (1 + 3 + 3)
    torch.testing.assert_close(alike, torch.tensor([3 / 5, 3 / 4, 3 / 4]).log().neg())
    plain = common.contrastive_loss(video, text, math.log(3))
    torch.testing.assert_close(plain, torch.tensor([3 / 5, 3 / 7, 3 / 7]).log().neg())


def test_both_directions_count():
    """Asymmetric similarities: half of the rows' cross-entropy, half of the columns'; features in half precision."""
    video, text = (
        F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(i)), dim=-1)
        for i in (0, 1)
    )
    expected = slow_loss(video, text, 10.0, range(4))
    torch.testing.assert_close(common.contrastive_loss(video, text, 10.0), expected)
    half = common.contrastive_loss(video.bfloat16(), text.bfloat16(), 10.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=0.1)


def test_reference_has_what_could_go_wrong():
    """Drop path drops, the duplicates matter, and every parameter has a gradient, the temperature's not a small one."""
    _, _, gradients = reference()
    assert (
        all(g is not None and g.norm() > 1e-4 for g in gradients.values())
        and gradients["logit_scale"].abs() > 0.01
    )
    model, (clips, words, ids, keys) = make_model(), make_batch()
    video, text, scale, _ = model(clips, words, keys)
    assert not torch.allclose(video, model(clips, words, None)[0], atol=1e-2)
    assert not torch.allclose(
        slow_loss(video, text, scale, ids), slow_loss(video, text, scale, range(BATCH))
    )


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_micro_batches(micro):
    """1 process: 1, 2, 4, 8 micro-batches; one needs a single pass, more need two, of which the first has no graph."""
    calls = []
    check(step(CPU, micro, calls=calls))
    passes = [graph for graph, *_ in calls]
    assert passes == ([True] if micro == 1 else [False] * micro + [True] * micro)
    if micro > 1:  # keyed draws: the second pass is the first one
        for a, b in zip(calls[:micro], calls[micro:], strict=True):
            assert a[1] == b[1] and torch.equal(a[2], b[2])


def worker(rank, world, folder):
    """A rank of a gloo group: steps of 1 and 2 micro-batches, saved."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world
    )
    ctx = common.launch("fp32")
    results = {micro: step(ctx, micro) for micro in (1, 2)}
    torch.save(results, f"{folder}/{rank}.pt")
    ctx.barrier()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world, tmp_path):
    """2 and 4 processes (DistributedDataParallel on gloo), with 1 and 2 micro-batches each: the same on every rank."""
    torch.multiprocessing.start_processes(
        worker, (world, tmp_path), nprocs=world, start_method="forkserver"
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for micro in (1, 2):
        losses, errors = (torch.cat([results[micro][i] for results in ranks]) for i in (0, 1))
        for results in ranks:
            check((losses, errors, results[micro][2]))


def test_without_extra_loss():
    """No second loss: its parameters have no gradient, extras are zeros, and the rest is the contrastive part."""
    model, (clips, words, ids, keys) = make_model(), make_batch()
    video, text, scale, _ = model(clips, words, keys)
    (slow_loss(video, text, scale, ids) / math.log(BATCH)).mean().backward()
    _, errors, gradients = step(CPU, 2, extra=None)
    assert gradients["pixels.weight"] is None and errors.tolist() == [0.0] * BATCH
    for name, parameter in model.named_parameters():
        if not name.startswith("pixels"):
            assert norm([gradients[name] - parameter.grad]) <= 1e-5 * norm([parameter.grad])


def test_loss_scale():
    """fp16's scaler: gradients come scaled, and are the reference's once unscaled."""
    check(step(CPU, 4, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)))


def test_autocast():
    """bf16: both passes give the same features, every parameter learns, 4 micro-batches do as 1, to bf16's digits."""
    ctx, calls = common.Context(0, 1, torch.device("cpu"), "bf16"), []
    one, four = step(ctx, 1), step(ctx, 4, calls=calls)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(calls[:4], calls[4:], strict=True))
    assert norm(
        a - b for a, b in zip(one[2].values(), four[2].values(), strict=True)
    ) < 0.02 * norm(one[2].values())
    assert norm(four[2][k] - g for k, g in reference()[2].items()) < 0.05 * norm(
        reference()[2].values()
    )


@pytest.mark.parametrize("micro", [1, 4])
def test_what_is_not_finite_makes_all_gradients_so(micro):
    """A clip of NaN: all losses compare with it, one extra is its own. An extra of inf: a constant, without gradient.
    Either way no tensor's gradient is finite, so that the scaler's step skips the update."""
    clips, words, ids, keys = make_batch()
    clips[7, 0, 0] = math.nan
    losses, errors, gradients = step(CPU, micro, batch=(clips, words, ids, keys))
    assert losses.isnan().all() and errors.isnan().tolist() == [i == 7 for i in range(BATCH)]
    assert not any(g.isfinite().all() for g in gradients.values())
    losses, errors, gradients = step(CPU, micro, extra=lambda error: error + math.inf)
    assert losses.isfinite().all() and errors.isinf().all()
    assert not any(g.isfinite().all() for g in gradients.values())


def test_accumulating_losses_is_another_task():
    """Why the step exists: the mean of micro-batches' own losses has fewer negatives and another gradient."""
    model, batch = make_model(), make_batch()
    for clips, words, ids, keys in zip(*(x.chunk(4) for x in batch), strict=True):
        video, text, scale, error = model(clips, words, keys)
        loss = slow_loss(video, text, scale, ids) / math.log(BATCH)
        (loss.sum() / BATCH + error.sum() / BATCH).backward()
    difference = [p.grad - reference()[2][name] for name, p in model.named_parameters()]
    assert norm(difference) > 0.1 * norm(reference()[2].values())
