"""Reading published weights: formats against their own libraries, and VideoMAE's outputs against transformers'."""

import argparse
import json
import struct

import pytest
import torch
from torch import nn

import common
import data
import tpt_mae
import turbo
from common import UserError

FRAMES, SIZE, WIDTH, DEPTH = 4, 64, 128, 4  # Turbo's vit_toy; 2 x 4 x 4 tokens


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


# ---- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(header, payload=b"", length=None):
    """The bytes of a file, by the format's description."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors_by_hand(tmp_path):
    """Values packed by Python, in another order than the header's, at odd addresses, a scalar and an empty one too."""
    header = {
        "f": entry("F32", [2], 3, 11),
        "__metadata__": {"format": "pt"},
        "b": entry("U8", [3], 0, 3),
    }
    header |= {"i": entry("I64", [], 11, 19), "none": entry("F16", [0, 4], 19, 19)}
    path = tmp_path / "a"
    path.write_bytes(
        safetensors(
            header, bytes([1, 2, 255]) + struct.pack("<ff", 1.5, -2.0) + struct.pack("<q", -7)
        )
    )
    read = common.read_weights(path)  # the name says nothing, the content does
    assert {k: v.tolist() for k, v in read.items()} == {
        "f": [1.5, -2.0],
        "b": [1, 2, 255],
        "i": -7,
        "none": [],
    }
    assert (
        read["f"].dtype == torch.float32 and read["none"].shape == (0, 4) and read["i"].shape == ()
    )
    path.unlink()
    assert read["f"].add_(1).tolist() == [2.5, -1.0]  # a copy: the file can go


def test_safetensors_against_its_library(tmp_path):
    """Every dtype that is read, written by the safetensors package; a folder that holds model.safetensors."""
    library = pytest.importorskip("safetensors.torch")
    weights = {
        name: torch.arange(24).reshape(2, 3, 4).to(dtype)
        for name, dtype in common._SAFETENSORS.items()
    }
    library.save_file(
        weights | {"x": torch.randn(7)}, tmp_path / "model.safetensors", metadata={"a": "b"}
    )
    expected = library.load_file(tmp_path / "model.safetensors")
    assert len(expected) == 11 and equal(common.read_weights(tmp_path), expected)


BAD_HEADERS = {
    "unknown dtype": {"w": entry("F4", [2], 0, 8)},
    "too short": {"w": entry("F32", [2], 0, 4)},
    "beyond the end": {"w": entry("F32", [4], 0, 16)},
    "any length": {"w": entry("F32", [-1], 0, 8)},
    "negative": {"w": entry("F32", [-2], 0, -8)},
    "twice negative": {"w": entry("F32", [-1, -2], 0, 8)},
    "gap": {"w": entry("F32", [1], 4, 8)},
    "overlap": {"w": entry("F32", [2], 0, 8), "v": entry("F32", [1], 4, 8)},
    "rest": {"w": entry("F32", [1], 0, 4)},
    "no offsets": {"w": {"dtype": "F32", "shape": [2]}},
    "wrong types": {"w": entry("F32", [2.0], 0, 8.0)},
    "a list": [entry("F32", [2], 0, 8)],
    "a number": {"w": 3},
    "no tensor": {},
    "not JSON": b'{"w": ',
    "deep": b'{"w":' + b"[" * 100000,
    "lines": b'{"w": "\n\n"}',
    "not UTF-8": b"{\xff\xfe",
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_safetensors_refuses(name, tmp_path):
    path = tmp_path / "bad.safetensors"
    header = BAD_HEADERS[name]
    path.write_bytes(safetensors(header if isinstance(header, bytes | dict) else b" " + json.dumps(header).encode(),
                                 bytes(8)))  # fmt: skip
    for read in (common.read_safetensors, common.read_weights):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_cut_or_missing_files(tmp_path):
    """A file cut anywhere, or with a length that can't be, is refused in one line that names it."""
    whole, path = safetensors({"w": entry("F32", [2], 0, 8)}, bytes(8)), tmp_path / "w"
    cuts = [whole[:n] for n in range(len(whole))]
    for content in [
        *cuts,
        whole + b"x",
        safetensors(b"{}", length=2**63),
        safetensors(b"{}", length=2**64 - 1),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)) as error:
            common.read_weights(path)
        assert len(str(error.value).splitlines()) == 1
    path.write_bytes(whole)
    assert common.read_weights(path)["w"].tolist() == [0, 0]
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>404: Not Found</html>")
    with pytest.raises(UserError, match="page.safetensors: refused, it is not a file of tensors"):
        common.read_weights(tmp_path / "page.safetensors")
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match=f"{missing}.*no such checkpoint"):
            common.read_weights(missing)


