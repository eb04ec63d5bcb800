"""Efficient VideoMAE via Temporal Progressive Training (TPT-MAE): self-supervised video
pretraining, in one file.

VideoMAE hides 90 % of a clip's places in all of its frames and learns to paint them. A clip's
frames are redundant: what is spatial can be learned from 2, for a tenth of the multiply-adds of 16
(ViT-B). So TPT spends its budget of frames in stages, on clips of 2, then 4, 8 and 16 frames, each
from the weights of the one before. Then the encoder is fine-tuned to classify.

    paper                                here
    Sec. 3.1, the tube mask              VideoMAE.split, common.tube_split
    Sec. 3.1, encoder, decoder           Encoder, VideoMAE, common.Autoencoder, common.Decoder
    Sec. 3.1, MSE                        data.pixel_target, mae_loss
    Sec. 3.2, C = {f_i, p_i, R_i}        plan_stages, Stage, schedule (--stages, --stage-batch)
    Sec. 3.2.1, budget, number, order    plan_stages, lay_out (--budget, --order)
    Sec. 3.2.1, 3.2.2, the search        search_space, search_schedule (--task search_schedule)
    Sec. 5.3, long and short cycle       Segment, lay_out (--cycle; Table 5)
    Sec. 4, recipe                       Config, RECIPES
    Sec. 4, sampling and views           sample_clip, evaluate_classes (--test-views)
    Table 3, backbones                   DividedBlock, TrajectoryBlock (--backbone)
    Table 6, learning rate cycles        learning_rate (--lr-cycles, --decay)
    Table 7, batch a stage               schedule (--stage-batch)
    Sec. 5.4, reuse of decoded frames    clips_of (--repeated)
    fine-tuning                          Classifier, following (recipes *_ft, --then)

    row of the paper                     flags
    Table 1, TPT-MAE, ViT-L, K400        --recipe k400 --model vit_l --then k400_ft
    Table 1, TPT-MAE, ViT-L, SSv2        --recipe ssv2_ft --model vit_l
                                         --init runs/tpt_mae-k400/last.pt
    Table 1, VideoMAE, ViT-L, K400       --recipe videomae_k400 --model vit_l --budget 1600
                                         --then k400_ft
    Table 2, TPT-MAE                     --recipe ssv2 --then ssv2_ft
    Tables 2-4, VideoMAE (67.6 to 68.4)  --recipe ssv2 --then ssv2_ft --stages 16:100
    Table 3, TimeSformer, TPT-MAE        --recipe ssv2 --then ssv2_ft --backbone divided
                                         --stages 2,4,8 --budget-frames 8
    Table 3, MotionFormer, ImageNet-21k  --recipe ssv2_sup --backbone trajectory --frames 8
                                         --init B_16.npz
    Table 4, 3 sub-tasks, (2, 8, 16)     --recipe ssv2 --then ssv2_ft --stages 2,8,16
    Table 5, short-cycle, random         --recipe ssv2 --then ssv2_ft --cycle short --order random
    Table 6, 1 cycle, cosine             --recipe ssv2 --then ssv2_ft --lr-cycles 1
    Table 7, 8, 8, 8, 16                 --recipe ssv2 --then ssv2_ft --stage-batch 512,512,512,1024
    Sec. 5.3, more to early stages       --recipe ssv2 --then ssv2_ft
                                         --stages 2:50,4:25,8:12.5,16:12.5

Faithful: stages, budget arithmetic, optimiser, masks, target, sampling, as the paper or the
VideoMAE it builds on says.
DECISIONS where the paper is silent or contradicts itself; each line that one shapes is tagged:
    budget      "25 % at 2 frames -> 1600 epochs" holds at a budget of 800 epochs of 16 frames, not
                at Sec. 4's 400: epochs = share x budget x 16 / frames, rounded to whole epochs.
                The text gives no searched C*: --stages are Table 4's best, 25 % each, for K400 too
                (see decoder). Table 3's 8-frame models get 400 epochs of 8 frames.
    carry       weights and AdamW's moments go on through all stages; beta2 = 0.95 forgets the old
                ones in about 20 steps, of warm-up.
    warmup      40 epochs are 10 % of Sec. 4's budget of 400 (of K400's 1600: 2.5 %): a stage (a
                learning-rate cycle) warms up for that share of itself, not for 40 epochs.
    lr          Sec. 4 says 1.5e-4, Sec. 3.2's example 0.01. The recipes have 1.5e-4 x batch / 256,
                VideoMAE's rule; another --batch-size needs its own --lr and --min-lr, --stage-batch
                follows the rule. --min-lr, the cosine's end, stays the same share of the peak.
    step        Table 6's "step": a tenth after each third of a cycle.
    rounds      a short cycle's round holds one epoch of the stage that has the fewest, and the same
                share of each other stage.
    random      any order but the progressive one; the longest stage too is shuffled (Sec. 5.3's
                example keeps it last). A short cycle shuffles each round anew.
    single      a 1-frame stage ("single frame", Secs. 3.2.1 and 6) repeats the frame to fill the
                tubelet.
    stride      K400's stride stays 4 at all lengths, so a short clip is a short time; SSv2's
                segments span the video.
    views       "3 views", "5 views" are read as VideoMAE's tests, 2 x 3 and 5 x 3 clips x crops.
    repeated    VideoMAE shows the same frames of a video again, augmented otherwise; here each clip
                draws its own frames.
    sizes       fine-tuning is VideoMAE's of ViT-B at every size; its K400 S, L and H differ
                (k400_ft says how). Sec. 5.3's 30 epochs on SSv2 serve Tables 1 to 3 too.
    search      a schedule ends at the full length, which is the task; shares are the portions that
                Sec. 3.2.1 names, although Table 4's three stages have thirds. Batch and rate, which
                Sec. 3.2.2 would search too, are the same in all: --batch-size, --lr.
    blocks      all backbones: tubelets, no CLS, fixed positions, mean pooling and a joint decoder,
                as VideoMAE; ImageNet's start learns positions, because its own are.
    trajectory  from an image's weights, values along a trajectory start as the tokens, W_v = 1, so
                that a still clip's are the image's. The public code's default leaves W_v out (its
                flag USE_ORIGINAL_TRAJ_ATTN_CODE).
    memory      Sec. 4's V100s come with 16 or 32 GB: --micro-batch and --then's fit 32, for every
                --model (--plan).
    decoder     VideoMAE's files of L and H have 12 layers, the default. Sec. 5.1's "54 %" comes out
                with 4 x 512 for L and 25 % a stage.
    target      of masked patches alone, normalised per patch and channel, as VideoMAE: Sec. 3.1's
                decoder gives all patches. The toy recipe predicts raw pixels (--target).
    toy         so that minutes are enough, the encoder's positions are 5 times as large, and the
                classifier's first weights 5,000 times.
Missing: Table 1's SlowFast, MViT, MViTv2, MotionFormer (32 frames), Swin, TimeSformer (64 frames),
MaskFeat, ST-MAE; Table 2's ImageMAE, MotionMAE, MAM2, M3Video; Lion, which AVION's code has for its
VideoMAE (its Sec. 5.5).

    python tpt_mae.py                   # toy videos: pretrains, then fine-tunes; 2 CPU cores
    torchrun --nproc_per_node=8 tpt_mae.py --recipe ssv2 --then ssv2_ft \
        --train-list train.csv --val-list val.csv
    torchrun --nproc_per_node=8 tpt_mae.py --recipe k400 --model vit_l --train-list k400.csv \
        --val-list k400_val.csv --then ssv2_ft --then-train-list ssv2.csv \
        --then-val-list ssv2_val.csv    # Table 1's SSv2 column

Shapes: B clips, T frames, C colours, N tokens, K kept (visible) and R masked ones, S time steps of
two frames, with N / S places each, D width, H heads, d = D / H, P pixel values of a patch. keys,
int64 [B], number the clips: masks and drop path are hashed from them (common.make_key).
"""

import math
import os
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import combinations, pairwise, product
from pathlib import Path
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
    Attention,
    Autoencoder,
    Block,
    Decoder,
    UserError,
    attention,
    gather_tokens,
    opt,
    patchify,
    uniform,
)
from data import pixel_target

TUBELET = 2  # frames of a token (Sec. 3.1)

# Encoder; layers x width of VideoMAE's decoder (heads of 64, but 8 of 80 in H's); `patch`: height
# and width of a token. In minutes a small model learns where and when only if positions stand out
# from the pixels: those of the toy's encoder are 5 x VideoMAE's.
# DECISION (decoder): 12 layers, as the files of L and H have.
MODELS = {
    "vit_toy": {"width": 128, "depth": 4, "heads": 2, "decoder": "2x64", "patch": 4,
                "position_scale": 5.0, "head_std": 0.1},  # DECISION (toy)
    "vit_s": {"width": 384, "depth": 12, "heads": 6, "decoder": "4x192", "patch": 16},
    "vit_b": {"width": 768, "depth": 12, "heads": 12, "decoder": "4x384", "patch": 16},
    "vit_l": {"width": 1024, "depth": 24, "heads": 16, "decoder": "12x512", "patch": 16},
    "vit_h": {"width": 1280, "depth": 32, "heads": 16, "decoder": "12x640", "patch": 16},
}  # fmt: skip

