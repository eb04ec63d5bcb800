"""Turbo Training with Token Dropout (Han, Xie, Zisserman, BMVC 2022), in one file.

Video is redundant, so a ViT can be trained on a random few of a clip's tokens. Each step drops the
share m of the tokens before it embeds them, does its task from the rest, and beside it
reconstructs some of those that were dropped, the share r <= m of all tokens: a partial masked
autoencoder, so that what the encoder sees must tell of what it doesn't. At m = 0.75, r = 0.25 a
step costs a quarter of the usual one; at test nothing is dropped. The tasks: action
classification, video-language training, and long video, which then fits end to end.

    paper                                   here
    Sec. 3.2, operations (1), (2), (3)      token_dropout
    Sec. 3.1, z = ViT([v_CLS, v_1 ...])     Turbo.encode
    Sec. 3.2, Partial Masked Autoencoder    partial_mae, common.Autoencoder
    the MAE target (VideoMAE's)             pixel_target
    Eq. 1                                   turbo_loss
    Eq. 2                                   nce_loss, TurboText
    Sec. 3.2, 4.2, language model, frozen   data.encode_sentences (--task encode_text)
    Sec. 4.1, 16 frames at 5 fps            sample_clip
    Sec. 4.2, clip and sentence             sample_pair, Pairs
    Sec. 4.3, first and last 20 %           sample_clip (--sampling span)
    Sec. 4.3, ten samplings at test         over_views (--test-clips)
    Sec. 5.2, R@1 on HTM-Align              recall_at_1, evaluate_alignment
    Sec. 4.2, 5.1.1, start from VideoMAE    init_weights (--init videomae.pth)
    Tables 2, 5, start from HTM-AA          init_weights (--init runs/turbo-htm_aa/last.pt)
    Table 1 left, GFLOPs; Figure 2          TABLE_1, count_gmacs, saved_megabytes (--plan)
    Table 1 right, m at inference           evaluate (--eval-mask-ratios)
    Table 6                                 Config (defaults), RECIPES

    row of the paper                flags
    Table 1 left, 0 (no MAE)        --recipe ucf101 --init videomae.pth --mask-ratio 0
                                    --recon-ratio 0
    Table 1 left, 75, 25; Figure 3  --recipe ucf101 --init videomae.pth --mask-ratio 0.75
                                    --recon-ratio 0.25
    Table 1 right, of that run      --recipe ucf101 --task eval --eval-mask-ratios 0.75,0.5,0
    Table 2, from VideoMAE, UCF101  --recipe ucf101 --init videomae.pth
    Table 2, from HTM-AA, HMDB51    --recipe hmdb51 --init vl.pt
    Table 3, no masking             --recipe htm_aa --init videomae.pth --mask-ratio 0
                                    --recon-ratio 0
    Table 3, 50, 50                 --recipe htm_aa --init videomae.pth --mask-ratio 0.5
                                    --recon-ratio 0.5
    Table 3, 75, 25; Table 4, ours  --recipe htm_aa --init videomae.pth
    Table 5 A, Breakfast            --recipe breakfast --init videomae.pth
    Table 5 B, Breakfast            --recipe breakfast --init vl.pt --frames 16 --mask-ratio 0.5
                                    --recon-ratio 0.5
    Table 5 C, COIN                 --recipe coin --init vl.pt
    Table 5 D, COIN                 --recipe coin --init vl.pt --frames 64 --mask-ratio 0.875
                                    --recon-ratio 0.125
    Figure 2, 75, 25                --recipe ucf101 --mask-ratio 0.75 --recon-ratio 0.25 --plan

Beside them each row has its lists and an --out of its own; Table 1 right that of the run it tests.
videomae.pth is VideoMAE's ViT-B, pretrained on Kinetics-400; vl.pt is last.pt of Table 4's run.
Figure 3 and Table 3 are curves: they come from the runs' log.jsonl.
Faithful: m, r, losses and their weights, encoder, optimiser, schedule, sampling, as the paper
states them.
DECISIONS where the paper is silent or contradicts itself, tagged in the code where they are made:
    decoder     Table 6 states 8 layers x 512. Table 1's GFLOPs come out only with VideoMAE-B's own
                4 x 384 (0.12 %; 8 x 512 misses by up to 117 %, and at m = 0.5 would save hardly
                any memory). Default: 4 x 384; --decoder 8x512.
    mask        per-token random. VideoMAE's tubes would round to other numbers of tokens: Table 1's
                last rows would be 1-2 % off.
    CLS         VideoMAE has none. Here: learned, without the position that Sec. 3.1 adds to it (it
                can learn one), not shown to the decoder (Sec. 3.2 counts N_i + N_r). All tokens
                attend to it; with cls_token emptied, [1, 0, D], encode and decode are VideoMAE's.
    target      normalised per patch and channel, as VideoMAE; the toy recipes predict raw pixels
                (--target).
    embedding   dropped patches are not embedded. The paper's GFLOPs embed all of them: --plan
                shows both.
    lr          "base learning rate 1e-3" is read as VideoMAE's rule, lr = base * batch / 256, at
                the paper's batches.
    positions   32 and 64 frames continue the 1-D table of 16, which numbers the tokens: nothing is
                interpolated.
    short       a video shorter than 16 frames at 5 fps is spread over, not padded; one of under 16
                frames is refused.
    RandAug     "(9, 0.5)" is read as timm's rand-m9-mstd0.5-inc1: two operations, each with
                probability 0.5. Crops and flips are VideoMAE's; its random erasing and layer-wise
                rates are not in Table 6, and not here.
    mixed       mixup and cutmix: what is reconstructed is the mixed clip, as the encoder sees no
                other.
    split       UCF101 and HMDB51: the first. Breakfast: three of the usual four folds of its
                people train.
    views       Sec. 4.1 names no test views: one clip and crop. VideoMAE's: --test-clips 5
                --test-crops 3.
    repeat      repeated sampling: one decode gives 4 clips, each with its own frames, crop and, in
                video-language training, sentence: four different ones where the video has them, as
                in TAN. "Batch size of 16 videos" (Sec. 4.3) is read as 16 x 4 clips; an epoch has
                each video once. Batch sizes count clips; Table 3's, "at most 32 [...] depending on
                different masking ratios" (Sec. 4.2), are 32 in each of its rows.
    cosine      Eq. 2 is written with bare products. Here: unit vectors and temperature 0.07, as in
                the authors' TAN.
    MLP         "2-layer MLP": width -> width -> 256 with GELU, for video and for text.
    sentence    the language model's first output token, as Sec. 3.2 says; the model is
                microsoft/mpnet-base.
    same        pairs with the same sentence are not each other's negatives.
    when        a sentence of HTM-AA has one time: its 3.2 s clip begins in the 3.2 s before that,
                as in TAN.
Missing of the paper's tables: the rows of other methods (Tables 2, 4, 5).
--init takes over the encoder, by name, and decoder and heads where they are of the same size; it
says what it left. Data and weights, from their authors: UCF101 (crcv.ucf.edu/data/UCF101.php),
HMDB51 and Breakfast (serre-lab.clps.brown.edu), COIN (coin-dataset.github.io), HTM-AA and HTM-Align
(robots.ox.ac.uk/~htd/tan), VideoMAE (github.com/MCG-NJU/VideoMAE). `python data.py list` makes the
lists.

    python turbo.py                     # toy videos, made on first use: 2 CPU cores, some minutes
    python turbo.py --recipe toy_vl     # video-language; --recipe toy_long: 32 frames of long video
    torchrun --nproc_per_node=8 turbo.py --recipe ucf101 --init videomae.pth \\
        --train-list train.csv --val-list val.csv

Part I is video alone, and complete without Part II, video and language (Sec. 4.2); the plan, the
weights and the tasks, after them, serve both. The method is token_dropout, turbo_loss and
Turbo.autoencode; the loop that calls them is main's.
Shapes: B clips, V views (clips of a video), T frames, C colours, N tokens, K visible and R
reconstructed ones (the paper's N_i, N_r), D width, D' the decoder's, P numbers of a patch, E width
of the joint space of video and text, W of a sentence's features, S sentences.
"""

