"""Turbo Training with Token Dropout (Han, Xie, Zisserman, BMVC 2022): action classification, in one file.

Video is redundant, so a ViT can be trained on a random few of a clip's tokens. Each step drops the share m of the
tokens before anything is computed for them, classifies the clip from the rest, and beside it reconstructs the share
r <= m of the tokens that were dropped: a partial masked autoencoder, whose light decoder keeps the encoder honest about
what it did not see. At m = 0.75, r = 0.25 a step costs a quarter of the usual one; at test nothing is dropped.

    paper                                   here
    Sec. 3.2, operations (1), (2), (3)      token_dropout
    Sec. 3.1, z = ViT([v_CLS, v_1 ...])     Turbo.encode
    Sec. 3.2, Partial Masked Autoencoder    Turbo.decode
    the MAE target (VideoMAE's)             pixel_target
    Eq. 1                                   turbo_loss
    Sec. 4.1, 16 frames at 5 fps            sample_clip
    Table 1 left, GFLOPs                    TABLE_1, count_gmacs (--plan)
    Table 1 right, m at inference           evaluate (--eval-mask-ratio)
    Table 6                                 Config (defaults), RECIPES

Faithful: m, r, losses and their weights, encoder, optimiser, schedule, sampling, as the paper states them.
DECISIONS where the paper is silent or contradicts itself; each line that one shapes is tagged:
    decoder     Table 6 states 8 layers x 512. Table 1's GFLOPs come out only with VideoMAE-B's own 4 x 384 (0.12 %;
                8 x 512 misses by up to 117 %, and would not save memory at m = 0.5). Default: 4 x 384; --decoder 8x512.
    mask        per-token random: with tubes Table 1's last rows miss by 1-2 %.
    CLS         VideoMAE has none. Here: learned, no position, not shown to the decoder (Sec. 3.2 counts N_i + N_r).
    target      normalised per patch and channel, as VideoMAE; the toy recipe predicts raw pixels (--target).
    embedding   dropped patches are not embedded. The paper's GFLOPs embed all of them: --plan shows both.
    lr          "base learning rate 1e-3" is read as VideoMAE's rule, lr = base * batch / 256, at Figure 3's batch, 16.
    short       a video shorter than 16 frames at 5 fps is spread over, not padded; one of under 16 frames is refused.
    RandAug     "(9, 0.5)" is read as timm's rand-m9-mstd0.5-inc1: two operations, each with probability 0.5.
Missing: video-language training (Eq. 2) and long video (Sec. 4.3).

    python turbo.py                     # toy videos, made on first use: 2 CPU cores, about 3 minutes
    torchrun --nproc_per_node=8 turbo.py --recipe ucf101 --train-list train.csv --val-list val.csv --data-root UCF-101

Shapes: B clips, T frames, C colours, N tokens, K kept (visible) and R reconstructed ones, D width, P pixel values.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common
import data
from common import Block, UserError, gather_tokens, opt, parse, patchify, uniform, unpatchify

# Width, depth and heads of the encoder; layers x width of the decoder that VideoMAE gives it, in heads of 64.
MODELS = {
    "vit_toy": {"width": 128, "depth": 4, "heads": 2, "decoder": "2x64"},
    "vit_s": {"width": 384, "depth": 12, "heads": 6, "decoder": "4x192"},
    "vit_b": {"width": 768, "depth": 12, "heads": 12, "decoder": "4x384"},  # DECISION (decoder): not Table 6's 8x512
    "vit_l": {"width": 1024, "depth": 24, "heads": 16, "decoder": "4x512"},
}

# A recipe replaces defaults of Config, which are Table 6's column "Act. Classification".
RECIPES = {
    "toy": {
        "train_list": "toy/actions/train.csv",
        "val_list": "toy/actions/val.csv",
        "data_root": "toy/actions",
        "train_clips": 1600,
        "num_classes": 8,
        "model": "vit_toy",
        "size": 64,
        "recon_ratio": 0.25,
        "target": "pixels",  # a small model needs long to learn the normalised one
        "epochs": 15,
        "warmup_epochs": 1.0,
        "eval_every": 5,
        "lr": 1e-3,
        "drop_path": 0.0,
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "rand_augment": 0.0,
        "crop": False,
        "flip": False,  # left is not right
        "workers": 2,
        "log_every": 50,
    },
    "ucf101": {
        "train_clips": 9537,  # split 1
        "num_classes": 101,
        "lr": 1e-3 * 16 / 256,  # DECISION (lr): Table 6's base rate by VideoMAE's rule
    },
}


@dataclass
class Config:
    recipe: str = opt("toy", "a column of the paper's table of hyper-parameters: see RECIPES")
    task: str = opt("train", "what to do with it", choices=["train", "eval", "predict", "features"], free=True)
    train_list: str = opt("", "list of training videos: `path label` or `path,label` a line", free=True)
    val_list: str = opt("", "list of validation videos", free=True)
    data_root: str = opt("", "folder that the lists' paths are relative to", free=True)
    input: tuple = opt((), "videos for --task predict", free=True)
    out: str = opt("", "run folder; empty: runs/turbo-<recipe>", free=True)
    init: str = opt("", "weights to start from: ours, VideoMAE's .pth or hub folder (eval ...: ours; empty: best.pt)")
    resume: str = opt(
        "auto", "auto: continue the run folder's last.pt if it is there; or a checkpoint to continue", free=True
    )
    overwrite: bool = opt(False, "start anew in a run folder that holds another run", free=True)
    plan: bool = opt(False, "print what would run (cost, memory, steps) without data or GPU, and exit", free=True)

    model: str = opt("vit_b", "encoder size", choices=list(MODELS))
    decoder: str = opt("", "layers x width of the decoder, such as 8x512; empty: the model's own")
    frames: int = opt(16, "frames a clip (Sec. 4.1)")
    fps: float = opt(5.0, "frames a second of a clip (Sec. 4.1)")
    size: int = opt(224, "height and width of a clip, in pixels (Sec. 4.1)")
    num_classes: int = opt(0, "number of classes; 0: as many as the training list has")
    mask_ratio: float = opt(0.5, "m, the share of tokens dropped in training (Sec. 3.2)")
    recon_ratio: float = opt(0.5, "r <= m, the share of tokens reconstructed; 0: no decoder (Sec. 3.2)")
    eval_mask_ratio: float = opt(0.0, "m at test (Table 1 right; 0 is best, Sec. 5.1.1)")
    target: str = opt("normalized", "what is predicted of a patch", ["normalized", "pixels"])  # DECISION (target)

    train_clips: int = opt(0, "size of the training set, for --plan", free=True)
    epochs: int = opt(100, "passes over the training list (Table 6)")
    max_steps: int = opt(0, "number of optimizer steps instead of --epochs; 0: by epochs")
    batch_size: int = opt(16, "clips per optimizer step over all ranks (Figure 3)")
    micro_batch: int = opt(0, "clips that one process holds at once; 0: batch / ranks", free=True)
    lr: float = opt(1e-3, "peak learning rate at this batch, as used")
    min_lr: float = opt(1e-6, "learning rate at the end of the cosine (VideoMAE)")
    warmup_epochs: float = opt(10.0, "epochs of linear warm-up (Table 6)")
    weight_decay: float = opt(0.05, "AdamW's weight decay (Table 6)")
    clip_grad: float = opt(0.0, "largest gradient norm; 0: not clipped (VideoMAE)")
    drop_path: float = opt(0.1, "stochastic depth of the last block, rising linearly (Table 6)")
    label_smoothing: float = opt(0.1, "share of a label spread over all classes (Table 6)")
    mixup: float = opt(0.8, "Beta parameter of mixup; 0: off (Table 6)")
    cutmix: float = opt(1.0, "Beta parameter of cutmix; 0: off (Table 6)")
    rand_augment: float = opt(9.0, "magnitude of RandAugment; 0: off (Table 6)")  # DECISION (RandAug)
    crop: bool = opt(True, "random resized crops in training (VideoMAE); off: the centre square")
    flip: bool = opt(True, "random left-right flips in training (VideoMAE)")

    workers: int = opt(8, "loader processes a rank; 0: load in the training process", free=True)
    max_bad: float = opt(
        0.01, "share of an epoch's videos that may be unreadable (at least 1 video) before it stops", free=True
    )
    precision: str = opt(
        "auto", "auto: bf16, fp16 or fp32, the best of the device", ["auto", "fp32", "bf16", "fp16"], True
    )
    attention: str = opt(
        "auto", "auto: flash-attn where it can run, else sdpa", ["auto", "flash", "sdpa", "plain"], True
    )
    compile: bool | None = opt(None, "torch.compile the model; default: on CUDA", free=True)
    grad_checkpoint: bool = opt(False, "recompute blocks in backward: less memory, more time", free=True)
    seed: int = opt(0, "key of every random draw")
    eval_every: int = opt(1, "epochs between evaluations; the last step is always evaluated")
    log_every: int = opt(20, "steps between log records")
    tensorboard: bool = opt(False, "also write the log for TensorBoard, where it is installed", free=True)
    save_minutes: float = opt(10.0, "minutes between checkpoints, besides one an epoch", free=True)
    max_skipped: int = opt(20, "updates skipped for a non-finite loss or gradient before the run stops", free=True)


# ---- The paper's ideas -----------------------------------------------------------------------------------------------


def num_kept(n, m, r):
    """(N_vis, N_rec) of n tokens: n (1 - m) and n r, rounded down; r = m reconstructs all that is not visible."""
    visible = int(round(n * (1 - m), 6))  # round: 100 * (1 - 0.9) is 9.999...98 in floating point
    return visible, n - visible if r == m else int(round(n * r, 6))


def token_dropout(keys, n, m, r):
    """Which of n tokens a clip shows its encoder, and which it reconstructs (Sec. 3.2, operations 1-3).

    keys int64 [B]; m the mask ratio, r <= m the reconstruction ratio. Returns indices (visible [B, K], reconstructed
    [B, R]), int64, ascending, disjoint; the remaining n (m - r) tokens take no part in this step. Per-token random.
    """
    if not 0 <= r <= m < 1:
        raise ValueError(f"token dropout needs 0 <= r <= m < 1, not m = {m}, r = {r}")
    return common.random_split(keys, n, *num_kept(n, m, r))  # DECISION (mask): no tubes


def pixel_target(patches, kind, mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD):
    """What the decoder predicts of 0-255 patches [B, R, P], in float32 [B, R, P].

    "normalized": each patch, each colour by its own mean and (unbiased) deviation over the patch's pixels, as VideoMAE:
    it rewards texture and motion edges over brightness. "pixels": as the encoder sees them.
    """
    if kind == "pixels":
        return data.normalize(patches, mean, std)
    x = (patches.float() / 255).unflatten(-1, (-1, 3))  # [B, R, P/3, 3]
    deviation = x.var(dim=2, keepdim=True, unbiased=True).sqrt()  # [B, R, 1, 3]
    return ((x - x.mean(dim=2, keepdim=True)) / (deviation + 1e-6)).flatten(2)  # [B, R, P]


def turbo_loss(logits, labels, prediction, target):
    """Eq. 1, a clip at a time: L = lambda_CE CE + PMAE with lambda_CE = 1 / ln(classes). -> L, CE, PMAE, each [B].

    1 / ln(classes) makes a uniform guess cost 1, what predicting the mean of a normalised patch costs the other loss.
    logits [B, classes]; labels soft, [B, classes]; prediction and target [B, R, P], R = 0 if nothing is reconstructed.
    """
    ce = -(labels * logits.float().log_softmax(-1)).sum(-1)  # [B]
    pmae = (prediction.float() - target).square().mean((1, 2)) if target.shape[1] else torch.zeros_like(ce)  # [B]
    return ce / math.log(logits.shape[1]) + pmae, ce, pmae


def sample_clip(cfg, train, video, index, view, key):
    """(frames, box) of a clip: 16 frames at 5 fps (Sec. 4.1); a random start and crop in training, else the centre."""
    start = uniform(key, "start").item() if train else 0.5
    frames = data.fps_frames(video.info, cfg.frames, cfg.fps, start)  # DECISION (short): spread over a short video
    box = data.random_resized_box(video.info, key) if train and cfg.crop else data.centre_box(video.info)
    return frames, box


# ---- The model -------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """VideoMAE's decoder: blocks, norm, one linear layer to the pixels of a patch."""

    def __init__(self, layers, width, pixels, kind):
        super().__init__()
        heads = max(1, width // 64)
        self.blocks = nn.ModuleList(Block(width, heads, kind=kind) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, pixels)

    def forward(self, x, count, grad_checkpoint=False):
        """Pixels of the last `count` tokens: [B, K + R, D] -> [B, R, P]; the visible ones need no prediction."""
        x = common.run_blocks(self.blocks, x, grad_checkpoint=grad_checkpoint)  # [B, K + R, D]
        return self.head(self.norm(x[:, x.shape[1] - count :]))  # [B, R, P]


class Turbo(nn.Module):
    """ViT encoder on the visible tokens, classifier on its CLS, light decoder on visible + reconstructed ones (Fig. 1).

    Module names follow VideoMAE's checkpoints.
    """

    patch = (2, 16, 16)  # frames, height, width of a token (App. A)

    def __init__(self, num_classes, model="vit_b", decoder="", frames=16, size=224, recon=True, target="normalized",
                 drop_path=0.1, attention="auto", grad_checkpoint=False):  # fmt: skip
        super().__init__()
        spec = MODELS[model]
        self.width, self.target, self.grad_checkpoint = spec["width"], target, grad_checkpoint
        self.grid = (frames // self.patch[0], size // self.patch[1], size // self.patch[2])  # tokens in (t, h, w)
        self.num_tokens, pixels = math.prod(self.grid), math.prod(self.patch) * 3
        self.patch_embed = nn.Linear(pixels, self.width)  # = VideoMAE's Conv3d (common.conv_to_linear)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, self.width))  # DECISION (CLS): learned, no position
        rates = [drop_path * i / (spec["depth"] - 1) for i in range(spec["depth"])]
        self.blocks = nn.ModuleList(
            Block(self.width, spec["heads"], drop_path=rate, kind=attention, index=i) for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = nn.Linear(self.width, num_classes)  # App. A: CLS into one linear layer
        self.register_buffer("positions", common.sinusoid_table(self.num_tokens, self.width)[None], persistent=False)
        if recon:
            layers, width = map(int, (decoder or spec["decoder"]).split("x"))
            self.encoder_to_decoder = nn.Linear(self.width, width, bias=False)
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.decoder = Decoder(layers, width, pixels, attention)
            table = common.sinusoid_table(self.num_tokens, width)[None]  # [1, N, decoder width]
            self.register_buffer("decoder_positions", table, persistent=False)
        self.apply(common.init_linear)
        self.patch_embed.reset_parameters()  # PyTorch's default, as VideoMAE's convolution: positions must stand out
        nn.init.normal_(self.head.weight, std=0.01)

    def encode(self, patches, visible, keys=None):
        """Final-layer tokens [B, 1 + K, D], CLS first, of the visible ones of 0-255 patches [B, N, P]; visible [B, K].

        Tokens are dropped before normalisation and embedding: what is not looked at costs nothing. `keys` turns on
        drop path.
        """
        # DECISION (embedding): gather first
        x = data.normalize(gather_tokens(patches, visible), data.IMAGENET_MEAN, data.IMAGENET_STD)  # [B, K, P]
        x = self.patch_embed(x) + gather_tokens(self.positions, visible)  # [B, K, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # [B, 1 + K, D]
        return self.norm(common.run_blocks(self.blocks, x, keys, self.grad_checkpoint))  # [B, 1 + K, D]

    def decode(self, tokens, visible, recon):
        """Predicted pixels [B, R, P] of the tokens `recon` [B, R], from encoded visible tokens [B, K, D] (no CLS)."""
        x = self.encoder_to_decoder(tokens) + gather_tokens(self.decoder_positions, visible)  # [B, K, D']
        masked = self.mask_token + gather_tokens(self.decoder_positions, recon)  # [B, R, D']
        return self.decoder(
            torch.cat([x, masked.to(x.dtype)], dim=1), recon.shape[1], self.grad_checkpoint
        )  # [B, R, P]

    def forward(self, clips, keys, m, r):
        """clips 0-255 [B, T, C, H, W], keys int64 [B] -> logits [B, classes], prediction and target [B, R, P]."""
        patches = patchify(clips, self.patch)  # [B, N, P]
        visible, recon = token_dropout(keys, self.num_tokens, m, r)  # [B, K], [B, R]
        tokens = self.encode(patches, visible, keys if self.training else None)  # [B, 1 + K, D]
        logits = self.head(tokens[:, 0])  # [B, classes]
        if recon.shape[1] == 0:
            return logits, *[torch.zeros(len(clips), 0, patches.shape[-1], device=clips.device)] * 2
        target = pixel_target(gather_tokens(patches, recon), self.target)  # [B, R, P]
        return logits, self.decode(tokens[:, 1:], visible, recon), target


def build(cfg, num_classes):
    """The model that a Config describes."""
    return Turbo(num_classes, cfg.model, cfg.decoder, cfg.frames, cfg.size, cfg.recon_ratio > 0, cfg.target,
                 cfg.drop_path, cfg.attention, cfg.grad_checkpoint)  # fmt: skip


# ---- Evaluation and pictures -----------------------------------------------------------------------------------------


def eval_batches(videos, cfg, ctx, failures):
    """Batches of centre clips, on the device, that hold each readable video once over all ranks."""
    dataset = data.ClipDataset(videos, partial(sample_clip, cfg, False), cfg.size, cfg.seed, replace=False)
    size = cfg.micro_batch or max(1, cfg.batch_size // ctx.world)
    batches = data.every_sample(len(videos), size, ctx.rank, ctx.world)
    for batch in data.make_loader(dataset, batches, cfg.workers, ctx.device):
        failures.new += batch.failures
        if len(batch.labels):
            yield batch._replace(keys=batch.keys.to(ctx.device))


@torch.no_grad()
def evaluate(model, videos, cfg, ctx, picture=None):
    """Top-1 and top-k in % (k = 5, or all classes if fewer) at --eval-mask-ratio; PMAE, masked as in training.

    Every readable video counts once, at any number of ranks; `unread` of them could not be. A centre clip a video.
    """
    model.eval()
    failures, k = data.Failures(len(videos), cfg.max_bad), min(5, len(videos.classes))
    sums = torch.zeros(4, dtype=torch.float64, device=ctx.device)  # clips, top-1, top-k, PMAE
    for batch in eval_batches(videos, cfg, ctx, failures):
        with ctx.autocast():
            logits, _, _ = model(batch.clips, batch.keys, cfg.eval_mask_ratio, 0.0)  # r = 0: only the classifier runs
            pmae = torch.zeros(len(logits), device=ctx.device)  # [B]
            if cfg.recon_ratio > 0:
                _, prediction, target = model(batch.clips, batch.keys, cfg.mask_ratio, cfg.recon_ratio)
                pmae = (prediction.float() - target).square().mean((1, 2))  # [B]
        hits = logits.topk(k).indices == batch.labels[:, None]  # [B, k]
        sums += torch.stack([torch.ones_like(pmae), hits[:, 0], hits.any(1), pmae]).double().sum(1)  # [4]
        if picture and ctx.rank == 0 and cfg.recon_ratio > 0:
            write_recon(model, batch.clips[:4], batch.keys[:4], cfg, picture)
            picture = None
    unread = failures.collect(ctx, 0)
    n, top1, topk, pmae = ctx.sum(sums).tolist()
    model.train()
    if not n:
        raise UserError(f"{videos.path}: no video could be read: {'; '.join(unread[:3])}")
    result = {"val_top1": 100 * top1 / n, f"val_top{k}": 100 * topk / n, "val_clips": int(n), "val_unread": len(unread)}
    return result | ({"val_mae": pmae / n} if cfg.recon_ratio > 0 else {})


def write_recon(model, clips, keys, cfg, path):
    """Write path.png and the animated path_animated.png, a clip below the other, panels in this order (README):

    original; what the encoder saw (dropped patches grey); the model's own reconstruction of every dropped patch (more
    than it was trained on at a time where r < m). A normalised-target model can't know a dropped patch's mean and
    deviation: its own panel uses those of the clip's visible pixels, and a fourth panel, framed red, borrows the true
    ones of each patch from the original.
    """
    patches = patchify(clips, model.patch).float()  # [B, N, P]
    visible, masked = token_dropout(keys, model.num_tokens, cfg.mask_ratio, cfg.mask_ratio)  # [B, K], [B, N - K]
    _, prediction, _ = model(clips, keys, cfg.mask_ratio, cfg.mask_ratio)  # the same split: it belongs to the keys
    prediction = prediction.float().unflatten(-1, (-1, 3))  # [B, N - K, P/3, 3]
    mean, std = torch.tensor(data.IMAGENET_MEAN).to(clips.device), torch.tensor(data.IMAGENET_STD).to(clips.device)
    scales = [(mean * 255, std * 255)]
    if cfg.target == "normalized":
        seen, hidden = (gather_tokens(patches, i).unflatten(-1, (-1, 3)) for i in (visible, masked))  # [B, ., P/3, 3]
        scales = [(x.mean(dims, keepdim=True), x.std(2, keepdim=True).mean(dims, keepdim=True))
                  for x, dims in ((seen, (1, 2)), (hidden, 2))]  # fmt: skip
    fill = lambda value: patches.scatter(1, masked[..., None].expand(-1, -1, patches.shape[-1]), value)  # [B, N, P]
    grey = torch.full_like(prediction, 128).flatten(2)
    panels = [patches, fill(grey), *(fill((prediction * s + m).flatten(2)) for m, s in scales)]
    panels = [unpatchify(x.clamp(0, 255).byte(), model.patch, model.grid).cpu() for x in panels]  # [B, T, C, H, W]
    data.write_panels(path, panels, fps=cfg.fps, marked=3)


# Table 1 left: (m, r) and the printed "GFLOPs", which are multiply-adds.
TABLE_1 = {
    (0.0, 0.0): 180.6,
    (0.5, 0.5): 99.3,
    (0.75, 0.75): 57.6,
    (0.75, 0.25): 45.9,
    (0.9, 0.9): 35.2,
    (0.9, 0.1): 18.3,
}


def count_gmacs(cfg, classes, m, r):
    """(GMACs of a clip's forward pass counted here, the same with all patches embedded) at mask ratios (m, r).

    The paper's GFLOPs include embedding every patch; a step needs only the visible ones. The difference is added
    explicitly: dropped tokens x pixels x width.
    """
    with torch.device("meta"):
        model = build(replace(cfg, recon_ratio=r, attention="sdpa", grad_checkpoint=False), classes)
        clips = torch.empty(1, cfg.frames, 3, cfg.size, cfg.size, dtype=torch.uint8)
        here = common.count_macs(model, clips, torch.zeros(1, dtype=torch.int64), m, r)
    dropped = model.num_tokens - num_kept(model.num_tokens, m, r)[0]
    return here, here + dropped * math.prod(model.patch) * 3 * model.width / 1e9


def saved_megabytes(model, m, r):
    """MB that all blocks store for the backward pass of one clip in fp32, from one real block each on the CPU."""
    visible, recon = num_kept(model.num_tokens, m, r)
    total = len(model.blocks) * common.saved_bytes(model.blocks[0], torch.randn(1, visible + 1, model.width))
    if r > 0:
        block, width = model.decoder.blocks[0], model.decoder.norm.weight.numel()
        total += len(model.decoder.blocks) * common.saved_bytes(block, torch.randn(1, visible + recon, width))
    return total / 1e6


def print_plan(cfg):
    """What would run, counted on the model itself: no data, no GPU, no training (--plan)."""
    classes, m, r = cfg.num_classes or 2, cfg.mask_ratio, cfg.recon_ratio
    model = build(replace(cfg, attention="sdpa", grad_checkpoint=False), classes)
    parameters = {name: p.numel() / 1e6 for name, p in model.named_parameters()}
    decoder = sum(n for name, n in parameters.items() if name.startswith(("decoder", "encoder_to", "mask")))
    visible, recon = num_kept(model.num_tokens, m, r)
    steps = cfg.max_steps or cfg.train_clips // cfg.batch_size * cfg.epochs
    print(f"model     {cfg.model}: {sum(parameters.values()):.1f} M parameters, {decoder:.1f} M of them the decoder's")
    print(f"tokens    {visible} visible, {recon} reconstructed of {model.num_tokens} (m = {m}, r = {r})")
    print(
        f"schedule  {cfg.epochs} epochs of {cfg.train_clips} clips at batch {cfg.batch_size}: {steps} steps, "
        f"peak lr {cfg.lr:g}"
    )
    full, ours = saved_megabytes(model, 0.0, 0.0), saved_megabytes(model, m, r)
    print(
        f"memory    blocks save {ours:.0f} MB a clip for backward in fp32, {full:.0f} MB without dropout "
        f"({full / ours:.2f}x)"
    )
    print('\nGMACs of a clip, forward, beside Table 1 left (its "GFLOPs" are multiply-adds)')
    print(f"{'m':>5} {'r':>5} {'visible':>8} {'recon':>6} {'here':>8} {'all embedded':>13} {'paper':>7} {'cheaper':>8}")
    is_paper = (cfg.model, cfg.decoder or "4x384", cfg.frames, cfg.size, classes) == ("vit_b", "4x384", 16, 224, 101)
    base, _ = count_gmacs(cfg, classes, 0.0, 0.0)
    for row in dict.fromkeys([*TABLE_1, (m, r)]):
        (here, embedded), (vis, rec) = count_gmacs(cfg, classes, *row), num_kept(model.num_tokens, *row)
        paper = f"{TABLE_1[row]:.1f}" if is_paper and row in TABLE_1 else "-"
        mark = "  <- this run" if row == (m, r) else ""
        print(
            f"{row[0]:5.2f} {row[1]:5.2f} {vis:8} {rec:6} {here:8.2f} {embedded:13.2f} {paper:>7} "
            f"{base / here:7.2f}x{mark}"
        )


# ---- The tasks -------------------------------------------------------------------------------------------------------


def check(cfg):
    """Refuse settings that can't work, by the flag's name, before anything is read or made."""
    t, h, _ = Turbo.patch
    if not 0 <= cfg.mask_ratio < 1 or not 0 <= cfg.eval_mask_ratio < 1:
        raise UserError("--mask-ratio and --eval-mask-ratio must be in [0, 1): at 1 nothing is left to look at")
    if not 0 <= cfg.recon_ratio <= cfg.mask_ratio:
        raise UserError(
            f"--recon-ratio {cfg.recon_ratio} must be in [0, --mask-ratio {cfg.mask_ratio}]: only dropped tokens are "
            "reconstructed"
        )
    if cfg.frames < t or cfg.frames % t:
        raise UserError(f"--frames {cfg.frames} is not a multiple of the token's {t} frames")
    if cfg.size < h or cfg.size % h:
        raise UserError(f"--size {cfg.size} is not a multiple of the patch's {h} pixels")
    tokens = cfg.frames // t * (cfg.size // h) ** 2
    if not all(num_kept(tokens, m, 0)[0] for m in (cfg.mask_ratio, cfg.eval_mask_ratio)):
        raise UserError(f"of {tokens} tokens --mask-ratio and --eval-mask-ratio must leave at least one")
    if cfg.recon_ratio and not num_kept(tokens, cfg.mask_ratio, cfg.recon_ratio)[1]:
        raise UserError(
            f"--recon-ratio {cfg.recon_ratio} reconstructs none of {tokens} tokens; 0 turns the decoder off"
        )
    layers, _, width = (cfg.decoder or MODELS[cfg.model]["decoder"]).partition("x")
    if not (layers.isdecimal() and width.isdecimal() and int(width) and (int(width) < 64 or int(width) % 64 == 0)):
        raise UserError(f"--decoder {cfg.decoder} is not layers x width, such as 8x512, in heads of 64")
    for flag in ("epochs", "fps", "log_every", "eval_every"):
        if getattr(cfg, flag) <= 0:
            raise UserError(f"--{flag.replace('_', '-')} must be above 0")
    if not 0 <= cfg.rand_augment <= 10:
        raise UserError("--rand-augment must be in [0, 10]")
    for flag in ("max_steps", "workers", "micro_batch", "mixup", "cutmix", "max_bad"):
        if getattr(cfg, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} must not be negative")
    if not (0 <= cfg.drop_path < 1 and 0 <= cfg.label_smoothing < 1):
        raise UserError("--drop-path and --label-smoothing must be in [0, 1)")


def open_lists(cfg, ctx):
    """(training, validation) VideoLists; toy videos are made where the toy recipe's own lists are asked for."""
    if cfg.train_list == RECIPES["toy"]["train_list"]:
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
    if len(videos.classes) < 2:
        raise UserError(f"{cfg.train_list}: all videos are of one class; a classifier needs two")
    if len(videos) < cfg.batch_size:
        raise UserError(f"{cfg.train_list}: {len(videos)} videos are less than one --batch-size of {cfg.batch_size}")
    return videos, data.VideoList(cfg.val_list, cfg.data_root, classes=videos.classes)


def init_weights(path, classes):
    """Model weights of a checkpoint of ours or VideoMAE's; left out is a classifier of another number of classes, and
    VideoMAE's, which reads a mean over tokens where ours reads CLS."""
    weights = common.videomae_weights(common.read_weights(path))
    keep = "fc_norm.weight" not in weights
    return {k: v for k, v in weights.items() if not k.startswith("head.") or (keep and len(v) == classes)}


def use(cfg, ctx):
    """--task eval, predict, features: a trained model, its shape read from its own checkpoint."""
    source = cfg.init or f"{cfg.out or 'runs/turbo-' + cfg.recipe}/best.pt"
    state = common.load_checkpoint(source)
    if not isinstance(state, dict) or not {"model", "config", "classes"} <= set(state):
        raise UserError(f"{source}: not a checkpoint of turbo.py")
    shape = ("model", "decoder", "frames", "fps", "size", "mask_ratio", "recon_ratio", "target", "seed")
    cfg, classes = replace(cfg, **{key: state["config"][key] for key in shape}), state["classes"]
    net = build(cfg, len(classes)).to(ctx.device).eval()
    net.load_state_dict(state["model"])
    if cfg.task == "predict":
        return predict(net, cfg, ctx, classes)
    if not cfg.val_list:
        raise UserError(f"--task {cfg.task} needs --val-list")
    videos = data.VideoList(cfg.val_list, cfg.data_root, classes=classes)
    if cfg.task == "features":
        return write_features(net, videos, cfg, ctx)
    result = evaluate(net, videos, cfg, ctx)
    if ctx.rank == 0:
        print(
            f"{source} on {cfg.val_list}, m = {cfg.eval_mask_ratio}: "
            + "  ".join(f"{k} {v:.4g}" for k, v in result.items())
        )


@torch.no_grad()
def predict(net, cfg, ctx, classes):
    """Print the five likeliest classes of each --input video."""
    if not cfg.input:
        raise UserError("--task predict needs --input video.mp4 ...")
    videos, failures = data.VideoList.of(cfg.input), data.Failures(len(cfg.input), 1.0)
    for batch in eval_batches(videos, cfg, ctx, failures):
        with ctx.autocast():
            logits, _, _ = net(batch.clips, batch.keys, cfg.eval_mask_ratio, 0.0)  # [B, classes]
        shares, order = logits.float().softmax(-1).sort(-1, descending=True)
        for i, share, best in zip(batch.index.tolist(), shares.tolist(), order.tolist(), strict=True):
            words = (f"{classes[c]} {100 * p:.1f} %" for c, p in zip(best[:5], share, strict=False))
            print(f"{videos.video(i)}: {', '.join(words)}")
    if failures.new:
        raise UserError("; ".join(failures.new))


@torch.no_grad()
def write_features(net, videos, cfg, ctx):
    """Write features.npy, float32 [videos, D]: CLS of a video's centre clip, in the list's order; NaN if unreadable."""
    path = Path(cfg.out or f"runs/turbo-{cfg.recipe}") / "features.npy"
    if ctx.rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, "w+", np.float32, (len(videos), net.width))[:] = np.nan
        except OSError as error:
            raise UserError(f"--out {path.parent}: can't write there ({error.strerror})") from None
    ctx.barrier()
    rows, failures = np.lib.format.open_memmap(path, "r+"), data.Failures(len(videos), cfg.max_bad)
    for batch in eval_batches(videos, cfg, ctx, failures):
        with ctx.autocast():
            visible, _ = token_dropout(batch.keys, net.num_tokens, cfg.eval_mask_ratio, 0.0)  # [B, K]
            tokens = net.encode(patchify(batch.clips, net.patch), visible)  # [B, 1 + K, D]
        rows[batch.index.numpy()] = tokens[:, 0].float().cpu().numpy()
    rows.flush()
    unread = failures.collect(ctx, 0)
    if ctx.rank == 0:
        print(
            f"{path}: {len(videos)} x {net.width}" + (f"; NaN for {len(unread)}: {'; '.join(unread)}" if unread else "")
        )


def main(cfg):
    check(cfg)
    if cfg.plan:
        return print_plan(cfg)
    ctx = common.launch(cfg.precision)
    if cfg.task != "train":
        return use(cfg, ctx)
    micro, accumulation = common.micro_batches(cfg, ctx, pairs=bool(cfg.mixup or cfg.cutmix))
    videos, val_videos = open_lists(cfg, ctx)
    classes = len(videos.classes)
    run = common.Run(cfg, ctx, "turbo")
    state = run.resume()

    epoch_steps = len(videos) // cfg.batch_size
    total = cfg.max_steps or cfg.epochs * epoch_steps
    torch.manual_seed(cfg.seed)  # for the initial weights; all later draws are keyed
    net = build(cfg, classes).to(ctx.device)
    optimizer = torch.optim.AdamW(common.param_groups(net, cfg.weight_decay), lr=cfg.lr, fused=True)
    scaler = common.loss_scaler(ctx)  # outside fp16 it scales by 1, and only skips updates that are not finite
    meter = common.Meter(ctx.device, "loss", "ce", "mae")
    # What a checkpoint says beside weights: a run has no other state, because its draws and its data order are keyed.
    at = {"step": 0, "evaluated": 0, "best": -1.0, "skipped": 0, "last": {}}
    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["precision"] == ctx.precision:
            scaler.load_state_dict(state["scaler"])
        at = state["at"]
        meter.load(state["sums"], ctx)
    elif cfg.init:
        run.say(common.load_weights(net, init_weights(cfg.init, classes), cfg.init))
    compiled = cfg.compile or (cfg.compile is None and ctx.device.type == "cuda")
    model = ctx.wrap(torch.compile(net) if compiled else net)  # `net` itself, uncompiled, is evaluated and saved
    run.say(
        f"{len(videos)} training and {len(val_videos)} validation videos, {classes} classes; batch {cfg.batch_size} = "
        f"{ctx.world} ranks x {micro} clips x {accumulation}; peak lr {cfg.lr:g}; {ctx.precision} on {ctx.device}; "
        f"steps {at['step']} to {total}"
    )

    dataset = data.ClipDataset(videos, partial(sample_clip, cfg, True), cfg.size, cfg.seed, replace=True)
    schedule = data.GlobalBatches(len(videos), cfg.batch_size, micro, cfg.seed, at["step"], total, ctx.rank, ctx.world)
    batches = data.make_loader(dataset, schedule, cfg.workers, ctx.device)
    failures = data.Failures(len(videos), cfg.max_bad)

    def save(*names):
        if at["step"] < total and not meter.healthy(ctx):
            return False  # the last good checkpoint stays
        state = {
            name: part.state_dict() for name, part in (("model", net), ("optimizer", optimizer), ("scaler", scaler))
        }
        run.save(state | {"at": at, "sums": meter.state(ctx), "classes": videos.classes}, *names)
        return True

    while True:
        # Evaluation comes before the step, so that a run that was stopped between the two takes it up again.
        step = at["step"]
        if step > at["evaluated"] and (step == total or step % (cfg.eval_every * epoch_steps) == 0):
            result = evaluate(net, val_videos, cfg, ctx, run.folder / "recon.png")
            run.log(result | {"clips": step * cfg.batch_size}, step, total)
            better = result["val_top1"] > at["best"] and meter.healthy(ctx)
            at |= {"evaluated": step, "best": result["val_top1"] if better else at["best"], "last": result}
            save(*["best.pt"] * better, "last.pt")
        if step == total:
            break

        lr = common.cosine(step, total, cfg.warmup_epochs * epoch_steps, cfg.lr, cfg.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for i in range(accumulation):
            with run.waiting():
                batch = next(batches)
            failures.add(batch, micro)
            clips = batch.clips  # [B, T, C, H, W], uint8
            if cfg.rand_augment:
                clips = data.rand_augment(clips, batch.keys, cfg.rand_augment, layers=2)  # [B, T, C, H, W]
            if cfg.flip:
                clips = data.flip(clips, batch.keys)  # [B, T, C, H, W]
            keys = batch.keys.to(ctx.device, non_blocking=True)  # [B]
            labels = data.soft_labels(batch.labels, classes, cfg.label_smoothing)  # [B, classes]
            clips, labels = data.mix(clips, labels, (cfg.seed, step), cfg.mixup, cfg.cutmix)
            with ctx.sync(model, last=i == accumulation - 1):
                with ctx.autocast():
                    logits, prediction, target = model(clips, keys, cfg.mask_ratio, cfg.recon_ratio)
                    loss, ce, pmae = turbo_loss(logits, labels, prediction, target)  # [B] each
                # The mean over the global batch; the ranks' gradients are averaged, hence the factor `world`. A loss
                # that is not finite makes the gradient so too, and thereby skips the update.
                poison = torch.where(loss.isfinite().all(), 1.0, math.nan)
                scaler.scale(loss.sum() * poison * ctx.world / cfg.batch_size).backward()
            meter.add(batch.index, loss, ce, pmae)
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
        if cfg.clip_grad:
            nn.utils.clip_grads_with_norm_(net.parameters(), cfg.clip_grad, norm)
        meter.step(norm)
        scaler.step(optimizer)  # an update that is not finite is skipped, by a flag on the device
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        at["step"] = step = step + 1

        run.advance(step, total)
        epoch_ends = step % epoch_steps == 0
        if epoch_ends or step % cfg.log_every == 0 or step == total:
            for line in failures.collect(ctx, (step - 1) // epoch_steps):
                run.say(f"unreadable, replaced by another: {line}")
        if step % cfg.log_every == 0 or step == total:
            means, bad, skipped = meter.read(ctx)
            at["skipped"] += run.guard([videos.video(i) for i in bad], skipped, at["skipped"], scaler.get_scale())
            record = {"epoch": round(step / epoch_steps, 3), **means, "lr": lr, "clips": step * cfg.batch_size}
            run.log(record, step, total)
        if (run.save_due() or epoch_ends) and save("last.pt"):
            run.leave(step)

    run.say(
        f"complete: top-1 {at['last']['val_top1']:.1f} % of {at['last']['val_clips']} validation clips (chance "
        f"{100 / classes:.1f} %), "
        f"best {at['best']:.1f} %. {run.folder}/recon.png: original, seen, reconstruction. --overwrite starts anew."
    )


if __name__ == "__main__":
    main(parse(Config, RECIPES))
