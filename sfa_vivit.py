"""Optimizing ViViT Training (Gowda, Arnab, Huang, 2023): SFA-ViViT, action recognition in two
stages, in one file.

ViViT's factorised encoder is an image transformer, run on each time step, and a temporal
transformer on the CLS tokens that it gives. Nearly all of a step's time and memory goes into
training the first. So stage 1 trains everything on a few frames; stage 2 takes many frames, with
the spatial transformer frozen, a small adapter behind it, and the temporal transformer going on
from stage 1. The frozen part runs without autograd: a third of its multiply-adds are left, and no
activations are kept. It is one model that goes through the stages (ViViT.enter); stage1.pt keeps it
as stage 1 left it.

    paper                                   here
    Sec. 3.1, factorised encoder            Encoder, ViViT
    Sec. 3.2, Eq. 1, Eq. 2                  ViViT.over_space, ViViT.over_time, Adapter
    Sec. 3.2, Fig. 2, stages 1 and 2        plan_stages, ViViT.enter, main
    Fig. 2, image checkpoint                image_weights, inflate
    Table 1, base and rows I-V              Config (--stages, --freeze, --adapter, --init-temporal)
    Fig. 3; Fig. 5, App. D; App. F          Config (--stages, --freeze)
    Table 4, frames that fit                memory_model, largest_frames (--plan)
    Table 6, EPIC-Kitchens                  read_epic, joint_scores
    Table 7                                 RECIPES, Config, augment
    Tables 9 and 10, near-peak epoch        near_peak
    4 x 3 views at test (scenic)            sample_clip, evaluate

    row of the paper                flags
    Table 1, base; Table 6, L       --recipe ssv2 --stages 64:35 --grad-checkpoint --init L_16.npz
    Table 1, row I                  --recipe ssv2 --stages 64:35 --freeze spatial --no-adapter
                                    --init L_16.npz
    Table 1, row II                 --recipe ssv2 --stages 64:35 --freeze temporal --grad-checkpoint
                                    --init L_16.npz
    Table 1, row III                --recipe ssv2 --stages 64:35 --freeze spatial --init L_16.npz
    Table 1, row IV                 --recipe ssv2 --stages 64:35 --freeze spatial --init L_16.npz
                                    --init-temporal videomae_l.pth
    Table 1, row V; Table 6, SSv2   --recipe ssv2 --init L_16.npz
    Table 2, SSv2 from K400         --recipe ssv2 --stages 64:35 --freeze spatial
                                    --temporal-depth 24 --init runs/sfa-k400/stage1.pt
    Table 2, K400 from SSv2         --recipe k400 --stages 128:30 --freeze spatial
                                    --temporal-depth 4 --init runs/sfa-ssv2/stage1.pt
    Table 3, ViViT-g, one view      --recipe k400 --model vivit_g --stages 8:30,48:30 --views 1
                                    --crops 1 --init g_14.npz
    Table 5, ViViT-H + SFA, MiT     --recipe mit --model vivit_h --init H_14.npz
    Table 6, EPIC-Kitchens          --recipe epic --init L_16.npz
    Table 8, ViT-H, 32 frames       --recipe k400 --model vivit_h --stages 32:30 --freeze spatial
                                    --no-adapter --init H_14.npz
    Table 10, ViViT-L from 8 frames --recipe k400 --freeze none --grad-checkpoint --init L_16.npz
    Fig. 3, 96 frames from 16       --recipe k400 --stages 16:30,96:30 --init L_16.npz
    Fig. 5, model A                 --recipe k400 --stages 8:10,32:10,128:10 --init L_16.npz

Rows of one recipe need an --out each. Table 1 is of B by its caption, of L by its text and its
hours. The paper's 64 TPUs of 16 GB hold 2 clips each of every row, by --plan's count, but for stage
1 of g, which needs 24 GB.

Faithful: model, stages, what is frozen and initialised, optimiser, schedule, augmentation, as the
paper states them; what it leaves to "the default parameters used by ViViT" (Sec. 4.2) is scenic's,
the ViViT authors' code. The "1.5B parameters" of its ViT-g (Sec. 4.7) are not those of its Sec.
4.2: 40 layers of 1408 / 6144 are 1.01 B.
DECISIONS where the paper is silent or contradicts itself, tagged in the code where they are made;
of several recipes that share one, at one:
    tubelet     a token is of 2 frames (scenic), which the paper never says: its 128 frames are 64
                time steps. An image's kernel goes into the second one (--inflate central, scenic).
    depth       of the temporal transformer: 4 layers, as scenic's B and its L on SSv2 and
                EPIC-Kitchens; in L on K400 and K600 24, as there. H and g, which scenic lacks, have
                4. Weights of another depth are refused. Table 8 keeps it "fixed in size": give L
                --temporal-depth 4 there. Its width is the image model's in any case.
    patch       16 in B and L; 14 in H and g, because the image models that they start from have 14.
    gelu        exact, as in the hub's and timm's copies of these weights; --gelu tanh computes what
                scenic does.
    class       the image model's class token is loaded with the rest; scenic's loader leaves it
                behind.
    frozen      "spatial" is the embedding, CLS and positions too. What is frozen drops no layers.
                In half precision a frozen spatial transformer's matrices are kept in half.
    adapter     two layers D -> D, GELU between, added to its input, the last one zero: at first it
                changes nothing of what stage 1 learned.
    head        Fig. 2's "MLP head" is one linear layer (scenic). It goes on from stage 1 as the
                temporal transformer does; left at init for other classes (Table 2). Zero at first
                (scenic), not in the toy: before an encoder that starts from nothing it stays at
                chance for long.
    restart     each stage has its own warm-up, cosine and optimizer state, those of Table 7: "the
                same hyperparameters as ViViT" (App. A).
    epochs      the 30 of the 8-frame model (Sec. 4.2) are Kinetics'; elsewhere stage 1 has the
                epochs of Table 7.
    length      stage 2's frames are not stated for Tables 1, 5, 6. Here 128 (K400, K600, MiT) and
                64 (the others): with 8 / frames for stage 1 and half for stage 2 their costs are
                those that Tables 5 and 6 print of L, 0.56 and 0.62.
    stride      between frames it is the same in all stages, scenic's: 2 on Kinetics and MiT, 1
                elsewhere. So few frames are a short piece of the video, "short-term context"
                (Sec. 3.2).
    short       the frames of a clip that is longer than its video are spread evenly over it, and
                repeat where the video has fewer.
    size        256 of a short side of 288 on SSv2, as scenic has it, and on Something-Else, which
                are videos of SSv2; 224 of 256 elsewhere. (Table 6's hours a frame are 1.4 and 1.2
                times those of EPIC-Kitchens; 256 pixels cost 1.3 times 224.) H and g, whose patches
                of 14 don't divide 256, take --size 252.
    scale       a test crop is a square of --crop-share of the short side, 224 / 256 or 256 / 288; a
                training crop, one of that over a scale of 0.9 to 1.33. Left out: scenic draws a
                scale of the height and another of the width.
    colour      Table 7 gives the probability, 0.8; the strengths are 0.4, 0.4, 0.4, and 0.2 of the
                hue's circle. Left out: scenic adds its brightness, up to 32 levels, and makes one
                clip in 10 grey.
    RandAug     scenic's: 11 operations of colour and cutout, or none, each as likely, all frames
                alike. Its scale ends at 10; what magnitudes 15 and 20 do is what its code makes of
                them (data.SCENIC_AUGMENT).
    flip        with probability 0.5 on all data sets, as Table 7 says, though SSv2's labels tell
                left from right.
    drop        layer drop rises linearly to its rate in each of the two transformers, and scales up
                what it keeps. All time steps of a clip drop the same layers (scenic).
    VMAE        row IV: the temporal transformer's layers are the first of VideoMAE's encoder.
    peak        "1 % less than the eventual best performance" (App. E) is one point of top-1.
Missing: the R+ViT hybrid of Table 8; JFT's image weights (Tables 3 and 8), which are not public;
VideoMAE's pretraining for row IV (tpt_mae.py, or --init-temporal with published weights); scenic's
own ViViT checkpoints.

    python sfa_vivit.py           # toy videos, made on first use: 2 CPU cores, a few minutes
    torchrun --nproc_per_node=8 sfa_vivit.py --recipe ssv2 --init L_16.npz --train-list train.csv \\
        --val-list val.csv

On 8 GPUs that takes 19 GB each by --plan's count; `--plan --gpus 8` prints the --micro-batch that
fits less.

Shapes: B clips, T frames, C colours, H x W pixels, S time steps, N tokens of a time step, D width,
P pixel values of a tubelet, V views of a video. In a transformer, B and N are its own: it takes B S
sequences of N tokens over space, B of S over time.
"""

