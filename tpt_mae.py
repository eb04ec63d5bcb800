"""Efficient VideoMAE via Temporal Progressive Training (TPT-MAE): self-supervised video pretraining, in one file.

VideoMAE hides 90 % of a clip's places in all of its frames and learns to paint them. Most of what it learns is spatial,
and 2 frames teach that for a tenth of the price of 16: so TPT spends its budget of frames in stages, on clips of 2,
then 4, 8 and 16 frames, each from the weights of the one before. Then the encoder is fine-tuned to classify.

    paper                                   here
    Sec. 3.1, the tube mask                 VideoMAE.forward, common.tube_split
    Sec. 3.1, encoder, decoder, MSE         Encoder, VideoMAE, pixel_target, mae_loss
    Sec. 3.2, C = {f_i, p_i, R_i}           plan_stages, schedule (--stages, --stage-batch, --stage-lr)
    Sec. 3.2.1, long and short cycle        lay_out (--cycle, --order; Table 5)
    Sec. 3.2.2, the search                  search_space, search_schedule (--task search_schedule)
    Sec. 4, sampling and views              sample_clip, evaluate (--test-views)
    Table 3, backbones                      DividedBlock, TrajectoryBlock (--backbone)
    Table 6, learning rate cycles           learning_rate (--lr-cycles, --decay)
    Table 7, batch a stage                  RECIPES, Config (--stage-batch)
    Sec. 5.4, reuse of decoded frames       sample_clip (--repeated)
    fine-tuning                             Classifier, following (recipes *_ft, --then)

    row of the paper                        flags
    Table 1, TPT-MAE, ViT-L, K400           --recipe k400 --model vit_l --then k400_ft
    Table 1, TPT-MAE, ViT-L, SSv2           --recipe ssv2_ft --model vit_l --init runs/tpt_mae-k400/last.pt
    Table 1, VideoMAE, ViT-L, K400          --recipe videomae_k400 --model vit_l --budget 1600 --then k400_ft
    Table 2, TPT-MAE                        --recipe ssv2 --then ssv2_ft
    Table 2, VideoMAE                       --recipe ssv2 --then ssv2_ft --stages 16:100
    Table 3, TimeSformer, TPT-MAE           --recipe ssv2 --then ssv2_ft --stages 2,4,8 --budget-frames 8
                                            --backbone divided
    Table 3, MotionFormer, ImageNet-21k     --recipe ssv2_sup --frames 8 --backbone trajectory --init B_16.npz
    Table 4, 3 sub-tasks, (2, 8, 16)        --recipe ssv2 --then ssv2_ft --stages 2,8,16
    Table 5, short-cycle, random            --recipe ssv2 --then ssv2_ft --cycle short --order random
    Table 6, 1 cycle, cosine                --recipe ssv2 --then ssv2_ft --lr-cycles 1
    Table 7, 8, 8, 8, 16                    --recipe ssv2 --then ssv2_ft --stage-batch 512,512,512,1024

Faithful: stages, budget arithmetic, optimiser, masks, target, sampling, as the paper or the VideoMAE it builds on says.
DECISIONS where the paper is silent or contradicts itself; each line that one shapes is tagged:
    budget      "25 % at 2 frames -> 1600 epochs" holds at a budget of 800 epochs of 16 frames, not at Sec. 4's 400:
                epochs = share x budget x 16 / frames, rounded to whole epochs.
    carry       weights and AdamW's moments go on through all stages; beta2 = 0.95 forgets the old ones in warm-up.
    warmup      40 epochs are 10 % of Sec. 4's budget of 400: a stage (a learning-rate cycle) warms up for that share
                of itself, not for 40 epochs of its own.
    lr          Sec. 4 says 1.5e-4, Sec. 3.2's example 0.01. Here 1.5e-4 x batch / 256, VideoMAE's rule, at each stage;
                --min-lr, the cosine's end, stays the same share of the peak.
    step        Table 6's "step": a tenth after each third of a cycle.
    rounds      a short cycle's round holds one epoch of the stage that has the fewest, and its like of the others.
    random      all stages are shuffled, the longest too; a short cycle shuffles each round anew.
    single      a 1-frame stage ("single frame", Secs. 3.2.1 and 6) repeats the frame to fill the tubelet.
    stride      K400's stride stays 4 at all lengths, so a short clip is a short time; SSv2's segments span the video.
    views       "3 views", "5 views" are read as VideoMAE's tests, 2 x 3 and 5 x 3 clips x crops.
    repeated    VideoMAE shows the same frames of a video again, augmented otherwise; here each clip draws its own frames.
    sizes       fine-tuning is VideoMAE's of ViT-B at every size; its K400 S, L and H differ (k400_ft says how).
    search      a schedule ends at the full length, which is the task; shares are powers of two that sum to 100 %.
    blocks      all backbones: tubelets, no CLS, fixed positions, mean pooling and a joint decoder, as VideoMAE;
                ImageNet's start learns positions, because its own are.
    trajectory  from an image's weights, values along a trajectory start as the tokens, W_v = 1, so that a still clip's
                are the image's. The public code's default leaves W_v out (its flag USE_ORIGINAL_TRAJ_ATTN_CODE).
    memory      Sec. 4's V100s come with 16 or 32 GB: --micro-batch and --then's fit 32, for every --model (--plan).
    decoder     VideoMAE's files of L and H have 12 layers, the default. Sec. 5.1's "54 %" comes out with 4 x 512 for L.
    target      normalised per patch and channel, as VideoMAE; the toy recipe predicts raw pixels (--target).
    toy         so that minutes are enough, positions are 5 times as large, and the classifier's weights 5,000 times.
Missing: Table 1's SlowFast, MViT, MViTv2, MotionFormer (32 frames), Swin, TimeSformer (64 frames), MaskFeat, ST-MAE;
Table 2's ImageMAE, MotionMAE, MAM2, M3Video; Lion, which AVION's code has for its VideoMAE (its Sec. 5.5).

    python tpt_mae.py                   # toy videos: pretrains on 2, 4, 8 frames, then fine-tunes; 2 CPU cores
    torchrun --nproc_per_node=8 tpt_mae.py --recipe ssv2 --then ssv2_ft --train-list train.csv --val-list val.csv
    torchrun --nproc_per_node=8 tpt_mae.py --recipe k400 --model vit_l --train-list k400.csv --val-list k400_val.csv \
        --then ssv2_ft --then-train-list ssv2.csv --then-val-list ssv2_val.csv    # Table 1's SSv2 column

Shapes: B clips, T frames, C colours, N tokens, K kept (visible) and R masked ones, S time steps, D width, H heads,
d = D / H, P pixel values of a patch.
"""

import math
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, combinations, pairwise, product
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: on the CPU the loader needs their cores

import torch
from torch import nn

import common
import data
from common import Attention, Block, Decoder, UserError, attention, gather_tokens, opt, patchify, uniform
from data import pixel_target

# Encoder; layers x width of VideoMAE's decoder (heads of 64, but 8 of 80 in H's); frames, height, width of a token.
MODELS = {
    "vit_toy": {"width": 128, "depth": 4, "heads": 2, "decoder": "2x64", "patch": (2, 4, 4)},
    "vit_s": {"width": 384, "depth": 12, "heads": 6, "decoder": "4x192", "patch": (2, 16, 16)},
    "vit_b": {"width": 768, "depth": 12, "heads": 12, "decoder": "4x384", "patch": (2, 16, 16)},
    "vit_l": {"width": 1024, "depth": 24, "heads": 16, "decoder": "12x512", "patch": (2, 16, 16)},  # DECISION (decoder)
    "vit_h": {"width": 1280, "depth": 32, "heads": 16, "decoder": "12x640", "patch": (2, 16, 16)},
}
# In minutes a small model learns where and when only if positions stand out from the pixels: 5 x VideoMAE's.
MODELS["vit_toy"] |= {"position_scale": 5.0, "head_std": 0.1}  # DECISION (toy)

TOY = {"train_list": "toy/actions/train.csv", "val_list": "toy/actions/val.csv", "data_root": "toy/actions",
       "train_clips": 1600, "num_classes": 8, "model": "vit_toy", "size": 32, "sampling": "stride", "batch_size": 16,
       "lr": 1e-3, "min_lr": 1e-6, "workers": 2, "log_every": 50, "gpus": 1}  # fmt: skip
