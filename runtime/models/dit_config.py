"""The architecture of a DiT, in the field names of the released configuration."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Gating = Literal["per_token", "per_head", "none"]


@dataclass(frozen=True)
class DiTConfig:
    """A single-stream DiT; the defaults are daVinci-MagiHuman's base and distilled models (15.3 B parameters)."""

    num_layers: int = 40
    hidden_size: int = 5120
    head_dim: int = 128
    num_query_groups: int = 8  # key-value heads
    video_in_channels: int = 192  # 48 latent channels in 1 x 2 x 2 patches
    audio_in_channels: int = 64
    text_in_channels: int = 3584
    mm_layers: tuple[int, ...] = (0, 1, 2, 3, 36, 37, 38, 39)  # one set of weights a modality
    gelu7_layers: tuple[int, ...] = (0, 1, 2, 3)  # the others are swiglu7
    local_attn_layers: tuple[int, ...] = ()
    post_norm_layers: tuple[int, ...] = ()  # the branch is normalised again before the residual addition
    gating: Gating = "per_token"  # per_head: one learned scalar a head, as HappyHorse-1.0 describes it
    frame_receptive_field: int = 11  # latent frames on either side in local layers; -1: all
    params_dtype: torch.dtype = torch.float32  # of the embedded tokens, where the residual stream starts

    def __post_init__(self) -> None:
        channels = ("video_in_channels", "audio_in_channels", "text_in_channels")
        for name in ("num_layers", "hidden_size", "head_dim", "num_query_groups", *channels):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed: at least 1")
        if self.frame_receptive_field < -1:
            raise ValueError(f"frame_receptive_field: got {self.frame_receptive_field}, allowed: at least -1")
        if self.hidden_size % self.head_dim or self.num_heads_q % self.num_query_groups or self.head_dim % 8:
            raise ValueError(
                f"head_dim, num_query_groups: got {self.head_dim}, {self.num_query_groups} for hidden_size "
                f"{self.hidden_size}, allowed: head_dim a multiple of 8 that divides hidden_size, "
                "num_query_groups a divisor of the number of heads"
            )
        if self.gating not in get_args(Gating):
            raise ValueError(f"gating: got {self.gating!r}, allowed: {', '.join(get_args(Gating))}")
        for name in ("mm_layers", "gelu7_layers", "local_attn_layers", "post_norm_layers"):
            if wrong := [n for n in getattr(self, name) if not 0 <= n < self.num_layers]:
                raise ValueError(f"{name}: got {wrong}, allowed: 0 to {self.num_layers - 1}")

    @property
    def num_heads_q(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def gelu7_width(self) -> int:
        return 4 * self.hidden_size

    @property
    def swiglu7_width(self) -> int:
        # The released width comes from this float product; integer arithmetic differs for some sizes.
        return int(self.hidden_size * 4 * 2 / 3) // 4 * 4

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """From JSON in the released field names; fields that inference does not read are ignored.

        Raises ValueError for a value that does not fit.
        """
        values = dict(values)
        if "enable_attn_gating" in values:
            values.setdefault("gating", "per_token" if values["enable_attn_gating"] else "none")
        if "params_dtype" in values:
            dtype = getattr(torch, str(values["params_dtype"]).removeprefix("torch."), None)
            if dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise ValueError(f"params_dtype: got {values['params_dtype']!r}, allowed: float32, bfloat16, float64")
            values["params_dtype"] = dtype
        known: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in values:
                value = values[field.name]
                default = field.default
                value = tuple(value) if isinstance(value, list) else value
                integers = not isinstance(value, tuple) or all(type(n) is int for n in value)
                if type(value) is not type(default) or not integers:
                    raise ValueError(f"{field.name}: got {value!r}, allowed: a value like {default!r}")
                known[field.name] = value
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, ready for JSON."""
        values = dataclasses.asdict(self)
        return values | {"params_dtype": str(self.params_dtype).removeprefix("torch.")}
