"""Floating-point operations that a method's step must do, counted from the shape: the matrix products, without attention's own.

With N_b the entries of a block's matrices, N_d of its output projection, L blocks and N = L N_b + vocabulary * hidden:

    full (ga)   forward 2N, backward 4N                                      6N a forget token
    LoRA (tvn)  forward 2N, backward 2N: frozen weights need no gradient     4N a forget token
    LoRA (npo)  the same, and a forward pass of the base                     6N a forget token, 4N a retain token
    rmu         blocks 0..l-3 once, l-2..l twice forward (trained and base,  2(l-2) N_b + 14 N_b + 8 N_d a token,
                the first one's front once), backward through the last two   forget and retain alike

LoRA's own factors are left out: they are 1 % of N at rank 16.
"""

import math
from collections.abc import Mapping

from shapes import Shape, tensors

TRAINED = 3  # blocks that RMU trains


def matrices(shape: Shape) -> tuple[int, int, int]:
    """N_b, N_d, N."""
    sizes = {name: math.prod(dimensions) for name, dimensions in tensors(shape) if len(dimensions) == 2}
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    down = sizes["model.layers.0.mlp.down_proj.weight"]
    return block, down, shape.layers * block + shape.vocabulary * shape.hidden


def operations(method: str, shape: Shape, tokens: Mapping[str, int], layer: int) -> float:
    """Of one step. tokens: `forget` and `retain` of a step; layer: RMU's l."""
    block, down, whole = matrices(shape)
    steered = (2 * (layer - TRAINED + 1) + 14) * block + 8 * down
    each = {
        "ga": {"forget": 6 * whole},
        "tvn": {"forget": 4 * whole},
        "npo": {"forget": 6 * whole, "retain": 4 * whole},
        "rmu": {"forget": steered, "retain": steered},
    }[method]
    return float(sum(each[side] * tokens[side] for side in each))