# ---- torch.save ------------------------------------------------------------------------------------------------------


def test_read_weights_of_pth(tmp_path):
    """Under model, under module, or at the top; what is no tensor, and the rest of a training file, is left out."""
    weights, args = (
        {"a.weight": torch.randn(2, 3), "n": torch.tensor(3)},
        argparse.Namespace(lr=0.1),
    )
    moments = {"state": {0: torch.zeros(2)}}
    for i, state in enumerate([weights, {"model": weights, "args": args, "optimizer": moments}, {"module": weights},
                               weights | {"epoch": 3}]):  # fmt: skip
        torch.save(state, tmp_path / f"{i}.pth", _use_new_zipfile_serialization=i != 2)
        assert equal(common.read_weights(tmp_path / f"{i}.pth"), weights)
    for i, state in enumerate([{}, {"model": {}}, {"model": 3, "epoch": 1}, [torch.zeros(2)], 3]):
        torch.save(state, tmp_path / f"{i}.pth")
        with pytest.raises(UserError, match=f"{i}.pth: no weights"):
            common.read_weights(tmp_path / f"{i}.pth")


# ---- VideoMAE --------------------------------------------------------------------------------------------------------


def hub_model(folder, kind="VideoMAEForPreTraining", eps=1e-6, **options):
    """transformers' VideoMAE of vit_toy's size, all parameters random, saved in the hub's layout.

    eps: of all LayerNorms, upstream's by default; the hub's config says 1e-12 (and its decoder.norm 1e-5).
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    config = transformers.VideoMAEConfig(
        image_size=SIZE, num_frames=FRAMES, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2,
        intermediate_size=4 * WIDTH, decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=1,
        decoder_intermediate_size=256, **options)  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(0)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # the model's init has zeros and ones that would hide a mistake
        nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.05, generator)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and eps:
            module.eps = eps
    model.save_pretrained(folder)
    return model


def upstream_names(hub):
    """The hub's tensors as upstream's pretraining file has them: what transformers' conversion script undoes."""
    leaves = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj",
              "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}  # fmt: skip
    rest = {"videomae.layernorm": "encoder.norm", "mask_token": "mask_token", "decoder.head": "decoder.head",
            "encoder_to_decoder": "encoder_to_decoder", "decoder.norm": "decoder.norm", "fc_norm": "fc_norm",
            "videomae.embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
            "classifier": "head"}  # fmt: skip
    names = {}
    for theirs, ours, layers in (("videomae.encoder.layer", "encoder.blocks", DEPTH),
                                 ("decoder.decoder_layers", "decoder.blocks", 2)):  # fmt: skip
        for i in range(layers):
            rest |= {f"{theirs}.{i}.{leaf}": f"{ours}.{i}.{name}" for leaf, name in leaves.items()}
            attention = f"{theirs}.{i}.attention.attention"
            names |= {f"{attention}.{b}_bias": f"{ours}.{i}.attn.{b}_bias" for b in "qv"}
            if f"{attention}.query.weight" in hub:
                q, k, v = (hub[f"{attention}.{part}.weight"] for part in ("query", "key", "value"))
                names[f"{ours}.{i}.attn.qkv.weight"] = torch.cat([q, k, v])
    names |= {f"{a}{end}": f"{b}{end}" for a, b in rest.items() for end in (".weight", ".bias", "")}
    merged = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
    return {names[k]: v for k, v in hub.items() if k in names} | merged


