"""Half precision as CUDA's autocast has it: what LayerNorm gives is float32, which on the CPU it is not."""

import pytest
import small
import torch
import torch.nn.functional as F

import common


@pytest.fixture
def cuda_rules(monkeypatch):
    """LayerNorm answers in float32, whatever it is given."""
    layer_norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", small.SMALL)
def test_blocks_add_up_in_half_precision(name, dtype, cuda_rules):
    """Positions, CLS, words and LayerNorm are float32: had one a say, each sum of each block would be twice as large."""
    case = small.SMALL[name]
    net = small.build(name)
    blocks = [module for module in net.modules() if isinstance(module, common.Block)]
    seen = set()
    ran = set()

    def note(block, inputs, output):
        seen.update((inputs[0].dtype, output.dtype))
        ran.add(block)

    for block in blocks:
        block.register_forward_hook(note)
    batch = small.clips_of(2, case.frames)
    with torch.autocast("cpu", dtype):
        if case.encode:
            case.encode(net, batch)
        else:
            case.losses(net, *batch)
    assert seen == {dtype} and ran == set(blocks) != set()


def test_without_autocast_nothing_is_cast():
    x = torch.randn(2, 5, 8)
    assert common.run_blocks([], x) is x
    assert common.run_blocks([], x.double()).dtype == torch.float64
