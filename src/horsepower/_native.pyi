"""Native CPU kernels of horsepower, in the widest instruction set that the CPU has."""

def isas() -> list[str]:
    """Instruction sets that this CPU runs, best first."""

def add_rms_norm(
    isa: str,
    residual: int,
    branch: int,
    post_gain: int,
    gain: int,
    sum: int,
    normed: int,
    residual_pitch: int,
    branch_pitch: int,
    post_gain_pitch: int,
    gain_pitch: int,
    rows: int,
    dim: int,
    second: int,
    third: int,
    eps: float,
    branch_bf16: bool,
    normed_bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.add_rms_norm. Addresses; pitches in elements."""

def activation(
    isa: str,
    u: int,
    out: int,
    pitch: int,
    rows: int,
    dim: int,
    gated: bool,
    u_bf16: bool,
    out_bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.activation. Addresses; pitches in elements."""

def qk_norm_rope(
    isa: str,
    qkv: int,
    q_gain: int,
    k_gain: int,
    rope: int,
    q: int,
    k: int,
    qkv_pitch: int,
    rope_pitch: int,
    gain_pitch: int,
    rows: int,
    heads_q: int,
    heads_kv: int,
    dim: int,
    half: int,
    second: int,
    third: int,
    eps: float,
    bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.qk_norm_rope. Addresses; pitches in elements."""

def rms_norm(
    isa: str,
    x: int,
    gain: int,
    out: int,
    pitch: int,
    gain_pitch: int,
    rows: int,
    dim: int,
    second: int,
    third: int,
    eps: float,
    x_bf16: bool,
    out_bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.rms_norm. Addresses; pitches in elements."""