TOY = {"train_list": "toy/actions/train.csv", "val_list": "toy/actions/val.csv",
       "data_root": "toy/actions", "train_clips": 1600, "num_classes": 8, "model": "vit_toy",
       "size": 32, "sampling": "stride", "batch_size": 16, "lr": 1e-3, "min_lr": 1e-6, "workers": 2,
       "log_every": 50, "gpus": 1}  # fmt: skip
# Classes and sampling of Sec. 4; the training lists' videos, of which --plan counts the steps.
SSV2 = {"train_clips": 168913, "num_classes": 174, "sampling": "segments"}
K400 = {"train_clips": 241258, "num_classes": 400, "sampling": "stride"}
# An evaluation takes 16 frames of each video: after each epoch of 2-frame clips it would read about
# as many frames as the epoch.
# DECISION (memory): Table 7's "per-GPU batch size".
PRETRAIN = {"eval_every": 50, "micro_batch": 16}
# VideoMAE's fine-tuning, which Sec. 4 follows: 384 videos a step, which its rule for the rate
# counts, of 2 clips each.
FINETUNE = {"stages": "", "frames": 16, "batch_size": 768, "micro_batch": 4, "repeated": "2",
            "lr": 5e-4 * 384 / 256, "min_lr": 1e-6 * 384 / 256, "warmup_epochs": 5.0,
            "beta2": 0.999, "layer_decay": 0.75, "drop_path": 0.1, "label_smoothing": 0.1,
            "mixup": 0.8, "cutmix": 1.0, "rand_augment": 7.0, "erase": 0.25}  # fmt: skip

# A recipe replaces defaults of Config, which are Sec. 4's pretraining. One whose stages are "", as
# FINETUNE's are, fine-tunes.
RECIPES = {
    # DECISION (target): a small model needs long to learn the normalised one. It learns nothing at
    # 90 % of so few places.
    "toy": TOY | {"stages": "2:25,4:25,8:50", "budget": 8, "budget_frames": 8, "warmup_epochs": 0.4,
                  "mask_ratio": 0.75, "target": "pixels", "search_frames": "2,4,8", "eval_every": 2,
                  "repeated": "2", "then": "toy_ft"},
    "toy_ft": TOY | {"stages": "", "frames": 8, "epochs": 3, "lr": 2e-3, "warmup_epochs": 0.3,
                     "beta2": 0.999},
    "ssv2": SSV2 | PRETRAIN,
    "k400": K400 | PRETRAIN | {"budget": 1600},  # Table 1
    # VideoMAE itself: one stage; with this loader, AVION's Sec. 5.5
    "videomae_k400": K400 | PRETRAIN | {"stages": "16:100", "budget": 800, "batch_size": 2048,
                                        "lr": 1.5e-4 * 2048 / 256, "min_lr": 1e-5 * 2048 / 256},
    # Sec. 5.3; DECISION (views)
    "ssv2_ft": SSV2 | FINETUNE | {"epochs": 30, "test_views": "2x3"},
    # Table 3, ImageNet-21k; DECISION (blocks): learned positions
    "ssv2_sup": SSV2 | FINETUNE | {"epochs": 30, "test_views": "2x3", "positions": "learned"},
    # DECISION (sizes). VideoMAE's others on K400: S 150 epochs; L 35, rate 2e-3 per 256 videos; H
    # 50, 1e-3, drop path 0.2 and head dropout 0.5.
    "k400_ft": K400 | FINETUNE | {"epochs": 75, "test_views": "5x3", "flip": True},
}  # fmt: skip


@dataclass
class Config(common.RunConfig):
    task: str = opt(
        "train",
        "what to do with it",
        ["train", "eval", "predict", "features", "search_schedule"],
        free=True,
    )
    init: str = opt(
        "",
        "ours, VideoMAE's .pth, a hub folder, a ViT's .npz; random: none (eval: ours, or best.pt)",
    )
    then: str = opt("", "recipe to follow, in <out>_ft", ["", "toy_ft", "ssv2_ft", "k400_ft"], True)
    then_train_list: str = opt("", "its training videos; empty: the same lists", free=True)
    then_val_list: str = opt("", "its validation videos", free=True)
    then_data_root: str = opt("", "folder that its lists' paths are relative to", free=True)
    then_micro_batch: int = opt(
        0, "its --micro-batch; 0: its recipe's, and at most this run's", free=True
    )
    then_of: str = opt("", "set by --then: a digest of the pretraining that the weights are from")

    model: str = opt("vit_b", "encoder size", choices=list(MODELS))
    backbone: str = opt("joint", "kind of attention (Table 3)", ["joint", "divided", "trajectory"])
    decoder: str = opt("", "layers x width of the decoder, such as 4x512; empty: the model's own")
    positions: str = opt("sinusoid", "learned: as image ViTs have", ["sinusoid", "learned"])
    # DECISION (budget): Table 4's best
    stages: str = opt("2:25,4:25,8:25,16:25", "frames:percent of the budget; empty: fine-tuning")
    budget: float = opt(400.0, "epochs of --budget-frames a clip (Sec. 4)", within="(0, 1e6]")
    budget_frames: int = opt(16, "frames of a clip in the budget (Sec. 3.2.1)", within="(0, 1e6]")
    cycle: str = opt(
        "long", "each stage once, or in many short rounds (Table 5)", ["long", "short"]
    )
    order: str = opt("progressive", "order of the stages (Table 5)", ["progressive", "random"])
    lr_cycles: int = opt(
        0, "cycles of the learning rate; 0: one a stage; of --cycle short one in all (Table 6)"
    )
    decay: str = opt("cosine", "how a cycle's learning rate falls (Table 6)", ["cosine", "step"])
    stage_batch: str = opt(
        "", "each stage's batch: 512,512,512,1024; empty: --batch-size (Table 7)"
    )
    stage_lr: str = opt("", "peak rate of each stage; empty: --lr x its batch / --batch-size")
    repeated: str = opt("1", "clips of a video from one decode, of each stage: 4,2,1,1 (Sec. 5.4)")
    search_frames: str = opt("2,4,8,12,16", "frames that search_schedule tries (Sec. 3.2.1)")
    search_stages: int = opt(4, "stages that it tries at most (Sec. 3.2.1)", within="[1, inf)")
    frames: int = opt(0, "frames a clip in fine-tuning")
    size: int = opt(224, "height and width of a clip, in pixels (Sec. 4)")
    sampling: str = opt(
        "segments", "by --stride, or one a segment (Sec. 4)", ["stride", "segments"]
    )
    stride: int = opt(4, "frames from one of a clip to the next (VideoMAE)", within="[1, inf)")
    mask_ratio: float = opt(0.9, "share of places masked in all frames (Sec. 3.1)", within="[0, 1)")
    # DECISION (target)
    target: str = opt("normalized", "what is predicted of a patch", ["normalized", "pixels"])

    epochs: int = opt(0, "passes over the training list in fine-tuning")
    batch_size: int = opt(
        1024, "clips a step, of all ranks and repeats (Sec. 4)", within="[1, inf)"
    )
    # DECISION (lr): VideoMAE's rule
    lr: float = opt(
        1.5e-4 * 1024 / 256, "peak rate, as used: not scaled by --batch-size", within="(0, inf)"
    )
    min_lr: float = opt(1e-5 * 1024 / 256, "where --lr's cosine ends (VideoMAE)")
    warmup_epochs: float = opt(40.0, "epochs of budget or fine-tuning that warm up (Sec. 4)")
    weight_decay: float = opt(0.05, "AdamW's weight decay (Sec. 4)")
    beta2: float = opt(0.95, "AdamW's second beta (VideoMAE)", within="[0, 1)")
    layer_decay: float = opt(
        1.0, "a layer's rate over the next one's (VideoMAE)", within="(0, inf)"
    )
    clip_grad: float = opt(0.0, "largest gradient norm; 0: any (VideoMAE)")
    drop_path: float = opt(
        0.0,
        "stochastic depth of the last block in fine-tuning, rising linearly (VideoMAE)",
        within="[0, 1)",
    )
    head_dropout: float = opt(0.0, "dropout before the head (VideoMAE: 0.5 for H)", within="[0, 1)")
    label_smoothing: float = opt(0.0, "share of a label that all get (VideoMAE)", within="[0, 1)")
    mixup: float = opt(0.0, "Beta parameter of mixup; 0: off (VideoMAE)")
    cutmix: float = opt(0.0, "Beta parameter of cutmix; 0: off (VideoMAE)")
    rand_augment: float = opt(0.0, "its magnitude, 4 layers; 0: off (VideoMAE)", within="[0, 10]")
    erase: float = opt(0.0, "probability of random erasing (VideoMAE)", within="[0, 1)")
    crop: bool = opt(True, "multi-scale crops, in fine-tuning random resized ones (VideoMAE)")
    flip: bool = opt(False, "random left-right flips in training (VideoMAE: K400's fine-tuning)")
    test_views: str = opt("1x1", "clips x crops a video of the last evaluation (Sec. 4)")

    eval_every: int = opt(
        1,
        "a stage's epochs between evaluations; its end (in a short cycle: the run's) is one too",
        within="[1, inf)",
    )
    gpus: int = opt(64, "GPUs that --plan counts memory for (Sec. 4)", free=True, within="[1, inf)")
    clips_per_second: float = opt(
        0.0, "measured at the longest stage (log.jsonl), for the hours of --plan", free=True
    )

    @property
    def pretraining(self):
        """Whether it is pretraining, in stages; or else fine-tuning, in epochs."""
        return self.stages != ""