import math
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

# Idle threads sleep: on the CPU the loader needs their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
from common import Block, UserError, opt, parse, patchify, uniform, unpatchify

# Width, layers, heads and MLP width are those of Sec. 4.2.
# DECISION (patch): its side, in pixels
# DECISION (depth): layers of the temporal transformer; temporal_layers knows the exceptions
MODELS = {
    "vivit_toy": {"width": 128, "depth": 4, "heads": 2, "mlp": 512, "patch": 16, "temporal": 2},
    # for clips of half the side
    "vivit_toy8": {"width": 128, "depth": 4, "heads": 2, "mlp": 512, "patch": 8, "temporal": 2},
    "vivit_b": {"width": 768, "depth": 12, "heads": 12, "mlp": 3072, "patch": 16, "temporal": 4},
    "vivit_l": {"width": 1024, "depth": 24, "heads": 16, "mlp": 4096, "patch": 16, "temporal": 4},
    "vivit_h": {"width": 1280, "depth": 32, "heads": 16, "mlp": 5120, "patch": 14, "temporal": 4},
    "vivit_g": {"width": 1408, "depth": 40, "heads": 16, "mlp": 6144, "patch": 14, "temporal": 4},
}
TUBELET = 2  # DECISION (tubelet): frames of a token, and so of a time step

# A column of Table 7 each, and the toy: what differs from Config's defaults.
RECIPES = {
    "toy": {"train_list": "toy/pairs/train.csv", "val_list": "toy/pairs/val.csv",
            "data_root": "toy/pairs", "train_clips": 1600, "num_classes": 8, "model": "vivit_toy8",
            "stages": "4:4,16:8", "size": 32,
            "stride": 2,  # 4 frames mostly show one motion of two, 16 always both
            # From nothing, SGD learns little in minutes.
            "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05,
            "head_std": 0.1,  # DECISION (head)
            "batch_size": 32, "crop": False, "flip": False,  # left is not right
            "views": 1, "crops": 1, "eval_every": 2.0, "log_every": 50, "workers": 2, "gpus": 1},
    "k400": {"train_clips": 235693, "num_classes": 400, "stages": "8:30,128:30", "lr": 0.1,
             "colour_jitter": 0.8},
    "k600": {"train_clips": 380735, "num_classes": 600, "stages": "8:30,128:30", "lr": 0.1,
             "colour_jitter": 0.8},
    "mit": {"train_clips": 791297, "num_classes": 339, "stages": "8:10,128:10",  # DECISION (epochs)
            "lr": 0.25, "colour_jitter": 0.8},
    "epic": {"train_clips": 67217, "labels": "epic", "stages": "8:50,64:50", "stride": 1,
             "rand_augment": 15.0, "drop_path": 0.2, "label_smoothing": 0.2, "mixup": 0.1},
    "ssv2": {"train_clips": 168913, "num_classes": 174,
             "stages": "8:35,64:35",  # DECISION (length)
             "stride": 1,  # DECISION (stride)
             "size": 256, "crop_share": 256 / 288,  # DECISION (size)
             "rand_augment": 20.0, "drop_path": 0.3, "label_smoothing": 0.3, "mixup": 0.3},
    "selse": {"train_clips": 54919, "num_classes": 174, "stages": "8:35,64:35", "stride": 1,
              "size": 256, "crop_share": 256 / 288},  # the compositional split
}  # fmt: skip
EPIC = 97, 300  # classes of verbs and nouns (EPIC-Kitchens-100)

# Frames of one clip that the paper fits into the 16 GB of a TPU v3, everything trained and with SFA
# (Table 4).
TABLE_4 = {
    ("vivit_h", 16): "; the paper: full 96, frozen 128",
    ("vivit_g", 16): "; the paper: full 8, frozen 48",
}


@dataclass
class Config(common.RunConfig):
    init: str = opt("", "an image ViT's .npz or hub folder, or ours; `random`: none, and mean it")
    init_temporal: str = opt(
        "", "the temporal transformer's: VideoMAE's .pth or hub folder, or ours (Table 1, row IV)"
    )
    inflate: str = opt(
        "central",
        "an image's kernel in a tubelet: in one frame, or in both",
        ["central", "average"],
    )

    model: str = opt("vivit_l", "model size (Sec. 4.2)", list(MODELS))
    temporal_depth: int = opt(
        0, "layers of the temporal transformer; 0: as the model and the recipe have"
    )
    gelu: str = opt(
        "exact",
        "exact, as the hub's and timm's ViTs; tanh: its approximation (scenic)",
        ["exact", "tanh"],
    )
    head_std: float = opt(0.0, "standard deviation of the classifier's weights at init (scenic: 0)")
    stages: str = opt(
        "8:35,64:35", "frames:epochs of each stage, such as 8:30,32:10,128:10 (Sec. 3.2, App. D)"
    )
    freeze: str = opt(
        "later",
        "later: spatial, from stage 2 on; or spatial, temporal: in all stages; none (Table 1)",
    )
    adapter: bool = opt(
        True, "an adapter behind a spatial transformer that is frozen (Table 1, row I without)"
    )
    spatial_chunk: int = opt(
        32,
        "time steps that a frozen spatial transformer takes at once",
        free=True,
        within="[1, inf)",
    )
    stride: int = opt(
        2, "frames of the video from one frame of the clip to the next", within="[1, inf)"
    )
    size: int = opt(224, "height and width of a clip, in pixels")
    labels: str = opt(
        "classes",
        "classes: a label a line; epic: EPIC_100_*.csv, verb and noun",
        ["classes", "epic"],
    )

    batch_size: int = opt(
        128, "clips per optimizer step over all ranks (Table 7)", within="[1, inf)"
    )
    optimizer: str = opt("sgd", "sgd: with momentum 0.9 (Table 7)", ["sgd", "adamw"])
    lr: float = opt(0.5, "peak learning rate (Table 7's base one), as used")
    min_lr: float = opt(0.0, "learning rate at the end of the cosine (scenic)")
    warmup_epochs: float = opt(2.5, "epochs of linear warm-up, of each stage (Table 7)")
    weight_decay: float = opt(0.0, "weight decay (scenic)")
    clip_grad: float = opt(1.0, "largest gradient norm; 0: not clipped (scenic)")
    drop_path: float = opt(
        0.0,
        "stochastic layer drop of the last block, rising linearly (Table 7)",
        within="[0, 0.99]",
    )
    label_smoothing: float = opt(
        0.0, "share of a label spread over all classes (Table 7)", within="[0, 0.99]"
    )
    mixup: float = opt(0.0, "Beta parameter of mixup; 0: off (Table 7)")
    colour_jitter: float = opt(0.0, "probability of colour jitter (Table 7)", within="[0, 1]")
    rand_augment: float = opt(
        0.0, "magnitude of 2 layers of RandAugment, scenic's; 0: off (Table 7)", within="[0, 20]"
    )
    crop: bool = opt(
        True,
        "square crops, random with scale jitter in training (Table 7); off: of the whole short "
        "side",
    )
    crop_share: float = opt(
        224 / 256,
        "a crop's side as a share of the short side; jittered in training (scenic)",
        within="(0, 1]",
    )
    flip: bool = opt(True, "random left-right flips in training (Table 7)")  # DECISION (flip)
    views: int = opt(
        4,
        "clips of a video at test, evenly placed in time (scenic); 1 for Table 3",
        within="[1, inf)",
    )
    crops: int = opt(
        3,
        "squares of a clip at test, along its long side (scenic); 1 for Table 3",
        within="[1, inf)",
    )

    max_steps: int = opt(
        0, "number of optimizer steps of each stage instead of its epochs; 0: by epochs"
    )
    eval_every: float = opt(
        1, "epochs between evaluations; a stage's last step is always evaluated", within="[1, inf)"
    )
    gpus: int = opt(
        64,
        "GPUs that --plan counts memory for (the paper: 64 TPUs of 16 GB)",
        free=True,
        within="[1, inf)",
    )
    gpu_gb: tuple = opt(
        ("11", "16", "24", "80"),
        "GB of the cards that --plan fits clips and frames into",
        free=True,
    )


