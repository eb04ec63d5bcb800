"""Every model and mode of the four scripts, two layers deep, as one function each: a training step's losses of clips."""

from functools import partial
from typing import NamedTuple

import torch

import avion
import common
import data
import sfa_vivit
import tpt_mae
import turbo

CLASSES = 8
TWO = {"width": 64, "depth": 2, "heads": 2}
turbo.MODELS["two"] = TWO | {"decoder": "2x64"}
avion.MODELS["two"] = TWO | {"patch": 16, "text": (64, 2, 1), "tubelet": 2, "position_scale": 3.0}
tpt_mae.MODELS["two"] = TWO | {"decoder": "2x64", "patch": 8}
sfa_vivit.MODELS["two"] = TWO | {"mlp": 128, "patch": 16, "temporal": 2}


class Small(NamedTuple):
    """build(grad_checkpoint) -> model; losses(model, clips, keys) -> [B], or of a pair of encoders encode and loss_fn
    as common.cached_step has them; function: the loss that a script has compiled, by its name in `script`."""

    build: object
    losses: object
    frames: int
    script: object = None
    function: str = ""
    encode: object = None
    loss_fn: object = None


def clips_of(count, frames, size=32, first=0):
    """uint8 [B, T, C, H, W] and keys int64 [B] of the samples first ... first + count."""
    keys = common.make_key(7, torch.arange(first, first + count))  # [B]
    pixels = common.uniform(keys, "pixels", frames * 3 * size * size)  # [B, T C H W]
    return (256 * pixels).byte().reshape(count, frames, 3, size, size), keys


def targets(keys):
    return data.soft_labels(keys % CLASSES, CLASSES, 0.1)  # [B, classes]


def turbo_classes(net, clips, keys, m=0.5, r=0.25):
    logits, prediction, target = net(clips, keys, m, r)
    return turbo.turbo_loss(logits, targets(keys), prediction, target)[0]


def turbo_pairs(net, batch):
    clips, keys = batch
    words = common.uniform(keys, "words", 16)  # [B, text width]
    return turbo.encode_pairs((clips, keys, words, keys), net, 0.5, 0.25, turbo.partial_mae)


def avion_pairs(net, batch):
    clips, keys = batch
    words = (200 * common.uniform(keys, "words", 16)).long()  # [B, L]
    return dict(zip(("video", "text", "scale"), net(clips, words, keys), strict=True))


def cross_entropy(net, clips, keys):
    return -(targets(keys) * net(clips, keys).float().log_softmax(-1)).sum(-1)


def masked(net, clips, keys):
    return tpt_mae.mae_loss(*net(clips, keys, 0.75))


def two_encoders(grad_checkpoint):
    shape = {"grad_checkpoint": grad_checkpoint}
    video = avion.VideoEncoder("two", 4, 32, "clip", 0.2, 0.25, **shape)
    return avion.VideoCLIP(
        video, avion.TextEncoder("two", 300, **shape), 32, freeze_temperature=False
    )


def actions(grad_checkpoint):
    video = avion.VideoEncoder("two", 4, 32, "gelu", 0.2, grad_checkpoint=grad_checkpoint)
    return avion.VideoClassifier(video, CLASSES, 0.5)


def staged(stage, grad_checkpoint):
    net = sfa_vivit.ViViT(CLASSES, "two", stage.frames, 32, drop_path=0.2, grad_checkpoint=grad_checkpoint,
                          spatial_chunk=2, head_std=0.1)  # fmt: skip
    net.enter(stage)
    return net


def vivit(net, clips, keys):
    return sfa_vivit.vivit_loss(net(clips, keys), targets(keys), (CLASSES,))


def turbo_of(grad_checkpoint, kind=turbo.Turbo, outputs=CLASSES, recon=True):
    return kind(outputs, "two", "", 4, 32, recon, drop_path=0.2, grad_checkpoint=grad_checkpoint)


def mae_of(backbone, grad_checkpoint):
    options = {"backbone": backbone, "grad_checkpoint": grad_checkpoint}
    return tpt_mae.VideoMAE("two", frames=4, size=32, **options)


def classifier_of(backbone, grad_checkpoint):
    options = {"backbone": backbone, "grad_checkpoint": grad_checkpoint}
    return tpt_mae.Classifier(
        CLASSES, "two", frames=4, size=32, drop_path=0.2, head_dropout=0.1, **options
    )


SMALL = {
    "turbo": Small(turbo_of, turbo_classes, 4, turbo, "turbo_loss"),
    "turbo, all tokens": Small(partial(turbo_of, recon=False), partial(turbo_classes, m=0.0, r=0.0), 4),
    "turbo, text": Small(partial(turbo_of, kind=turbo.TurboText, outputs=16), None, 4, turbo, "partial_mae", turbo_pairs,
                         partial(turbo.nce_loss, temperature=0.07)),
    "avion": Small(two_encoders, None, 4, encode=avion_pairs, loss_fn=common.contrastive_loss),
    "avion, classes": Small(actions, cross_entropy, 4),
    "vivit, stage 1": Small(partial(staged, sfa_vivit.Stage(0, 4, 0, 1, (), False)), vivit, 4),
    "vivit, stage 2": Small(partial(staged, sfa_vivit.Stage(1, 8, 0, 1, ("spatial",), True)), vivit, 8),
    "vivit, frozen in time": Small(partial(staged, sfa_vivit.Stage(0, 4, 0, 1, ("temporal",), False)), vivit, 4),
}  # fmt: skip
for backbone in tpt_mae.BLOCKS:
    SMALL[f"mae, {backbone}"] = Small(partial(mae_of, backbone), masked, 4, tpt_mae, "mae_loss")
    SMALL[f"tuned, {backbone}"] = Small(partial(classifier_of, backbone), cross_entropy, 4)


def build(name, grad_checkpoint=False):
    """The model, in training, with weights that are none of them zero (an adapter's, a head's)."""
    torch.manual_seed(0)
    net = SMALL[name].build(grad_checkpoint).train()
    for number, parameter in enumerate(net.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return net


def gradient(name, ctx, model, batches, scaler):
    """Losses of this rank's clips, [B]; their mean's gradient over the global batch is left in .grad, as a script does
    it. batches: (clips, keys) of each micro-batch."""
    small = SMALL[name]
    if small.encode:
        losses, extra = common.cached_step(
            ctx, model, partial(small.encode, model), batches, small.loss_fn, scaler
        )
        return losses + extra
    parts = []
    for i, (clips, keys) in enumerate(batches):
        with ctx.sync(model, last=i == len(batches) - 1):
            with ctx.autocast():
                losses = small.losses(model, clips, keys)  # [B]
            scaler.scale(losses.sum() / (len(batches) * len(losses))).backward()
        parts.append(losses.detach())
    return torch.cat(parts)