# ---- The paper's ideas ---------------------------------------------------------------------------


def plan_stages(text, budget, full=16, ordered=True):
    """Sec. 3.2.1: "2:25,4:25,8:25,16:25" (frames:percent) as a list of (frames, percent, epochs).

    budget: in epochs of clips of `full` frames. Frames alone, "2,4,16", share it evenly (Table 4).
    ValueError: text of another form, shares that don't sum to 100, frames that the tubelet doesn't
    divide (1 aside), frames that don't rise although `ordered`, a stage of no epoch.
    """
    parts = text.split(",")
    rows = []
    try:
        for part in parts:
            frames, colon, percent = part.partition(":")
            rows.append((int(frames), float(percent) if colon else 100 / len(parts)))
    except ValueError:
        raise ValueError(
            "not frames:percent,frames:percent, such as 2:25,4:25,8:25,16:25"
        ) from None
    lengths, shares = zip(*rows, strict=True)
    whole = sum(shares)
    if not abs(whole - 100) < 0.05 or min(shares) <= 0:  # 0.05: thirds are written 33.33
        raise ValueError(f"the percentages must be above 0 and sum to 100, not {whole:g}")
    if ordered and any(a >= b for a, b in pairwise(lengths)):
        raise ValueError(
            "the numbers of frames must rise from stage to stage, unless --order is random"
        )
    stages = []
    for frames, percent in rows:
        if frames < 1 or (frames > 1 and frames % TUBELET):
            raise ValueError(
                f"{frames} frames are not a multiple of the token's {TUBELET} (a single one is "
                "repeated)"
            )
        # DECISION (budget): whole epochs
        epochs = math.floor(percent / 100 * budget * full / frames + 0.5)
        if not epochs:
            raise ValueError(
                f"{percent:g} % of --budget {budget:g} is no epoch of {frames} frames "
                "after rounding"
            )
        stages.append((frames, percent, epochs))
    return stages


class Stage(NamedTuple):
    """C_i = {f_i, p_i, R_i} of Sec. 3.2, and what follows from them. Fine-tuning has one stage."""

    frames: int  # f_i, of a clip
    percent: float  # p_i, of the budget
    epochs: int  # of the budget: as many clips as the list has videos; in fine-tuning: passes
    batch: int  # clips a step, R_i with the rate
    lr: float  # peak learning rate
    repeated: int  # clips of a video from one decode
    epoch_steps: int  # of a pass over the list, `repeated` clips a video: the log's epoch
    steps: int  # in all its segments


class Segment(NamedTuple):
    """Steps `start` to `stop` of a run, all of one stage, of which `offset` were done before.

    The paper's uniform schedule on SSv2 (--recipe ssv2), whose every stage sees as many frames:

        stage                  0           1       2     3
        frames                 2           4       8    16
        epochs               800         400     200   100
        steps            131,200      65,600  32,800 16,400       of 1024 clips, 164 an epoch

        --cycle long    |----- 0 -----|-- 1 --|-- 2 --|-- 3 --|  4 segments, and as many
        first step      0             131,200 196,800 229,600    cycles of the learning rate

        --cycle short   |0  |1 |2|3|0  |1 |2|3|0  |1 |2|3 ...    100 rounds of 4 segments, and
        first step      0          2,460      4,920              one cycle of the learning rate

    The second round's first segment is (stage 0, start 2460, stop 3772, offset 1312): the run's
    step 2460 is step 1312 of stage 0, which counts its own steps and epochs, for its shuffling, its
    evaluations and the log. A segment changes the frames of a clip, the batch, the rate, the order
    of videos. It carries on with the weights, AdamW's moments, the loss scale, and its stage's
    count of steps.
    """

    stage: int
    start: int
    stop: int
    offset: int
    cycle: tuple  # (start, stop), in steps, of the learning-rate cycle that it is in


def random_order(progressive, seed, number):
    """The stages' order in round `number` of --order random: any but the `progressive` one."""
    for attempt in range(100):
        key = common.make_key(seed, number, attempt)
        order = common.permutation(key, "stages", len(progressive)).tolist()
        if order != progressive:  # DECISION (random)
            break
    return order