import math
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

# Idle threads sleep: on the CPU the loader needs their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
from common import (
    Autoencoder,
    Block,
    Decoder,
    UserError,
    gather_tokens,
    opt,
    parse,
    patchify,
    permutation,
    uniform,
)
from data import pixel_target

# Width, depth and heads of the encoder; layers x width of its decoder, in heads of 64: VideoMAE's,
# but that its files of ViT-L have 12 layers (--decoder 12x512).
MODELS = {
    "vit_toy": {"width": 128, "depth": 4, "heads": 2, "decoder": "2x64"},
    # tpt_mae.py's toy, so that its weights can be started from (--recipe toy_tpt)
    "vit_toy4": {"width": 128, "depth": 4, "heads": 2, "decoder": "2x64", "patch": (2, 4, 4)},
    "vit_s": {"width": 384, "depth": 12, "heads": 6, "decoder": "4x192"},
    "vit_b": {"width": 768, "depth": 12, "heads": 12, "decoder": "4x384"},  # DECISION (decoder)
    "vit_l": {"width": 1024, "depth": 24, "heads": 16, "decoder": "4x512"},
}

# A recipe replaces defaults of Config, which are Table 6's column "Act. Classification" on UCF101.
UNREGULARISED = {
    "drop_path": 0.0, "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "rand_augment": 0.0,
    "flip": False,
}  # fmt: skip
TOY = UNREGULARISED | {  # no flips: to move left is another class than to move right
    "train_list": "toy/actions/train.csv", "val_list": "toy/actions/val.csv",
    "data_root": "toy/actions", "train_clips": 1600, "num_classes": 8, "model": "vit_toy",
    "size": 64, "recon_ratio": 0.25,
    # A small model has minutes: it would not learn the normalised target, nor, from positions as
    # small as VideoMAE's, the order of what happens.
    "target": "pixels", "position_scale": 5.0,
    "epochs": 15, "warmup_epochs": 1.0, "eval_every": 2.5, "lr": 1e-3, "clip_grad": 1.0,
    "crop": "centre", "workers": 2, "log_every": 50, "gpus": 1,
}  # fmt: skip
LONG = {
    "sampling": "span", "test_clips": 10, "frames": 32, "mask_ratio": 0.75, "recon_ratio": 0.25,
    "batch_size": 64, "repeated": 4,  # DECISION (repeat); Table 5 C
    "lr": 3e-4 * 64 / 256,  # DECISION (lr)
}  # fmt: skip
RECIPES = {
    "toy": TOY,
    # From the weights of tpt_mae.py's toy, in its sizes
    "toy_tpt": TOY | {
        "model": "vit_toy4", "size": 32, "frames": 8, "fps": 2.5, "epochs": 12, "eval_every": 4.0,
    },
    "toy_vl": TOY | {
        "train_list": "toy/narrated/train.jsonl", "val_list": "toy/narrated/val.jsonl",
        "data_root": "toy/narrated/videos", "train_clips": 240, "num_classes": 0,
        "objective": "align", "text_model": "hashing", "frames": 8, "fps": 3.0, "eval_fps": 3.0,
        "batch_size": 64, "repeated": 4, "epochs": 60, "warmup_epochs": 4.0, "eval_every": 20.0,
    },
    "toy_long": TOY | {
        "train_list": "toy/long/train.csv", "val_list": "toy/long/val.csv", "data_root": "toy/long",
        "train_clips": 480, "sampling": "span", "frames": 32, "mask_ratio": 0.75, "test_clips": 3,
        "epochs": 50, "warmup_epochs": 2.0, "eval_every": 10.0,
    },
    "ucf101": {"train_clips": 9537, "num_classes": 101},  # DECISION (split)
    "hmdb51": {"train_clips": 3570, "num_classes": 51},  # DECISION (split)
    "htm_aa": UNREGULARISED | {  # Table 6, "V-L Training"; Table 4
        "objective": "align", "train_clips": 250_000, "mask_ratio": 0.75, "recon_ratio": 0.25,
        "batch_size": 32, "repeated": 4,  # DECISION (repeat)
        "epochs": 5, "warmup_epochs": 0.5, "lr": 1e-4 * 32 / 256,  # DECISION (lr)
        "crop": "multi-scale", "eval_fps": 16.0, "eval_every": 0.1, "save_minutes": 30.0,
        "gpus": 1, "gpu_gb": ("24", "48", "80"),  # the paper's is one A40 of 48 GB (Sec. 5.2)
    },
    "breakfast": LONG | {"train_clips": 1284, "num_classes": 10},  # DECISION (split): of 1,712
    "coin": LONG | {"train_clips": 9030, "num_classes": 180, "epochs": 50, "warmup_epochs": 5.0},
}  # fmt: skip
# What starts from VideoMAE's weights: from these or, in rows of Tables 2 and 5, from htm_aa's.
FROM_VIDEOMAE = ("ucf101", "hmdb51", "htm_aa", "breakfast", "coin")


@dataclass
class Config(common.RunConfig):
    task: str = opt(
        "train",
        "what to do with it",
        ["train", "eval", "predict", "features", "encode_text"],
        free=True,
    )
    train_list: str = opt(
        "", "training videos: `path label` or `path,label` a line; or captions", free=True
    )
    init: str = opt(
        "", "weights to start from: ours, VideoMAE's .pth or hub folder; `random`: none"
    )

    model: str = opt("vit_b", "encoder size", list(MODELS))
    decoder: str = opt("", "layers x width of the decoder, such as 8x512; empty: the model's own")
    frames: int = opt(16, "frames a clip (Sec. 4.1)")
    fps: float = opt(5.0, "frames a second of a clip (Sec. 4.1)", within="(0, inf)")
    size: int = opt(224, "height and width of a clip, in pixels (Sec. 4.1)")
    objective: str = opt(
        "classify", "classify: Eq. 1; align: video and text, Eq. 2", ["classify", "align"]
    )
    sampling: str = opt(
        "clip", "clip: at --fps; span: --frames over the whole video (Sec. 4.3)", ["clip", "span"]
    )
    repeated: int = opt(
        1,
        "clips of a video in a batch, from one decode (Table 6: repeated sampling)",
        within="[1, inf)",
    )
    test_clips: int = opt(  # DECISION (views)
        1, "clips of a video at test, averaged as probabilities (Sec. 4.3: 10)", within="[1, inf)"
    )
    test_crops: int = opt(1, "crops of each of them, along the long side (1 or 3)")
    mask_ratio: float = opt(
        0.5, "m, the share of tokens dropped in training (Sec. 3.2)", within="[0, 1)"
    )
    recon_ratio: float = opt(
        0.5, "r <= m, the share of tokens reconstructed; 0: no decoder (Sec. 3.2)"
    )
    eval_mask_ratios: str = opt(
        "0", "m at test; of a classifier also several: 0,0.5,0.9 (Table 1 right)"
    )
    target: str = opt(  # DECISION (target)
        "normalized", "what is predicted of a patch", ["normalized", "pixels"]
    )
    position_scale: float = opt(1.0, "factor of the encoder's sin-cos positions (1: VideoMAE's)")

    text_model: str = opt(
        "microsoft/mpnet-base", "language model: a hub name or folder; hashing: of words (Sec. 4.2)"
    )
    text_features: str = opt(
        "", "folder of the sentences' features (--task encode_text); empty: run folder", free=True
    )
    temperature: float = opt(  # DECISION (cosine)
        0.07, "divides the products of Eq. 2", within="(0, inf)"
    )
    eval_fps: float = opt(
        0.0, "frames a second of a clip that R@1 is counted on (Sec. 5.2: 16); 0: --fps"
    )

    epochs: int = opt(100, "passes over the training list (Table 6)", within="[1, inf)")
    batch_size: int = opt(16, "clips per optimizer step over all ranks (Figure 3)")
    lr: float = opt(1e-3 * 16 / 256, "peak learning rate, at this batch")  # DECISION (lr)
    min_lr: float = opt(1e-6, "learning rate at the end of the cosine (VideoMAE)")
    warmup_epochs: float = opt(10.0, "epochs of linear warm-up (Table 6)")
    weight_decay: float = opt(0.05, "AdamW's weight decay (Table 6)")
    clip_grad: float = opt(0.0, "largest gradient norm; 0: not clipped (VideoMAE)")
    drop_path: float = opt(
        0.1, "stochastic depth of the last block, rising linearly (Table 6)", within="[0, 1)"
    )
    label_smoothing: float = opt(
        0.1, "share of a label spread over all classes (Table 6)", within="[0, 1)"
    )
    mixup: float = opt(0.8, "Beta parameter of mixup; 0: off (Table 6)")
    cutmix: float = opt(1.0, "Beta parameter of cutmix; 0: off (Table 6)")
    rand_augment: float = opt(  # DECISION (RandAug)
        9.0, "magnitude of RandAugment; 0: off (Table 6)", within="[0, 10]"
    )
    crop: str = opt(
        "resized",
        "random crop in training (VideoMAE; Table 6)",
        ["resized", "multi-scale", "centre"],
    )
    flip: bool = opt(True, "random left-right flips in training (VideoMAE)")
    eval_every: float = opt(
        1.0, "epochs between evaluations; the last step is always evaluated", within="(0, inf)"
    )

    @property
    def eval_ratios(self):
        """The mask ratios at test."""
        return [float(m) for m in self.eval_mask_ratios.split(",")]


