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
    kind: int,
    u_bf16: bool,
    out_bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.activation. Addresses; pitches in elements."""

def silu_mul(
    isa: str,
    gate: int,
    up: int,
    out: int,
    gate_pitch: int,
    up_pitch: int,
    rows: int,
    dim: int,
    bf16: bool,
    out_bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.silu_mul. Addresses; pitches in elements."""

def layer_norm(
    isa: str,
    x: int,
    weight: int,
    bias: int,
    out: int,
    pitch: int,
    rows: int,
    dim: int,
    eps: float,
    x_bf16: bool,
    out_bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.layer_norm. Addresses; pitches in elements."""

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

def attention_workspace(isa: str, keys: int, heads: int, kv_heads: int, dim: int, bf16: bool, threads: int) -> int:
    """Bytes of scratch memory that attention needs."""

def attention(
    isa: str,
    q: int,
    k: int,
    v: int,
    gate: int,
    out: int,
    workspace: int,
    q_pitch: int,
    q_head: int,
    k_pitch: int,
    k_head: int,
    v_pitch: int,
    v_head: int,
    gate_pitch: int,
    second: int,
    third: int,
    ranges: list[int],
    keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    bf16: bool,
    gate_bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.attention. Addresses; pitches in elements; six numbers a range."""

def linear_workspace(isa: str, depth: int, bf16: bool, threads: int) -> int:
    """Bytes of scratch memory that linear needs."""

def linear(
    isa: str,
    x: int,
    codes: int,
    scales: int,
    out: int,
    workspace: int,
    x_pitch: int,
    codes_pitch: int,
    out_pitch: int,
    rows: int,
    depth: int,
    width: int,
    second: int,
    third: int,
    bf16: bool,
    threads: int,
) -> None:
    """See horsepower.kernels.linear. Addresses; pitches in elements."""