def lay_out(steps, rounds=1, order="progressive", cycles=1, seed=0, frames=None):
    """The Segments of stages of steps[i] optimizer steps each, in the order they are run.

    rounds (Table 5): 1 is the long cycle, each stage once; more is the short cycle, in which every
    round has 1 / rounds of each. cycles (Table 6): how many learning-rate cycles the segments are
    cut into, as evenly as they can be. frames: of each stage, which tell the progressive order, the
    one that "random" leaves out; None: they rise.

        lay_out([4, 2], rounds=2):   stage  start  stop  offset  cycle
                                         0      0     2       0  (0, 6)
                                         1      2     3       0  (0, 6)
                                         0      3     5       2  (0, 6)
                                         1      5     6       1  (0, 6)
    """
    sequence = list(range(len(steps)))  # the stages of a round
    progressive = sorted(sequence, key=frames.__getitem__) if frames else sequence
    stretches = []  # (stage, start, stop, offset): a Segment but for its cycle
    start = 0
    for number in range(rounds):
        if order == "random" and len(steps) > 1:
            sequence = random_order(progressive, seed, number)
        for stage in sequence:
            offset = steps[stage] * number // rounds
            length = steps[stage] * (number + 1) // rounds - offset
            if length:
                stretches.append((stage, start, start + length, offset))
                start += length
    groups = {}  # the stretches of each learning-rate cycle
    for k, stretch in enumerate(stretches):
        groups.setdefault(k * cycles // len(stretches), []).append(stretch)
    segments = []
    for group in groups.values():
        cycle = group[0][1], group[-1][2]  # from its first one's start to its last one's stop
        segments += [Segment(*stretch, cycle) for stretch in group]
    return segments


def learning_rate(step, cycle, peak, floor, warmup, decay="cosine"):
    """Learning rate of a run's `step` in a cycle (start, stop): linear from 0 over the share
    `warmup` of it, then falling from `peak`: by a cosine to `floor`, or in steps."""
    done = step - cycle[0]
    length = cycle[1] - cycle[0]
    if decay == "cosine" or done < warmup * length:  # cosine has the warm-up of both
        return common.cosine(done, length, warmup * length, peak, floor)
    return peak * 0.1 ** (3 * done // length)  # DECISION (step): thirds


def search_space(frames=(2, 4, 8, 12, 16), most=4, portions=(6.25, 12.5, 25.0, 50.0, 100.0)):
    """The schedules that Sec. 3.2.1 searches, as --stages strings, from few stages to many.

    1 to `most` stages of rising frames out of `frames`; portions that sum to 100 %. Pruned as the
    paper does: no single stage of fewer frames. DECISION (search): none at all that doesn't end at
    the full length.
    """
    *short, full = sorted(frames)
    space = []
    for n in range(most):
        for some in combinations(short, n):  # DECISION (search): and `full` behind them
            for shares in product(portions, repeat=n + 1):
                if sum(shares) == 100:
                    rows = zip((*some, full), shares, strict=True)
                    space.append(",".join(f"{length}:{share:g}" for length, share in rows))
    return space


def mae_loss(prediction, target):
    """Sec. 3.1: the mean squared error, a clip at a time: [B, R, P] twice -> [B]."""
    # DECISION (target): R, of the masked tokens alone
    return F.mse_loss(prediction.float(), target, reduction="none").mean((1, 2))  # [B]


def sample_clip(
    video,
    index,
    view,
    key,
    frames,
    sampling="segments",
    stride=4,
    crop=data.multi_scale_box,
    views=None,
):
    """(frames, box) to read of an open `video`, for a clip of `frames` frames (Sec. 4);
    data.ClipDataset's `plan`.

    sampling: K400's "stride", frames that far apart; SSv2's "segments", one of each of so many
    segments. views: None in training, a random start and a random box by `crop` (None: the centre);
    at test (clips, squares) of a video, of which this is number `view`, squares along the long side
    fastest.
    """
    info = video.info
    segmented = sampling == "segments"
    if views is None:
        if segmented:  # DECISION (repeated): `key` is another for each clip of a video
            chosen = data.segment_frames(info, frames, uniform(key, "start", frames).numpy())
        else:  # DECISION (stride): the same at every length
            chosen = data.stride_frames(info, frames, stride, uniform(key, "start").item())
        box = crop(info, key) if crop else data.centre_box(info)
    else:
        clip, square = divmod(view, views[1])
        if segmented:
            chosen = data.segment_frames(info, frames, clip / views[0] if views[0] > 1 else 0.5)
        else:
            chosen = data.view_frames(info, frames, stride, clip, views[0])
        box = data.crop_box(info, square, views[1])
    if frames == 1:  # DECISION (single)
        chosen = chosen * TUBELET
    return chosen, box


def augment(clips, keys, rand_augment, flip, erase):
    """VideoMAE's augmentation of fine-tuning, on the device: uint8 [B, T, C, H, W] -> the same.
    No recipe has any in pretraining. keys: int64 [B], on the CPU."""
    if rand_augment:
        clips = data.rand_augment(clips, keys, rand_augment, layers=4)  # [B, T, C, H, W]
    if flip:
        clips = data.flip(clips, keys)  # [B, T, C, H, W]
    if erase:
        clips = data.erase(clips, keys, erase)  # [B, T, C, H, W]
    return clips


# ---- The model -----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Patch embedding, positions and blocks: what pretraining and fine-tuning share. Names follow
    VideoMAE's files."""

    def __init__(
        self,
        model="vit_b",
        frames=16,
        size=224,
        backbone="joint",
        drop_path=0.0,
        positions="sinusoid",
        attention="auto",
        grad_checkpoint=False,
    ):
        super().__init__()
        spec = MODELS[model]
        self.width = spec["width"]
        self.patch = TUBELET, spec["patch"], spec["patch"]
        self.kind = attention
        self.grad_checkpoint = grad_checkpoint
        # Tokens in (t, h, w) of the longest clip. A shorter one's positions are the first of them:
        # the table is one-dimensional, so that no stage has to interpolate it.
        self.grid = time_steps(frames), size // self.patch[1], size // self.patch[2]
        self.places = math.prod(self.grid[1:])
        self.num_tokens = math.prod(self.grid)
        self.patch_embed = nn.Linear(math.prod(self.patch) * 3, self.width)  # = VideoMAE's Conv3d
        self.joint = backbone == "joint"
        make = BLOCKS[backbone]
        self.blocks = nn.ModuleList()
        for i in range(spec["depth"]):
            rate = drop_path * i / (spec["depth"] - 1)
            block = make(self.width, spec["heads"], drop_path=rate, kind=self.kind, index=i)
            self.blocks.append(block)
        table = common.sinusoid_table(self.num_tokens, self.width)[None]  # [1, N, D]
        table = spec.get("position_scale", 1.0) * table  # [1, N, D]
        if positions == "learned":
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)

    def init_parameters(self):
        self.apply(common.init_linear)
        # PyTorch's default, as VideoMAE's convolution has it: Xavier's weights are larger,
        # beside which positions would stand out less.
        self.patch_embed.reset_parameters()
        for block in self.blocks:
            if isinstance(block, DividedBlock):
                # An image model's features at first, as TimeSformer's.
                nn.init.zeros_(block.temporal_fc.weight)

    def encode(self, patches, visible=None, keys=None):
        """0-255 patches [B, N, P] -> the last block's tokens [B, K, D] of the visible ones [B, K];
        None: of all.

        Patches are dropped before pixels are normalised and embedded: what is not looked at costs
        nothing. `keys` turns on drop path. Visible tokens must be the same places of all time steps
        (tubes), unless attention is joint.
        """
        x = self.embed(patches, visible)  # [B, K, D]
        more = []
        if not self.joint:
            more.append(patches.shape[1] // self.places)  # time steps
        return common.run_blocks(self.blocks, x, keys, self.grad_checkpoint, *more)  # [B, K, D]

    @common.region
    def embed(self, patches, visible=None):
        """The visible ones of patches [B, N, P] as tokens [B, K, D]."""
        positions = self.positions[:, : patches.shape[1]]  # [1, N, D]
        if visible is not None:
            patches = gather_tokens(patches, visible)  # [B, K, P]
            positions = gather_tokens(positions, visible)  # [B, K, D]
        x = data.normalize(patches, data.IMAGENET_MEAN, data.IMAGENET_STD)  # [B, K, P]
        x = self.patch_embed(x)  # [B, K, D]
        return x + positions.to(x.dtype)  # [B, K, D]

    def layer_of(self, name):
        """For common.param_groups: 0 the embedding, 1 ... depth the blocks, then what is above."""
        if name.startswith(("patch_embed", "positions")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return len(self.blocks) + 1


class VideoMAE(Encoder, Autoencoder):
    """Masked autoencoder of clips (Sec. 3.1), of any length up to `frames`. options: Encoder's.

        net = VideoMAE("vit_b")
        keys = common.make_key(seed, step, torch.arange(B))  # other masks in each step
        loss = mae_loss(*net(clips, keys, 0.9)).mean()       # clips uint8 [B, T, 3, 224, 224]

    clip -> patches [B, N, P] -> the visible 10 % -> Encoder -> their tokens [B, K, D]
                |                                                       |
                |                                + behind them mask tokens [B, K + R, D']
                v                                                       v
    target [B, R, P] of the masked 90 %     <- MSE ->      decoder's prediction [B, R, P]
    """

    def __init__(self, model="vit_b", decoder="", target="normalized", **options):
        super().__init__(model, **options)
        layers, width = map(int, (decoder or MODELS[model]["decoder"]).split("x"))
        self.target = target
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.encoder_to_decoder = nn.Linear(self.width, width, bias=False)
        token = torch.empty(1, 1, width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02))
        heads = 8 if width == 640 else max(1, width // 64)
        self.decoder = Decoder(layers, width, heads, self.patch_embed.in_features, self.kind)
        table = common.sinusoid_table(self.num_tokens, width)[None]  # [1, N, D']
        self.register_buffer("decoder_positions", table, persistent=False)
        self.init_parameters()
        # PyTorch's default: VideoMAE inits its encoder and decoder alone
        self.encoder_to_decoder.reset_parameters()

    def features(self, clips):
        """clips 0-255 [B, T, C, H, W] -> the normed tokens' mean [B, D]: nothing is masked."""
        return self.norm(self.encode(patchify(clips, self.patch))).mean(1)  # [B, D]

    def forward(self, clips, keys, ratio):
        """0-255 clips [B, T, C, H, W], keys int64 [B] -> prediction and target of the masked
        tokens, [B, R, P] each."""
        patches, visible, masked, target = self.split(clips, keys, ratio)
        tokens = self.norm(self.encode(patches, visible))  # [B, K, D]
        return self.decode(tokens, visible, masked), target  # decode: common.Autoencoder's

    @common.region
    def split(self, clips, keys, ratio):
        """-> patches [B, N, P]; which are visible [B, K], and masked [B, R]; their target
        [B, R, P]."""
        patches = patchify(clips, self.patch)  # [B, N, P]
        steps = patches.shape[1] // self.places
        visible, masked = common.tube_split(keys, steps, self.places, ratio)  # [B, K], [B, R]
        target = pixel_target(gather_tokens(patches, masked), self.target)  # [B, R, P]
        return patches, visible, masked, target


class Classifier(Encoder):
    """VideoMAE's fine-tuning: the encoder on all tokens, their mean, norm, one linear layer.
    options: Encoder's."""

    def __init__(self, num_classes, model="vit_b", head_dropout=0.0, **options):
        super().__init__(model, **options)
        self.head_dropout = head_dropout
        self.fc_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = nn.Linear(self.width, num_classes)
        # As in pretraining; VideoMAE's is N(0, 0.02), which its weights then replace.
        self.init_parameters()
        # VideoMAE's init_scale, so that all classes are alike at first; the toy's few steps can't
        # wait for that.
        nn.init.trunc_normal_(self.head.weight, std=MODELS[model].get("head_std", 0.02 * 0.001))

    def features(self, clips, keys=None):
        """clips 0-255 [B, T, C, H, W] -> the normed mean of all tokens [B, D]; keys: drop path."""
        return self.fc_norm(self.encode(patchify(clips, self.patch), keys=keys).mean(1))  # [B, D]

    def forward(self, clips, keys=None):
        """clips 0-255 [B, T, C, H, W], keys int64 [B] -> logits [B, classes]."""
        x = self.features(clips, keys if self.training else None)  # [B, D]
        if self.training and self.head_dropout:
            kept = uniform(keys, "head", self.width) >= self.head_dropout  # [B, D]
            x = x * kept / (1 - self.head_dropout)  # [B, D]
        return self.head(x)  # [B, classes]


# ---- Table 3's other backbones -------------------------------------------------------------------


class DividedBlock(Block):
    """TimeSformer's divided attention (Bertasius et al. 2021, Sec. 3.1), of the tokens that a tube
    mask leaves.

    A token, at place p of step t, first looks at its own place in all S time steps, then, from what
    that gave, at all places of its own step: S + K comparisons instead of S K.
        alpha^time_ptt'  = softmax_t'(q_pt . k_pt' / sqrt(d))
        alpha^space_ptp' = softmax_p'(q_pt . k_p't / sqrt(d))
    The mask keeps the same places in each step: both are plain attention over a grid [S, K], where
    K counts the places kept, and N = S K all tokens that are left.
    """

    branches = ("attn", "mlp", "attn.time")  # where drop path draws

    def __init__(self, dim, heads, kind="auto", **options):
        if kind != "plain":
            kind = "sdpa"  # flash-attn has no pieces: see common.SDPA_ROWS
        super().__init__(dim, heads, kind=kind, **options)
        self.temporal_norm = nn.LayerNorm(dim, eps=1e-6)
        self.temporal_attn = Attention(dim, heads, kind)  # of B K sequences, 12,544 of 64 clips
        self.temporal_fc = nn.Linear(dim, dim)

    def forward(self, x, keys=None, steps=1):
        B, N, D = x.shape
        x = self.add_time(x, keys, steps)  # [B, N, D]
        if keys is not None:  # all steps of a clip drop the same branches
            keys = keys.repeat_interleave(steps)  # [B S]
        # Over space, each step is to a Block a clip by itself.
        return super().forward(x.reshape(B * steps, -1, D), keys).reshape(B, N, D)

    @common.region
    def add_time(self, x, keys, steps):
        """[B, N, D] with the branch of attention over time added."""
        B, N, D = x.shape
        grid = self.temporal_norm(x).unflatten(1, (steps, -1))  # [B, S, K, D]
        time = self.temporal_attn(grid.transpose(1, 2).flatten(0, 1))  # [B K, S, D]
        time = time.unflatten(0, (B, -1)).transpose(1, 2).reshape(B, N, D)  # [B, N, D]
        time = self.temporal_fc(time)  # [B, N, D]
        return x + common.drop_path(time, self.rate, keys, self.purposes[2])  # [B, N, D]


class TrajectoryAttention(Attention):
    """MotionFormer's trajectory attention (Patrick et al. 2021, Sec. 3.2), [B, N, D] -> [B, N, D]
    in S time steps; N = S K tokens are left by the mask, K in each step.

    1. Along space: where is the point that token (s, t) shows, in each other time step t'? Softmax
       runs over the places of one step at a time, so that every step answers:
       y_stt' = sum_s' v_s't' softmax_s'(q_st . k_s't').
    2. Along the trajectory y_st1 ... y_stS, by new projections, queried from its own step:
       z_st = sum_t' W_v y_stt' softmax_t'(W_q y_stt . W_k y_stt').
    """

    def __init__(self, dim, heads, kind="auto"):
        # Step 2 has B N sequences of one query: more than flash-attn takes, and nothing for it to
        # win (common.SDPA_ROWS).
        super().__init__(dim, heads, "plain" if kind == "plain" else "sdpa")
        self.trajectory_q = nn.Linear(dim, dim)
        self.trajectory_kv = nn.Linear(dim, 2 * dim)

    def forward(self, x, steps=1):
        B, N, D = x.shape
        S, K, H, d = steps, N // steps, self.heads, D // self.heads
        q, k, v = self.project(x)  # [B, N, H, d] each
        # Each step is asked by all tokens.
        q = q[:, None].expand(-1, S, -1, -1, -1).flatten(0, 1)  # [B S, N, H, d]
        k = k.reshape(B * S, K, H, d)  # [B S, K, H, d]
        v = v.reshape(B * S, K, H, d)  # [B S, K, H, d]
        y = attention(q, k, v, self.kind).reshape(B, S, S, K, D)  # [B, S (t'), S (t), K, D]
        own = y.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)  # [B, S (t), K, D]: y_stt
        q = self.trajectory_q(own).reshape(B * N, 1, H, d)  # [B N, 1, H, d]
        kv = self.trajectory_kv(y).permute(0, 2, 3, 1, 4)  # [B, S (t), K, S (t'), 2D]
        kv = kv.reshape(B * N, S, 2, H, d)  # [B N, S, 2, H, d]
        z = attention(q, *kv.unbind(2), kind=self.kind)  # [B N, 1, H, d]
        return self.proj(z.reshape(B, N, D))  # [B, N, D]


class TrajectoryBlock(Block):
    """A block with trajectory attention in the place of joint attention."""

    def __init__(self, dim, heads, kind="auto", **options):
        super().__init__(dim, heads, kind=kind, **options)
        self.attn = TrajectoryAttention(dim, heads, kind)


BLOCKS = {
    "joint": Block,
    "divided": DividedBlock,
    "trajectory": TrajectoryBlock,
}  # DECISION (blocks)


# ---- Weights -------------------------------------------------------------------------------------


def image_weights(image, net, path):
    """An image ViT's weights (common.vit_weights, from `path`) as a video model takes them: all
    time steps share its positions, and attention over time starts as the one over space."""
    own = net.state_dict()
    if "positions" not in own:
        raise UserError(
            f"{path}: an image ViT's weights bring their own positions: --positions learned"
        )
    weights = common.vit_for_video(image, net.patch[0], data.IMAGENET_MEAN, data.IMAGENET_STD)
    table = weights.pop("pos_embed")[:, 1:]  # [1, h w, D], without CLS
    places = table.shape[1]
    if places != net.places:
        raise UserError(f"{path}: its positions are {places} places, --size makes {net.places}")
    weights["positions"] = table.repeat(1, net.grid[0], 1)  # [1, N, D]
    for name, value in own.items():
        space = name.replace(".temporal_attn.", ".attn.").replace(".temporal_norm.", ".norm1.")
        if space != name and space in image:
            weights[name] = image[space]
        if name.endswith("trajectory_kv.weight"):  # DECISION (trajectory)
            keys, values = value.chunk(2)  # [D, D] each
            weights[name] = torch.cat([keys, torch.eye(len(values)).to(values)])  # [2D, D]
    return weights


def init_weights(path, net):
    """A file's weights for `net`: ours, VideoMAE's, or an image ViT's for a classifier with learned
    positions.

    Fine-tuning leaves out the decoder, VideoMAE's final norm (fc_norm takes its place), and a
    classifier of another number of classes. UserError: weights of another backbone.
    """
    own = net.state_dict()
    state = common.read_weights(path)
    image = common.vit_weights(state)
    if image:
        weights = image_weights(image, net, path)
    else:
        weights = common.videomae_weights(state)
        if "pos_embed" in weights:
            weights["positions"] = weights.pop("pos_embed")  # upstream's name of learned ones
    theirs = block_parts(weights)
    other = theirs - block_parts(own)
    if not image:  # an image ViT may lack parts: attention over time
        other = theirs ^ block_parts(own)
    if theirs and other:
        raise UserError(
            f"{path}: weights of another backbone than this --backbone (by {min(other)})"
        )
    if isinstance(net, Classifier):
        unused = ["decoder.", "encoder_to_decoder.", "mask_token", "norm.", "cls_token"]
        head = own["head.weight"]
        if weights.get("head.weight", head).shape != head.shape:
            unused.append("head.")
        weights = {name: x for name, x in weights.items() if not name.startswith(tuple(unused))}
    return weights


def block_parts(weights):
    """The names of a block's weights: "norm1.bias" and so on, by which backbones differ."""
    return {name.split(".", 2)[2] for name in weights if name.startswith("blocks.")}


def videomae_state(net):
    """The model's weights as upstream VideoMAE's file has them: its names, the embedding as a
    Conv3d's."""
    state = {}
    for name, tensor in net.state_dict().items():
        if name == "patch_embed.weight":
            tensor = common.linear_to_conv(tensor, net.patch)  # [D, 3, p_t, p_h, p_w]
        if isinstance(net, VideoMAE) and name.startswith(("patch_embed", "blocks", "norm")):
            name = f"encoder.{name}"
        name = name.replace("patch_embed.", "patch_embed.proj.").replace("positions", "pos_embed")
        state[name] = tensor
    return state


# ---- From flags to model and stages --------------------------------------------------------------


def time_steps(frames):
    """Tokens in time of so many frames; a single frame fills a tubelet."""
    return math.ceil(frames / TUBELET)


def build(cfg, num_classes, frames=0):
    """The model of a Config, for clips of up to `frames`; 0: its longest."""
    options = {
        "model": cfg.model,
        "frames": frames or longest(cfg),
        "size": cfg.size,
        "backbone": cfg.backbone,
        "attention": cfg.attention,
        "grad_checkpoint": cfg.grad_checkpoint,
    }
    if cfg.pretraining:
        return VideoMAE(decoder=cfg.decoder, target=cfg.target, **options)
    options |= {"drop_path": cfg.drop_path, "positions": cfg.positions}
    return Classifier(num_classes, head_dropout=cfg.head_dropout, **options)


def stage_rows(cfg):
    """(frames, percent, epochs) of each stage; fine-tuning has one."""
    if not cfg.pretraining:
        return [(cfg.frames, 100.0, cfg.epochs)]
    try:
        return plan_stages(cfg.stages, cfg.budget, cfg.budget_frames, cfg.order == "progressive")
    except ValueError as error:
        raise UserError(f"--stages {cfg.stages}: {error}") from None


def longest(cfg):
    """Frames of the longest clip."""
    return max(frames for frames, _, _ in stage_rows(cfg))


def one_each(flag, text, count, kind):
    """Values of a comma-list flag, one a stage; a single one is for all."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, count) or not all(0 < value < math.inf for value in values):
        raise UserError(
            f"{flag} {text}: not one number above 0, or one for each of {count} stages, with commas"
        )
    return values * (count // len(values))


def schedule(cfg, n):
    """(Stages, Segments) of a run on n training videos."""
    rows = stage_rows(cfg)
    batch_sizes = cfg.stage_batch or str(cfg.batch_size)
    batches = one_each("--stage-batch", batch_sizes, len(rows), int)
    repeats = one_each("--repeated", cfg.repeated or "1", len(rows), int)
    if cfg.stage_lr:
        rates = one_each("--stage-lr", cfg.stage_lr, len(rows), float)
    else:
        rates = [cfg.lr * batch / cfg.batch_size for batch in batches]  # DECISION (lr)
    source = "--train-clips" if cfg.plan else cfg.train_list
    stages = []
    for row, batch, lr, repeated in zip(rows, batches, rates, repeats, strict=True):
        if batch % repeated:
            raise UserError(
                f"--repeated {cfg.repeated}: a batch of {batch} clips is no whole number of videos; "
                "--repeated 1 takes one clip of each"
            )
        epoch_steps = common.steps_of_epoch(source, n, batch, repeated)
        steps = row[2] * epoch_steps  # row[2]: epochs
        if cfg.pretraining:
            # The budget counts clips, of which a pass shows `repeated` a video; fine-tuning's
            # epochs are passes (VideoMAE).
            steps = max(1, round(steps / repeated))
        stages.append(Stage(*row, batch, lr, repeated, epoch_steps, steps))
    if cfg.max_steps:
        stages = shorten(stages, cfg.max_steps)
    rounds = 1
    cycles = len(stages)
    if cfg.cycle == "short":
        rounds = min(stage.epochs for stage in stages)  # DECISION (rounds)
        cycles = 1
    cycles = cfg.lr_cycles or cycles
    frames = [stage.frames for stage in stages]
    steps = [stage.steps for stage in stages]
    segments = lay_out(steps, rounds, cfg.order, cycles, cfg.seed, frames)
    if cycles > len(segments):
        raise UserError(
            f"--lr-cycles {cycles} are more than the {len(segments)} segments that share them out"
        )
    return stages, segments


def shorten(stages, max_steps):
    """The Stages with so many steps in all, shared out as before."""
    short = []
    total = sum(stage.steps for stage in stages)
    done = 0  # steps of the stages before, in the whole schedule
    for stage in stages:
        first = round(max_steps * done / total)
        done += stage.steps
        steps = round(max_steps * done / total) - first
        if not steps:
            raise UserError(
                f"--max-steps {max_steps} leaves one of {len(stages)} stages without a step"
            )
        short.append(stage._replace(steps=steps))
    return short


def of_stage(cfg, stage, ranks):
    """The Config with a stage's --batch-size and a --micro-batch that is no more than a rank's."""
    micro = min(cfg.micro_batch, stage.batch // ranks)  # 0 stays 0: all of the rank's
    return replace(cfg, batch_size=stage.batch, micro_batch=micro)


def micro_batch_of(cfg, stage, ctx):
    """(clips of a micro-batch, accumulation steps) of a stage on this rank."""
    return common.micro_batches(of_stage(cfg, stage, ctx.world), ctx, stage.repeated)


def clips_of(cfg, videos, frames, views=None, repeated=1, number=0):
    """The clips of a list: random ones to train on in stage `number`, `repeated` of a video from
    one decode; or the `views`, (clips, squares), of each video."""
    crop = data.multi_scale_box if cfg.pretraining else data.random_resized_box
    sample = partial(
        sample_clip,
        frames=frames,
        sampling=cfg.sampling,
        stride=cfg.stride,
        crop=crop if cfg.crop else None,
        views=views,
    )
    training = views is None
    seed = cfg.seed
    if training:
        seed = common.make_key(seed, "stage", number).item()
    else:
        repeated = math.prod(views)
    return data.ClipDataset(
        videos, sample, cfg.size, seed, replace=training, views=repeated, frames=frames
    )


def test_clips(cfg, videos, views=(1, 1)):
    """The `views`, (clips, squares), of each video of a list, at full length."""
    return clips_of(cfg, videos, longest(cfg), views)


# ---- Evaluation and pictures ---------------------------------------------------------------------


@torch.no_grad()
def write_recon(net, clips, keys, mask_ratio, path):
    """Write path.png, path_animated.png: what the encoder saw of clips, and what the decoder made
    of the rest."""
    patches, visible, masked, _ = net.split(clips, keys, mask_ratio)
    prediction, _ = net(clips, keys, mask_ratio)  # [B, R, P]
    grid = clips.shape[1] // TUBELET, *net.grid[1:]  # of this many frames
    data.write_reconstruction(
        path, patches, visible, masked, prediction, net.target, net.patch, grid, fps=5
    )


@torch.no_grad()
def evaluate_masked(net, batches, found, mask_ratio, draw=None):
    """Add to `found`, a common.Evaluation, a pretrained model's masked error.

    net: in eval mode. batches: test clips, see data.test_batches. draw(net, clips, keys), once: of
    the first ones.
    """
    for batch in batches:
        keys = batch.keys.to(batch.clips.device)  # [B]
        prediction, target = net(batch.clips, keys, mask_ratio)  # [B, R, P] each
        found.add("mae", mae_loss(prediction, target))
        if draw:
            draw(net, batch.clips[:4], keys[:4])
            draw = None


@torch.no_grad()
def evaluate_classes(net, batches, found, views):
    """Add to `found` a classifier's top-1 and top-5 in %, where the softmax of a video's views is
    averaged (Sec. 4). net, batches: see `evaluate_masked`. views: their number a video."""
    for batch in batches:
        logits = net(batch.clips)  # [V B, classes]
        shares = logits.float().softmax(-1)  # [V B, classes]
        shares = shares.unflatten(0, (views, -1)).mean(0)  # [B, classes]
        found.add_hits(shares, batch.labels[: len(shares)])


# ---- The plan ------------------------------------------------------------------------------------


def visible_places(cfg, net):
    """Places of a time step that the encoder sees."""
    if not cfg.pretraining:
        return net.places
    return net.places - int(cfg.mask_ratio * net.places)


def count_gmacs(cfg, classes, frames):
    """GMACs of a clip's forward pass, of this model, and as VideoMAE has it, which embeds all
    patches: a pair. The difference is added: masked tokens x pixels x width."""
    with torch.device("meta"):
        net = build(cfg, classes, frames)
    steps = net.grid[0]
    ratio = [cfg.mask_ratio] if cfg.pretraining else []
    gmacs = common.clip_macs(net, steps * net.patch[0], cfg.size, *ratio)
    masked = steps * (net.places - visible_places(cfg, net))
    return gmacs, gmacs + masked * net.patch_embed.weight.numel() / 1e9


def memory(cfg):
    """A common.Phase of each stage."""
    with torch.device("meta"):
        net = build(cfg, cfg.num_classes or 2)
    word = "pretraining" if cfg.pretraining else "fine-tuning"
    flag = "--then-micro-batch" if cfg.then_of else "--micro-batch"
    phases = []
    for stage in schedule(cfg, cfg.train_clips)[0]:
        steps = time_steps(stage.frames)
        tokens = steps * net.places
        pixels = common.pixel_bytes(cfg.rand_augment or cfg.erase, cfg.mixup)
        pixels *= tokens * net.patch_embed.in_features
        extra = [] if net.joint else [None, steps]
        passed = [(net.blocks, (steps * visible_places(cfg, net), net.width), *extra)]
        if cfg.pretraining:
            pixels *= 2  # as much again: the prediction in half precision and float32, its gradient
            passed.append((net.decoder.blocks, (tokens, net.encoder_to_decoder.out_features)))
        name = f"{word} on {stage.frames} frames"
        own = of_stage(cfg, stage, cfg.gpus)
        phase = common.plan_phase(own, name, net, pixels, passed, stage.repeated)
        phases.append(phase._replace(flag=flag))
    return phases


def print_plan(cfg):
    """What would run, counted on the model itself: no data, no GPU, no training (--plan)."""
    stages, segments = schedule(cfg, cfg.train_clips)
    classes = cfg.num_classes or 2
    full = cfg.budget_frames if cfg.pretraining else cfg.frames
    with torch.device("meta"):
        net = build(cfg, classes)
    print_model(cfg, net, segments)
    common.print_memory(cfg, memory(cfg))
    print(
        "\nframes percent  epochs    steps  batch       lr repeated visible tokens    GMACs",
        "embedded    PMACs   hours",
    )
    lengths = {full, *(stage.frames for stage in stages)}
    macs = {frames: np.array(count_gmacs(cfg, classes, frames)) for frames in lengths}

    per_hour = 3600 * cfg.clips_per_second * macs[longest(cfg)][0] / 1e6  # PMACs, measured
    hours = lambda pmacs: f"{pmacs / per_hour:.1f}" if per_hour else "-"
    totals = np.zeros(2)  # PMACs of all clips' forward passes, as count_gmacs has them
    total_frames = 0
    loads = []
    for stage in stages:
        clips = stage.steps * stage.batch
        gmacs, embedded = macs[stage.frames]
        costs = clips * macs[stage.frames] / 1e6
        totals += costs
        total_frames += clips * stage.frames
        loads.append((stage.frames, (4 if cfg.grad_checkpoint else 3) * gmacs, stage.repeated))
        in_time = time_steps(stage.frames)
        print(
            f"{stage.frames:6} {stage.percent:7.2f} {stage.epochs:7} {stage.steps:8} "
            f"{stage.batch:6} {stage.lr:8.3g} {stage.repeated:8} "
            f"{in_time * visible_places(cfg, net):7} {in_time * net.places:6} "
            f"{gmacs:8.3f} {embedded:8.3f} {costs[0]:8.3f} {hours(costs[0]):>7}"
        )
    print(
        f"total     {segments[-1].stop} steps, {totals[0]:.3f} PMACs, {hours(totals[0])} hours "
        "by --clips-per-second. GMACs: multiply-adds of a clip, forward (a training step: 3 times "
        "that); embedded: with all patches embedded"
    )
    data.print_cores(loads)
    if cfg.pretraining:
        print_saving(full, total_frames, totals, macs[full])


def print_model(cfg, net, segments):
    """Parameters, and how the stages are laid out."""
    decoder = common.millions(net, starts=("decoder", "encoder_to", "mask"))
    cycles = len({segment.cycle for segment in segments})
    print(
        f"model     {cfg.model}, {cfg.backbone} attention: {common.millions(net):.1f} M "
        f"parameters, {decoder:.1f} M of them the decoder's\n"
        f"schedule  {len(segments)} segments ({cfg.cycle} cycle, {cfg.order}), {cycles} "
        f"learning-rate cycles ({cfg.decay}); {cfg.train_clips} videos"
    )


def print_saving(full, frames, totals, gmacs):
    """What `totals` PMACs on so many frames save against clips of `full` frames only, of `gmacs`
    each."""
    for times, words in ((1, "equal frames"), (2, "twice the frames, the paper's comparison")):
        clips = times * frames / full
        less, embedded = 100 - 1e8 * totals / (clips * gmacs)
        print(
            f"against   {full} frames only at {words}: {less:.1f} % fewer multiply-adds, "
            f"embedded {embedded:.1f} %"
        )


def print_plans(cfg):
    """--plan: what the command would run, one training after the other; of a search its schedules,
    and the longest's memory.

    No list, video or GPU is looked at.
    """
    if cfg.task == "search_schedule":
        trials = search_trials(cfg)
        print("\n".join(["schedules to search, as --stages:", *(trial.stages for trial in trials)]))
        for trial in (trials[0], following(trials[0])):
            common.print_memory(trial, memory(trial))
        return
    print_plan(cfg)
    if cfg.then:
        print_plan(following(cfg))


# ---- The tasks -----------------------------------------------------------------------------------


def check(cfg):
    """Refuse settings that can't work, by the flag's name, before anything is read or made."""
    patch = MODELS[cfg.model]["patch"]
    common.check_flags(cfg, patch)
    places = (cfg.size // patch) ** 2
    whole, flag = cfg.epochs, "--epochs"
    if cfg.pretraining:
        whole, flag = cfg.budget, "--budget"
        if cfg.epochs or cfg.frames:
            raise UserError(
                "--stages decide frames and epochs: leave out --frames and --epochs, or --stages ''"
            )
        if cfg.positions == "learned":
            raise UserError(
                "--positions learned is for fine-tuning from an image model; "
                "pretraining has fixed ones"
            )
        if not int(cfg.mask_ratio * places):
            raise UserError(
                f"--mask-ratio {cfg.mask_ratio} must mask some of a frame's {places} places"
            )
    elif not cfg.epochs or not cfg.frames or cfg.frames % TUBELET:
        raise UserError(
            f"without --stages, --epochs {cfg.epochs} must be above 0 and --frames {cfg.frames} "
            f"a multiple of the token's {TUBELET} frames"
        )
    if cfg.warmup_epochs >= whole:
        raise UserError(f"--warmup-epochs {cfg.warmup_epochs:g} must be less than {flag} {whole:g}")
    common.check_decoder(cfg.decoder or MODELS[cfg.model]["decoder"])
    common.two_numbers("--test-views", cfg.test_views)
    stage_rows(cfg)
    common.need_init(cfg, ["ssv2_ft", "k400_ft"], "weights pretrained on videos")
    common.need_init(cfg, ["ssv2_sup"], "an image ViT's weights (.npz or hub folder)")
    if (cfg.then_train_list == "") != (cfg.then_val_list == ""):
        raise UserError("--then-train-list and --then-val-list need each other")
    if cfg.then:
        check(following(cfg))


def open_lists(cfg, ctx):
    """(training list, validation list, Stages, Segments) of a training; refuses what can't work
    before a folder is made."""
    data.need_lists(cfg, ctx)
    videos = data.VideoList(cfg.train_list, cfg.data_root, cfg.num_classes)
    if not cfg.pretraining:
        data.need_classes(videos)
    val_videos = data.VideoList(cfg.val_list, cfg.data_root, classes=videos.classes)
    root = "--then-data-root" if cfg.then_of and cfg.then_train_list else "--data-root"
    data.need_videos(val_videos, cfg.max_bad, root)
    stages, segments = schedule(cfg, len(videos))
    for stage in stages:
        micro_batch_of(cfg, stage, ctx)  # for what it refuses
    return videos, val_videos, stages, segments


def validate(cfg, ctx, net, videos, views=(1, 1), name="val", draw=None):
    """A pretrained model's masked error; a classifier's top-1 and top-5 in %, in `views`, (clips,
    squares), of each video. Every readable video of a list counts once, at any number of ranks;
    `unread` of them could not be, in one view or more."""
    found = common.Evaluation(len(videos), cfg.max_bad)
    clips = test_clips(cfg, videos, views)
    batches = data.test_batches(cfg, ctx, clips, found.failures)
    net.eval()
    with ctx.autocast():
        if cfg.pretraining:
            evaluate_masked(net, batches, found, cfg.mask_ratio, draw)
        else:
            evaluate_classes(net, batches, found, clips.views)
    net.train()
    return found.result(ctx, name)


def use(cfg, ctx):
    """--task eval, predict, features: a trained model, its shape read from its own checkpoint."""
    settings = (
        "model backbone decoder positions stages budget budget_frames order frames epochs "
        "warmup_epochs size sampling stride mask_ratio target seed"
    )

    def build_saved(own, state):
        check(own)
        return build(own, len(state["classes"])).to(ctx.device)

    cfg, net, state = common.open_trained(
        replace(cfg, then=""), "tpt_mae.py", settings.split(), ["classes"], build_saved
    )
    classes = state["classes"]
    if cfg.task == "predict":
        return predict(cfg, ctx, net, classes)
    if cfg.task == "features":
        videos = data.VideoList(cfg.val_list, cfg.data_root)  # its classes may be others
        features = lambda batch: net.features(batch.clips)  # the tokens' mean, [B, D]
        return data.write_features(cfg, ctx, test_clips(cfg, videos), features, net.width)
    videos = data.VideoList(cfg.val_list, cfg.data_root, classes=classes)
    views = "1x1" if cfg.pretraining else cfg.test_views  # the masked error is of one view
    result = validate(cfg, ctx, net, videos, common.two_numbers("--test-views", views))
    common.print_result(cfg, ctx, result, f", views {views}")


def predict(cfg, ctx, net, classes):
    """Print the likeliest classes of each --input video; a pretrained model's reconstructions are
    drawn."""
    videos = data.VideoList.of(cfg.input)
    clips = test_clips(cfg, videos)
    if not cfg.pretraining:
        shares = lambda batch: net(batch.clips).float().softmax(-1)  # [B, classes]
        return data.print_predictions(cfg, ctx, clips, shares, classes)
    failures = common.Failures(len(videos), 1.0)
    for number, batch in enumerate(data.test_batches(cfg, ctx, clips, failures)):
        path = Path(cfg.out) / f"predict_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with ctx.autocast():
            write_recon(net, batch.clips, batch.keys.to(ctx.device), cfg.mask_ratio, path)
        print(f"{path}: {', '.join(videos.video(i) for i in batch.index.tolist())}")
    if failures.new:
        raise UserError("; ".join(failures.new))


# What --then-of is a digest of. The order stays, so that folders of earlier versions can go on.
SETTINGS = (
    "recipe init then_of model backbone decoder positions stages budget budget_frames cycle "
    "order lr_cycles decay stage_batch stage_lr repeated search_frames search_stages frames "
    "size sampling stride num_classes mask_ratio target epochs max_steps batch_size lr min_lr "
    "warmup_epochs weight_decay beta2 layer_decay clip_grad drop_path head_dropout "
    "label_smoothing mixup cutmix rand_augment erase crop flip test_views seed eval_every "
    "log_every"
)


def following(cfg):
    """The Config of --then: that recipe, from this run's weights, in <out>_ft, at the full length,
    with this run's loader, precision and other flags of the machine.

    Its videos are this run's, or --then-train-list's (Table 1: pretrained on K400, fine-tuned on
    SSv2).
    """
    new = Config(recipe=cfg.then, **RECIPES[cfg.then])
    names = ["model", "backbone", "size", "seed", "num_classes"]
    names += [field.name for field in fields(cfg) if field.metadata["free"]]
    same = {name: getattr(cfg, name) for name in names}
    if cfg.then_train_list:
        same |= {"train_list": cfg.then_train_list, "val_list": cfg.then_val_list}
        same |= {"data_root": cfg.then_data_root, "train_clips": new.train_clips}
        same["num_classes"] = 0  # as many as that list has
    micro = [size for size in (new.micro_batch, cfg.micro_batch) if size]  # new's own
    settings = [getattr(cfg, name) for name in SETTINGS.split()]
    new = replace(new, **same)
    return replace(
        new,
        task="train",
        then="",
        resume="auto",
        init=f"{cfg.out}/last.pt",
        out=f"{cfg.out}_ft",
        frames=cfg.budget_frames if cfg.pretraining else cfg.frames,
        micro_batch=cfg.then_micro_batch or min(micro, default=0),
        clips_per_second=0.0,  # it was measured in pretraining
        # By this <out>_ft tells whose weights it has, and refuses to go on after another
        # pretraining.
        then_of=f"{common.make_key(repr(settings)).item():x}",
    )


def search_trials(cfg):
    """The Config of each schedule that --task search_schedule trains; first the full length
    alone."""
    if not cfg.then:
        raise UserError(
            "--task search_schedule ranks by fine-tuned accuracy: "
            "--then says which recipe fine-tunes"
        )
    try:
        lengths = [int(part) for part in cfg.search_frames.split(",")]
        space = search_space(lengths, cfg.search_stages)
    except ValueError:
        raise UserError(
            f"--search-frames {cfg.search_frames} is not a list such as 2,4,8,12,16"
        ) from None
    trials = [replace(cfg, task="train", stages=text) for text in space]
    for trial in trials:
        check(trial)
    return trials


def search_schedule(cfg, ctx):
    """Secs. 3.2.1, 3.2.2: train each schedule of search_space at this --budget, fine-tune it by
    --then, rank them. DECISION (search): batch and rate are not searched.

    Each has its folder, so that the same command goes on where it was stopped. The winner is
    printed as a flag.
    """
    ranking = []
    for trial in search_trials(cfg):
        folder = f"{cfg.out}/{trial.stages.replace(':', '-')}"
        result = train_then(replace(trial, out=folder), ctx)
        ranking.append((result["val_top1"], trial.stages))
    ranking.sort(key=lambda row: -row[0])
    if ctx.rank == 0:
        print("\n".join(f"{top1:6.2f} % top-1  --stages {text}" for top1, text in ranking))
        best = ranking[0][1]
        print(f"best of {len(ranking)}, at a budget of {cfg.budget:g} epochs: --stages {best}")
    return ranking


def train_then(cfg, ctx):
    """Train; then go on with --then's recipe from these weights. Returns the last evaluation."""
    if not cfg.then:
        return train(cfg, ctx)
    open_lists(following(cfg), ctx)  # what it would refuse, now
    train(replace(cfg, then=""), ctx)  # its model and optimizer are freed as it ends
    return train(following(cfg), ctx)


def train(cfg, ctx):
    """One training: pretraining in its stages, or fine-tuning. Returns its last evaluation."""
    videos, val_videos, stages, segments = open_lists(cfg, ctx)
    classes = len(videos.classes)
    total = segments[-1].stop
    counts = {"clips": 0, "frames": 0}
    run = common.Trainer(cfg, ctx, at=counts, train_list=videos, val_list=val_videos)
    torch.manual_seed(cfg.seed)  # for the initial weights; all later draws are keyed
    net = build(cfg, classes).to(ctx.device)
    if not run.state and cfg.init:
        run.say(common.load_weights(net, init_weights(cfg.init, net), cfg.init))
    groups = common.param_groups(
        net, cfg.weight_decay, cfg.layer_decay, net.layer_of, len(net.blocks), ("positions",)
    )
    # DECISION (carry): one optimizer for all stages
    optimizer = common.optimizer("adamw", groups, cfg.lr, (0.9, cfg.beta2))
    run.prepare(net, optimizer, classes=videos.classes)
    pixel_loss = common.compiled(mae_loss, ctx, cfg.compile)
    run.say(
        f"{len(videos)} training and {len(val_videos)} validation videos, {classes} classes; "
        f"{len(stages)} stages in {len(segments)} segments; {ctx.precision} on {ctx.device}; steps "
        f"{run.step} to {total}"
    )
    whole = cfg.budget if cfg.pretraining else cfg.epochs
    warmup = cfg.warmup_epochs / whole  # DECISION (warmup)

    for segment in segments:
        if segment.stop < run.step:  # done before this process started, its evaluation too
            continue
        stage = stages[segment.stage]
        begin_segment(cfg, ctx, run, videos, stage, segment, total)
        floor = cfg.min_lr * stage.lr / cfg.lr  # DECISION (lr)
        ends = cfg.cycle == "long" or segment.stop == total  # is this segment's end evaluated?

        if run.evaluation_due(ends):  # the run was stopped between a step and its evaluation
            evaluate_step(cfg, ctx, run, val_videos)
        # backward takes the mean over the step's clips, update clips and steps: common.Trainer.
        while run.step < segment.stop:
            step_key = cfg.seed, run.step
            lr = learning_rate(run.step, segment.cycle, stage.lr, floor, warmup, cfg.decay)
            for batch in run.micro_batches():
                # clips [B, T, C, H, W], augmented (begin_segment); labels [B, classes], soft.
                # These two lines are for fine-tuning: no recipe mixes clips in pretraining.
                labels = data.soft_labels(batch.labels, classes, cfg.label_smoothing)
                clips, labels = data.mix(batch.clips, labels, step_key, cfg.mixup, cfg.cutmix)
                keys = data.to_device(batch.keys, ctx.device)  # [B], for the mask and drop path
                with run.forward():
                    if cfg.pretraining:
                        prediction, target = run.model(clips, keys, cfg.mask_ratio)  # [B, R, P]
                        loss = pixel_loss(prediction, target)  # [B]
                    else:
                        logits = run.model(clips, keys)  # [B, classes]
                        loss = F.cross_entropy(logits.float(), labels, reduction="none")  # [B]
                run.backward(loss)
            run.update(lr)
            run.at["clips"] += stage.batch
            run.at["frames"] += stage.batch * stage.frames
            run.end_step(stage=segment.stage, clips=run.at["clips"], frames=run.at["frames"])
            if run.evaluation_due(ends):
                evaluate_step(cfg, ctx, run, val_videos)

    if ctx.rank == 0:
        common.save_atomic(run.folder / "videomae.pth", {"model": videomae_state(net)})
    result = "  ".join(f"{name} {value:.4g}" for name, value in run.at["last"].items())
    run.say(
        f"complete: {result}; best {abs(run.at['best']):.4g}. Weights in VideoMAE's format: "
        f"{run.folder}/videomae.pth. --overwrite starts anew."
    )
    run.save_due()  # a signal that came during the last evaluation: what comes after is not begun
    run.leave(total)
    return run.at["last"]


def begin_segment(cfg, ctx, run, videos, stage, segment, total):
    """Have `run` go on with a Segment, or with what is left of it: its clips, batches and
    epochs."""
    start = max(segment.start, run.step)
    zero = segment.start - segment.offset  # counted from here, steps are the stage's own
    micro, accumulation = micro_batch_of(cfg, stage, ctx)
    clips = clips_of(cfg, videos, stage.frames, repeated=stage.repeated, number=segment.stage)
    augmented = partial(augment, rand_augment=cfg.rand_augment, flip=cfg.flip, erase=cfg.erase)
    batches = data.training_batches(
        cfg, ctx, clips, stage.batch, micro, start - zero, segment.stop - zero, augmented
    )
    run.begin(
        batches, stage.batch, micro, stage.epoch_steps,
        stop=segment.stop, total=total, start=segment.start, epoch_zero=zero,
    )  # fmt: skip
    if start < segment.stop:
        run.say(
            f"steps {start} to {segment.stop}: {stage.frames}-frame clips; batch {stage.batch} = "
            f"{ctx.world} ranks x {micro} clips x {accumulation}; peak lr {stage.lr:g}"
        )


def evaluate_step(cfg, ctx, run, videos):
    """Validate the weights as they are; a fine-tuned model's last ones in --test-views too. Log and
    save."""
    draw = None
    if ctx.rank == 0:
        path = run.folder / "recon.png"
        draw = partial(write_recon, mask_ratio=cfg.mask_ratio, path=path)
    result = validate(cfg, ctx, run.net, videos, draw=draw)
    if run.step == run.total and cfg.test_views != "1x1" and not cfg.pretraining:
        views = common.two_numbers("--test-views", cfg.test_views)  # DECISION (views)
        result |= validate(cfg, ctx, run.net, videos, views, "test")
    metric = "val_mae" if cfg.pretraining else "val_top1"
    lower_is_better = cfg.pretraining
    run.evaluated(result, metric, lower_is_better, clips=run.at["clips"], frames=run.at["frames"])


@common.in_one_line
def main(cfg):
    check(cfg)
    searching = cfg.task == "search_schedule"
    if searching and not cfg.out:
        cfg = replace(cfg, out=f"runs/tpt_mae-{cfg.recipe}-search")  # beside the training's folder
    cfg = common.settled(cfg, "tpt_mae")
    if cfg.plan:
        return print_plans(cfg)
    ctx = common.launch(cfg.precision)
    if searching:
        return search_schedule(cfg, ctx)
    if cfg.task == "train":
        return train_then(cfg, ctx)
    return use(cfg, ctx)


if __name__ == "__main__":
    main(common.parse(Config, RECIPES))
