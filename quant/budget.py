"""The error budget: how far a product of eight bits is from the exact one, on rows that its layer really reads.

Errors are relative L2 against float64. e4m3 rounds normal values by 2.6 %, so that a product of two such operands is
off by 3.7 %. Layers show more where their sums cancel (inputs share a large part that the weight hardly sees), or where
one value of a row is 1e5 times the others, which leaves these without bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from horsepower.kernels.linear import LINEAR
from horsepower.quant.quantised import quantise

# 1.6 times what normal operands cost, and reached where a sum cancels to 0.6 of its terms' length.
BUDGET = 0.06
# Of final latents: 40 layers of random weights show 0.06 to 0.13, and 0.005 to 0.014 in 16 bits.
LATENT_BUDGET = 0.15
BLOCK = 2**23  # values of a weight in float64 at a time


@dataclass(frozen=True)
class Rows:
    """Some rows that a layer reads, as they are and, under a scheme of codes, as its plan hands them to the product."""

    x: Tensor  # [L, I], as exact as they are known
    counts: tuple[int, int, int]  # of them by modality
    codes: Tensor | None = None  # [L, I] in e4m3
    scales: Tensor | None = None  # float32 [L, 1] of the codes; None if these have one for all rows:
    static: Tensor | float = 1.0  # the one that goes into the scales of the weight


@dataclass(frozen=True)
class ProductError:
    """Of one product: with the weight's own 16 bits, and under the scheme. Infinite where it is not a number."""

    own: float
    scheme: float


def product_error(rows: Rows, weight: Tensor, experts: int, scales_of_weight: int | None = None) -> ProductError:
    """weight [experts * O, I], of 16 bits, with so many scales: None, one a row. The products are those of a plan."""
    codes, scales = quantise(weight, len(weight) if scales_of_weight is None else scales_of_weight)
    x = rows.x.to(weight.dtype)
    (own,) = LINEAR(x, weight, experts, rows.counts)
    if rows.codes is None:
        (got,) = LINEAR(x, codes, experts, rows.counts, None, scales)
    else:
        (got,) = LINEAR(rows.codes, codes, experts, rows.counts, rows.scales, scales * rows.static)
    return ProductError(*_relative((own, got), rows, weight, experts))


def _relative(products: Sequence[Tensor], rows: Rows, weight: Tensor, experts: int) -> list[float]:
    """L2 distances [L, O] from the exact product, relative to it; a block of the weight is widened at a time."""
    length = torch.zeros((), dtype=torch.float64, device=weight.device)
    distances = [torch.zeros_like(length) for _ in products]
    parts = (rows.counts, weight.chunk(experts)) if experts > 1 else ([len(rows.x)], [weight])
    step, first = max(1, BLOCK // weight.shape[1]), 0
    for count, own in zip(*parts, strict=True):
        part, first = slice(first, first + count), first + count
        x = rows.x[part].double()
        for at in range(0, own.shape[0], step):
            exact = x @ own[at : at + step].double().t()
            length += exact.square().sum()
            for distance, got in zip(distances, products, strict=True):
                distance += (got[part, at : at + step].double() - exact).square().sum()
    return relative(distances, length)


def relative(distances: Sequence[Tensor], length: Tensor) -> list[float]:
    """Roots of squared distances in multiples of that of a squared length; infinite where they are no numbers."""
    errors = [float((distance / length).sqrt()) if length or distance else 0.0 for distance in distances]
    return [error if math.isfinite(error) else math.inf for error in errors]


def fewest(count: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest n up to `count` that holds, if whatever is above one that holds does too; None if `count` does not.

    Asks about log2(count) times.
    """
    if holds(0):
        return 0
    if count == 0 or not holds(count):
        return None
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