def test_upstream_names_and_shapes(tmp_path):
    """The test's upstream file has exactly the names of upstream's pretraining model (modeling_pretrain.py)."""
    hub_model(tmp_path, use_mean_pooling=False)
    names = set(upstream_names(common.read_weights(tmp_path)))
    block = ["norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight",
             "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
             "mlp.fc2.bias"]  # fmt: skip
    expected = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias", "encoder.norm.weight",
                "encoder.norm.bias", "encoder_to_decoder.weight", "mask_token", "decoder.norm.weight",
                "decoder.norm.bias", "decoder.head.weight", "decoder.head.bias"}  # fmt: skip
    expected |= {f"encoder.blocks.{i}.{leaf}" for i in range(DEPTH) for leaf in block}
    assert names == expected | {f"decoder.blocks.{i}.{leaf}" for i in range(2) for leaf in block}


def test_every_form_gives_the_same_weights(tmp_path):
    """Hub, upstream's file (DDP's prefix too), the same read twice: one result, all that Turbo has but CLS and head."""
    hub_model(tmp_path, use_mean_pooling=False)
    hub = common.read_weights(tmp_path)
    ours, upstream = common.videomae_weights(hub), upstream_names(hub)
    assert equal(common.videomae_weights(upstream), ours)
    assert equal(common.videomae_weights({f"module.{k}": v for k, v in upstream.items()}), ours)
    assert equal(common.videomae_weights(ours), ours)
    net = turbo.Turbo(8, "vit_toy", frames=FRAMES, size=SIZE)
    assert net.state_dict().keys() - ours.keys() == {"cls_token", "head.weight", "head.bias"}
    assert ours.keys() <= net.state_dict().keys() and equal(
        common.videomae_weights(net.state_dict()), net.state_dict()
    )


def test_fine_tuned_forms(tmp_path):
    """Upstream's fine-tuning names (no `encoder.`, or `backbone.`) and the hub's classifier: encoder, fc_norm, head."""
    hub_model(tmp_path, "VideoMAEForVideoClassification", num_labels=5)
    hub = common.read_weights(tmp_path)
    ours = common.videomae_weights(hub)
    upstream = {k.removeprefix("encoder."): v for k, v in upstream_names(hub).items()}
    assert {
        "fc_norm.weight",
        "head.weight",
        "patch_embed.proj.weight",
        "blocks.0.attn.q_bias",
    } <= upstream.keys()
    for prefix in ("", "backbone."):
        assert equal(common.videomae_weights({prefix + k: v for k, v in upstream.items()}), ours)
    assert ours["head.weight"].shape == (5, WIDTH) and len(ours) == 2 + 13 * DEPTH + 4
    torch.save({"module": upstream}, tmp_path / "ft.pth")  # as DeepSpeed names it
    for path in (
        tmp_path,
        tmp_path / "ft.pth",
    ):  # its classifier reads the tokens' mean, so Turbo doesn't take it
        message = turbo.init_weights(path, turbo.Turbo(5, "vit_toy", frames=FRAMES, size=SIZE))
        assert f"loaded {2 + 13 * DEPTH} (" in message and "not used 2 (fc_norm." in message
        assert "its classifier is not used: reads the tokens' mean" in message


