"""One function compiled by all passes, compared with eager: which passes took a site, and why others refused."""

import torch
import torch.nn.functional as F
from torch import nn

from horsepower.graph import passes
from horsepower.graph.capture import capture
from horsepower.runtime.executor import weights_of
from recordings import relative_error

BF16 = torch.bfloat16
COLUMNS = 64


class Runs(nn.Module):
    """A function of inputs and of a weight and a bias of `COLUMNS`."""

    def __init__(self, run, dtype=torch.float32):
        super().__init__()
        self.run = run
        generator = torch.Generator().manual_seed(1)
        self.weight, self.bias = (
            nn.Parameter(torch.randn(COLUMNS, generator=generator).to(dtype)) for _ in range(2)
        )  # fmt: skip

    def forward(self, *inputs):
        return self.run(self, *inputs)


def site(run, *inputs, dtype=torch.float32):
    """Compile and compare with eager; the passes that took a site, and why others refused."""
    module = Runs(run, dtype)
    graph = passes.run(capture(module, inputs))
    with torch.no_grad():
        got, want = graph.run(weights_of(module), *inputs), module(*inputs)
    assert got.dtype == want.dtype
    assert relative_error(got, want) < (1e-6 if dtype == torch.float32 else 1e-2)
    taken = [each.rewrite for each in graph.sites if each.refused is None]
    return taken, [each.refused for each in graph.sites if each.refused]


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def written_out(module, x, weight=True, dims=-1, eps=1e-6):
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + eps)).to(x.dtype)
    return module.weight * normed if weight else normed


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attended(mask=None, **options):
    """Attention of 4 heads over [B, L, 64], to the last input."""

    def run(module, x, y, *rest):
        q, k, v = heads(x, 4), heads(y, 4), heads(y + 1, 4)
        chosen = mask(*rest) if callable(mask) else mask
        return F.scaled_dot_product_attention(q, k, v, chosen, **options).transpose(1, 2).flatten(2)

    return run