# ---- Part I: video -------------------------------------------------------------------------------
# A clip's N tokens in a training step, here with m = 0.75 and r = 0.25. A draw of its own for each
# clip and epoch deals them out into three sets (Sec. 3.2):
#
#         v . r . . v . r . . v . r . r v        N tokens, in no order of time or place
#
#     v   visible,        N (1 - m)    embedded and encoded
#     r   reconstructed,  N r          the decoder predicts their pixels
#     .   ignored,        N (m - r)    not embedded, not predicted, in no loss
#
#         v v v v  -> encoder -> CLS      -> classifier               -> CE    of Eq. 1
#                             -> v v v v  -> decoder with r r r r     -> PMAE
#
# Those that are not visible, r and . together, are the dropped ones, N m. r = m reconstructs all of
# them: a masked autoencoder. At m = 0 all are visible.
#
# No step needs a generator's state. Each clip comes with a key, an int64 that stands for seed,
# epoch, video and view, and all that is drawn for the clip (frames, crop, augmentation, tokens,
# drop path) is hashed from it (common.py, 3): a draw can be made again, anywhere, and is the same.
# What mixup and cutmix draw is one for all clips of a step, and keyed by seed and step.


def token_counts(n, m, r):
    """Of n tokens, how many are visible and how many reconstructed: n (1 - m) and n r, rounded
    down; r = m reconstructs the whole rest."""
    visible = int(round(n * (1 - m), 6))  # round: 100 * (1 - 0.9) is 9.999...98 in floating point
    if r == m:
        return visible, n - visible
    return visible, int(round(n * r, 6))


def token_dropout(keys, n, m, r):
    """Which of n tokens a clip shows its encoder, and which it reconstructs (Sec. 3.2, operations
    1-3).

    keys int64 [B]; m the mask ratio, r <= m the reconstruction ratio. Returns indices (visible [B,
    K], reconstructed [B, R]), int64, ascending, disjoint; the remaining n (m - r) tokens take no
    part in this step. Per-token random.
    """
    if not 0 <= r <= m < 1:
        raise ValueError(f"token dropout needs 0 <= r <= m < 1, not m = {m}, r = {r}")
    return common.random_split(keys, n, *token_counts(n, m, r))  # DECISION (mask): no tubes


def partial_mae(prediction, target):
    """L_PMAE of each clip: the mean squared error over its reconstructed tokens; 0 if there are
    none.

    prediction, target: [B, R, P] -> [B].
    """
    if target.shape[1] == 0:
        return target.new_zeros(len(target))  # [B]
    return (prediction.float() - target).square().mean((1, 2))  # [B]


def turbo_loss(logits, labels, prediction, target):
    """Eq. 1, a clip at a time: L = lambda_CE CE + PMAE, lambda_CE = 1 / ln(classes). -> L, CE,
    PMAE [B].

    1 / ln(classes) makes a uniform guess cost 1, what predicting the mean of a normalised patch
    costs the other loss. logits [B, classes]; labels soft, [B, classes]; prediction and target [B,
    R, P].
    """
    ce = F.cross_entropy(logits.float(), labels, reduction="none")  # [B]
    pmae = partial_mae(prediction, target)  # [B]
    return ce / math.log(logits.shape[1]) + pmae, ce, pmae


def training_box(info, key, crop):
    """The crop of a training clip, (x, y, w, h) in pixels: "resized", "multi-scale" or "centre"."""
    if crop == "centre":
        return data.centre_box(info)
    if crop == "multi-scale":
        return data.multi_scale_box(info, key)
    return data.random_resized_box(info, key)


def sample_clip(video, index, view, key, frames, fps, sampling, crop, test_views=None):
    """(frames, box) to read of an open `video`: data.ClipDataset's `plan`.

    sampling: "clip", so many frames at `fps` (Sec. 4.1); "span", over the whole video (Sec. 4.3).
    test_views: None in training, where start and crop are random; at test (clips, crops) of a
    video, of which this is number `view`, crops fastest. Test clips are evenly spaced; of "span"
    they are drawn (Sec. 4.3), and anew for each crop. A single one is in the middle.
    """
    start = uniform(key, "start").item()  # of "clip"
    ends = uniform(key, "span", 2).tolist()  # of "span"
    if test_views is None:
        box = training_box(video.info, key, crop)
    else:
        clips, crops = test_views
        number, place = divmod(view, crops)
        box = data.crop_box(video.info, place, crops)
        if clips > 1:
            start = number / (clips - 1)
        else:
            start = 0.5
            ends = (0.5, 0.5)
    if sampling == "span":
        return data.span_frames(video, frames, ends), box
    return data.fps_frames(video, frames, fps, start), box  # DECISION (short): spread, not padded


def augment(clips, keys, rand_augment, flip):
    """Table 6's augmentation on the device: uint8 [B, T, C, H, W] -> the same; keys [B], on the
    CPU."""
    if rand_augment:
        # DECISION (RandAug): two operations
        clips = data.rand_augment(clips, keys, rand_augment, layers=2)  # [B, T, C, H, W]
    if flip:
        clips = data.flip(clips, keys)  # [B, T, C, H, W]
    return clips


# ---- The model -----------------------------------------------------------------------------------


