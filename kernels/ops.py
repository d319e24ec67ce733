"""Every op, registered: `ops.<name>.default` is what a graph calls."""

import torch

from horsepower.kernels import (  # noqa: F401 importing an op registers it
    activation,
    add_rms_norm,
    add_rms_norm_quantise,
    attention,
    head_bound,
    layer_norm,
    linear,
    linear_activation,
    linear_add_rms_norm,
    linear_add_rms_norm_quantise,
    linear_qk_norm_rope,
    pad_weight,
    pair_heads,
    qk_norm_rope,
    quantise,
    quantise_tensor,
    rms_norm,
    rms_norm_quantise,
    rope,
    silu_mul,
    to_codes,
    transpose_to_codes,
    value_bound,
)

ops = torch.ops.horsepower