# ---- The paper's ideas ---------------------------------------------------------------------------


class Stage(NamedTuple):
    """A stage of training. Steps count on from one stage to the next."""

    number: int  # from 0: the paper's stage 1 is number 0
    frames: int  # of a clip
    start: int  # its first step
    stop: int  # the step after its last
    frozen: tuple  # of "spatial", "temporal"
    adapter: bool


def plan_stages(stages, epoch_steps, freeze="later", adapter=True, max_steps=0):
    """The Stages of --stages, --freeze and --adapter, in order (Fig. 2).

    max_steps: of each stage instead of its epochs; 0: by epochs, of `epoch_steps` steps. ValueError
    where `stages` is not frames:epochs, separated by commas, in whole tubelets, or `freeze` is none
    of its four.
    """
    if freeze not in ("later", "spatial", "temporal", "none"):
        raise ValueError(
            f"--freeze {freeze}: choose from later, spatial, temporal, none (with everything "
            "frozen no transformer is left to learn)"
        )
    always = () if freeze in ("later", "none") else (freeze,)
    planned = []
    start = 0
    for number, part in enumerate(stages.split(",")):
        frames, _, epochs = part.partition(":")
        if not (frames.isdecimal() and epochs.isdecimal() and int(frames) and int(epochs)):
            raise ValueError(
                f"--stages {stages} is not frames:epochs for each stage, such as 8:30,128:30"
            )
        if int(frames) % TUBELET:
            raise ValueError(
                f"--stages {stages}: {frames} frames are not a multiple of the tubelet's {TUBELET}"
            )
        frozen = ("spatial",) if freeze == "later" and number > 0 else always
        adapts = adapter and "spatial" in frozen
        stop = start + (max_steps or int(epochs) * epoch_steps)
        planned.append(Stage(number, int(frames), start, stop, frozen, adapts))
        start = stop
    return planned


def stages_of(cfg, epoch_steps):
    return plan_stages(cfg.stages, epoch_steps, cfg.freeze, cfg.adapter, cfg.max_steps)


def resize_positions(positions, grid, new):
    """Learned positions [1, 1 + N, D] for another grid of tokens: linear, corners on corners, CLS's
    row kept (scenic).

    grid, new: (n,) in time, or (n_h, n_w) in space, of N tokens before and after.
    """
    if grid == new:
        return positions
    cls = positions[:, :1]  # [1, 1, D]
    rest = positions[:, 1:].unflatten(1, grid).movedim(-1, 1).float()  # [1, D, *grid]
    mode = "linear" if len(grid) == 1 else "bilinear"
    rest = F.interpolate(rest, new, mode=mode, align_corners=True).to(cls.dtype)  # [1, D, *new]
    return torch.cat([cls, rest.movedim(1, -1).flatten(1, -2)], dim=1)  # [1, 1 + N, D]


class Adapter(nn.Module):
    """The paper's "two-layer fully connected network" between the transformers (Eq. 2):
    [B, S, D] -> [B, S, D]."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.apply(common.init_linear)
        nn.init.zeros_(self.fc2.weight)  # DECISION (adapter): at first it changes nothing

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(x)))  # DECISION (adapter): residual, [B, S, D]


def near_peak(curve):
    """(first step within 1 point of the best top-1, step of the best) of [step, top-1] pairs
    (App. E, Table 9)."""
    best_step, best = max(curve, key=lambda point: point[1])  # of equals the first
    near_step = next(step for step, top1 in curve if top1 >= best - 1)  # DECISION (peak)
    return near_step, best_step


# ---- Clips, labels, loss -------------------------------------------------------------------------


def last_start(count, n, stride):
    """The last frame of a video of `count` from which n frames, `stride` apart, still fit; 0 if
    none."""
    return max(0, count - 1 - (n - 1) * stride)


def clip_frames(count, n, stride, start):
    """Indices of n frames, `stride` apart, of a video of `count`, from frame `start` of 0 ...
    last_start."""
    step = min(stride, (count - 1) / max(1, n - 1))  # DECISION (short): spread, not looped
    places = [int(start + i * step + 1e-6) for i in range(n)]  # 1e-6: 7 * (61 / 7) is to be 61
    return [min(count - 1, place) for place in places]


def sample_clip(video, index, view, key, videos, frames, stride, crop_share=None, views=None):
    """(indices of frames, box) to read of an open `video`, entry `index` of the list `videos`: what
    data.ClipDataset calls `plan`.

    frames: how many, `stride` apart. crop_share: a square's side as a share of the short side;
    None: all of it. views: None in training, a random start and square; at test (clips, squares) of
    a video, evenly placed, of which this is number `view`, squares fastest. Of data.Captions, a
    clip is of the entry's time. ValueError if that is empty.
    """
    info = video.info
    count = info.num_frames
    timed = isinstance(videos, data.Captions)
    if timed:
        start = videos.start[index]  # in seconds
        end = video.clamp(videos.end[index])
        if start >= end:
            raise ValueError(
                f"has nothing from second {start:g} to {end:g}, its end or the action's"
            )
        count = max(1, round((end - start) * info.fps))
    last = last_start(count, frames, stride)
    if views is None:
        first = int(uniform(key, "start").item() * (last + 1))
        box = data.centre_box(info)
        if crop_share:
            scale = 0.9 + (1.33 - 0.9) * uniform(key, "scale").item()  # DECISION (scale)
            box = data.random_box(info, key, crop_share / scale)
    else:
        clips, squares = views
        clip, square = divmod(view, squares)
        first = last * clip // (clips - 1) if clips > 1 else last // 2
        box = data.crop_box(info, square, squares, crop_share or 1.0)
    chosen = clip_frames(count, frames, stride, first)
    if timed:
        chosen = video.at(start + np.array(chosen) / info.fps)
    return chosen, box


def augment(clips, keys, colour_jitter, rand_augment, flip):
    """The rest of Table 7's augmentation, on the device: uint8 [B, T, C, H, W] -> the same; keys
    int64 [B], on the CPU."""
    if colour_jitter:
        chosen = data.to_device(uniform(keys, "colour") < colour_jitter, clips.device)  # [B]
        jittered = data.colour_jitter(clips, keys, hue=0.2)  # DECISION (colour)
        clips = torch.where(chosen[:, None, None, None, None], jittered, clips)
        del jittered  # its memory is what RandAugment takes
    if rand_augment:  # DECISION (RandAug)
        clips = data.scenic_rand_augment(clips, keys, rand_augment, layers=2)  # [B, T, C, H, W]
    return data.flip(clips, keys) if flip else clips  # [B, T, C, H, W]


def heads_of(kind, classes):
    """Numbers of classes, a classifier's each: (those of the list,), or (verbs, nouns). kind:
    --labels."""
    return EPIC if kind == "epic" else (len(classes),)


def head_labels(labels, heads):
    """Labels of each head; a label of two heads is verb * nouns + noun. int64 [B] -> a tuple of
    [B]."""
    return (labels,) if len(heads) == 1 else (labels // heads[1], labels % heads[1])


def soft_targets(labels, heads, smoothing):
    """Targets of each head's classes, side by side: int64 [B] -> float32 [B, sum(heads)]."""
    parts = zip(head_labels(labels, heads), heads, strict=True)
    return torch.cat([data.soft_labels(part, n, smoothing) for part, n in parts], dim=1)


