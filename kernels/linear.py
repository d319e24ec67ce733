"""Matrix product with a transposed weight; with three experts, each modality's rows with a weight of their own.

    y = x weight^T                          of one dtype
    y = x_scale weight_scale (x weight^T)   with codes of eight bits (`float8`): of the weight, or of both

Scales belong to rows: of x its tokens, of the weight its outputs, or all outputs of an expert share one. Codes of x
whose scale is the same for all tokens come without one: the weight's has it folded in.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower import _native
from horsepower.kernels.float8 import E4M3, arithmetic
from horsepower.kernels.modality import by_modality, check_experts, first_rows
from horsepower.kernels.native_library import FLOATS, ISAS, pitch, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.sizes import differ
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor x, Tensor weight, int experts, SymInt[] counts, Tensor? x_scale=None, Tensor? weight_scale=None) -> Tensor"
)


def outputs(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x [..., I] and weight [experts * O, I] of one dtype -> [..., O]; with experts, x is [L, I].

    The weight may be codes with weight_scale [experts * O, 1] or [experts, 1], and then x [L, I] codes too, perhaps
    with x_scale [L, 1]; scales are float32. Of codes the result is bfloat16, else of x's dtype.
    Raises ValueError for inputs that do not belong together.
    """
    check_experts(experts, counts, x.shape[0])
    allowed = x.dtype if weight_scale is None else E4M3
    if weight.ndim != 2 or weight.dtype != allowed or weight.shape[1] != x.shape[-1] or weight.shape[0] % experts:
        raise ValueError(
            f"weight: got {list(weight.shape)} {weight.dtype}, allowed: [{experts} O, {x.shape[-1]}] {allowed}"
        )
    if x.dtype == E4M3 and (weight_scale is None or x.ndim != 2):
        raise ValueError(f"x: got {list(x.shape)} {x.dtype}, allowed: [L, I], with a weight_scale")
    if experts != 1 and x.ndim != 2:
        raise ValueError(f"x: got {list(x.shape)}, allowed: [L, I], for {experts} experts")
    shared = weight_scale is not None and tuple(weight_scale.shape) == (experts, 1)
    rows = experts if shared else weight.shape[0]
    for name, scale, count in (("x_scale", x_scale, x.shape[0]), ("weight_scale", weight_scale, rows)):
        if scale is not None and (differ(scale.shape, (count, 1)) or scale.dtype != torch.float32):
            raise ValueError(f"{name}: got {list(scale.shape)} {scale.dtype}, allowed: [{count}, 1] torch.float32")
    if x_scale is not None and x.dtype != E4M3:
        raise ValueError(f"x_scale: got one for {x.dtype}, allowed: for {E4M3}")
    return (x.new_empty((*x.shape[:-1], weight.shape[0] // experts), dtype=arithmetic(x.dtype)),)


def reference(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One product, or one a modality; of codes in float32, or in float64 for its inputs."""
    if weight_scale is None:
        return (by_modality(F.linear, experts, counts, x, weight),)
    wide = torch.float64 if torch.float64 in (x.dtype, weight_scale.dtype) else torch.float32

    def scaled(rows: Tensor, own: Tensor, scale: Tensor) -> Tensor:
        return F.linear(rows.to(wide), own.to(wide)) * scale[:, 0]

    y = by_modality(scaled, experts, counts, x, weight, weight_scale)
    return ((y if x_scale is None else y * x_scale).to(arithmetic(x.dtype)),)


def library_supports(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the library's product cannot write the output in place, or None."""
    if weight_scale is not None:
        return "the weight is quantised"
    return None if x.ndim == 2 else f"x has {x.ndim} dimensions"


def library(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int],
    *_scales: None,
) -> None:  # fmt: skip
    """torch's matrix product (oneDNN, cuBLAS) into the output's rows."""
    for part, rows, own in _parts(experts, counts, (out[0], x), (weight,)):
        torch.mm(rows, own.t(), out=part)


def scaled_supports(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the library's product of codes cannot take these inputs, or None."""
    if x.dtype != E4M3:
        return "x is not quantised"
    assert weight_scale is not None
    if x_scale is not None and weight_scale.shape[0] < weight.shape[0]:
        return "x has a scale a token, the weight one for all outputs"
    if x.shape[1] % 16 or weight.shape[0] // experts % 16:
        return "a dimension of the weight is no multiple of 16"
    return None if x.stride(1) == weight.stride(1) == 1 else "rows are not contiguous"


def scaled(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int],
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """torch's matrix product of codes (cuBLASLt) into the output's rows."""
    assert weight_scale is not None
    shared = weight_scale.shape[0] < weight.shape[0]
    one = weight_scale.new_ones(1 if shared else x.shape[0], 1) if x_scale is None else x_scale
    scales = one.expand(x.shape[0], 1)
    for part, rows, scale, own, own_scale in _parts(experts, counts, (out[0], x, scales), (weight, weight_scale)):
        by = (one.view(()), own_scale.view(())) if shared else (scale, own_scale.t())
        torch._scaled_mm(rows, own.t(), scale_a=by[0], scale_b=by[1], out_dtype=out[0].dtype, out=part)


def native_supports(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the C++ kernel cannot take these inputs, or None."""
    if weight_scale is None:
        return "the weight is not quantised"
    if weight_scale.shape[0] < weight.shape[0]:
        return "the weight has one scale for all outputs"
    if x.dtype not in FLOATS:
        return "x is neither float32 nor bfloat16"
    if not x.shape[-1]:
        return "x has no columns"
    if pitch(x) is None:
        return "its rows are not equally far apart"
    if ISAS[0] == "portable" and x.numel() > 32 * x.shape[-1]:
        return "torch's product of decoded weights is faster for so many rows"
    return refuses(x, weight) or (None if weight_scale.is_contiguous() else "the scales are not contiguous")


def native_workspace(x: Tensor, weight: Tensor, experts: int, *_: object, isa: str = ISAS[0]) -> int:
    """Bytes for the weights of some outputs, decoded by each thread."""
    if weight.dtype != E4M3 or x.dtype not in FLOATS:
        return 0
    return _native.linear_workspace(isa, x.shape[-1], x.dtype == torch.bfloat16, threads(_work(x, weight, experts)))


def _work(x: Tensor, weight: Tensor, experts: int) -> int:
    """In elements as long as those that other kernels read: 32 codes that are decoded, or 64 multiplications."""
    return max(weight.numel() // 32, x.numel() * weight.shape[0] // (64 * experts))


def native(
    out: tuple[Tensor, ...], workspace: Tensor, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int],
    x_scale: None, weight_scale: Tensor, isa: str = ISAS[0],
) -> None:  # fmt: skip
    """C++ in the widest instruction set of this CPU; rows may be strided; bfloat16 products where the CPU has them."""
    rows = x.numel() // x.shape[-1]
    second, third = first_rows(experts == 3, counts, rows)
    _native.linear(
        isa,
        x.data_ptr(),
        weight.data_ptr(),
        weight_scale.data_ptr(),
        out[0].data_ptr(),
        workspace.data_ptr(),
        pitch(x) or 0,
        weight.stride(0),
        pitch(out[0]) or 0,
        rows,
        x.shape[-1],
        out[0].shape[-1],
        second,
        third,
        x.dtype == torch.bfloat16,
        threads(_work(x, weight, experts)),
    )


def _parts(
    experts: int, counts: Sequence[int], tokens: tuple[Tensor, ...], weights: tuple[Tensor, ...]
) -> list[tuple[Tensor, ...]]:
    """Of each expert with rows: its rows of what belongs to tokens, then its part of what belongs to weights."""
    if experts == 1:
        return [(*tokens, *weights)]
    rows = (x.split(list(counts)) for x in tokens)
    parts = zip(*rows, *(x.chunk(experts) for x in weights), strict=True)
    return [part for part in parts if part[0].shape[0]]


def cost(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Cost:  # fmt: skip
    """A multiplication and an addition for each pair; each tensor passes memory once."""
    width, scales = weight.shape[0] // experts, (each for each in (x_scale, weight_scale) if each is not None)
    made = x.numel() // x.shape[-1] * width * arithmetic(x.dtype).itemsize
    return Cost(flops=2 * x.numel() * width, bytes=made + sum(each.nbytes for each in (x, weight, *scales)))


LINEAR = register(
    Op(
        "linear",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(
            Kernel("library", library_supports, library, devices=("cpu", "cuda")),
            Kernel("native", native_supports, native, native_workspace),
            Kernel("scaled_mm", scaled_supports, scaled, devices=("cuda",)),
            triton_kernel("linear"),
        ),
    )
)
