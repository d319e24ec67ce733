"""The compiler: the ordered list of its passes.

A pass is a function on a graph with a one-line statement of what it proves; it records the sites that it took and those
that it refused. After each, what fell dead is swept and the graph is checked: it can be executed at every stage.
"""

from collections.abc import Callable, Sequence

from horsepower.graph.graph import Graph
from horsepower.graph.passes.canonicalise import canonicalise
from horsepower.graph.passes.fuse_activation import fuse_activation
from horsepower.graph.passes.fuse_add_norm import fuse_add_norm
from horsepower.graph.passes.fuse_gate import fuse_gate
from horsepower.graph.passes.fuse_qkv import fuse_qkv
from horsepower.graph.passes.hoist import hoist
from horsepower.graph.passes.lower import lower
from horsepower.graph.passes.pad_mlp import pad_mlp
from horsepower.graph.passes.pad_qkv import pad_qkv
from horsepower.graph.passes.pair_rope import pair_rope
from horsepower.graph.passes.quantise import quantise
from horsepower.graph.passes.quantise_attention import quantise_attention
from horsepower.graph.passes.quantise_in_producer import quantise_in_producer
from horsepower.graph.passes.raise_activation import raise_activation
from horsepower.graph.passes.raise_attention import raise_attention
from horsepower.graph.passes.raise_layer_norm import raise_layer_norm
from horsepower.graph.passes.raise_linear import raise_linear
from horsepower.graph.passes.raise_mask import raise_mask
from horsepower.graph.passes.raise_rms_norm import raise_rms_norm
from horsepower.graph.passes.raise_rope import raise_rope
from horsepower.graph.passes.raise_silu_mul import raise_silu_mul
from horsepower.graph.spec import check

Pass = Callable[[Graph], None]

PASSES: tuple[Pass, ...] = (
    canonicalise,
    hoist,
    raise_linear,
    raise_rms_norm,
    raise_layer_norm,
    raise_rope,
    raise_mask,
    raise_attention,
    raise_silu_mul,
    raise_activation,
    fuse_gate,
    fuse_qkv,
    fuse_activation,
    fuse_add_norm,
    pad_mlp,
    pair_rope,
    pad_qkv,
    quantise,
    quantise_in_producer,
    quantise_attention,
    lower,
)


def run(graph: Graph, passes: Sequence[Pass] = PASSES) -> Graph:
    """Apply the passes in order, in place; returns the graph."""
    for each in passes:
        each(graph)
        graph.sweep()
        check(graph, each.__name__)
    return graph