def vivit_loss(logits, targets, heads):
    """Cross entropy of each head, their mean, a clip at a time (scenic): [B, sum(heads)] twice ->
    [B]."""
    parts = zip(logits.split(heads, 1), targets.split(heads, 1), strict=True)
    losses = [F.cross_entropy(own.float(), wanted, reduction="none") for own, wanted in parts]
    return torch.stack(losses).mean(0)  # [B]


def joint_scores(logits, heads):
    """Log-probability of each class; of each (verb, noun) pair where there are two heads (Table 6):
    the best action is the best pair. [B, sum(heads)] -> [B, prod(heads)]."""
    scores = [own.float().log_softmax(-1) for own in logits.split(heads, 1)]
    if len(heads) == 1:
        return scores[0]  # [B, classes]
    verbs, nouns = scores
    return (verbs[:, :, None] + nouns[:, None]).flatten(1)  # [B, verbs * nouns]


# ---- The model -----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A ViT's transformer: CLS before the tokens, learned positions, pre-norm blocks, norm.
    [B, N, D] -> CLS [B, D], each of B sequences alone.

    LayerNorm's epsilon goes with the weights, in their state dict: 1e-6 in Google's ViTs, 1e-12 in
    the hub's.
    """

    def __init__(self, tokens, spec, depth, drop_path=0.0, kind="auto", gelu="exact", first=0):
        """first: the number of the first block; it keys the draws of layer drop."""
        super().__init__()
        width = spec["width"]
        ratio = spec["mlp"] / width
        act = partial(nn.GELU, "tanh" if gelu == "tanh" else "none")  # DECISION (gelu)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))  # scenic: zeros
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + tokens, width))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(1, depth - 1)  # DECISION (drop)
            block = Block(width, spec["heads"], ratio, rate, act=act, kind=kind, index=first + i)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("eps", torch.tensor(1e-6))
        self.register_load_state_dict_post_hook(Encoder.use_eps)

    def use_eps(self, _):
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = self.eps.item()

    @common.region
    def add_cls(self, x):
        """Tokens with CLS and positions: [B, N, D] -> [B, 1 + N, D]."""
        cls = self.cls_token.to(x.dtype).expand(len(x), -1, -1)  # [B, 1, D]
        return torch.cat([cls, x], dim=1) + self.positions.to(x.dtype)

    def forward(self, x, keys=None, grad_checkpoint=False):
        """keys int64 [B]: layers are dropped by them; None: no layer is."""
        x = common.run_blocks(self.blocks, self.add_cls(x), keys, grad_checkpoint)  # [B, 1 + N, D]
        return self.norm(x[:, 0])  # [B, D]

    def attention(self, x):
        """Where CLS looks in the last block, the mean of its heads, for pictures: [B, N, D] ->
        [B, N]."""
        last = self.blocks[-1]
        x = common.run_blocks(self.blocks[:-1], self.add_cls(x))  # [B, 1 + N, D]
        q, k, _ = last.attn.project(last.norm1(x))  # [B, 1 + N, heads, D / heads] each
        scores = torch.einsum("bhd,bnhd->bhn", q[:, 0], k)  # [B, heads, 1 + N]
        return (scores * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 1:]  # [B, N]


class ViViT(nn.Module):
    """ViViT's factorised encoder (Eq. 1): a ViT on the patches of each time step, another on the
    CLS tokens it gives.

    `enter` makes it the model of a stage. Where the spatial transformer needs no gradient (frozen,
    or evaluated) it runs without autograd, `spatial_chunk` images at a time: its memory doesn't
    grow with the clip.
    """

    def __init__(self, num_classes, model="vivit_l", frames=8, size=224, temporal_depth=0,
                 drop_path=0.0, attention="auto", grad_checkpoint=False, spatial_chunk=32,
                 gelu="exact", head_std=0.0):  # fmt: skip
        super().__init__()
        spec = MODELS[model]
        self.width = spec["width"]
        self.patch = (TUBELET, spec["patch"], spec["patch"])
        self.grad_checkpoint = grad_checkpoint
        self.spatial_chunk = spatial_chunk
        self.tokens = (size // spec["patch"]) ** 2  # of a time step
        self.steps = frames // TUBELET  # time steps
        self.frozen = ()
        self.adapter = None
        pixels = math.prod(self.patch) * 3
        self.patch_embed = nn.Linear(pixels, self.width)  # = a Conv3d (common.conv_to_linear)
        depth = spec["depth"]
        self.spatial = Encoder(self.tokens, spec, depth, drop_path, attention, gelu)
        layers = temporal_depth or spec["temporal"]
        self.temporal = Encoder(self.steps, spec, layers, drop_path, attention, gelu, first=depth)
        self.head = nn.Linear(self.width, num_classes)  # DECISION (head)
        self.apply(common.init_linear)
        nn.init.normal_(self.head.weight, std=head_std)

    def enter(self, stage, half=None):
        """Become the model of a Stage: temporal positions for its frames, adapter, requires_grad as
        it says. The optimizer is to be made after it: positions and adapter are new parameters.

        half: the dtype in which a frozen spatial transformer's matrices are kept; None: as they
        are. Entered again, a stage changes no value.
        """
        before = self.steps
        self.steps = stage.frames // TUBELET
        positions = self.temporal.positions.detach()
        positions = resize_positions(positions, (before,), (self.steps,))  # [1, 1 + S, D]
        self.temporal.positions = nn.Parameter(positions)
        if not stage.adapter:
            self.adapter = None
        elif self.adapter is None:
            self.adapter = Adapter(self.width).to(positions.device)
        self.frozen = stage.frozen
        spatial_trains = "spatial" not in stage.frozen
        # DECISION (frozen): embedding, CLS and positions with the blocks
        self.patch_embed.requires_grad_(spatial_trains)
        self.spatial.requires_grad_(spatial_trains)
        self.temporal.requires_grad_("temporal" not in stage.frozen)
        if half and not spatial_trains:  # DECISION (frozen)
            for module in [self.patch_embed, *self.spatial.modules()]:
                if isinstance(module, nn.Linear):
                    module.to(half)

    def tubelets(self, clips):
        """0-255 clips cut up, time step by time step: [B, T, C, H, W] -> [B S, N, P]."""
        tokens = patchify(clips, self.patch)  # [B, S N, P]
        return tokens.unflatten(1, (-1, self.tokens)).flatten(0, 1)  # [B S, N, P]

    @common.region
    def embed(self, tubelets):
        """0-255 tubelets embedded: [B S, N, P] -> [B S, N, D]. Inputs are in [-1, 1], as Google's
        ViTs expect."""
        return self.patch_embed(data.normalize(tubelets, (0.5,) * 3, (0.5,) * 3))  # [B S, N, D]

    def over_space(self, clips, keys=None):
        """The spatial transformer, on each time step (Eq. 1 and 2, first line): [B, T, C, H, W] ->
        [B, S, D]; keys int64 [B], for layer drop."""
        tubelets = self.tubelets(clips)  # [B S, N, P]
        if "spatial" in self.frozen or not torch.is_grad_enabled():
            parts = []
            with torch.no_grad():
                for part in tubelets.split(self.spatial_chunk):
                    parts.append(self.spatial(self.embed(part)))  # DECISION (frozen): without keys
            x = torch.cat(parts)  # [B S, D]
        else:
            if keys is not None:  # DECISION (drop): all time steps of a clip alike
                keys = keys.repeat_interleave(self.steps)  # [B S]
            x = self.spatial(self.embed(tubelets), keys, self.grad_checkpoint)  # [B S, D]
        return x.unflatten(0, (len(clips), -1))  # [B, S, D]

    def over_time(self, x, keys=None):
        """Adapter and temporal transformer (Eq. 2, its other lines): [B, S, D] -> [B, D]; keys as
        over space."""
        if self.adapter is not None:
            x = self.adapter(x)  # [B, S, D]
        if "temporal" in self.frozen:
            keys = None  # DECISION (frozen)
        return self.temporal(x, keys, self.grad_checkpoint)  # [B, D]

    def encode(self, clips, keys=None):
        """Features of clips: [B, T, C, H, W] -> [B, D]."""
        return self.over_time(self.over_space(clips, keys), keys)  # [B, D]

    def forward(self, clips, keys=None):
        """clips 0-255 [B, T, C, H, W], keys int64 [B] (for layer drop, in training) -> logits
        [B, classes]."""
        return self.head(self.encode(clips, keys if self.training else None))  # [B, classes]


def temporal_layers(cfg):
    """Layers of the temporal transformer: --temporal-depth, or what scenic has for a model and a
    data set."""
    if cfg.temporal_depth:
        return cfg.temporal_depth
    if cfg.model == "vivit_l" and cfg.recipe in ("k400", "k600"):
        return 24  # DECISION (depth)
    return MODELS[cfg.model]["temporal"]


def build(cfg, heads, stage):
    """The model that a Config describes, in a Stage."""
    net = ViViT(sum(heads), cfg.model, stage.frames, cfg.size, temporal_layers(cfg), cfg.drop_path,
                cfg.attention, cfg.grad_checkpoint, cfg.spatial_chunk, cfg.gelu,
                cfg.head_std)  # fmt: skip
    net.enter(stage)
    return net


# ---- Weights -------------------------------------------------------------------------------------


def image_weights(path, how):
    """An image ViT's weights by ViViT's names, on the CPU, its patch kernel as a tubelet's (`how`:
    see inflate); or ours as they are.

    path: any file that common.vit_weights knows, or a checkpoint of this script. Of a hub's ViT,
    the epsilon too. UserError where it is neither.
    """
    state = common.read_weights(path)
    if any(name.startswith(("spatial.", "temporal.")) for name in state):
        return state
    image = common.vit_weights(state)
    if not image:
        held = ", ".join([*state][:3])
        raise UserError(f"{path}: no image ViT's weights are in it, nor ours (it holds {held} ...)")
    ours = {}
    for name, x in image.items():  # DECISION (class): cls_token too
        if name == "patch_embed.weight":
            x = common.conv_to_linear(inflate(x, TUBELET, how))  # [D, P]
        elif name != "patch_embed.bias":
            name = "spatial." + name.replace("pos_embed", "positions")
        ours[name] = x
    if any(name.endswith("embeddings.position_embeddings") for name in state):
        eps = common.hub_setting(path, "layer_norm_eps", 1e-12)  # the hub's own default
        ours["spatial.eps"] = torch.tensor(eps)
    return ours


def inflate(kernel, frames, how):
    """An image's patch kernel [D, C, p, p] as a tubelet's [D, C, frames, p, p] (ViViT, Sec. 3.4).

    "central": all weight in frame frames // 2; "average": an equal share in each. Both see in a
    still clip what the image's saw.
    """
    if how == "average":
        share = torch.full((frames,), 1 / frames)
    else:
        share = torch.arange(frames) == frames // 2  # DECISION (tubelet)
    return kernel[:, :, None] * share[:, None, None]  # [D, C, frames, p, p]


def temporal_weights(path, depth):
    """The temporal transformer's weights: ours, or the first `depth` layers of VideoMAE's encoder,
    and its norm. UserError where it is neither."""
    state = common.read_weights(path)
    ours = {name: x for name, x in state.items() if name.startswith("temporal.")}
    if ours:
        return ours
    kept = ("norm.", *(f"blocks.{i}." for i in range(depth)))  # DECISION (VMAE)
    for name, x in common.videomae_weights(state).items():
        if name.startswith(kept):
            ours[f"temporal.{name}"] = x
    if not ours:
        raise UserError(f"--init-temporal {path}: no temporal transformer and no VideoMAE is in it")
    return ours


def init_weights(path, temporal_path, net, how):
    """The tensors of --init and --init-temporal as `net` takes them. how: --inflate. UserError
    where they don't fit."""
    depth = len(net.temporal.blocks)
    weights = image_weights(path, how) if path else {}
    if temporal_path:
        weights |= temporal_weights(temporal_path, depth)
    layers = {name.split(".")[2] for name in weights if name.startswith("temporal.blocks.")}
    if layers and len(layers) != depth:
        raise UserError(
            f"{temporal_path or path}: its temporal transformer has {len(layers)} layers, "
            f"this one {depth}; give --temporal-depth {len(layers)}"
        )
    if len(weights.get("head.weight", ())) != net.head.out_features:  # DECISION (head)
        for name in ("head.weight", "head.bias"):
            weights.pop(name, None)
    # Where no kernel is given, the model's own stands for it, and fits.
    kernel = weights.get("patch_embed.weight", net.patch_embed.weight)  # [D, P]
    side = math.isqrt(kernel.shape[1] // 3 // TUBELET)
    if side != net.patch[1]:
        raise UserError(
            f"{path}: its patches are {side} pixels wide, those of --model are {net.patch[1]}"
        )
    fit_positions(net, weights, path)
    if "spatial" in net.frozen and path:
        for name, _ in net.named_parameters():
            if name.startswith(("patch_embed.", "spatial.")) and name not in weights:
                raise UserError(
                    f"{path}: no {name} in it; --freeze spatial would keep what nothing has "
                    "initialised"
                )
    return weights


def fit_positions(net, weights, path):
    """Learned positions become those of the model's grid and its time steps, in place."""
    space = weights.get("spatial.positions")  # [1, 1 + N, D]
    if space is not None:
        count = space.shape[1]
        side = math.isqrt(count)
        if count == side**2:  # big_vision's: CLS has no position
            space = F.pad(space, (0, 0, 1, 0))  # [1, 1 + N, D]
        elif count != 1 + side**2:
            raise UserError(
                f"{path}: its {count} positions are not those of CLS and a square of patches"
            )
        own = math.isqrt(net.tokens)
        weights["spatial.positions"] = resize_positions(space, (side, side), (own, own))
    time = weights.get("temporal.positions")  # [1, 1 + S, D]
    if time is not None:
        before = (time.shape[1] - 1,)
        weights["temporal.positions"] = resize_positions(time, before, (net.steps,))


# ---- Evaluation and pictures ---------------------------------------------------------------------


@torch.no_grad()
def evaluate(net, batches, found, heads, views, draw=None):
    """Add to `found`, a common.Evaluation, top-1 and top-k in % (k = 5, or all classes if fewer);
    of two heads: of the pair, and of each alone (Table 6); and the loss (Fig. 4). The logits of a
    video's views are averaged (scenic).

    net: in eval mode. batches: test clips, see data.test_batches. heads: numbers of classes. views:
    their number a video. draw(net, clips), once: of the first ones.
    """
    for batch in batches:
        logits = net(batch.clips)  # [V B, classes], view by view
        if draw:
            draw(net, batch.clips[:4])
            draw = None
        logits = logits.float().unflatten(0, (views, -1)).mean(0)  # [B, classes]
        labels = batch.labels[: len(logits)]  # [B]
        found.add_hits(joint_scores(logits, heads), labels)
        if len(heads) == 2:
            parts = logits.split(heads, 1), head_labels(labels, heads)
            for word, scores, own in zip(("verb", "noun"), *parts, strict=True):
                found.add(word, 100 * (scores.argmax(1) == own))
        found.add("loss", vivit_loss(logits, soft_targets(labels, heads, 0.0), heads))


def write_attention(net, clips, path):
    """Write a picture and an animation (data.write_panels): clips, and below each the same, lit by
    where the spatial transformer's CLS looks."""
    images = net.tubelets(clips).unflatten(0, (len(clips), -1))  # [B, S, N, P]
    images = images[:, :: -(-net.steps // 8)]  # at most 8 time steps
    look = net.spatial.attention(net.embed(images.flatten(0, 1))).float()  # [B S, N]
    light = (look / look.amax(1, keepdim=True)).view(*images.shape[:3], 1)  # [B, S, N, 1]
    side = math.isqrt(net.tokens)
    grid = images.shape[1], side, side
    lit = images * (0.15 + 0.85 * light)  # [B, S, N, P]
    panels = [unpatchify(x.byte(), net.patch, grid).cpu() for x in (images, lit)]
    data.write_panels(path, panels, fps=4)


# ---- The plan ------------------------------------------------------------------------------------


def count_gmacs(net, stage):
    """GMACs of a training step on one clip in a Stage, forward and backward, counted on `net`,
    which is on `meta`.

    The layers of a transformer cost the same, and so do time steps: one of each is counted.
    """
    net.enter(stage)
    spatial_trains = "spatial" not in stage.frozen

    def gmacs(part, *shape, after_trained=True):
        """after_trained: whether something trains before the part, whose input then needs a
        gradient."""
        x = torch.empty(1, *shape, device="meta", requires_grad=after_trained)

        def step():
            y = part(x)
            if y.requires_grad:
                y.sum().backward()

        return common.count_macs(step)

    embed = gmacs(net.embed, net.tokens, net.patch_embed.in_features, after_trained=False)
    layer = gmacs(net.spatial.blocks[0], 1 + net.tokens, net.width, after_trained=spatial_trains)
    over_space = net.steps * (embed + len(net.spatial.blocks) * layer)
    over_time = len(net.temporal.blocks) * gmacs(net.temporal.blocks[0], 1 + net.steps, net.width)
    if net.adapter:
        over_time += gmacs(net.adapter, net.steps, net.width, after_trained=spatial_trains)
    return over_space + over_time + gmacs(net.head, net.width)


def block_memory(cfg, net):
    """(all spatial blocks' bytes, those of one at work, all temporal blocks'): what they hold of a
    time step of one clip; the temporal ones' is a 64th of what 64 time steps take."""
    block = net.temporal.blocks[0]  # of the size of a spatial one, and it trains
    shape = 1 + net.tokens, net.width  # of a time step
    spatial = common.block_bytes(cfg, block, len(net.spatial.blocks), shape)
    working = common.block_bytes(cfg, block, 0, shape)
    temporal = common.block_bytes(cfg, block, len(net.temporal.blocks), (64, net.width)) / 64
    return spatial, working, temporal


def memory_model(cfg, net, stage, blocks):
    """(bytes, bytes more a time step) that training on one clip holds in a Stage; blocks: see
    block_memory.

    Weights, gradients, optimizer state; the clip; what blocks save for backward, under autocast
    unless --precision fp32. Where spatial is frozen: its weights, and the images of one chunk in
    one block.
    """
    net.enter(stage)
    spatial, working, temporal = blocks
    fixed = common.state_bytes(cfg, net)
    augmented = cfg.rand_augment or cfg.colour_jitter
    a_step = common.pixel_bytes(augmented, cfg.mixup) * TUBELET * 3 * cfg.size**2 + temporal
    if net.adapter:
        a_step += 3 * 4 * net.width  # its input, its hidden layer before and after the GELU
    if "spatial" not in stage.frozen:
        return fixed, a_step + spatial
    if cfg.precision != "fp32":
        fixed -= 4e6 * common.millions(net, trained=False)  # in half alone: without float32's 4
    return fixed + cfg.spatial_chunk * working, a_step


def largest_frames(memory, gigabytes):
    """The most frames, whole tubelets, whose training step fits: memory as of memory_model, a
    card's GB."""
    fixed, a_step = memory
    return max(0, int((gigabytes * 2**30 - fixed) / a_step)) * TUBELET


def print_plan(cfg):
    """What would run, counted and measured on the model's own parts: no data, no GPU, no training
    (--plan)."""
    heads = heads_of(cfg.labels, range(cfg.num_classes or 2))
    stages = stages_of(cfg, max(1, cfg.train_clips // cfg.batch_size))
    last = stages[-1]
    full = last._replace(frozen=(), adapter=False)
    frozen = last._replace(frozen=("spatial",), adapter=cfg.adapter)
    with torch.device("meta"):
        # in the stage that has an adapter: print_model counts it
        net = build(cfg, heads, frozen)
    print_model(cfg.model, net)
    blocks = block_memory(cfg, net)

    whole = count_gmacs(net, full) * (last.stop - last.start)
    shares = []
    phases = []
    loads = []
    for stage in stages:
        name = f"stage {stage.number + 1}"
        steps = stage.stop - stage.start
        gmacs = count_gmacs(net, stage)
        shares.append(gmacs * steps / whole)
        passes = 4 if cfg.grad_checkpoint and "spatial" not in stage.frozen else 3
        loads.append((stage.frames, gmacs * passes / 3, 1))
        adapter = ", with adapter" if stage.adapter else ""
        print(
            f"{name}   {stage.frames} frames, {steps} steps at batch {cfg.batch_size}, peak lr "
            f"{cfg.lr:g}; frozen: {', '.join(stage.frozen) or 'nothing'}{adapter}; {gmacs:.0f} "
            "GMACs a clip"
        )
        fixed, a_step = memory_model(cfg, net, stage, blocks)
        clip = stage.frames // TUBELET * a_step
        group = common.clips_together(cfg)
        phases.append(common.Phase(name, cfg.batch_size, cfg.micro_batch, group, fixed, clip))
    print(
        f"cost      {' + '.join(f'{share:.3f}' for share in shares)} = {sum(shares):.3f} of "
        f"training everything on {last.frames} frames for as many steps as the last stage"
    )
    common.print_memory(cfg, phases)
    data.print_cores(loads)
    print_table_4(cfg, net, {stage.frames for stage in stages}, (full, frozen), blocks)


def print_model(name, net):
    """The parameters of each part of the model."""
    millions = common.millions
    parts = {
        "spatial": millions(net.patch_embed) + millions(net.spatial),
        f"temporal ({len(net.temporal.blocks)} layers)": millions(net.temporal),
        "adapter": millions(net.adapter) if net.adapter else 0.0,
        "head": millions(net.head),
    }
    total = sum(parts.values())
    listed = " + ".join(f"{part} {number:.1f}" for part, number in parts.items())
    print(
        f"model     {name}: {total:.1f} M parameters = {listed}; {total - parts['spatial']:.1f} M "
        "train where spatial is frozen"
    )


def print_table_4(cfg, net, lengths, kinds, blocks):
    """Cost and memory of one clip in both kinds of stage, full and frozen, and the frames that fit
    into each --gpu-gb (Table 4). lengths: numbers of frames to show beside the paper's."""
    print(
        "\nGMACs of one clip, forward and backward; MB that training on it holds, with weights and "
        "optimizer state"
    )
    print(f"{'frames':>6} {'full':>9} {'frozen':>9} {'ratio':>6} {'full MB':>9} {'frozen MB':>9}")
    lengths = sorted(lengths | {4, 8, 16, 32, 48, 64, 96, 128})
    memory = []
    for kind in kinds:
        longest = kind._replace(frames=lengths[-1])  # state grows by positions alone
        memory.append(memory_model(cfg, net, longest, blocks))
    for n in lengths:
        full, frozen = (count_gmacs(net, kind._replace(frames=n)) for kind in kinds)
        full_mb, frozen_mb = ((fixed + n // TUBELET * a_step) / 1e6 for fixed, a_step in memory)
        print(
            f"{n:6} {full:9.1f} {frozen:9.1f} {frozen / full:6.3f} {full_mb:9.0f} {frozen_mb:9.0f}"
        )

    precision = "fp32" if cfg.precision == "fp32" else "half precision"
    recomputed = "blocks" if cfg.grad_checkpoint else "nothing"
    print(
        f"\nmost frames of a micro-batch of one clip, {precision}, {recomputed} recomputed "
        "(Table 4)"
    )
    for card in sorted(map(float, cfg.gpu_gb), reverse=True):
        full, frozen = (largest_frames(of_kind, card) or "none" for of_kind in memory)
        paper = TABLE_4.get((cfg.model, card), "")
        print(f"{card:6g} GB: full {full}, frozen {frozen}{paper}")
    # 11 GB: a 2080 Ti's; Sec. 4.2 and 4.8 say 12.
    print(
        "These are not the paper's: no one way of counting gives its H and its g, and it tells "
        "neither the precision nor what\nis recomputed. (On 11 GB, of a ViViT that it doesn't "
        "name: full 16, frozen 80.) Not counted: CUDA's own memory and\nworkspace, fragmentation, "
        "the loader."
    )
    if frozen == "none":  # on the last card, the smallest
        raise UserError(
            f"--gpu-gb {card:g}: weights and optimizer state of {cfg.model} alone take "
            f"{memory[1][0] / 2**30:.1f} GB, even with its spatial transformer frozen"
        )


# ---- The tasks -----------------------------------------------------------------------------------


def check(cfg):
    """Refuse settings that can't work, by the flag's name, before anything is read or made."""
    common.check_flags(cfg, MODELS[cfg.model]["patch"])
    try:
        stages = stages_of(cfg, 1)
    except ValueError as error:
        raise UserError(str(error)) from None
    if "spatial" in stages[0].frozen and not cfg.init and cfg.task == "train" and not cfg.plan:
        raise UserError(
            "--freeze spatial freezes what nothing has initialised: give --init an image model's "
            "weights or a stage 1's checkpoint, or train a stage 1 (--freeze later); --init random "
            "if that is what you want"
        )
    pretrained = [name for name in RECIPES if name != "toy"]
    common.need_init(cfg, pretrained, "an image ViT's weights (.npz or hub folder), or a stage 1's")


def read_epic(path, root, max_bad=0.01, ctx=None):
    """EPIC-KITCHENS-100's annotations as published (EPIC_100_train.csv, ..._validation.csv) ->
    data.Captions, whose labels are verb * 300 + noun. UserError names file and line of what is no
    row of them, or of no known class."""
    videos = data.read_captions([path], root, max_bad, texts=False, classes=EPIC, ctx=ctx)
    labels = []
    for action in videos.actions:
        verb, noun = map(int, action.split(":"))
        labels.append(verb * EPIC[1] + noun)
    videos.labels = np.array(labels, np.int32)[videos.action]
    videos.classes = [f"verb {i // EPIC[1]} noun {i % EPIC[1]}" for i in range(math.prod(EPIC))]
    return videos


def read_list(cfg, ctx, path, classes=None):
    """A list as --labels says; classes: the training list's, which a validation list must keep
    to."""
    if cfg.labels == "epic":
        return read_epic(path, cfg.data_root, cfg.max_bad, ctx)
    return data.VideoList(path, cfg.data_root, 0 if classes else cfg.num_classes, classes)


def open_lists(cfg, ctx):
    """(training, validation) lists."""
    data.need_lists(cfg, ctx)
    videos = read_list(cfg, ctx, cfg.train_list)
    data.need_classes(videos)
    val_videos = read_list(cfg, ctx, cfg.val_list, videos.classes)
    data.need_videos(val_videos, cfg.max_bad)
    return videos, val_videos


def clips_of(cfg, videos, frames, views=None):
    """The clips of a list: random ones of so many frames to train on, or the `views`, (clips,
    squares), of each video."""
    share = cfg.crop_share if cfg.crop else None
    plan = partial(
        sample_clip,
        videos=videos,
        frames=frames,
        stride=cfg.stride,
        crop_share=share,
        views=views,
    )
    number = 1 if views is None else math.prod(views)
    return data.ClipDataset(
        videos, plan, cfg.size, cfg.seed, replace=views is None, views=number, frames=frames
    )


def validate(cfg, ctx, net, videos, heads, frames, views=(1, 1), name="val", draw=None):
    """`evaluate` a list in `views`, (clips, squares) of `frames` frames, of each video. Every
    readable video counts once, at any number of ranks; `unread` of them could not be."""
    found = common.Evaluation(len(videos), cfg.max_bad)
    clips = clips_of(cfg, videos, frames, views)
    batches = data.test_batches(cfg, ctx, clips, found.failures)
    net.eval()
    with ctx.autocast():
        evaluate(net, batches, found, heads, clips.views, draw)
    net.train()
    return found.result(ctx, name)


def use(cfg, ctx):
    """--task eval, predict, features: a trained model, its shape and its crops read from its own
    checkpoint."""
    settings = "model", "temporal_depth", "gelu", "stride", "size", "crop", "crop_share", "labels"

    def saved(own, state):
        heads = heads_of(own.labels, state["classes"])
        return build(own, heads, Stage(*state["stage"])).to(ctx.device)

    more = "classes", "stage"
    cfg, net, state = common.open_trained(cfg, "sfa_vivit.py", settings, more, saved)
    classes = state["classes"]
    frames = net.steps * TUBELET
    heads = heads_of(cfg.labels, classes)
    if cfg.task == "predict":
        clips = clips_of(cfg, data.VideoList.of(cfg.input), frames, (1, 1))
        shares = lambda batch: joint_scores(net(batch.clips), heads).exp()  # [B, classes]
        return data.print_predictions(cfg, ctx, clips, shares, classes)
    if cfg.task == "features":
        videos = read_list(replace(cfg, num_classes=0), ctx, cfg.val_list)  # other classes too
        clips = clips_of(cfg, videos, frames, (1, 1))
        cls = lambda batch: net.encode(batch.clips)  # [B, D]
        return data.write_features(cfg, ctx, clips, cls, net.width)
    videos = read_list(cfg, ctx, cfg.val_list, classes)
    views = cfg.views, cfg.crops
    result = validate(cfg, ctx, net, videos, heads, frames, views, "test")
    common.print_result(cfg, ctx, result, f", {frames} frames, {cfg.views} x {cfg.crops} views")


@common.in_one_line
def main(cfg):
    check(cfg)
    cfg = common.settled(cfg, "sfa")
    cfg = replace(cfg, temporal_depth=temporal_layers(cfg))  # for the log and the checkpoint
    if cfg.plan:
        return print_plan(cfg)
    ctx = common.launch(cfg.precision)
    if cfg.task != "train":
        return use(cfg, ctx)
    micro, accumulation = common.micro_batches(cfg, ctx)
    videos, val_videos = open_lists(cfg, ctx)
    heads = heads_of(cfg.labels, videos.classes)
    epoch_steps = common.steps_of_epoch(cfg.train_list, len(videos), cfg.batch_size)
    stages = stages_of(cfg, epoch_steps)
    total = stages[-1].stop

    # curve: [step, top-1] of the stage so far; seconds: when each stage ended
    at = {"stage": 0, "best": -1.0, "curve": [], "seconds": []}
    run = common.Trainer(cfg, ctx, at=at, train_list=videos, val_list=val_videos)
    # For the initial weights; enter_stage seeds a later adapter's; all other draws are keyed.
    torch.manual_seed(cfg.seed)
    net = build(cfg, heads, stages[run.at["stage"]]).to(ctx.device)
    if not run.state and (cfg.init or cfg.init_temporal):
        source = " and ".join(filter(None, (cfg.init, cfg.init_temporal)))
        weights = init_weights(cfg.init, cfg.init_temporal, net, cfg.inflate)
        run.say(common.load_weights(net, weights, source))
    run.say(
        f"{len(videos)} training and {len(val_videos)} validation videos, "
        f"{' + '.join(map(str, heads))} classes; batch {cfg.batch_size} = {ctx.world} ranks x "
        f"{micro} clips x {accumulation}; peak lr {cfg.lr:g}; {ctx.precision} on {ctx.device}; "
        f"steps {run.step} to {total}"
    )
    warmup = cfg.warmup_epochs * epoch_steps
    augmented = partial(
        augment, colour_jitter=cfg.colour_jitter, rand_augment=cfg.rand_augment, flip=cfg.flip
    )
    for stage in stages[run.at["stage"] :]:
        if stage.number > run.at["stage"]:
            run.at |= {"stage": stage.number, "best": -1.0, "curve": []}
        enter_stage(cfg, ctx, run, net, stage, videos.classes)
        batches = data.training_batches(
            cfg, ctx, clips_of(cfg, videos, stage.frames), cfg.batch_size, micro, run.step,
            stage.stop, augmented,
        )  # fmt: skip
        run.begin(
            batches, cfg.batch_size, micro, epoch_steps,
            stop=stage.stop, total=total, start=stage.start, epoch_zero=stage.start,
        )  # fmt: skip
        if run.evaluation_due():  # the run was stopped between a step and its evaluation
            evaluate_stage(cfg, ctx, run, val_videos, heads, stage)
        steps = stage.stop - stage.start
        # backward takes the mean over a step's clips, update steps, end_step logs: common.Trainer.
        while run.step < stage.stop:
            for batch in run.micro_batches():  # its clips are augmented: see training_batches above
                targets = soft_targets(batch.labels, heads, cfg.label_smoothing)  # [B, classes]
                clips, targets = data.mix(
                    batch.clips, targets, (cfg.seed, run.step), cfg.mixup, cutmix=0.0
                )
                keys = data.to_device(batch.keys, ctx.device)  # [B], for layer drop
                with run.forward():
                    logits = run.model(clips, keys)  # [B, classes]
                    loss = vivit_loss(logits, targets, heads)  # [B]
                run.backward(loss)
            done = run.step - stage.start  # DECISION (restart)
            run.update(common.cosine(done, steps, warmup, cfg.lr, cfg.min_lr))
            run.end_step()
            if run.evaluation_due():
                evaluate_stage(cfg, ctx, run, val_videos, heads, stage)
    say_result(run, heads)


def enter_stage(cfg, ctx, run, net, stage, classes):
    """Make `net` the model of a stage, and `run` what trains it, with an optimizer of its own."""
    torch.manual_seed(cfg.seed)  # for the adapter
    net.enter(stage, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(ctx.precision))
    optimizer = common.optimizer(cfg.optimizer, common.param_groups(net, cfg.weight_decay), cfg.lr)
    trained = common.millions(net, trained=True)
    run.say(
        f"stage {stage.number + 1}: {stage.frames} frames, frozen: "
        f"{', '.join(stage.frozen) or 'nothing'}; {trained:.1f} M parameters train; "
        f"{cfg.model} with {cfg.temporal_depth} temporal layers"
    )
    run.prepare(net, optimizer, stage=tuple(stage), classes=classes)


def evaluate_stage(cfg, ctx, run, videos, heads, stage):
    """Validate the model as it is at a step of a stage; at a stage's end also say when it came near
    its peak, and at the end of all test it."""
    draw = None
    if ctx.rank == 0:
        draw = partial(write_attention, path=run.folder / "attention.png")
    result = validate(cfg, ctx, run.net, videos, heads, stage.frames, draw=draw)
    run.at["curve"].append([run.step - stage.start, result["val_top1"]])
    also = []
    if run.step == stage.stop:
        near, best = near_peak(run.at["curve"])
        result |= {"near_peak_epoch": near / run.epoch_steps, "best_epoch": best / run.epoch_steps}
        result["best_step"] = stage.start + best
        run.at["seconds"].append(round(time.time() - run.started, 1))
        if run.step < run.total:
            also = [f"stage{stage.number + 1}.pt"]  # for other stages 2 (--init)
        elif cfg.views * cfg.crops > 1:  # one view was validated just now
            views = cfg.views, cfg.crops
            result |= validate(cfg, ctx, run.net, videos, heads, stage.frames, views, "test")
    run.evaluated(result, "val_top1", also=also, stage=stage.number + 1)


def say_result(run, heads):
    """The line that a run ends with."""
    last = run.at["last"]
    times = [b - a for a, b in pairwise([0.0, *run.at["seconds"]])]
    run.say(
        f"complete: top-1 {last['val_top1']:.1f} % of {last['val_clips']} validation clips (chance "
        f"{100 / math.prod(heads):.1f} %), best of the last stage {run.at['best']:.1f} %; "
        f"{' + '.join(f'{t:.0f}' for t in times)} = {sum(times):.0f} seconds, with evaluation. "
        f"{run.folder}/attention.png: clips, and where the spatial transformer looks. --overwrite "
        "starts anew."
    )


if __name__ == "__main__":
    main(parse(Config, RECIPES))