SSV2 = {"train_clips": 168913, "num_classes": 174, "sampling": "segments"}  # Sec. 4
K400 = {"train_clips": 241258, "num_classes": 400, "sampling": "stride"}
# An evaluation takes 16 frames of each video: after each epoch of 2 it would cost as much as these.
PRETRAIN = {"eval_every": 50, "micro_batch": 16}  # DECISION (memory); Table 7's "per-GPU batch size"
# VideoMAE's fine-tuning, which Sec. 4 follows: 384 videos a step, which its rule for the rate counts, of 2 clips each.
FINETUNE = {"stages": "", "frames": 16, "batch_size": 768, "micro_batch": 4, "repeated": "2", "lr": 5e-4 * 384 / 256,
            "min_lr": 1e-6 * 384 / 256, "warmup_epochs": 5.0, "beta2": 0.999, "layer_decay": 0.75, "drop_path": 0.1,
            "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "rand_augment": 7.0, "erase": 0.25}  # fmt: skip

# A recipe replaces defaults of Config, which are Sec. 4's pretraining. A recipe without stages fine-tunes.
RECIPES = {
    # A small model needs long to learn the normalised target, and learns nothing at 90 % of so few places.
    "toy": TOY | {"stages": "2:25,4:25,8:50", "budget": 8, "budget_frames": 8, "warmup_epochs": 0.4, "mask_ratio": 0.75,
                  "target": "pixels", "search_frames": "2,4,8", "eval_every": 4, "then": "toy_ft"},
    "toy_ft": TOY | {"stages": "", "frames": 8, "epochs": 3, "lr": 2e-3, "warmup_epochs": 0.3, "beta2": 0.999},
    "ssv2": SSV2 | PRETRAIN,
    "k400": K400 | PRETRAIN | {"budget": 1600},  # Table 1
    "videomae_k400": K400 | PRETRAIN  # VideoMAE itself: one stage; with this loader, AVION's Sec. 5.5
    | {"stages": "16:100", "budget": 800, "batch_size": 2048, "lr": 1.5e-4 * 2048 / 256, "min_lr": 1e-5 * 2048 / 256},
    "ssv2_ft": SSV2 | FINETUNE | {"epochs": 30, "test_views": "2x3"},  # Sec. 5.3
    "ssv2_sup": SSV2 | FINETUNE | {"epochs": 30, "test_views": "2x3", "positions": "learned"},  # Table 3, ImageNet-21k
    # DECISION (sizes). VideoMAE's others on K400: S 150 epochs; L 35, rate 2e-3 per 256 videos; H 50, 1e-3, drop path
    # 0.2 and head dropout 0.5.
    "k400_ft": K400 | FINETUNE | {"epochs": 75, "test_views": "5x3", "flip": True},
}  # fmt: skip


@dataclass
class Config:
    recipe: str = opt("toy", "settings of one of the paper's trainings: see RECIPES")
    task: str = opt("train", "what to do with it", ["train", "eval", "predict", "features", "search_schedule"], True)
    train_list: str = opt("", "list of training videos: `path label` or `path,label` a line", free=True)
    val_list: str = opt("", "list of validation videos", free=True)
    data_root: str = opt("", "folder that the lists' paths are relative to", free=True)
    input: tuple = opt((), "videos for --task predict", free=True)
    out: str = opt("", "run folder; empty: runs/tpt_mae-<recipe>", free=True)
    init: str = opt(
        "", "weights: ours, VideoMAE's .pth, a hub folder, a ViT's .npz; random: none (eval ...: ours; empty: best.pt)"
    )
    resume: str = opt("auto", "auto: continue the run folder's last.pt; or a checkpoint to continue", free=True)
    overwrite: bool = opt(False, "start anew in a run folder that holds another run", free=True)
    plan: bool = opt(False, "print what would run (cost, memory, steps) without data or GPU, and exit", free=True)
    gpus: int = opt(64, "GPUs that --plan counts memory for (Sec. 4)", free=True)
    gpu_gb: tuple = opt(("24", "80"), "GB of the cards that --plan fits micro-batches into", free=True)
    then: str = opt("", "recipe to go on with, in <out>_ft", ["", "toy_ft", "ssv2_ft", "k400_ft"], True)
    then_train_list: str = opt("", "its training videos, where it has others; empty: the same lists", free=True)
    then_val_list: str = opt("", "its validation videos", free=True)
    then_data_root: str = opt("", "folder that its lists' paths are relative to", free=True)
    then_micro_batch: int = opt(0, "its --micro-batch; 0: its recipe's, and at most this run's", free=True)
    then_of: str = opt("", "set by --then: a digest of the pretraining that the weights are from")

    model: str = opt("vit_b", "encoder size", choices=list(MODELS))
    backbone: str = opt("joint", "attention over space and time (Table 3)", ["joint", "divided", "trajectory"])
    decoder: str = opt("", "layers x width of the decoder, such as 4x512; empty: the model's own")
    positions: str = opt("sinusoid", "learned: for a start from an image ViT's weights", ["sinusoid", "learned"])
    stages: str = opt("2:25,4:25,8:25,16:25", "pretraining, frames:percent of the budget each; empty: fine-tuning")
    budget: float = opt(400.0, "frames to pretrain on, in epochs of --budget-frames (Sec. 4)")
    budget_frames: int = opt(16, "frames a clip in which the budget is counted (Sec. 3.2.1)")
    cycle: str = opt("long", "each stage once, or all of them in many short rounds (Table 5)", ["long", "short"])
    order: str = opt("progressive", "order of the stages (Table 5)", ["progressive", "random"])
    lr_cycles: int = opt(0, "cycles of the learning rate; 0: one a stage, or one for a short cycle (Table 6)")
    decay: str = opt("cosine", "how a cycle's learning rate falls (Table 6)", ["cosine", "step"])
    stage_batch: str = opt("", "batch size of each stage, such as 512,512,512,1024; empty: --batch-size (Table 7)")
    stage_lr: str = opt("", "peak learning rate of each stage; empty: --lr x its batch / --batch-size")
    repeated: str = opt("1", "clips of a video that one decode gives, for all stages or each: 4,2,1,1 (Sec. 5.4)")
    search_frames: str = opt("2,4,8,12,16", "frames that --task search_schedule tries (Sec. 3.2.1)")
    search_stages: int = opt(4, "largest number of stages that it tries (Sec. 3.2.1)")
    frames: int = opt(0, "frames a clip in fine-tuning")
    size: int = opt(224, "height and width of a clip, in pixels (Sec. 4)")
    sampling: str = opt("segments", "frames --stride apart, or one of each segment (Sec. 4)", ["stride", "segments"])
    stride: int = opt(4, "frames from one of a clip to the next (VideoMAE)")
    num_classes: int = opt(0, "number of classes; 0: as many as the training list has")
    mask_ratio: float = opt(0.9, "share of a frame's places that are masked, in all frames (Sec. 3.1)")
    target: str = opt("normalized", "what is predicted of a patch", ["normalized", "pixels"])  # DECISION (target)

    train_clips: int = opt(0, "size of the training set, for --plan", free=True)
    clips_per_second: float = opt(0.0, "measured at the longest stage (log.jsonl), for the hours of --plan", free=True)
    epochs: int = opt(0, "passes over the training list in fine-tuning")
    max_steps: int = opt(0, "number of optimizer steps instead of --epochs or --budget; 0: by these")
    batch_size: int = opt(1024, "clips per optimizer step over all ranks, repeats included (Sec. 4)")
    micro_batch: int = opt(0, "clips that one process holds at once; 0: batch / ranks", free=True)
    lr: float = opt(1.5e-4 * 1024 / 256, "peak learning rate at this batch, as used")  # DECISION (lr): VideoMAE's rule
    min_lr: float = opt(1e-5 * 1024 / 256, "learning rate at the end of the cosine at peak --lr (VideoMAE)")
    warmup_epochs: float = opt(40.0, "epochs of the whole budget, or of fine-tuning, that warm up (Sec. 4)")
    weight_decay: float = opt(0.05, "AdamW's weight decay (Sec. 4)")
    beta2: float = opt(0.95, "AdamW's second beta (VideoMAE)")
    layer_decay: float = opt(1.0, "factor on the learning rate from each layer to the one below (VideoMAE)")
    clip_grad: float = opt(0.0, "largest gradient norm; 0: not clipped (VideoMAE)")
    drop_path: float = opt(0.0, "stochastic depth of the last block in fine-tuning, rising linearly (VideoMAE)")
    head_dropout: float = opt(0.0, "dropout before the classifier (VideoMAE: 0.5 for H)")
    label_smoothing: float = opt(0.0, "share of a label spread over all classes (VideoMAE)")
    mixup: float = opt(0.0, "Beta parameter of mixup; 0: off (VideoMAE)")
    cutmix: float = opt(0.0, "Beta parameter of cutmix; 0: off (VideoMAE)")
    rand_augment: float = opt(0.0, "magnitude of RandAugment, 4 operations; 0: off (VideoMAE)")
    erase: float = opt(0.0, "probability of random erasing (VideoMAE)")
    crop: bool = opt(True, "multi-scale crops in pretraining, random resized ones in fine-tuning (VideoMAE)")
    flip: bool = opt(False, "random left-right flips in training (VideoMAE: K400's fine-tuning)")
    test_views: str = opt("1x1", "clips x crops a video of the last evaluation (Sec. 4)")  # DECISION (views)

    workers: int = opt(8, "loader processes a rank; 0: load in the training process", free=True)
    max_bad: float = opt(0.01, "share of an epoch's videos (at least 1) that may be unreadable", free=True)
    precision: str = opt("auto", "auto: the device's best", ["auto", "fp32", "bf16", "fp16"], True)
    attention: str = opt("auto", "auto: flash-attn or sdpa", ["auto", "flash", "sdpa", "plain"], True)
    compile: bool | None = opt(None, "torch.compile the model; default: on CUDA", free=True)
    grad_checkpoint: bool = opt(False, "recompute blocks in backward: less memory, more time", free=True)
    seed: int = opt(0, "key of every random draw")
    eval_every: int = opt(1, "a stage's epochs between evaluations; its end (in a short cycle: the run's) is one too")
    log_every: int = opt(20, "steps between log records")
    tensorboard: bool = opt(False, "also write the log for TensorBoard, where it is installed", free=True)
    save_minutes: float = opt(10.0, "minutes between checkpoints, besides one an epoch", free=True)
    max_skipped: int = opt(20, "updates skipped for a non-finite loss or gradient before the run stops", free=True)


# ---- The paper's ideas -----------------------------------------------------------------------------------------------


def plan_stages(text, budget, full=16, tubelet=2, ordered=True):
    """Sec. 3.2.1: "2:25,4:25,8:25,16:25" (frames:percent) as a list of (frames, percent, epochs), in that order.

    budget: in epochs of `full` frames a clip. Frames alone, "2,4,16", share it evenly (Table 4). ValueError: text of
    another form, shares that don't sum to 100, frames that no tubelet divides (1 aside), frames that don't rise
    although `ordered`, a stage of no epoch.
    """
    parts = [part.partition(":") for part in text.split(",")]
    try:
        rows = [(int(frames), float(percent) if colon else 100 / len(parts)) for frames, colon, percent in parts]
    except ValueError:
        raise ValueError("not frames:percent,frames:percent, such as 2:25,4:25,8:25,16:25") from None
    whole = sum(percent for _, percent in rows)
    if not abs(whole - 100) < 0.05 or min(percent for _, percent in rows) <= 0:  # 0.05: thirds are written 33.33
        raise ValueError(f"the percentages must be above 0 and sum to 100, not {whole:g}")
    for frames, _ in rows:
        if frames < 1 or (frames > 1 and frames % tubelet):
            raise ValueError(f"{frames} frames are not a multiple of the token's {tubelet} (a single one is repeated)")
    if ordered and any(a >= b for (a, _), (b, _) in pairwise(rows)):
        raise ValueError("the numbers of frames must rise from stage to stage, unless --order is random")
    # DECISION (budget): whole epochs, of a budget counted in 16 frames
    stages = [(frames, percent, math.floor(percent / 100 * budget * full / frames + 0.5)) for frames, percent in rows]
    for frames, percent, epochs in stages:
        if not epochs:
            raise ValueError(f"{percent:g} % of --budget {budget:g} is no epoch of {frames} frames after rounding")
    return stages


class Segment(NamedTuple):
    """A stretch of steps, start to stop, at one stage; `offset` steps of that stage were done before it."""

    stage: int
    start: int
    stop: int
    offset: int
    cycle: tuple  # (first, last) step of the learning-rate cycle that it is in


def lay_out(steps, rounds=1, order="progressive", cycles=1, seed=0, frames=None):
    """The Segments of stages of steps[i] optimizer steps each, in the order they are run (Tables 5 and 6).

    rounds: 1 is the long cycle, each stage once; more is the short cycle, in which every round has 1 / rounds of each.
    cycles: how many learning-rate cycles the segments are cut into, as evenly as they can be. frames: of each stage;
    None: they rise.
    """
    parts, at = [], 0
    rising = sorted(range(len(steps)), key=(frames or range(len(steps))).__getitem__)
    for i in range(rounds):
        turn = list(range(len(steps)))
        for attempt in range(100) if order == "random" and len(steps) > 1 else ():
            turn = common.permutation(common.make_key(seed, i, attempt), "stages", len(steps)).tolist()
            if turn != rising:  # DECISION (random): any order but the progressive one
                break
        for stage in turn:
            offset, end = (steps[stage] * k // rounds for k in (i, i + 1))
            if end > offset:
                parts.append((stage, at, at + end - offset, offset))
                at += end - offset
    group = [k * cycles // len(parts) for k in range(len(parts))]
    bounds = [[part[1:3] for part, g in zip(parts, group, strict=True) if g == own] for own in group]
    return [Segment(*part, (own[0][0], own[-1][1])) for part, own in zip(parts, bounds, strict=True)]


def learning_rate(step, cycle, peak, floor, warmup, decay="cosine"):
    """Learning rate of step 0, 1, ... in a cycle (first, last): linear from 0 over the share `warmup`, then falling."""
    at, length = step - cycle[0], cycle[1] - cycle[0]
    if decay == "cosine" or at < warmup * length:
        return common.cosine(at, length, warmup * length, peak, floor)
    return peak * 0.1 ** (3 * at // length)  # DECISION (step): thirds


def search_space(frames=(2, 4, 8, 12, 16), most=4, portions=(6.25, 12.5, 25.0, 50.0, 100.0)):
    """The schedules that Sec. 3.2.1 searches, as --stages strings, from few stages to many.

    1 to `most` stages of rising frames out of `frames`; portions that sum to 100 %. Pruned as the paper does: no
    single stage of fewer frames. DECISION (search): none at all that doesn't end at the full length.
    """
    *short, full = sorted(frames)
    return [
        ",".join(f"{f}:{p:g}" for f, p in zip((*some, full), shares, strict=True))
        for n in range(min(most, len(frames)))
        for some in combinations(short, n)  # DECISION (search): and `full` behind them
        for shares in product(portions, repeat=n + 1)
        if sum(shares) == 100
    ]


def mae_loss(prediction, target):
    """Sec. 3.1: the mean squared error over masked tokens, a clip at a time: [B, R, P] twice -> [B]."""
    return nn.functional.mse_loss(prediction.float(), target, reduction="none").mean((1, 2))  # [B]


def sample_clip(cfg, frames, train, views, video, index, view, key):
    """(frames, box) of a clip of `frames` frames (Sec. 4); a test clip is number `view` of views = (clips, crops).

    K400: --stride frames apart, from a random start; SSv2: one frame of each of `frames` segments. A random crop in
    training, else one of `crops` squares along the long side.
    """
    (clip, crop), info = divmod(view, views[1]), video.info
    if cfg.sampling == "segments":  # DECISION (repeated): `key` is another for each clip of a video
        places = uniform(key, "start", frames).numpy() if train else clip / views[0] if views[0] > 1 else 0.5
        chosen = data.segment_frames(info, frames, places)
    elif train:  # DECISION (stride): the same at every length
        chosen = data.stride_frames(info, frames, cfg.stride, uniform(key, "start").item())
    else:
        chosen = data.view_frames(info, frames, cfg.stride, clip, views[0])
    if frames == 1:  # DECISION (single)
        chosen = chosen * MODELS[cfg.model]["patch"][0]
    if not (train and cfg.crop):
        return chosen, data.crop_box(info, crop, views[1])
    return chosen, (data.multi_scale_box if cfg.stages else data.random_resized_box)(info, key)


# ---- The model -------------------------------------------------------------------------------------------------------


class DividedBlock(Block):
    """TimeSformer's divided attention (Bertasius et al. 2021, Sec. 3.1), of the tokens that a tube mask leaves.

    A token, at place p of step t, first looks at its own place in all S time steps, then, from what that gave, at all
    places of its own step: S + K comparisons instead of S K.
        alpha^time_ptt' = softmax_t'(q_pt . k_pt' / sqrt(d)),    alpha^space_ptp' = softmax_p'(q_pt . k_p't / sqrt(d))
    The mask keeps the same K places in each step, so that both are plain attention over a regular grid [S, K].
    """

    branches = ("attn", "mlp", "attn.time")

    def __init__(self, dim, heads, kind="auto", **options):
        kind = "sdpa" if kind != "plain" else kind  # flash-attn has no pieces: see common.SDPA_ROWS
        super().__init__(dim, heads, kind=kind, **options)
        self.temporal_norm = nn.LayerNorm(dim, eps=1e-6)
        self.temporal_attn = Attention(dim, heads, kind)  # of B K sequences, 12,544 of 64 clips
        self.temporal_fc = nn.Linear(dim, dim)

    @common.region
    def forward(self, x, keys=None, steps=1):
        B, N, D = x.shape
        time = self.temporal_norm(x).unflatten(1, (steps, -1)).transpose(1, 2).flatten(0, 1)  # [B K, S, D]
        time = self.temporal_attn(time).unflatten(0, (B, -1)).transpose(1, 2).reshape(B, N, D)  # [B, N, D]
        x = x + common.drop_path(self.temporal_fc(time), self.rate, keys, self.purposes[2])  # [B, N, D]
        space = self.attn(self.norm1(x).reshape(B * steps, -1, D)).reshape(B, N, D)  # [B, N, D]
        x = x + common.drop_path(space, self.rate, keys, self.purposes[0])  # [B, N, D]
        return x + common.drop_path(self.mlp(self.norm2(x)), self.rate, keys, self.purposes[1])  # [B, N, D]


class TrajectoryAttention(Attention):
    """MotionFormer's trajectory attention (Patrick et al. 2021, Sec. 3.2), [B, N, D] -> [B, N, D] in S time steps.

    1. Along space: where is the point that token (s, t) shows, in each other time step t'?  Softmax runs over the
       places of one step at a time, so that every step answers:  y_stt' = sum_s' v_s't' softmax_s'(q_st . k_s't').
    2. Along the trajectory y_st1 ... y_stS, by new projections, the query from the token's own step, y_stt:
       z_st = sum_t' W_v y_stt' softmax_t'(W_q y_stt . W_k y_stt').
    """

    def __init__(self, dim, heads, kind="auto"):
        # Step 2 has B N sequences of one query: more than flash-attn takes, and nothing for it to win (common.SDPA_ROWS).
        super().__init__(dim, heads, "sdpa" if kind != "plain" else kind)
        self.trajectory_q = nn.Linear(dim, dim)
        self.trajectory_kv = nn.Linear(dim, 2 * dim)

    def forward(self, x, steps=1):
        B, N, D = x.shape
        H, K, S = self.heads, N // steps, steps
        q, k, v = self.project(x)  # [B, N, H, d] each
        q = q[:, None].expand(-1, S, -1, -1, -1).flatten(0, 1)  # [B S, N, H, d]: each step is asked by all
        k, v = (part.reshape(B * S, K, H, D // H) for part in (k, v))  # [B S, K, H, d]
        y = attention(q, k, v, self.kind).reshape(B, S, S, K, D)  # [B, S (t'), S (t), K, D]
        own = y.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)  # [B, S (t), K, D]: y_stt
        q = self.trajectory_q(own).reshape(B * N, 1, H, D // H)  # [B N, 1, H, d]
        kv = self.trajectory_kv(y).permute(0, 2, 3, 1, 4).reshape(B * N, S, 2, H, D // H)  # [B N, S, 2, H, d]
        return self.proj(attention(q, *kv.unbind(2), kind=self.kind).reshape(B, N, D))  # [B, N, D]


class TrajectoryBlock(Block):
    """A block with trajectory attention in the place of joint attention."""

    def __init__(self, dim, heads, kind="auto", **options):
        super().__init__(dim, heads, kind=kind, **options)
        self.attn = TrajectoryAttention(dim, heads, kind)

    @common.region
    def forward(self, x, keys=None, steps=1):
        x = x + common.drop_path(self.attn(self.norm1(x), steps), self.rate, keys, self.purposes[0])  # [B, N, D]
        return x + common.drop_path(self.mlp(self.norm2(x)), self.rate, keys, self.purposes[1])  # [B, N, D]


BLOCKS = {"joint": Block, "divided": DividedBlock, "trajectory": TrajectoryBlock}  # DECISION (blocks): no CLS in any


class Encoder(nn.Module):
    """Patch embedding, positions and blocks: what pretraining and fine-tuning share. Names follow VideoMAE's files."""

    def __init__(self, model="vit_b", frames=16, size=224, backbone="joint", drop_path=0.0, positions="sinusoid",
                 attention="auto", grad_checkpoint=False):  # fmt: skip
        super().__init__()
        spec = MODELS[model]
        self.width, self.patch, self.grad_checkpoint = spec["width"], spec["patch"], grad_checkpoint
        # Tokens in (t, h, w) of the longest clip. Of f frames the first ones are used: the table is one-dimensional.
        self.grid = (-(-frames // self.patch[0]), size // self.patch[1], size // self.patch[2])
        self.places, self.num_tokens = math.prod(self.grid[1:]), math.prod(self.grid)
        self.patch_embed = nn.Linear(math.prod(self.patch) * 3, self.width)  # = VideoMAE's Conv3d
        rates = [drop_path * i / (spec["depth"] - 1) for i in range(spec["depth"])]
        self.joint, block = backbone == "joint", BLOCKS[backbone]
        self.blocks = nn.ModuleList(
            block(self.width, spec["heads"], drop_path=rate, kind=attention, index=i) for i, rate in enumerate(rates)
        )
        scale = spec.get("position_scale", 1.0)
        table = scale * common.sinusoid_table(self.num_tokens, self.width)[None]  # [1, N, D]
        if positions == "learned":
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)

    def init_parameters(self):
        self.apply(common.init_linear)
        self.patch_embed.reset_parameters()  # PyTorch's default, as VideoMAE's convolution: positions must stand out
        for block in self.blocks:
            if isinstance(block, DividedBlock):
                nn.init.zeros_(block.temporal_fc.weight)  # an image model's features at first, as TimeSformer's

    def encode(self, patches, visible=None, keys=None):
        """Last block's tokens [B, K, D] of the visible ones [B, K] (None: all) of 0-255 patches [B, N, P].

        Tokens are dropped before normalisation and embedding: what is not looked at costs nothing. `keys` turns on
        drop path. Visible tokens must be the same places of all time steps (tubes), unless attention is joint.
        """
        x = self.embed(patches, visible)  # [B, K, D]
        steps = {} if self.joint else {"steps": patches.shape[1] // self.places}
        return common.run_blocks(self.blocks, x, keys, self.grad_checkpoint, **steps)  # [B, K, D]

    @common.region
    def embed(self, patches, visible=None):
        """Visible ones of patches [B, N, P] as tokens [B, K, D]."""
        positions = self.positions[:, : patches.shape[1]]  # [1, N, D]
        if visible is not None:
            patches, positions = gather_tokens(patches, visible), gather_tokens(positions, visible)  # [B, K, P | D]
        x = data.normalize(patches, data.IMAGENET_MEAN, data.IMAGENET_STD)  # [B, K, P]
        x = self.patch_embed(x)  # [B, K, D]
        return x + positions.to(x.dtype)  # [B, K, D]

    def layer_of(self, name):
        """For common.param_groups: 0 the embedding, 1 ... depth the blocks, depth + 1 what is above them."""
        if name.startswith(("patch_embed", "positions")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else len(self.blocks) + 1


class VideoMAE(Encoder):
    """Masked autoencoder of clips (Sec. 3.1): encoder on the visible tokens, light decoder on all. Any clip up to
    `frames` frames long: positions are counted from the first token, so a shorter clip's are the same."""

    def __init__(self, model="vit_b", decoder="", frames=16, size=224, target="normalized", backbone="joint",
                 attention="auto", grad_checkpoint=False):  # fmt: skip
        super().__init__(model, frames, size, backbone, attention=attention, grad_checkpoint=grad_checkpoint)
        layers, width = map(int, (decoder or MODELS[model]["decoder"]).split("x"))
        self.target = target
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.encoder_to_decoder = nn.Linear(self.width, width, bias=False)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02, a=-0.02, b=0.02))
        heads = 8 if width == 640 else max(1, width // 64)
        self.decoder = Decoder(layers, width, heads, self.patch_embed.in_features, attention)
        table = common.sinusoid_table(self.num_tokens, width)[None]  # [1, N, decoder width]
        self.register_buffer("decoder_positions", table, persistent=False)
        self.init_parameters()
        self.encoder_to_decoder.reset_parameters()  # PyTorch's default: VideoMAE inits its encoder and decoder alone

    def decode(self, tokens, visible, masked):
        """Predicted pixels [B, R, P] of the tokens `masked` [B, R], from encoded visible tokens [B, K, D]."""
        x = self.fill(tokens, visible, masked)  # [B, K + R, D']
        return self.decoder(x, masked.shape[1], self.grad_checkpoint)  # [B, R, P]

    @common.region
    def fill(self, tokens, visible, masked):
        """The decoder's input: visible tokens, and for each masked one the mask token: [B, K + R, D']."""
        x = self.encoder_to_decoder(tokens)  # [B, K, D']
        positions = self.decoder_positions.to(x.dtype)  # [1, N, D']
        hidden = self.mask_token.to(x.dtype) + gather_tokens(positions, masked)  # [B, R, D']
        return torch.cat([x + gather_tokens(positions, visible), hidden], dim=1)  # [B, K + R, D']

    def features(self, clips):
        """clips 0-255 [B, T, C, H, W] -> the normed tokens' mean [B, D]: nothing is masked."""
        return self.norm(self.encode(patchify(clips, self.patch))).mean(1)  # [B, D]

    def forward(self, clips, keys, ratio):
        """clips 0-255 [B, T, C, H, W], keys int64 [B] -> prediction and target [B, R, P] of the masked tokens."""
        patches, visible, masked, target = self.split(clips, keys, ratio)
        tokens = self.norm(self.encode(patches, visible))  # [B, K, D]
        return self.decode(tokens, visible, masked), target

    @common.region
    def split(self, clips, keys, ratio):
        """-> patches [B, N, P]; which are visible [B, K], which are masked [B, R]; target [B, R, P]."""
        patches = patchify(clips, self.patch)  # [B, N, P]
        steps = patches.shape[1] // self.places
        visible, masked = common.tube_split(keys, steps, self.places, ratio)  # [B, K], [B, R]
        return patches, visible, masked, pixel_target(gather_tokens(patches, masked), self.target)


class Classifier(Encoder):
    """The encoder on all tokens, their mean, norm, one linear layer: VideoMAE's fine-tuning model."""

    def __init__(self, num_classes, model="vit_b", frames=16, size=224, backbone="joint", drop_path=0.1,
                 head_dropout=0.0, positions="sinusoid", attention="auto", grad_checkpoint=False):  # fmt: skip
        super().__init__(model, frames, size, backbone, drop_path, positions, attention, grad_checkpoint)
        self.head_dropout = head_dropout
        self.fc_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = nn.Linear(self.width, num_classes)
        self.init_parameters()  # as in pretraining; VideoMAE's is N(0, 0.02), which its weights then replace
        # VideoMAE's init_scale, so that all classes are alike at first; what has few steps can't wait for that.
        nn.init.trunc_normal_(self.head.weight, std=MODELS[model].get("head_std", 0.02 * 0.001))

    def features(self, clips, keys=None):
        """clips 0-255 [B, T, C, H, W] -> the normed mean of all tokens [B, D]; keys: drop path."""
        return self.fc_norm(self.encode(patchify(clips, self.patch), keys=keys).mean(1))  # [B, D]

    def forward(self, clips, keys):
        """clips 0-255 [B, T, C, H, W], keys int64 [B] -> logits [B, classes]."""
        x = self.features(clips, keys if self.training else None)  # [B, D]
        if self.training and self.head_dropout:
            x = x * (uniform(keys, "head", self.width) >= self.head_dropout) / (1 - self.head_dropout)  # [B, D]
        return self.head(x)  # [B, classes]


def build(cfg, num_classes, frames=0):
    """The model of a Config, for `frames` (0: its longest clip): VideoMAE, or without stages Classifier."""
    frames = frames or longest(cfg)
    if cfg.stages:
        return VideoMAE(cfg.model, cfg.decoder, frames, cfg.size, cfg.target, cfg.backbone, cfg.attention,
                        cfg.grad_checkpoint)  # fmt: skip
    return Classifier(num_classes, cfg.model, frames, cfg.size, cfg.backbone, cfg.drop_path, cfg.head_dropout,
                      cfg.positions, cfg.attention, cfg.grad_checkpoint)  # fmt: skip


def videomae_state(net):
    """The model's weights as upstream VideoMAE's file has them: its names, the embedding as a Conv3d kernel."""
    prefix, names = "encoder." if isinstance(net, VideoMAE) else "", {}
    for name, tensor in net.state_dict().items():
        if name == "patch_embed.weight":
            tensor = common.linear_to_conv(tensor, net.patch)  # [D, 3, p_t, p_h, p_w]
        own = name.startswith(("patch_embed", "blocks", "norm"))
        theirs = name.replace("patch_embed.", "patch_embed.proj.").replace("positions", "pos_embed")
        names[(prefix if own else "") + theirs] = tensor
    return names


# ---- Evaluation and pictures -----------------------------------------------------------------------------------------


def eval_batches(videos, cfg, ctx, failures, views=(1, 1)):
    """Batches on the device that hold each readable video once over all ranks, in (clips, crops) views each."""
    plan, count = partial(sample_clip, cfg, longest(cfg), False, views), math.prod(views)
    dataset = data.ClipDataset(videos, plan, cfg.size, cfg.seed, replace=False, views=count)
    size = max(1, (cfg.micro_batch or cfg.batch_size // ctx.world) // count)
    batches = data.every_sample(len(videos), size, ctx.rank, ctx.world)
    for batch in data.make_loader(dataset, batches, cfg.workers, ctx.device):
        failures.new += batch.failures
        if len(batch.labels):
            yield batch._replace(keys=batch.keys.to(ctx.device))


@torch.no_grad()
def evaluate(model, videos, cfg, ctx, views=(1, 1), picture=None):
    """Fine-tuned: top-1 and top-k in % (k = 5, or all classes if fewer). Pretrained: masked error at full length.

    Every readable video counts once, at any number of ranks; `unread` of them could not be, in one view or more. A
    video's views are merged by the mean of their softmax (Sec. 4); they lie in one batch, so no name is looked up.
    """
    model.eval()
    failures, k = data.Failures(len(videos), cfg.max_bad), min(5, len(videos.classes))
    sums = torch.zeros(3, dtype=torch.float64, device=ctx.device)  # clips, then top-1, top-k or error, 0
    for batch in eval_batches(videos, cfg, ctx, failures, views):
        with ctx.autocast():
            outputs = model(batch.clips, batch.keys, *[cfg.mask_ratio] * bool(cfg.stages))
        if cfg.stages:
            error = mae_loss(*outputs)  # [B]
            values = torch.stack([torch.ones_like(error), error, torch.zeros_like(error)])  # [3, B]
        else:
            shares = outputs.float().softmax(-1).unflatten(0, (math.prod(views), -1)).mean(0)  # [videos, classes]
            hits = shares.topk(k).indices == batch.labels[: len(shares), None]  # [videos, k]
            values = torch.stack([torch.ones_like(hits[:, 0]), hits[:, 0], hits.any(1)])  # [3, videos]
        sums += values.double().sum(1)  # [3]
        if picture and ctx.rank == 0 and cfg.stages:
            write_recon(model, batch.clips[:4], batch.keys[:4], outputs[0][:4], cfg, picture)
            picture = None
    unread = failures.collect(ctx, 0)
    if unread and ctx.rank == 0:
        print("\n".join(f"unreadable, not scored: {line}" for line in unread))
    n, first, second = ctx.sum(sums).tolist()
    model.train()
    if not n:
        raise UserError(f"{videos.path}: no video could be read: {'; '.join(unread[:3])}")
    result = {"val_mae": first / n} if cfg.stages else {"val_top1": 100 * first / n, f"val_top{k}": 100 * second / n}
    return result | {"val_clips": int(n), "val_unread": len(unread)}


def write_recon(model, clips, keys, prediction, cfg, path):
    """Write path.png and path_animated.png: what the encoder saw of clips, and the prediction [B, R, P] of the rest."""
    grid = clips.shape[1] // model.patch[0], *model.grid[1:]  # of this many frames
    visible, masked = common.tube_split(keys, grid[0], model.places, cfg.mask_ratio)  # [B, K], [B, R]
    patches = patchify(clips, model.patch)  # [B, N, P]
    data.write_reconstruction(path, patches, visible, masked, prediction, cfg.target, model.patch, grid, fps=5)


# ---- The plan --------------------------------------------------------------------------------------------------------


def longest(cfg):
    """Frames of the longest clip: of the last stage, or of fine-tuning."""
    return max((frames for frames, _, _ in staged(cfg)), default=cfg.frames)


def staged(cfg):
    """plan_stages of the Config's flags, [] for fine-tuning; its mistakes as a UserError."""
    try:
        full, tubelet = cfg.budget_frames, MODELS[cfg.model]["patch"][0]
        ordered = cfg.order == "progressive"
        return plan_stages(cfg.stages, cfg.budget, full, tubelet, ordered) if cfg.stages else []
    except ValueError as error:
        raise UserError(f"--stages {cfg.stages}: {error}") from None


class Stage(NamedTuple):
    """One stage's settings: C_i = {f_i, p_i, R_i} of Sec. 3.2, and what follows from them. Fine-tuning has one."""

    frames: int
    percent: float
    epochs: int
    batch: int  # clips a step
    lr: float
    repeated: int  # clips of a video from one decode
    epoch_steps: int  # of a pass over the list
    steps: int


def one_each(flag, text, default, count, kind):
    """Values of a comma-list flag, one a stage; a single one is for all, an empty flag the default."""
    try:
        values = [kind(part) for part in text.split(",")] if text else [default]
    except ValueError:
        values = []
    if len(values) not in (1, count) or not all(0 < value < math.inf for value in values):
        raise UserError(f"{flag} {text}: not one number above 0, or one for each of {count} stages, with commas")
    return values * (count // len(values))


def schedule(cfg, n):
    """(Stages, Segments) of a run on n training videos."""
    rows = staged(cfg) or [(cfg.frames, 100.0, cfg.epochs)]
    batches = one_each("--stage-batch", cfg.stage_batch, cfg.batch_size, len(rows), int)
    lrs = one_each("--stage-lr", cfg.stage_lr, 0.0, len(rows), float) if cfg.stage_lr else [
        cfg.lr * batch / cfg.batch_size for batch in batches]  # DECISION (lr)  # fmt: skip
    repeats = one_each("--repeated", cfg.repeated, 1, len(rows), int)
    stages = []
    for (frames, percent, epochs), batch, lr, repeat in zip(rows, batches, lrs, repeats, strict=True):
        if batch % repeat:
            raise UserError(f"--repeated {cfg.repeated}: a batch of {batch} clips is no whole number of videos")
        epoch_steps = n // (batch // repeat)
        if not epoch_steps:
            source = "--train-clips" if cfg.plan else cfg.train_list
            raise UserError(f"{source}: {n} videos are less than one batch of {batch} clips")
        # The budget counts clips, of which a pass shows `repeat` a video; fine-tuning's epochs are passes (VideoMAE).
        steps = max(1, round(epochs * epoch_steps / repeat)) if cfg.stages else epochs * epoch_steps
        stages.append(Stage(frames, percent, epochs, batch, lr, repeat, epoch_steps, steps))
    if cfg.max_steps:
        total = sum(stage.steps for stage in stages)
        ends = [round(cfg.max_steps * done / total) for done in accumulate(stage.steps for stage in stages)]
        stages = [stage._replace(steps=b - a) for stage, (a, b) in zip(stages, pairwise([0, *ends]), strict=True)]
        if not all(stage.steps for stage in stages):
            raise UserError(f"--max-steps {cfg.max_steps} leaves one of {len(stages)} stages without a step")
    rounds = 1 if cfg.cycle == "long" else min(stage.epochs for stage in stages)  # DECISION (rounds)
    cycles = cfg.lr_cycles or (len(stages) if cfg.cycle == "long" else 1)
    frames = [stage.frames for stage in stages]
    segments = lay_out([stage.steps for stage in stages], rounds, cfg.order, cycles, cfg.seed, frames)
    if cycles > len(segments):
        raise UserError(f"--lr-cycles {cycles} are more than the {len(segments)} segments that share them out")
    return stages, segments


def split(cfg, stage, ctx):
    """(clips of a micro-batch, accumulation steps) of a stage on this rank."""
    here = replace(cfg, batch_size=stage.batch, micro_batch=min(cfg.micro_batch, stage.batch // ctx.world))
    return common.micro_batches(here, ctx, bool(cfg.mixup or cfg.cutmix), stage.repeated)


def count_gmacs(cfg, classes, frames):
    """(GMACs of a clip's forward pass counted here, the same with all patches embedded, as VideoMAE does).

    The difference is added explicitly: masked tokens x pixels x width.
    """
    with torch.device("meta"):
        model = build(replace(cfg, attention="sdpa", grad_checkpoint=False), classes, frames)
        steps = model.grid[0]  # 1 frame fills a tubelet
        clips = torch.empty(1, steps * model.patch[0], 3, cfg.size, cfg.size, dtype=torch.uint8)
        ratio = [cfg.mask_ratio] * bool(cfg.stages)
        here = common.count_macs(model, clips, torch.zeros(1, dtype=torch.int64), *ratio)
    masked = steps * int(cfg.mask_ratio * model.places) if cfg.stages else 0
    return here, here + masked * model.patch_embed.weight.numel() / 1e9


def memory(cfg):
    """common.Phases of a run: of each stage the model's state, and what a clip adds, its pixels and the blocks' memory."""
    half = cfg.precision != "fp32"
    kind = "plain" if cfg.attention == "plain" else "sdpa"
    measure = partial(common.block_bytes, half=half, grad_checkpoint=cfg.grad_checkpoint)
    spec = MODELS[cfg.model]
    with torch.device("meta"):
        model = build(cfg, cfg.num_classes or 2)
    state = common.state_bytes(sum(p.numel() for p in model.parameters()), half=half)
    encoder = BLOCKS[cfg.backbone](spec["width"], spec["heads"], kind=kind)
    kept = model.places - int(cfg.mask_ratio * model.places) if cfg.stages else model.places
    phases = []
    for stage in schedule(cfg, cfg.train_clips)[0]:
        steps = -(-stage.frames // model.patch[0])
        extra = [] if model.joint else [None, steps]
        clip = common.PIXEL_BYTES * steps * model.places * model.patch_embed.in_features
        if cfg.stages:
            clip *= 2  # the prediction, in half precision and float32, and its gradient
        clip += measure(encoder, spec["depth"], (steps * kept, spec["width"]), *extra)
        if cfg.stages:
            attn = model.decoder.blocks[0].attn
            width = attn.proj.in_features
            decoder = Block(width, attn.heads, kind=kind)
            clip += measure(decoder, len(model.decoder.blocks), (steps * model.places, width))
        name = f"{'pretraining' if cfg.stages else 'fine-tuning'} on {stage.frames} frames"
        micro = min(cfg.micro_batch, stage.batch // cfg.gpus)
        group = stage.repeated * (2 if cfg.mixup or cfg.cutmix else 1)  # as common.micro_batches has it
        flag = "--then-micro-batch" if cfg.then_of else "--micro-batch"
        phases.append(common.Phase(name, stage.batch, micro, state, clip, group, flag))
    return phases


def print_plan(cfg):
    """What would run, counted on the model itself: no data, no GPU, no training (--plan)."""
    stages, segments = schedule(cfg, cfg.train_clips)
    classes, rate, full = cfg.num_classes or 2, cfg.clips_per_second, cfg.budget_frames if cfg.stages else cfg.frames
    with torch.device("meta"):
        model = build(cfg, classes)
    parameters = {name: p.numel() / 1e6 for name, p in model.named_parameters()}
    decoder = sum(n for name, n in parameters.items() if name.startswith(("decoder", "encoder_to", "mask")))
    kept = model.places - int(cfg.mask_ratio * model.places) if cfg.stages else model.places
    cycles = len({segment.cycle for segment in segments})
    print(f"model     {cfg.model}, {cfg.backbone} attention: {sum(parameters.values()):.1f} M parameters, "
          f"{decoder:.1f} M of them the decoder's\n"
          f"schedule  {len(segments)} segments ({cfg.cycle} cycle, {cfg.order}), {cycles} learning-rate cycles "
          f"({cfg.decay}); {cfg.train_clips} videos")  # fmt: skip
    common.print_memory(cfg, memory(cfg))
    print(
        "\nframes percent  epochs    steps  batch       lr repeated visible tokens    GMACs embedded    PMACs   hours"
    )
    macs = {frames: count_gmacs(cfg, classes, frames) for frames in {full, longest(cfg), *(s.frames for s in stages)}}
    hours = lambda pmacs: f"{pmacs * 1e6 / macs[longest(cfg)][0] / rate / 3600:.1f}" if rate else "-"
    total, frames = [0.0, 0.0], 0
    for f, percent, epochs, batch, lr, repeated, _, steps in stages:
        clips, n = steps * batch, -(-f // model.patch[0])
        here, embedded = cost = [clips * gmacs / 1e6 for gmacs in macs[f]]
        total, frames = [total[0] + here, total[1] + embedded], frames + clips * f
        print(f"{f:6} {percent:7.2f} {epochs:7} {steps:8} {batch:6} {lr:8.3g} {repeated:8} {n * kept:7} "
              f"{n * model.places:6} {macs[f][0]:8.3f} {macs[f][1]:8.3f} {cost[0]:8.3f} {hours(here):>7}")  # fmt: skip
    print(f"total     {segments[-1].stop} steps, {total[0]:.3f} PMACs, {hours(total[0])} hours by --clips-per-second. "
          "GMACs: multiply-adds of a clip, forward (a training step: 3 times that); embedded: with all patches embedded"
          )  # fmt: skip
    passes = 4 if cfg.grad_checkpoint else 3
    data.print_cores([(stage.frames, passes * macs[stage.frames][0], stage.repeated) for stage in stages])
    for times, name in ((1, "equal frames"), (2, "twice the frames, the paper's comparison")) if cfg.stages else ():
        less = [100 - 100 * a / (times * frames / full * b / 1e6) for a, b in zip(total, macs[full], strict=True)]
        print(f"against   {full} frames only at {name}: {less[0]:.1f} % fewer multiply-adds, embedded {less[1]:.1f} %")


# ---- The tasks -------------------------------------------------------------------------------------------------------


RANGES = {  # flags: which values, in words
    "lr stride log_every eval_every batch_size search_stages layer_decay": (lambda x: 0 < x < math.inf, "above 0"),
    "budget budget_frames": (lambda x: 0 < x <= 1e6, "above 0 and at most 1000000"),
    "min_lr weight_decay clip_grad max_steps workers micro_batch then_micro_batch mixup cutmix max_bad lr_cycles clips_per_second "
    "train_clips num_classes":
        (lambda x: 0 <= x < math.inf, "at least 0"),
    "beta2 mask_ratio drop_path head_dropout label_smoothing erase": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "rand_augment": (lambda x: 0 <= x <= 10, "in [0, 10]"),
}  # fmt: skip


def check(cfg):
    """Refuse settings that can't work, by the flag's name, before anything is read or made."""
    for flags, (allowed, words) in RANGES.items():
        for flag in flags.split():
            if not allowed(getattr(cfg, flag)):
                raise UserError(f"--{flag.replace('_', '-')} must be {words}, not {getattr(cfg, flag)}")
    if cfg.min_lr > cfg.lr:
        raise UserError(f"--min-lr {cfg.min_lr:g}, where the cosine ends, is above the peak, --lr {cfg.lr:g}")
    t, h, _ = MODELS[cfg.model]["patch"]
    if cfg.size < h or cfg.size % h:
        raise UserError(f"--size {cfg.size} is not a multiple of the patch's {h} pixels")
    if cfg.stages and (cfg.epochs or cfg.frames):
        raise UserError("--stages decide frames and epochs: leave out --frames and --epochs, or --stages ''")
    if cfg.stages and cfg.positions == "learned":
        raise UserError("--positions learned is for fine-tuning from an image model; pretraining has fixed ones")
    if not cfg.stages and (cfg.epochs <= 0 or cfg.frames < t or cfg.frames % t):
        raise UserError(f"without --stages, --epochs {cfg.epochs} must be above 0 and --frames {cfg.frames} a multiple "
                        f"of the token's {t} frames")  # fmt: skip
    whole, flag = (cfg.budget, "--budget") if cfg.stages else (cfg.epochs, "--epochs")
    if not 0 <= cfg.warmup_epochs < whole:
        raise UserError(f"--warmup-epochs {cfg.warmup_epochs:g} must be at least 0 and less than {flag} {whole:g}")
    places = (cfg.size // h) ** 2
    if cfg.stages and not int(cfg.mask_ratio * places):
        raise UserError(f"--mask-ratio {cfg.mask_ratio} must mask some of a frame's {places} places")
    _, width = two_numbers("--decoder", cfg.decoder or MODELS[cfg.model]["decoder"])
    if width > 64 and width % 64:
        raise UserError(f"--decoder {cfg.decoder}: a width of {width} is not in heads of 64")
    two_numbers("--test-views", cfg.test_views)
    staged(cfg)
    common.need_init(cfg, ["ssv2_ft", "k400_ft"], "weights pretrained on videos")
    common.need_init(cfg, ["ssv2_sup"], "an image ViT's weights (.npz or hub folder)")
    common.check_gpus(cfg)
    if bool(cfg.then_train_list) != bool(cfg.then_val_list):
        raise UserError("--then-train-list and --then-val-list need each other")
    if cfg.then:
        check(following(cfg))


def two_numbers(flag, text):
    """(4, 512) of "4x512"; UserError where a flag's text has another form."""
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", text):
        raise UserError(f"{flag} {text} is not two numbers above 0 with an x between them, such as 4x512 or 5x3")
    return tuple(map(int, text.split("x")))


def open_lists(cfg, ctx):
    """(training, validation) VideoLists; toy videos are made where the toy recipe's own lists are asked for."""
    if cfg.train_list == TOY["train_list"]:
        if ctx.rank == 0:
            try:
                data.make_toy("toy", "actions")
            except OSError as error:
                raise UserError(f"can't make the toy videos: {error}") from None
        ctx.barrier()
    for flag, path in (("--train-list", cfg.train_list), ("--val-list", cfg.val_list)):
        if not path:
            raise UserError(f"{flag} is missing: a file of one video a line, `path label` or `path,label`")
    videos = data.VideoList(cfg.train_list, cfg.data_root, cfg.num_classes)
    if len(videos.classes) < 2 and not cfg.stages:
        raise UserError(f"{cfg.train_list}: all videos are of one class; a classifier needs two")
    val_videos = data.VideoList(cfg.val_list, cfg.data_root, classes=videos.classes)
    root = "--then-data-root" if cfg.then_of and cfg.then_train_list else "--data-root"
    data.need_videos(val_videos, cfg.max_bad, root)
    return videos, val_videos


def prepare(cfg, ctx):
    """(training list, validation list, Stages, Segments) of a run; refuses what can't work before a folder is made."""
    videos, val_videos = open_lists(cfg, ctx)
    stages, segments = schedule(cfg, len(videos))
    for stage in stages:
        split(cfg, stage, ctx)
    return videos, val_videos, stages, segments


def init_weights(path, net):
    """A file's weights for `net`: ours, VideoMAE's, or an image ViT's for a classifier with learned positions.

    Fine-tuning leaves out the decoder, VideoMAE's final norm (fc_norm takes its place), and a classifier of another
    number of classes. UserError: weights of another backbone.
    """
    own = net.state_dict()
    state = common.read_weights(path)
    image = common.vit_weights(state)
    weights = image or common.videomae_weights(state)
    if "pos_embed" in weights and not image:
        weights["positions"] = weights.pop("pos_embed")  # upstream's name of learned ones
    if image and "positions" not in own:
        raise UserError(f"{path}: an image ViT's weights bring their own positions: --positions learned")
    if image:
        # A tubelet's frames share the image's kernel; its inputs were (p - 1/2) * 2, ours are (p - mean) / std.
        mean, std = (torch.tensor(x) for x in (data.IMAGENET_MEAN, data.IMAGENET_STD))
        kernel, frames = weights["patch_embed.weight"].permute(0, 2, 3, 1).flatten(1, 2), net.patch[0]  # [D, p p, 3]
        weights["patch_embed.bias"] = weights["patch_embed.bias"] + (kernel * (2 * mean - 1)).sum((1, 2))  # [D]
        weights["patch_embed.weight"] = (2 * kernel * std / frames).repeat(1, frames, 1).flatten(1)  # [D, P]
        table = weights.pop("pos_embed")[0, 1:]  # [h w, D], without CLS
        if len(table) != net.places:
            raise UserError(f"{path}: its positions are {len(table)} places, --size makes {net.places}")
        weights["positions"] = table.repeat(net.grid[0], 1)[None]  # [1, N, D]: the same in all time steps
        time = lambda name: name.replace(".attn.", ".temporal_attn.").replace(".norm1.", ".temporal_norm.")
        weights |= {time(k): v for k, v in weights.items() if time(k) in own and time(k) != k}  # starts as space's
        for name in own:
            if name.endswith("trajectory_kv.weight"):  # DECISION (trajectory)
                keys, values = own[name].chunk(2)  # [D, D] each
                weights[name] = torch.cat([keys, torch.eye(len(values)).to(values)])  # [2D, D]
    leaves = lambda names: {name.split(".", 2)[2] for name in names if name.startswith("blocks.")}
    other = leaves(weights) - leaves(own) or (leaves(own) - leaves(weights) if leaves(weights) and not image else set())
    if other:
        raise UserError(f"{path}: weights of another backbone than this --backbone (by {min(other)})")
    if isinstance(net, Classifier):
        unused = ("decoder.", "encoder_to_decoder.", "mask_token", "norm.", "cls_token")
        weights = {k: v for k, v in weights.items() if not k.startswith(unused)}
        wrong = weights.get("head.weight", own["head.weight"]).shape != own["head.weight"].shape
        weights = {k: v for k, v in weights.items() if not (wrong and k.startswith("head."))}
    return weights


def use(cfg, ctx):
    """--task eval, predict, features: a trained model, its shape read from its own checkpoint."""
    source = cfg.init or f"{cfg.out}/best.pt"
    shape = ("model", "backbone", "decoder", "positions", "stages", "budget", "budget_frames", "order", "frames",
             "epochs", "warmup_epochs", "size", "sampling", "stride", "mask_ratio", "target", "seed")  # fmt: skip

    def build_from(state):
        its_cfg = replace(cfg, then="", **{key: state["config"][key] for key in shape})
        check(its_cfg)
        return its_cfg, build(its_cfg, len(state["classes"])).to(ctx.device)

    cfg, net, state = common.open_trained(source, "tpt_mae.py", ("classes",), build_from)
    classes = state["classes"]
    if cfg.task == "predict":
        return predict(net, cfg, ctx, classes)
    if not cfg.val_list:
        raise UserError(f"--task {cfg.task} needs --val-list")
    videos = data.VideoList(cfg.val_list, cfg.data_root, classes=classes)
    if cfg.task == "features":
        return write_features(net, videos, cfg, ctx)
    views = "1x1" if cfg.stages else cfg.test_views  # the masked error is of one view
    result = evaluate(net, videos, cfg, ctx, two_numbers("--test-views", views))
    if ctx.rank == 0:
        values = "  ".join(f"{k} {v:.4g}" for k, v in result.items())
        print(f"{source} on {cfg.val_list}, views {views}: {values}")


@torch.no_grad()
def predict(net, cfg, ctx, classes):
    """Print the five likeliest classes of each --input video; a pretrained model's reconstructions are drawn."""
    if not cfg.input:
        raise UserError("--task predict needs --input video.mp4 ...")
    videos, failures = data.VideoList.of(cfg.input), data.Failures(len(cfg.input), 1.0)
    for number, batch in enumerate(eval_batches(videos, cfg, ctx, failures)):
        with ctx.autocast():
            outputs = net(batch.clips, batch.keys, *[cfg.mask_ratio] * bool(cfg.stages))
        if cfg.stages:
            path = Path(cfg.out) / f"predict_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_recon(net, batch.clips, batch.keys, outputs[0], cfg, path)
            print(f"{path}: {', '.join(videos.video(i) for i in batch.index.tolist())}")
            continue
        shares, order = outputs.float().softmax(-1).sort(-1, descending=True)
        for i, share, best in zip(batch.index.tolist(), shares.tolist(), order.tolist(), strict=True):
            words = (f"{classes[c]} {100 * p:.1f} %" for c, p in zip(best[:5], share, strict=False))
            print(f"{videos.video(i)}: {', '.join(words)}")
    if failures.new:
        raise UserError("; ".join(failures.new))


@torch.no_grad()
def write_features(net, videos, cfg, ctx):
    """Write features.npy, float32 [videos, D]: the tokens' mean of a video's centre clip, in the list's order; NaN if
    unreadable."""
    failures = data.Failures(len(videos), cfg.max_bad)

    def parts():
        for batch in eval_batches(videos, cfg, ctx, failures):
            with ctx.autocast():
                features = net.features(batch.clips)  # [B, D]
            yield batch.index, features

    common.write_features(cfg.out, (len(videos), net.width), parts(), failures, ctx)


def following(cfg):
    """The Config of --then: that recipe, from this run's weights, in <out>_ft, on this machine and the full length.

    Its videos are this run's, or --then-train-list's (Table 1: pretrained on K400, fine-tuned on SSv2)."""
    new = Config(**{"recipe": cfg.then} | RECIPES[cfg.then])
    free = [name for name, field in Config.__dataclass_fields__.items() if field.metadata["free"]]
    same = {name: getattr(cfg, name) for name in [*free, "model", "backbone", "size", "seed", "num_classes"]}
    if cfg.then_train_list:
        same |= {name: getattr(cfg, f"then_{name}") for name in ("train_list", "val_list", "data_root")}
        same |= {"train_clips": new.train_clips, "num_classes": 0}  # as many as that list has
    same |= {"task": "train", "then": "", "resume": "auto", "init": f"{cfg.out}/last.pt", "out": f"{cfg.out}_ft"}
    same["clips_per_second"] = 0.0  # it was measured in pretraining
    sizes = [size for size in (new.micro_batch, cfg.micro_batch) if size]
    same["micro_batch"] = cfg.then_micro_batch or min(sizes, default=0)
    same["grad_checkpoint"] = new.grad_checkpoint or cfg.grad_checkpoint
    # Another pretraining in the same folder is thereby refused by what an earlier one was fine-tuned to.
    settings = [getattr(cfg, name) for name in Config.__dataclass_fields__ if name not in free]
    same["then_of"] = f"{common.make_key(repr(settings)).item():x}"
    return replace(new, **same, frames=cfg.budget_frames if cfg.stages else cfg.frames)


def search_runs(cfg):
    """The Config of each schedule that --task search_schedule trains; first the full length alone."""
    if not cfg.then:
        raise UserError("--task search_schedule ranks by fine-tuned accuracy: --then says which recipe fine-tunes")
    try:
        space = search_space([int(part) for part in cfg.search_frames.split(",")], cfg.search_stages)
    except ValueError:
        raise UserError(f"--search-frames {cfg.search_frames} is not a list such as 2,4,8,12,16") from None
    runs = [replace(cfg, task="train", stages=text) for text in space]
    for run in runs:
        check(run)
    return runs


def print_plans(cfg):
    """--plan: what the command would run, one phase after the other; of a search its schedules, and the longest's memory.

    No list, video or GPU is looked at.
    """
    if cfg.task == "search_schedule":
        runs = search_runs(cfg)
        print("\n".join(["schedules to search, as --stages:", *(run.stages for run in runs)]))
        for run in (runs[0], following(runs[0])):
            common.print_memory(run, memory(run))
        return
    print_plan(cfg)
    if cfg.then:
        print_plan(following(cfg))


def search_schedule(cfg, ctx):
    """Sec. 3.2.2: train each schedule of search_space at this --budget, fine-tune it by --then, rank them.

    Each has its folder, so that the same command goes on where it was stopped. The winner is printed as a flag.
    """
    runs, ranking = search_runs(cfg), []
    for run in runs:
        result = main(replace(run, out=f"{cfg.out}/{run.stages.replace(':', '-')}"))
        ranking.append((result["val_top1"], run.stages))
    ranking.sort(key=lambda row: -row[0])
    if ctx.rank == 0:
        print("\n".join(f"{top1:6.2f} % top-1  --stages {text}" for top1, text in ranking))
        print(f"best of {len(ranking)}, at a budget of {cfg.budget:g} epochs: --stages {ranking[0][1]}")
    return ranking


def augment(clips, keys, rand_augment, flip, erase):
    """VideoMAE's augmentation of fine-tuning, on the device: uint8 [B, T, C, H, W] -> the same; keys int64 [B], on the
    CPU."""
    if rand_augment:
        clips = data.rand_augment(clips, keys, rand_augment, layers=4)  # [B, T, C, H, W]
    if flip:
        clips = data.flip(clips, keys)  # [B, T, C, H, W]
    if erase:
        clips = data.erase(clips, keys, erase)  # [B, T, C, H, W]
    return clips


@common.in_one_line
def main(cfg):
    check(cfg)
    cfg = common.without_random(cfg)
    search = cfg.task == "search_schedule"
    cfg = replace(cfg, out=str(Path(cfg.out or f"runs/tpt_mae-{cfg.recipe}{'-search' if search else ''}")))
    if cfg.plan:
        return print_plans(cfg)
    ctx = common.launch(cfg.precision)
    if search:
        return search_schedule(cfg, ctx)
    if cfg.then and cfg.task == "train":
        prepare(following(cfg), ctx)  # what it would refuse, now
        main(replace(cfg, then=""))  # a call of its own: its model and optimizer are freed before the next are made
        return main(following(cfg))
    if cfg.task != "train":
        return use(cfg, ctx)
    videos, val_videos, stages, segments = prepare(cfg, ctx)
    classes = len(videos.classes)
    run = common.Run(cfg, ctx, "tpt_mae")
    state = run.resume(train_list=videos, val_list=val_videos)

    total, warmup = segments[-1].stop, cfg.warmup_epochs / (cfg.budget if cfg.stages else cfg.epochs)
    torch.manual_seed(cfg.seed)  # for the initial weights; all later draws are keyed
    net = build(cfg, classes).to(ctx.device)
    groups = common.param_groups(net, cfg.weight_decay, cfg.layer_decay, net.layer_of, len(net.blocks), ("positions",))
    # DECISION (carry): one optimizer for all stages
    optimizer = common.optimizer("adamw", groups, cfg.lr, (0.9, cfg.beta2))
    scaler = common.loss_scaler(ctx)  # outside fp16 it scales by 1, and only skips updates that are not finite
    meter = common.Meter(ctx.device, "loss")
    # What a checkpoint says beside weights: a run has no other state, because its draws and its data order are keyed.
    at = {"step": 0, "evaluated": 0, "best": -math.inf, "skipped": 0, "clips": 0, "frames": 0, "last": {}}
    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["precision"] == ctx.precision:
            scaler.load_state_dict(state["scaler"])
        at = state["at"]
        meter.load(state["sums"], ctx)
    elif cfg.init:
        run.say(common.load_weights(net, init_weights(cfg.init, net), cfg.init))
    state = None  # its memory is free
    common.compile_model(net, ctx, cfg.compile)
    masked_error = common.compiled(mae_loss, ctx, cfg.compile)
    model = ctx.wrap(net)
    run.say(f"{len(videos)} training and {len(val_videos)} validation videos, {classes} classes; {len(segments)} "
            f"stages; {ctx.precision} on {ctx.device}; steps {at['step']} to {total}")  # fmt: skip

    def save(*names):
        if at["step"] < total and not meter.healthy(ctx):
            return False  # the last good checkpoint stays
        parts = {"model": net, "optimizer": optimizer, "scaler": scaler}
        state = {name: part.state_dict() for name, part in parts.items()}
        run.save(state | {"at": at, "sums": meter.state(ctx), "classes": videos.classes}, *names)
        return True

    augmented = partial(augment, rand_augment=cfg.rand_augment, flip=cfg.flip, erase=cfg.erase)
    for segment in segments:
        if segment.stop < at["step"]:
            continue  # done before this process started
        stage, start = stages[segment.stage], max(segment.start, at["step"])
        local = segment.offset - segment.start  # a stage counts its own steps, across the rounds of a short cycle
        micro, accumulation = split(cfg, stage, ctx)
        seed = common.make_key(cfg.seed, "stage", segment.stage).item()
        plan = partial(sample_clip, cfg, stage.frames, True, (1, 1))
        dataset = data.ClipDataset(videos, plan, cfg.size, seed, replace=True, views=stage.repeated)
        span = start + local, segment.stop + local
        parts = stage.batch // stage.repeated, micro // stage.repeated  # in videos
        order = data.GlobalBatches(len(videos), *parts, seed, *span, ctx.rank, ctx.world)
        batches = data.make_loader(dataset, order, cfg.workers, ctx.device, augmented)
        failures, run.batch_size = data.Failures(len(videos), cfg.max_bad), stage.batch
        if start < segment.stop:
            run.say(f"steps {start} to {segment.stop}: {stage.frames}-frame clips; batch {stage.batch} = {ctx.world} "
                    f"ranks x {micro} clips x {accumulation}; peak lr {stage.lr:g}")  # fmt: skip
        while True:
            # Evaluation comes before the step, so that a run that was stopped between the two takes it up again.
            step = at["step"]
            due = step == total or (step == segment.stop and cfg.cycle == "long")
            whole = step > segment.start and (step + local) % (cfg.eval_every * stage.epoch_steps) == 0
            if step > at["evaluated"] and (due or whole):
                result = evaluate(net, val_videos, cfg, ctx, picture=run.folder / "recon.png")
                score = -result["val_mae"] if cfg.stages else result["val_top1"]
                if step == total and cfg.test_views != "1x1" and not cfg.stages:
                    test = evaluate(net, val_videos, cfg, ctx, two_numbers("--test-views", cfg.test_views))
                    result |= {name.replace("val", "test"): value for name, value in test.items()}
                run.log(result | {"clips": at["clips"], "frames": at["frames"]}, step, total)
                better = score > at["best"] and meter.healthy(ctx)
                at |= {"evaluated": step, "best": score if better else at["best"], "last": result}
                save(*["best.pt"] * better, "last.pt")
            if step == segment.stop:
                break

            floor = cfg.min_lr * stage.lr / cfg.lr  # DECISION (lr)
            lr = learning_rate(step, segment.cycle, stage.lr, floor, warmup, cfg.decay)  # DECISION (warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            for i in range(accumulation):
                batch = next(batches)
                run.wait(batch.waited)
                failures.add(batch, micro)
                keys = data.to_device(batch.keys, ctx.device)  # [B]
                labels = data.soft_labels(batch.labels, classes, cfg.label_smoothing)  # [B, classes]
                clips, labels = data.mix(batch.clips, labels, (cfg.seed, step), cfg.mixup, cfg.cutmix)
                with ctx.sync(model, last=i == accumulation - 1):
                    with ctx.autocast():
                        if cfg.stages:
                            loss = masked_error(*model(clips, keys, cfg.mask_ratio))  # [B]
                        else:
                            loss = -(labels * model(clips, keys).float().log_softmax(-1)).sum(-1)  # [B]
                    # The mean over the global batch; the ranks' gradients are averaged, hence the factor `world`. A
                    # loss that is not finite makes the gradient so too, and thereby skips the update.
                    poison = torch.where(loss.isfinite().all(), 1.0, math.nan)
                    scaler.scale(loss.sum() * poison * ctx.world / stage.batch).backward()
                meter.add(batch.index, loss)
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
            if cfg.clip_grad:
                nn.utils.clip_grads_with_norm_(net.parameters(), cfg.clip_grad, norm)
            meter.step(norm)
            scaler.step(optimizer)  # an update that is not finite is skipped, by a flag on the device
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            at["step"] = step = step + 1
            at["clips"], at["frames"] = at["clips"] + stage.batch, at["frames"] + stage.batch * stage.frames

            run.advance(step, total)
            epoch = (step + local) / stage.epoch_steps
            if epoch == int(epoch) or step % cfg.log_every == 0 or step == segment.stop:
                for line in failures.collect(ctx, (step + local - 1) // stage.epoch_steps):
                    run.say(f"unreadable, replaced by another: {line}")
            if step % cfg.log_every == 0 or step == segment.stop:
                means, bad, skipped = meter.read(ctx)
                at["skipped"] += run.guard([videos.video(i) for i in bad], skipped, at["skipped"], scaler.get_scale())
                record = {"stage": segment.stage, "epoch": round(epoch, 3), **means, "lr": lr}
                run.log(record | {"clips": at["clips"], "frames": at["frames"]}, step, total)
            if (run.save_due() or epoch == int(epoch)) and save("last.pt"):
                run.leave(step)

    if ctx.rank == 0:
        common.save_atomic(run.folder / "videomae.pth", {"model": videomae_state(net)})
    result = "  ".join(f"{k} {v:.4g}" for k, v in at["last"].items())
    run.say(f"complete: {result}; best {abs(at['best']):.4g}. Weights in VideoMAE's format: {run.folder}/videomae.pth. "
            "--overwrite starts anew.")  # fmt: skip
    run.save_due()  # a signal that came during the last evaluation: what comes after this run is not begun
    run.leave(total)
    return at["last"]


if __name__ == "__main__":
    main(common.parse(Config, RECIPES))