def test_parts_of_a_checkpoint(tmp_path):
    """A part that is not whole is refused by its name; a decoder of another size is left at init, as a whole."""
    hub_model(tmp_path, use_mean_pooling=False)
    whole = upstream_names(common.read_weights(tmp_path))
    net = turbo.Turbo(8, "vit_toy", frames=FRAMES, size=SIZE)
    cases = {"encoder.blocks.2.attn.q_bias": "1 weights of the encoder are not in it .blocks.2.attn.q_bias",
             "encoder.patch_embed": "2 weights of the encoder", "encoder.": "54 weights of the encoder",
             "decoder.blocks.1.mlp": "4 weights of the decoder", "mask_token": "1 weights of the decoder"}  # fmt: skip
    for lost, words in cases.items():
        torch.save(
            {"model": {k: v for k, v in whole.items() if not k.startswith(lost)}},
            tmp_path / "part.pth",
        )
        with pytest.raises(UserError, match=f"part.pth: {words}"):
            turbo.init_weights(tmp_path / "part.pth", net)
    torch.save(
        {"model": {k: v for k, v in whole.items() if k.startswith("encoder.")}},
        tmp_path / "encoder.pth",
    )
    assert f"loaded {13 * DEPTH + 4} " in turbo.init_weights(tmp_path / "encoder.pth", net)
    torch.save(
        {"model": whole | {f"encoder.blocks.{DEPTH}.norm1.bias": torch.zeros(WIDTH)}},
        tmp_path / "deep.pth",
    )
    with pytest.raises(
        UserError, match=f"deep.pth: its encoder has {DEPTH + 1} blocks, the model's {DEPTH}"
    ):
        turbo.init_weights(tmp_path / "deep.pth", net)


@pytest.mark.parametrize("decoder", ["2x128", "1x64", "3x64"])
def test_a_decoder_of_another_size_is_not_used(decoder, tmp_path):
    """Of another width or depth: left at init as a whole, and named with the flag that would fit it. (VideoMAE-L's has
    12 layers of 512, whose first four are no decoder.) A run that doesn't reconstruct has no need of it."""
    hub_model(tmp_path, use_mean_pooling=False)  # its decoder is 2 x 64
    torch.manual_seed(0)
    net = turbo.Turbo(8, "vit_toy", decoder, FRAMES, SIZE)
    before = {
        k: v.clone() for k, v in net.state_dict().items() if "decoder" in k or k == "mask_token"
    }
    message = turbo.init_weights(tmp_path, net)
    assert (
        f"loaded {13 * DEPTH + 4} " in message
        and "its decoder is not used: --decoder 2x64 would fit it" in message
    )
    assert all(torch.equal(net.state_dict()[k], before[k]) for k in before)
    fitting = turbo.Turbo(8, "vit_toy", "2x64", FRAMES, SIZE)
    assert "loaded 88 " in turbo.init_weights(tmp_path, fitting)
    without = turbo.Turbo(8, "vit_toy", decoder, FRAMES, SIZE, recon=False)
    assert "--decoder" not in turbo.init_weights(tmp_path, without)


def test_incomplete_attention_is_not_used():
    """A lost key matrix: nothing is merged from the rest, and load_weights says so."""
    block = "videomae.encoder.layer.0.attention.attention"
    state = {f"{block}.query.weight": torch.ones(2, 2), f"{block}.value.weight": torch.ones(2, 2)}
    assert common.videomae_weights(state).keys() == {
        "blocks.0.attn.query.weight",
        "blocks.0.attn.value.weight",
    }


def load(folder, target="normalized"):
    """A Turbo without CLS, from init_weights: VideoMAE has none, and one more token would take part in attention."""
    net = turbo.Turbo(8, "vit_toy", frames=FRAMES, size=SIZE, target=target, drop_path=0.0).eval()
    message = turbo.init_weights(folder, net)
    net.cls_token = nn.Parameter(
        torch.zeros(1, 0, WIDTH)
    )  # encode() is the same code, with none of these tokens
    return net, message


