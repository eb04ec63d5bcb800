"""What would make the host wait for a GPU, told on a machine that has none."""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Waits(TorchFunctionMode):
    """Notes what would make the host wait for a GPU, which the meta device stands for: copies to it that block.

    Whatever needs a value that is on the GPU (item, tolist, nonzero, a mask as an index) raises on the meta device.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, out = kwargs or {}, function(*args, **(kwargs or {}))
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        arrives = any(
            isinstance(a, torch.Tensor) and a.is_meta for a in [*given, *tree_leaves(out)]
        )
        from_host = function in (torch.tensor, torch.as_tensor) or any(
            a.is_cpu and a.dim() for a in given
        )
        if arrives and from_host and not kwargs.get("non_blocking"):
            place = traceback.extract_stack(limit=2)[0]
            self.found.append(
                f"{getattr(function, '__name__', function)} in {place.filename}, line {place.lineno}"
            )
        return out
