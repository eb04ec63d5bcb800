"""Half precision as CUDA's autocast has it: what LayerNorm gives is float32, which on the CPU it is not."""

import pytest
import torch
import torch.nn.functional as F

import avion
import common
import sfa_vivit
import tpt_mae
import turbo

TINY = "vit_toy"


@pytest.fixture
def cuda_rules(monkeypatch):
    """LayerNorm answers in float32, whatever it is given."""
    layer_norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest))


def turbo_model(**options):
    return turbo.Turbo(8, TINY, "", 8, 64, recon=True, drop_path=0.1, **options)


def avion_video():
    return avion.VideoEncoder("clip_toy", 8, 64, drop_path=0.1, patch_dropout=0.5)


def vivit(stage):
    net = sfa_vivit.ViViT(8, "vivit_toy", stage.frames, 64, drop_path=0.1)
    net.enter(stage)
    return net


def mae(backbone):
    return tpt_mae.VideoMAE(TINY, "", 8, 32, backbone=backbone)


def fine_tuned(backbone, positions="sinusoid"):
    return tpt_mae.Classifier(8, TINY, 8, 32, backbone, 0.1, 0.5, positions)


FULL = sfa_vivit.Stage(0, 8, 0, 1, (), False)
SECOND = sfa_vivit.Stage(1, 16, 0, 1, ("spatial",), True)
# A model, the frames and the side of its clips, and what its forward takes besides clips and keys.
MODELS = {
    "turbo": (turbo_model, 8, 64, (0.5, 0.25)),
    "turbo_checkpoint": (lambda: turbo_model(grad_checkpoint=True), 8, 64, (0.5, 0.25)),
    "turbo_align": (lambda: turbo.Turbo(0, TINY, "", 8, 64, text_width=32), 8, 64, (0.5, 0.25)),
    "avion_video": (avion_video, 8, 64, ()),
    "avion_classes": (lambda: avion.VideoClassifier(avion_video(), 8, 0.5), 8, 64, ()),
    "mae_joint": (lambda: mae("joint"), 8, 32, (0.75,)),
    "mae_divided": (lambda: mae("divided"), 8, 32, (0.75,)),
    "mae_trajectory": (lambda: mae("trajectory"), 8, 32, (0.75,)),
    "tuned_joint": (lambda: fine_tuned("joint"), 8, 32, ()),
    "tuned_divided": (lambda: fine_tuned("divided"), 8, 32, ()),
    "tuned_trajectory": (lambda: fine_tuned("trajectory"), 8, 32, ()),
    "tuned_learned": (lambda: fine_tuned("joint", "learned"), 8, 32, ()),
    "vivit_first": (lambda: vivit(FULL), 8, 64, ()),
    "vivit_second": (lambda: vivit(SECOND), 16, 64, ()),
}


def types_between_blocks(net, call):
    """The types of all inputs and outputs of the model's blocks in call(), and how many blocks there are and ran."""
    seen = set()
    ran = set()
    blocks = [module for module in net.modules() if isinstance(module, common.Block)]

    def note(block, inputs, output):
        seen.update((inputs[0].dtype, output.dtype))
        ran.add(block)

    for block in blocks:
        block.register_forward_hook(note)
    call()
    return seen, len(blocks), len(ran)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_add_up_in_half_precision(name, cuda_rules):
    """Positions, CLS and LayerNorm are float32: had one a say, each sum of each block would be twice as large."""
    build, frames, size, rest = MODELS[name]
    net = build()
    clips = torch.zeros(2, frames, 3, size, size, dtype=torch.uint8)
    keys = common.make_key(torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        seen, blocks, ran = types_between_blocks(net, lambda: net(clips, keys, *rest))
    assert seen == {torch.bfloat16} and ran == blocks > 0


def test_text_adds_up_in_half_precision(cuda_rules):
    """Embedded words are float32: an embedding is no product."""
    net = avion.TextEncoder("clip_toy", 300)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        seen, blocks, ran = types_between_blocks(net, lambda: net(tokens))
    assert seen == {torch.float16} and ran == blocks > 0


def test_without_autocast_nothing_is_cast():
    x = torch.randn(2, 5, 8)
    assert common.run_blocks([], x) is x
    assert common.run_blocks([], x.double()).dtype == torch.float64