class Turbo(Autoencoder):
    """ViT encoder on the visible tokens, classifier on its CLS, light decoder on visible +
    reconstructed tokens (Fig. 1; `decode`, VideoMAE's).

    Module names follow VideoMAE's checkpoints. Methods marked `common.region` are compiled on CUDA,
    one by one; so are the blocks. num_classes goes to `add_head`, which TurboText replaces.
    """

    patch = (2, 16, 16)  # frames, height, width of a token (App. A); the toy's may be smaller

    def __init__(
        self,
        num_classes,
        model="vit_b",
        decoder="",
        frames=16,
        size=224,
        recon=True,
        target="normalized",
        drop_path=0.1,
        attention="auto",
        grad_checkpoint=False,
        position_scale=1.0,
    ):
        super().__init__()
        spec = MODELS[model]
        depth = spec["depth"]
        self.width = spec["width"]
        self.target = target
        self.grad_checkpoint = grad_checkpoint
        self.patch = spec.get("patch", self.patch)
        p_t, p_h, p_w = self.patch
        self.grid = (frames // p_t, size // p_h, size // p_w)  # tokens in (t, h, w)
        self.num_tokens = math.prod(self.grid)
        pixels = 3 * p_t * p_h * p_w
        # The same as VideoMAE's Conv3d (common.conv_to_linear).
        self.patch_embed = nn.Linear(pixels, self.width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, self.width))  # DECISION (CLS)
        self.blocks = nn.ModuleList(
            Block(
                self.width,
                spec["heads"],
                drop_path=drop_path * i / (depth - 1),
                kind=attention,
                index=i,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.add_head(num_classes)
        table = common.sinusoid_table(self.num_tokens, self.width)[None]  # [1, N, D]
        positions = position_scale * table  # [1, N, D]  # DECISION (positions)
        self.register_buffer("positions", positions, persistent=False)
        if recon:
            layers, width = map(int, (decoder or spec["decoder"]).split("x"))
            self.encoder_to_decoder = nn.Linear(self.width, width, bias=False)
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.decoder = Decoder(layers, width, max(1, width // 64), pixels, attention)
            table = common.sinusoid_table(self.num_tokens, width)[None]  # [1, N, D']
            self.register_buffer("decoder_positions", table, persistent=False)
        # encoder_to_decoder too, at twice VideoMAE's spread: --init replaces it, and the toy, which
        # starts from nothing, ends at 98 % with this and at 91 % with VideoMAE's.
        self.apply(common.init_linear)
        # PyTorch's default, as VideoMAE's convolution: positions must stand out.
        self.patch_embed.reset_parameters()
        self.init_head()

    def add_head(self, num_classes):
        self.head = nn.Linear(self.width, num_classes)  # App. A: CLS into one linear layer
        self.feature_width = self.width

    def init_head(self):
        nn.init.normal_(self.head.weight, std=0.01)

    @common.region
    def split(self, clips, keys, m, r):
        """0-255 clips as patches [B, N, P]; which are visible [B, K] and reconstructed [B, R]; the
        target [B, R, P]."""
        patches = patchify(clips, self.patch)  # [B, N, P]
        visible, recon = token_dropout(keys, self.num_tokens, m, r)
        target = pixel_target(gather_tokens(patches, recon), self.target)  # [B, R, P]
        return patches, visible, recon, target

    @common.region
    def embed(self, patches, visible):
        """CLS and the visible ones of 0-255 patches [B, N, P] as tokens [B, 1 + K, D]."""
        x = gather_tokens(patches, visible)  # [B, K, P]  # DECISION (embedding): gather first
        x = data.normalize(x, data.IMAGENET_MEAN, data.IMAGENET_STD)  # [B, K, P]
        x = self.patch_embed(x)  # [B, K, D]
        x = x + gather_tokens(self.positions.to(x.dtype), visible)  # [B, K, D]
        cls = self.cls_token.expand(len(x), -1, -1).to(x.dtype)  # [B, 1, D]
        return torch.cat([cls, x], dim=1)  # [B, 1 + K, D]

    def encode(self, patches, visible, keys=None):
        """Final-layer tokens [B, 1 + K, D], CLS first, of the visible ones of 0-255 patches [B, N,
        P].

        visible: [B, K]. keys turns on drop path.
        """
        x = self.embed(patches, visible)  # [B, 1 + K, D]
        x = common.run_blocks(self.blocks, x, keys, self.grad_checkpoint)  # [B, 1 + K, D]
        return self.norm(x)  # [B, 1 + K, D]

    def autoencode(self, clips, keys, m, r):
        """The method (Fig. 1): 0-255 clips [B, T, C, H, W], keys int64 [B] -> CLS [B, D],
        prediction and target [B, R, P]. At r = 0, R is 0 and nothing is decoded; which tokens are
        visible does not depend on r."""
        patches, visible, recon, target = self.split(clips, keys, m, r)
        tokens = self.encode(patches, visible, keys if self.training else None)  # [B, 1 + K, D]
        if target.shape[1] == 0:
            return tokens[:, 0], target, target
        return tokens[:, 0], self.decode(tokens[:, 1:], visible, recon), target

    def forward(self, clips, keys, m, r):
        """-> logits [B, classes], prediction and target [B, R, P]; see `autoencode`."""
        cls, prediction, target = self.autoencode(clips, keys, m, r)
        return self.head(cls), prediction, target

    def features(self, clips, keys, m):
        """CLS of clips, [B, D]."""
        return self.autoencode(clips, keys, m, 0.0)[0]

    def probabilities(self, clips, keys, m):
        """Of the classes: float32 [B, classes]."""
        return self.head(self.features(clips, keys, m)).float().softmax(-1)


# ---- Evaluation and pictures ---------------------------------------------------------------------


@torch.no_grad()
def over_views(call, batch, m, views):
    """The mean over a video's test views of call(clips, keys, m), [V B, D] -> float32 [B, D]."""
    outputs = call(batch.clips, batch.keys.to(batch.clips.device), m)  # [V B, D], view by view
    return outputs.float().unflatten(0, (views, -1)).mean(0)  # [B, D]


@torch.no_grad()
def evaluate(net, batches, found, views, mask_ratios, m, r, draw=None):
    """Add to `found`, a common.Evaluation, top-1 and top-k in % (k = 5, or all classes if fewer) at
    each of `mask_ratios`, in one pass: `top1` at the first, `top1@0.5` at a further one; a video's
    probabilities are the mean over its views. Where r > 0, also PMAE of its first view, at m and r
    as in training.

    net: in eval mode. batches: test clips, see data.test_batches. views: their number a video.
    draw(net, clips, keys), once: of the first ones.
    """
    for batch in batches:
        for i, ratio in enumerate(mask_ratios):
            shares = over_views(net.probabilities, batch, ratio, views)  # [B, classes]
            found.add_hits(shares, batch.labels[: len(shares)], f"@{ratio:g}" if i else "")
        clips = batch.clips[: len(shares)]  # [B, T, C, H, W]: the first view of each video
        keys = batch.keys[: len(shares)].to(clips.device)  # [B]
        if r > 0:
            _, prediction, target = net(clips, keys, m, r)
            found.add("mae", partial_mae(prediction, target))
        if draw:
            draw(net, clips[:4], keys[:4])
            draw = None


@torch.no_grad()
def write_recon(model, clips, keys, m, fps, path):
    """Write path.png and path_animated.png: what the encoder saw of clips at mask ratio m, and
    every dropped patch reconstructed, more than it was trained on at a time where r < m
    (data.write_reconstruction)."""
    patches, visible, masked, _ = model.split(clips, keys, m, m)  # [B, N, P], [B, K], [B, N - K]
    tokens = model.encode(patches, visible)  # [B, 1 + K, D]
    prediction = model.decode(tokens[:, 1:], visible, masked)  # [B, N - K, P]
    data.write_reconstruction(
        path, patches, visible, masked, prediction, model.target, model.patch, model.grid, fps
    )


# ---- Part II: video and language -----------------------------------------------------------------
# Sec. 4.2: narrated videos, a frozen language model, and in place of the cross entropy of Eq. 1
# that of Eq. 2: L = lambda_NCE L_NCE + PMAE. L_NCE asks of each clip which sentence of the batch it
# shows, and of each sentence which clip. What is different from Part I, in the order of a step:
#
#     loader     draws each clip a sentence of its video, by the key of the video's first clip, and
#                reads frames at its time
#     trainer    draws the sentences AGAIN, by the same keys: clips come without words
#     model      clip -> z_v; the sentence's features -> z_t: unit vectors of one space
#     loss       compares all clips of the step with all its sentences, those of the other GPUs and
#                micro-batches too. So it is no sum over micro-batches, and `common.cached_step`
#                takes its gradient in two passes: all z of the batch without a graph, L and dL/dz;
#                then each micro-batch again with one, where dL/dz goes on to the weights. PMAE is
#                a clip's own, and decoded in the second pass only. Both passes drop the same
#                tokens, by their keys. A single micro-batch needs one pass only.


class Pairs:
    """Captions as training takes them: an entry is a video, and each clip of it shows a sentence
    of it. features: of all sentences, float16 [sentences, W], mapped, not read."""

    def __init__(self, captions, features=None):
        self.captions = captions
        self.features = features
        self.text_ids = data.numbered(captions.texts)  # [sentences], equal for equal ones
        self.path = captions.path
        self.classes = []  # none
        # Numbers of the sentences video by video, and where a video's begin in them.
        self._order = np.argsort(captions.video_of, kind="stable").astype(np.int32)  # [sentences]
        edges = np.arange(len(captions.names) + 1)
        self._first = np.searchsorted(captions.video_of[self._order], edges)  # [videos + 1]
        self.labels = np.broadcast_to(np.int32(0), len(captions.names))  # none

    def __len__(self):
        return len(self.labels)

    def digest(self):
        return self.captions.digest()

    def video(self, index):
        return self.captions.video(self._order[self._first[index]])

    def sentences(self, index, key, views):
        """Which captions `views` clips of video `index` show, [views]: all different, where it has
        as many. key: the first clip's."""
        first, stop = self._first[index : index + 2].tolist()
        order = permutation(key, "sentence", stop - first).numpy()  # [sentences of the video]
        # DECISION (repeat): different ones, or from the beginning again where they are fewer
        drawn = np.resize(order, views)  # [views]
        return self._order[first + drawn]  # [views]

    def sentences_of(self, batch, views):
        """Which captions the clips of a data.Batch show, view by view as they are: [B]. What
        PairDataset.plans drew, wherever the batch was read."""
        samples = len(batch.index) // views
        drawn = []
        for index, key in zip(batch.index[:samples].tolist(), batch.keys[:samples], strict=True):
            drawn.append(self.sentences(index, key, views))
        return np.stack(drawn, axis=1).ravel()  # [B]

    def texts(self, sentences, device):
        """Features [B, W] and ids [B] of sentences, given by their numbers, on a device."""
        words = torch.from_numpy(self.features[sentences]).float()  # [B, W]
        ids = self.text_ids[sentences]  # [B]
        return data.to_device(words, device), data.to_device(ids, device)


class PairDataset(data.ClipDataset):
    """Training clips of Pairs, whose plan is sample_pair: each is told its sentence."""

    def plans(self, video, index, keys):
        drawn = self.videos.sentences(index, keys[0], len(keys))
        return [self.plan(video, sentence, key) for sentence, key in zip(drawn, keys, strict=True)]


def sample_pair(video, sentence, key, captions, frames, fps, crop):
    """(frames, box) of a training clip around the time of a sentence, by its number (Sec. 4.2)."""
    start = captions.start[sentence]
    end = captions.end[sentence]
    chosen = data.moment_frames(video, start, end, frames, fps, uniform(key, "start").item())
    return chosen, training_box(video.info, key, crop)


def nce_loss(video, text, sentence, temperature):
    """lambda_NCE L_NCE of Eq. 2, a pair at a time, [B]; lambda_NCE = 1 / ln(batch), so that a
    uniform guess costs 1.

    video, text: unit vectors [B, E] of the global batch; sentence: int64 [B], equal for equal
    sentences.
    """
    same = sentence[:, None] == sentence  # [B, B]  # DECISION (same)
    return common.contrastive_loss(video, text, 1 / temperature, same) / math.log(len(video))  # [B]


class TurboText(Turbo):
    """Turbo with two heads in place of the classifier, into one space of video and text (Sec.
    3.2, App. A)."""

    embed_dim = 256  # E

    def add_head(self, text_width):
        """text_width: W, the constructor's first argument."""
        self.video_head = self.mlp(self.width)
        self.text_head = self.mlp(text_width)
        self.feature_width = self.embed_dim

    def mlp(self, width):  # DECISION (MLP)
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.embed_dim))

    def init_head(self):
        """Nothing: its layers start as all others do."""

    def embed_video(self, cls):
        """CLS [B, D] -> unit vectors [B, E]."""
        return F.normalize(self.video_head(cls).float(), dim=-1)  # [B, E]  # DECISION (cosine)

    def embed_text(self, text):
        """Sentences' features [S, W] -> unit vectors [S, E]."""
        return F.normalize(self.text_head(text).float(), dim=-1)  # [S, E]

    def forward(self, clips, keys, m, r, text):
        """-> unit vectors of clips [B, E] and of the sentences with features `text` [B, W], [B, E];
        prediction and target [B, R, P]; see `autoencode`."""
        cls, prediction, target = self.autoencode(clips, keys, m, r)
        return self.embed_video(cls), self.embed_text(text), prediction, target

    def features(self, clips, keys, m):
        """Unit vectors of clips, [B, E]."""
        return self.embed_video(super().features(clips, keys, m))


def encode_pairs(batch, model, m, r, error_of):
    """A micro-batch for common.cached_step: what the loss of the whole batch compares, and PMAE.

    batch: clips, keys, features of their sentences, their ids. error_of: partial_mae.
    """
    clips, keys, text, ids = batch
    if not torch.is_grad_enabled():  # the first of two passes
        r = 0.0
    z_v, z_t, prediction, target = model(clips, keys, m, r, text)  # [B, E], [B, E], [B, R, P] twice
    error = error_of(prediction, target)  # [B]
    return {"video": z_v, "text": z_t, "sentence": ids, "own_loss": error}


PIECE_SECONDS = 8


class Piece(NamedTuple):
    """Up to PIECE_SECONDS of a video that one decode serves in evaluation: `first` and those after
    it."""

    path: str
    video: int  # its number among the captions' videos
    first: int
    seconds: int  # of the whole video


def pieces_of(captions, videos, failures):
    """The Pieces of videos given by their numbers; what can't be opened goes to `failures`."""
    pieces = []
    for number in videos:
        path = os.path.join(captions.root, captions.names[number])
        try:
            with data.open_video(path) as video:
                seconds = max(1, int(video.clamp(math.inf)))
        except data.VideoError as error:
            failures.new.append(str(error))
            continue
        for first in range(0, seconds, PIECE_SECONDS):
            pieces.append(Piece(path, number, first, seconds))
    return pieces


def sample_second(video, index, view, key, pieces, frames, fps):
    """(frames, box) of a clip around the middle of second `view` of a Piece (Sec. 5.2); behind the
    video's last second, of that one."""
    second = min(pieces[index].first + view, pieces[index].seconds - 1)
    return data.second_frames(video, second, frames, fps), data.centre_box(video.info)


@torch.no_grad()
def align_features(net, batches, pieces, m, draw=None):
    """{video: unit vectors [seconds, E]}, one a second (Sec. 5.2), of the videos of Pieces; NaN
    where they could not be read. batches: a Piece's PIECE_SECONDS clips as the views of a video.
    m: the share of tokens dropped. net, draw: see `evaluate`."""
    features = {}
    for piece in pieces:
        shape = piece.seconds, net.embed_dim
        features[piece.video] = torch.full(shape, math.nan)  # [seconds, E]
    for batch in batches:
        keys = batch.keys.to(batch.clips.device)  # [V B]
        vectors = net.features(batch.clips, keys, m)  # [V B, E]
        if draw:
            draw(net, batch.clips[:4], keys[:4])
            draw = None
        vectors = vectors.unflatten(0, (PIECE_SECONDS, -1)).transpose(0, 1).cpu()  # [B, V, E]
        for i, rows in zip(batch.index[: len(vectors)].tolist(), vectors, strict=True):
            _, video, first, seconds = pieces[i]
            features[video][first : first + PIECE_SECONDS] = rows[: seconds - first]  # [<= V, E]
    return features


def recall_at_1(similarity, start, end):
    """Hits of the sentences of one video, bool [S]: is the second that fits best in the sentence's
    time?

    Arrays: similarity [S, seconds]; start, end [S], in seconds. HTM-Align's rule: floor(start) <=
    argmax <= ceil(end).
    """
    best = similarity.argmax(1)  # [S]
    return (np.floor(start) <= best) & (best <= np.ceil(end))


@torch.no_grad()
def evaluate_alignment(net, features, captions, text, found):
    """Add to `found`, a common.Evaluation, R@1 in % of the sentences, in which second of their
    video they are shown, as HTM-Align counts it (Sec. 5.2); and `chance`, the R@1 of a random
    second. Sentences that are not alignable (data.read_captions) or of unreadable videos don't
    count. Returns how many of those that do begin after their video's end.

    features: of align_features. text: features [sentences, W] of all captions.
    """
    outside = 0
    for video, rows in features.items():
        if not rows.isfinite().all():
            if not found.failures.new:
                raise UserError(
                    "the model's features of a video are not finite: its weights are broken"
                )
            continue
        own = np.flatnonzero(captions.video_of == video)  # [S]
        start = captions.start[own]
        end = captions.end[own]
        words = torch.from_numpy(text[own]).float().to(net.cls_token.device)  # [S, W]
        sentences = net.embed_text(words).cpu()  # [S, E]
        hits = recall_at_1((sentences @ rows.T).numpy(), start, end)  # [S]
        inside = np.minimum(np.ceil(end), len(rows) - 1) - np.floor(start) + 1  # [S], in seconds
        chance = inside.clip(0) / len(rows)  # [S]
        found.add("recall1", torch.from_numpy(100 * hits))
        found.add("chance", torch.from_numpy(100 * chance))
        outside += int((start >= len(rows)).sum())
    return outside


# ---- For both parts: the plan --------------------------------------------------------------------

# Table 1 left: (m, r) and the printed "GFLOPs", which are multiply-adds.
TABLE_1 = {
    (0.0, 0.0): 180.6,
    (0.5, 0.5): 99.3,
    (0.75, 0.75): 57.6,
    (0.75, 0.25): 45.9,
    (0.9, 0.9): 35.2,
    (0.9, 0.1): 18.3,
}


def count_gmacs(cfg, outputs, m, r):
    """(GMACs of a clip's forward pass counted here, the same with all patches embedded) at (m, r).

    The paper's GFLOPs include embedding every patch; a step needs only the visible ones. The
    difference is added explicitly: dropped tokens x pixels x width.
    """
    with torch.device("meta"):
        model = build(replace(cfg, recon_ratio=r), outputs)
        # No sentences: what is counted is a clip's.
        sentences = [torch.empty(0, outputs)] if cfg.objective == "align" else []
    here = common.clip_macs(model, cfg.frames, cfg.size, m, r, *sentences)
    dropped = model.num_tokens - token_counts(model.num_tokens, m, r)[0]
    return here, here + dropped * model.patch_embed.weight.numel() / 1e9


def training_blocks(model, tokens, m, r):
    """[(blocks, (N, D) of their input)]: what a clip of `tokens` passes in training."""
    visible, recon = token_counts(tokens, m, r)
    passed = [(model.blocks, (visible + 1, model.width))]  # 1: CLS
    if r > 0:
        width = model.mask_token.shape[-1]
        passed.append((model.decoder.blocks, (visible + recon, width)))
    return passed


def saved_megabytes(model, tokens, m, r):
    """MB that all blocks store for the backward pass of one clip of `tokens` in fp32, from one
    real block each."""
    total = 0
    for blocks, shape in training_blocks(model, tokens, m, r):
        block = common.on_cpu(blocks[0])
        total += len(blocks) * common.saved_bytes(block, torch.zeros(1, *shape))
    return total / 1e6


def print_plan(cfg):
    """What would run, counted on the model itself: no data, no GPU, no training (--plan)."""
    m = cfg.mask_ratio
    r = cfg.recon_ratio
    outputs = cfg.num_classes or 2
    if cfg.objective == "align":
        outputs = 256 if cfg.text_model == "hashing" else 768  # as MPNet's
    with torch.device("meta"):
        model = build(cfg, outputs)
    decoder = common.millions(model, starts=PARTS["decoder"])
    visible, recon = token_counts(model.num_tokens, m, r)
    steps = cfg.max_steps or cfg.train_clips * cfg.repeated // cfg.batch_size * cfg.epochs
    print(
        f"model     {cfg.model}: {common.millions(model):.1f} M parameters, "
        f"{decoder:.1f} M of them the decoder's\n"
        f"tokens    {visible} visible, {recon} reconstructed of {model.num_tokens} "
        f"(m = {m}, r = {r})\n"
        f"schedule  {cfg.epochs} epochs of {cfg.train_clips} videos x {cfg.repeated} at batch "
        f"{cfg.batch_size}: {steps} steps, peak lr {cfg.lr:g}"
    )

    pixels = common.pixel_bytes(cfg.rand_augment, cfg.mixup) * cfg.frames * 3 * cfg.size**2
    passed = training_blocks(model, model.num_tokens, m, r)
    phase = common.plan_phase(cfg, "training", model, pixels, passed, cfg.repeated)
    common.print_memory(cfg, [phase])
    forward, _ = count_gmacs(cfg, outputs, m, r)
    passes = 4 if cfg.grad_checkpoint else 3
    data.print_cores([(cfg.frames, passes * forward, cfg.repeated)])
    print_figure_2(cfg, model)
    print_table_1(cfg, model.num_tokens, outputs)


def print_figure_2(cfg, model):
    """What the blocks save for backward at several lengths of a clip, with and without token
    dropout."""
    m = cfg.mask_ratio
    r = cfg.recon_ratio
    what = "MB that the blocks alone save for backward, a clip in fp32"
    print(f"\nFigure 2 (drawn, without numbers): {what}")
    print(f"{'frames':>6} {'m = 0':>9} {f'm = {m:g}, r = {r:g}':>20} {'less':>6}")
    for frames in sorted({16, 32, 64, cfg.frames}):
        tokens = frames * model.num_tokens // cfg.frames
        whole = saved_megabytes(model, tokens, 0.0, 0.0)
        ours = saved_megabytes(model, tokens, m, r)
        print(f"{frames:6} {whole:9.0f} {ours:20.0f} {whole / ours:5.2f}x")


def print_table_1(cfg, tokens, outputs):
    """Multiply-adds of Table 1's rows and of this run, beside the paper's."""
    what = '(its "GFLOPs" are multiply-adds; matrix products only)'
    print(f"\nGMACs of a clip, forward, beside Table 1 left {what}")
    print("    m     r  visible  recon     here  all embedded   paper  cheaper")
    own = (cfg.mask_ratio, cfg.recon_ratio)
    base = count_gmacs(cfg, outputs, 0.0, 0.0)[0]  # on all tokens
    for m, r in dict.fromkeys([*TABLE_1, own]):
        here, embedded = count_gmacs(cfg, outputs, m, r)
        visible, recon = token_counts(tokens, m, r)
        paper = TABLE_1.get((m, r), "-")
        note = "  <- this run" if (m, r) == own else ""
        left = f"{m:5.2f} {r:5.2f} {visible:8} {recon:6} {here:8.2f} {embedded:13.2f}"
        print(f"{left} {paper:>7} {base / here:7.2f}x{note}")
    print("paper: ViT-B, decoder 4 x 384, 16 frames of 224 x 224, 101 classes")


# ---- Weights -------------------------------------------------------------------------------------

# Parts of a checkpoint, by how the names of their weights begin. All but the encoder are taken
# whole or not at all.
PARTS = {
    "encoder": ("patch_embed.", "blocks."),
    "decoder": ("mask_token", "encoder_to_decoder.", "decoder."),
    "classifier": ("head.",),
    "heads": ("video_head.", "text_head."),
}


def depth_of(names):
    """The number of blocks of a part, by its weights' names."""
    return len({name.split("blocks.")[1].split(".")[0] for name in names if "blocks." in name})


def init_weights(path, net):
    """Start `net` from a checkpoint of ours or VideoMAE's; returns what was loaded and what not,
    as a line to print.

    The encoder must be of the model's size. A decoder or head of another size is not used, and
    named. UserError where some weights of a part are missing.
    """
    weights = common.videomae_weights(common.read_weights(path))
    own = net.state_dict()
    unused = ""
    for part, starts in PARTS.items():
        mine = {name: x.shape for name, x in own.items() if name.startswith(starts)}
        theirs = {name: x.shape for name, x in weights.items() if name.startswith(starts)}
        same = all(theirs.get(name, shape) == shape for name, shape in mine.items())
        depth = depth_of(theirs)
        why = ""
        if part == "encoder":
            if not same or not own.keys() & weights.keys():
                continue  # common.load_weights says what is wrong
            if depth > depth_of(mine):
                blocks = f"{depth} blocks, the model's {depth_of(mine)}"
                raise UserError(f"{path}: its encoder has {blocks}; is --model the file's?")
        elif not mine or not theirs:
            continue
        elif part == "classifier" and "fc_norm.weight" in weights:  # VideoMAE's
            why = "reads the tokens' mean, not CLS"
        elif not same or depth != depth_of(mine):
            why = "of another size"
            if "mask_token" in theirs:
                why = f"--decoder {depth}x{theirs['mask_token'][-1]} would fit it"
        gaps = [name for name in mine if name not in theirs]
        if why:
            unused += f"; its {part} is not used: {why}"
            weights = {name: x for name, x in weights.items() if name not in theirs}
        elif gaps:
            lost = f"{len(gaps)} weights of the {part} are not in it ({gaps[0]} ...)"
            raise UserError(f"{path}: {lost}")
    return common.load_weights(net, weights, path) + unused


# ---- The tasks -----------------------------------------------------------------------------------


def check(cfg):
    """Refuse settings that can't work, by the flag's name, before anything is read or made."""
    common.need_init(cfg, FROM_VIDEOMAE, "VideoMAE's weights")
    common.need_init(cfg, ["toy_tpt"], "tpt_mae.py's toy (runs/tpt_mae-toy/videomae.pth)")
    t, h, _ = MODELS[cfg.model].get("patch", Turbo.patch)
    common.check_flags(cfg, h)
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?)*", cfg.eval_mask_ratios):
        raise UserError(
            f"--eval-mask-ratios {cfg.eval_mask_ratios} is not a list of numbers such as 0,0.5,0.9"
        )
    if cfg.recon_ratio > cfg.mask_ratio:
        raise UserError(
            f"--recon-ratio {cfg.recon_ratio} must be in [0, --mask-ratio {cfg.mask_ratio}]"
        )
    if cfg.test_crops not in (1, 3):
        raise UserError("--test-crops must be 1 or 3")
    if cfg.frames < t or cfg.frames % t:
        raise UserError(f"--frames {cfg.frames} is not a multiple of the token's {t} frames")
    tokens = cfg.frames // t * (cfg.size // h) ** 2
    if token_counts(tokens, max(cfg.mask_ratio, *cfg.eval_ratios), 0)[0] < 1:
        raise UserError(
            f"of {tokens} tokens --mask-ratio and --eval-mask-ratios must leave at least one"
        )
    if cfg.recon_ratio and token_counts(tokens, cfg.mask_ratio, cfg.recon_ratio)[1] == 0:
        raise UserError(
            f"--recon-ratio {cfg.recon_ratio} is none of {tokens} tokens; 0: no decoder"
        )
    common.check_decoder(cfg.decoder or MODELS[cfg.model]["decoder"])
    if cfg.objective == "align":
        check_alignment(cfg)


def check_alignment(cfg):
    if cfg.batch_size < 2:
        raise UserError(
            "--batch-size 1 leaves InfoNCE nothing to tell apart (and 1 / ln 1 infinite)"
        )
    if cfg.mixup or cfg.cutmix or cfg.label_smoothing:
        raise UserError(
            "--objective align has no labels to mix: --mixup 0 --cutmix 0 --label-smoothing 0"
        )
    if len(cfg.eval_ratios) > 1:
        raise UserError(
            f"--eval-mask-ratios {cfg.eval_mask_ratios}: --objective align is evaluated at one"
        )


def build(cfg, outputs):
    """The model that a Config describes; outputs: the number of classes, or the width of
    sentences' features."""
    options = {
        "model": cfg.model,
        "decoder": cfg.decoder,
        "frames": cfg.frames,
        "size": cfg.size,
        "recon": cfg.recon_ratio > 0,
        "target": cfg.target,
        "drop_path": cfg.drop_path,
        "attention": cfg.attention,
        "grad_checkpoint": cfg.grad_checkpoint,
        "position_scale": cfg.position_scale,
    }
    if cfg.objective == "align":
        return TurboText(outputs, **options)
    return Turbo(outputs, **options)


def captions_of(cfg, path, ctx=None):
    """A list of captions. HTM-AA's sentences have one time: a clip begins within its length before
    it."""
    reach = cfg.frames / cfg.fps  # DECISION (when)
    return data.read_captions([path], cfg.data_root, cfg.max_bad, reach, ctx=ctx)


def open_text(cfg, captions, width=0):
    """The features of a list's sentences, float16 [sentences, W]."""
    return data.open_text(
        captions, cfg.text_model, cfg.text_features or cfg.out, width
    )  # DECISION (sentence)


def write_texts(cfg, ctx):
    """--task encode_text: encode each sentence of both lists once, as the language model is
    frozen."""
    paths = [path for path in (cfg.train_list, cfg.val_list) if path]
    if not paths:
        raise UserError("--task encode_text needs --train-list or --val-list")
    for path in paths:
        data.need_list("", path, ctx)
    if ctx.rank == 0:
        # All are read before hours of work on the first.
        lists = [captions_of(cfg, path, ctx) for path in paths]
        for captions in lists:
            folder = cfg.text_features or cfg.out
            data.write_text(captions, cfg.text_model, folder, ctx.device)


def open_validation(cfg, ctx, classes, text_width):
    """(validation list, features of its sentences): a VideoList and None, or Captions and float16
    [sentences, W]."""
    if cfg.objective == "align":
        videos = captions_of(cfg, cfg.val_list, ctx)
        return videos, open_text(cfg, videos, text_width)
    return data.VideoList(cfg.val_list, cfg.data_root, classes=classes), None


def open_lists(cfg, ctx):
    """(training list, validation list, features of its sentences, their width, steps of an epoch):
    VideoLists, None and 0; or Pairs, Captions, float16 [sentences, W] and W."""
    what = "a file of one video a line, `path label` or `path,label`; or captions"
    data.need_lists(cfg, ctx, what)
    text_width = 0
    if cfg.objective == "align":
        captions = captions_of(cfg, cfg.train_list, ctx)
        videos = Pairs(captions, open_text(cfg, captions))
        text_width = videos.features.shape[1]
    else:
        videos = data.VideoList(cfg.train_list, cfg.data_root, cfg.num_classes)
        data.need_classes(videos)
    epoch_steps = common.steps_of_epoch(cfg.train_list, len(videos), cfg.batch_size, cfg.repeated)
    val_videos, val_text = open_validation(cfg, ctx, videos.classes, text_width)
    data.need_videos(val_videos, cfg.max_bad)
    return videos, val_videos, val_text, text_width, epoch_steps


def clips_of(cfg, videos, test_views=None):
    """The clips of a list: random ones to train on, or `test_views`, (clips, crops), of a video."""
    shape = {"frames": cfg.frames, "fps": cfg.fps, "crop": cfg.crop}
    training = test_views is None
    views = cfg.repeated if training else math.prod(test_views)
    if isinstance(videos, Pairs):
        kind = PairDataset
        plan = partial(sample_pair, captions=videos.captions, **shape)
    else:
        kind = data.ClipDataset
        plan = partial(sample_clip, sampling=cfg.sampling, test_views=test_views, **shape)
    return kind(videos, plan, cfg.size, cfg.seed, replace=training, views=views, frames=cfg.frames)


def test_clips(cfg, videos):
    return clips_of(cfg, videos, (cfg.test_clips, cfg.test_crops))


def read_seconds(cfg, ctx, net, captions, failures, draw=None):
    """`align_features` of this rank's share of the videos of captions, NaN and all."""
    own = range(ctx.rank, len(captions.names), ctx.world)
    pieces = pieces_of(captions, own, failures)
    fps = cfg.eval_fps or cfg.fps
    plan = partial(sample_second, pieces=pieces, frames=cfg.frames, fps=fps)
    videos = data.VideoList.of([piece.path for piece in pieces])
    clips = data.ClipDataset(
        videos, plan, cfg.size, cfg.seed, replace=False, views=PIECE_SECONDS, frames=cfg.frames
    )
    batches = data.test_batches(cfg, ctx, clips, failures, shared=False)
    with ctx.autocast():
        return align_features(net, batches, pieces, cfg.eval_ratios[0], draw)


def validate(cfg, ctx, net, videos, text, draw=None):
    """`evaluate` a VideoList; or Captions, with the features `text` of their sentences: R@1. Every
    readable video counts once, at any number of ranks; `val_unread` of them could not be."""
    net.eval()
    if cfg.objective == "align":
        found = common.Evaluation(len(videos.names), cfg.max_bad)
        features = read_seconds(cfg, ctx, net, videos, found.failures, draw)
        outside = evaluate_alignment(net, features, videos, text, found)
        net.train()
        return found.result(ctx) | {"val_outside": sum(ctx.gather(outside))}
    found = common.Evaluation(len(videos), cfg.max_bad)
    clips = test_clips(cfg, videos)
    batches = data.test_batches(cfg, ctx, clips, found.failures)
    with ctx.autocast():
        evaluate(
            net, batches, found, clips.views, cfg.eval_ratios, cfg.mask_ratio, cfg.recon_ratio, draw
        )
    net.train()
    return found.result(ctx)


# What a run of an objective logs (ce without its weight, lambda_CE, nce with its own, lambda_NCE),
# what it is measured by, and what it counts.
LOSSES = {"classify": ("loss", "ce", "mae"), "align": ("loss", "nce", "mae")}
METRIC = {"classify": "val_top1", "align": "val_recall1"}
UNIT = {"classify": "videos", "align": "sentences"}


def evaluate_step(cfg, ctx, run, videos, text):
    """Validate a run's model as it is after a step."""
    draw = None
    if cfg.recon_ratio > 0 and ctx.rank == 0:
        path = run.folder / "recon.png"
        fps = cfg.fps
        if cfg.objective == "align" and cfg.eval_fps:
            fps = cfg.eval_fps
        draw = partial(write_recon, m=cfg.mask_ratio, fps=fps, path=path)
    result = validate(cfg, ctx, run.net, videos, text, draw)
    run.evaluated(result, METRIC[cfg.objective])


def say_result(cfg, run, classes):
    """The line that a run ends with."""
    last = run.at["last"]
    if cfg.objective == "align":
        metric = "R@1"
        chance = last["val_chance"]
    else:
        metric = "top-1"
        chance = 100 / classes
    picture = ""
    if cfg.recon_ratio > 0:
        picture = f"{run.folder}/recon.png: original, seen, reconstruction. "
    run.say(
        f"complete: {metric} {last[METRIC[cfg.objective]]:.1f} % of {last['val_clips']} "
        f"{UNIT[cfg.objective]} (chance {chance:.1f} %), best {run.at['best']:.1f} %. {picture}"
        "--overwrite starts anew."
    )


def use(cfg, ctx):
    """--task eval, predict, features: a trained model, its shape read from its own checkpoint."""
    settings = (
        "model", "decoder", "frames", "fps", "size", "mask_ratio", "recon_ratio", "target", "seed",
        "objective", "sampling", "text_model", "eval_fps", "position_scale",
    )  # fmt: skip

    def rebuild(own, state):
        check(own)
        return build(own, state["text_width"] or len(state["classes"])).to(ctx.device)

    more = "classes", "text_width"
    cfg, net, state = common.open_trained(cfg, "turbo.py", settings, more, rebuild)
    classes = state["classes"]
    align = cfg.objective == "align"
    m = cfg.eval_ratios[0]
    if cfg.task == "predict":
        if align:
            raise UserError(
                "--task predict needs a classifier; of a video-language model take "
                "--task features, with a --val-list of `path label` lines"
            )
        clips = test_clips(cfg, data.VideoList.of(cfg.input))
        shares = partial(over_views, net.probabilities, m=m, views=clips.views)
        return data.print_predictions(cfg, ctx, clips, shares, classes)
    if cfg.task == "features":

        def features(batch):
            """CLS [B, D], or unit vectors of the joint space [B, E]."""
            x = over_views(net.features, batch, m, clips.views)
            return F.normalize(x, dim=-1) if align else x

        videos = data.VideoList(cfg.val_list, cfg.data_root)  # its classes may be others
        clips = test_clips(cfg, videos)
        return data.write_features(cfg, ctx, clips, features, net.feature_width)
    videos, text = open_validation(cfg, ctx, classes, state["text_width"])
    result = validate(cfg, ctx, net, videos, text)
    common.print_result(cfg, ctx, result, f", m = {cfg.eval_mask_ratios}")


@common.in_one_line
def main(cfg):
    check(cfg)
    cfg = common.settled(cfg, "turbo")
    if cfg.plan:
        return print_plan(cfg)
    ctx = common.launch(cfg.precision)
    if cfg.task == "encode_text":
        return write_texts(cfg, ctx)
    if cfg.task != "train":
        return use(cfg, ctx)
    micro, accumulation = common.micro_batches(cfg, ctx, cfg.repeated)
    videos, val_videos, val_text, text_width, epoch_steps = open_lists(cfg, ctx)
    classes = videos.classes
    total = cfg.max_steps or cfg.epochs * epoch_steps
    warmup = cfg.warmup_epochs * epoch_steps

    losses = LOSSES[cfg.objective]
    run = common.Trainer(cfg, ctx, losses, train_list=videos, val_list=val_videos)
    torch.manual_seed(cfg.seed)  # for the initial weights; all later draws are keyed
    net = build(cfg, text_width or len(classes)).to(ctx.device)
    if cfg.init and not run.state:
        run.say(init_weights(cfg.init, net))
    optimizer = common.optimizer("adamw", common.param_groups(net, cfg.weight_decay), cfg.lr)
    run.prepare(net, optimizer, classes=classes, text_width=text_width)
    m = cfg.mask_ratio
    r = cfg.recon_ratio
    loss_of = common.compiled(turbo_loss, ctx, cfg.compile)  # Part I; of Part II the next three
    error_of = common.compiled(partial_mae, ctx, cfg.compile)
    encode = partial(encode_pairs, model=run.model, m=m, r=r, error_of=error_of)
    contrast = partial(nce_loss, temperature=cfg.temperature)
    run.say(
        f"{len(videos)} training videos, {len(val_videos)} {UNIT[cfg.objective]} to validate, "
        f"{len(classes) or 'no'} classes; batch {cfg.batch_size} = {ctx.world} ranks x {micro} "
        f"clips x {accumulation}; peak lr {cfg.lr:g}; {ctx.precision} on {ctx.device}; steps "
        f"{run.step} to {total}"
    )
    dataset = clips_of(cfg, videos)
    augmented = partial(augment, rand_augment=cfg.rand_augment, flip=cfg.flip)
    batches = data.training_batches(
        cfg, ctx, dataset, cfg.batch_size, micro, run.step, total, augmented
    )
    run.begin(batches, cfg.batch_size, micro, epoch_steps, stop=total)

    if run.evaluation_due():  # the run was stopped between a step and its evaluation
        evaluate_step(cfg, ctx, run, val_videos, val_text)
    # backward takes the mean over the step's clips; update clips gradients, and steps.
    while run.step < total:
        if cfg.objective == "classify":  # Eq. 1: a sum over clips, so micro-batches add up
            for batch in run.micro_batches():  # its clips are augmented: see training_batches above
                labels = data.soft_labels(batch.labels, len(classes), cfg.label_smoothing)
                clips, labels = data.mix(
                    batch.clips, labels, (cfg.seed, run.step), cfg.mixup, cfg.cutmix
                )
                keys = data.to_device(batch.keys, ctx.device)  # [B]
                with run.forward():
                    logits, prediction, target = run.model(clips, keys, m, r)  # DECISION (mixed)
                    loss, ce, pmae = loss_of(logits, labels, prediction, target)  # [B] each
                run.backward(loss, ce, pmae)
        else:  # Eq. 2, of all clips of the step: Part II
            pairs = []
            for batch in run.micro_batches():
                keys = data.to_device(batch.keys, ctx.device)  # [B]
                sentences = videos.sentences_of(batch, cfg.repeated)  # [B], as the loader drew them
                pairs.append((batch.clips, keys, *videos.texts(sentences, ctx.device)))
            nce, pmae = common.cached_step(
                ctx, run.model, encode, pairs, contrast, run.scaler
            )  # [B] each
            run.note(nce + pmae, nce, pmae)
        run.update(common.cosine(run.step, total, warmup, cfg.lr, cfg.min_lr))
        run.end_step()
        if run.evaluation_due():
            evaluate_step(cfg, ctx, run, val_videos, val_text)
    say_result(cfg, run, len(classes))


if __name__ == "__main__":
    main(parse(Config, RECIPES))
