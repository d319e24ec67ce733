"""The Triton kernels, imported when tensors on a GPU first ask for one."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from horsepower.kernels.registry import OPS, Kernel
from horsepower.kernels.tables import tuned_config


def triton_kernel(
    name: str, workspace: Callable[..., int] | None = None, rereads: Callable[..., int] | None = None
) -> Kernel:
    """The kernel of `kernels/gpu/<name>.py`, in the configuration that was measured to be the fastest.

    `workspace` and `rereads` as in `Kernel`, since plans without a GPU ask for them too.
    """

    def module() -> Any:
        return import_module(f"horsepower.kernels.gpu.{name}")

    def supports(*inputs: Any) -> str | None:
        if not all(x.is_cuda or x.is_meta for x in inputs if isinstance(x, Tensor)):
            return "not on a GPU"
        return module().supports(*inputs)  # type: ignore[no-any-return]

    def run(outputs: tuple[Tensor, ...], workspace: Tensor | None, *inputs: Any) -> None:
        module().run(outputs, workspace, *inputs, config=tuned_config(OPS[name], inputs))

    return Kernel("triton", supports, run, workspace, devices=("cuda",), rereads=rereads)