def clips_and_split(ratio=0.75):
    """Random clips uint8 [2, T, 3, H, W], transformers' input of them, and a tube mask as indices and as bools."""
    clips = torch.randint(
        256, (2, FRAMES, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)
    ).byte()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    visible, masked = common.tube_split(torch.tensor([3, 4]), FRAMES // 2, (SIZE // 16) ** 2, ratio)
    bools = torch.ones(2, visible.shape[1] + masked.shape[1], dtype=torch.bool).scatter(
        1, visible, False
    )
    return clips, (clips / 255 - mean) / std, visible, masked, bools


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def mae_loss(net, clips, visible, masked):
    patches = common.patchify(clips, net.patch)
    prediction = net.decode(net.encode(patches, visible), visible, masked)
    target = turbo.pixel_target(common.gather_tokens(patches, masked), net.target)
    return (prediction - target).square().mean(), prediction


@torch.no_grad()
@pytest.mark.parametrize("form", ["hub", "upstream"])
def test_outputs_are_videomaes(form, tmp_path):
    """Encoder features of all tokens, prediction and loss of a tube mask: transformers' to 1e-5 relative, in fp32."""
    model = hub_model(tmp_path, use_mean_pooling=False)
    path = tmp_path
    if form == "upstream":
        path = tmp_path / "videomae.pth"
        state = {
            "model": upstream_names(common.read_weights(tmp_path)),
            "args": argparse.Namespace(),
            "epoch": 799,
        }
        torch.save(state, path)
    net, message = load(path)
    assert "loaded 88 " in message and "left at init 3 (cls_token ...), not used 0" in message
    clips, pixels, visible, masked, bools = clips_and_split()
    everything = torch.arange(bools.shape[1]).expand(2, -1)
    features = net.encode(common.patchify(clips, net.patch), everything)
    expected = model.videomae(pixels).last_hidden_state
    loss, prediction = mae_loss(net, clips, visible, masked)
    output = model(pixels, bools)
    print("features", relative(features, expected), "prediction", relative(prediction, output.logits),
          "loss", loss.item(), abs(loss / output.loss - 1).item())  # fmt: skip
    assert relative(features, expected) < 1e-5 and (features - expected).abs().max() < 1e-4
    assert relative(prediction, output.logits) < 1e-5
    assert abs(loss / output.loss - 1) < 1e-5
    assert loss > 0.5 and expected.std() > 0.1  # no trivial values


@torch.no_grad()
def test_features_of_fine_tuned_weights(tmp_path):
    """The encoder of a fine-tuned file, which has no final norm (its fc_norm is for the mean): transformers' to 1e-5."""
    model = hub_model(tmp_path, "VideoMAEForVideoClassification", num_labels=5)
    net, message = load(tmp_path)
    assert f"loaded {2 + 13 * DEPTH} " in message and "not used 2 (fc_norm." in message
    net.norm = nn.Identity()
    clips, pixels, *_, bools = clips_and_split()
    features = net.encode(
        common.patchify(clips, net.patch), torch.arange(bools.shape[1]).expand(2, -1)
    )
    assert relative(features, model.videomae(pixels).last_hidden_state) < 1e-5


@torch.no_grad()
def test_raw_pixel_target(tmp_path):
    """transformers' raw target is pixels in [0, 1]; Turbo's is that less mean, over deviation: one is the other's."""
    model = hub_model(tmp_path, use_mean_pooling=False, norm_pix_loss=False)
    net, _ = load(tmp_path, "pixels")
    clips, pixels, visible, masked, bools = clips_and_split()
    target = turbo.pixel_target(
        common.gather_tokens(common.patchify(clips, net.patch), masked), "pixels"
    )
    mean, std = (torch.tensor(v).repeat(512) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    _, prediction = mae_loss(net, clips, visible, masked)
    loss = (prediction - (target * std + mean)).square().mean()
    assert abs(loss / model(pixels, bools).loss - 1) < 1e-5


@torch.no_grad()
def test_what_eps_and_cls_change(tmp_path):
    """The hub's eps moves features little. Turbo's CLS, attended to by all tokens, moves them more: no defect, but it
    is why Turbo's features are VideoMAE's only without it."""
    hub = hub_model(tmp_path, eps=None, use_mean_pooling=False).videomae
    net, _ = load(tmp_path)
    clips, pixels, *_, bools = clips_and_split()
    patches, everything = (
        common.patchify(clips, net.patch),
        torch.arange(bools.shape[1]).expand(2, -1),
    )
    without = net.encode(patches, everything)
    eps = relative(without, hub(pixels).last_hidden_state)
    net.cls_token = nn.Parameter(
        0.02 * torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    )
    cls = relative(net.encode(patches, everything)[:, 1:], without)
    print("eps", eps, "cls", cls)
    assert eps < 1e-5 < cls < 0.1


@torch.no_grad()
def test_recipe_toy_tpt_continues_tpt_maes_toy(tmp_path):
    """Its model sees what the toy of tpt_mae.py saw and, from that one's file, predicts the same pixels."""
    theirs = common.parse(tpt_mae.Config, tpt_mae.RECIPES, [])
    mae = tpt_mae.build(theirs, 8).eval()
    torch.save({"model": tpt_mae.videomae_state(mae)}, tmp_path / "videomae.pth")
    cfg = common.parse(turbo.Config, turbo.RECIPES, ["--recipe", "toy_tpt"])
    assert (cfg.size, cfg.frames, cfg.target) == (theirs.size, theirs.budget_frames, theirs.target)
    assert cfg.fps == data.TOY_SETS["actions"]["fps"] / theirs.stride
    net = turbo.build(cfg, 8).eval()
    message = turbo.init_weights(tmp_path / "videomae.pth", net)
    assert "left at init 3 (cls_token ...), not used 0" in message
    net.cls_token = nn.Parameter(torch.zeros(1, 0, net.width))
    clips = torch.randint(256, (2, cfg.frames, 3, cfg.size, cfg.size), dtype=torch.uint8)
    keys = common.make_key(torch.arange(2))
    patches, visible, masked, _ = mae.split(clips, keys, 0.75)
    expected, _ = mae(clips, keys, 0.75)
    found = net.decode(net.encode(patches, visible), visible, masked)
    assert relative(found, expected) < 1e-6


def train(toy_args, init, out):
    turbo.main(common.parse(turbo.Config, turbo.RECIPES, [*map(str, toy_args), "--init", str(init), "--out", str(out),
                                                          "--max-steps", "1"]))  # fmt: skip


def test_training_starts_from_it(tmp_path, toy_args, capsys):
    """turbo.py --init on the hub's folder: encoder and decoder loaded, CLS and classifier left, then a step."""
    hub_model(tmp_path / "hub", use_mean_pooling=False)  # of 4 frames; there are no positions in it
    train(toy_args, tmp_path / "hub", tmp_path / "run")
    assert (
        "hub: loaded 88 (mask_token ...), left at init 3 (cls_token ...), not used 0"
        in capsys.readouterr().out
    )
    assert (tmp_path / "run/last.pt").exists()


def test_other_models_are_refused(tmp_path, toy_args):
    """Another width, or another model's file: one line, with the file's name and the reason."""
    safe = {"text_model.final_layer_norm.weight": entry("F32", [2], 0, 8)}
    (tmp_path / "clip.safetensors").write_bytes(safetensors(safe, bytes(8)))
    torch.save(
        {"model": {"encoder.patch_embed.proj.weight": torch.zeros(384, 3, 2, 16, 16)}},
        tmp_path / "s.pth",
    )
    with pytest.raises(UserError, match="clip.safetensors: no weight of this model.*text_model"):
        train(toy_args, tmp_path / "clip.safetensors", tmp_path / "a")
    with pytest.raises(UserError, match=r"s.pth: patch_embed.weight is \(384, 1536\).*--model"):
        train(toy_args, tmp_path / "s.pth", tmp_path / "b")
