"""What a forward pass has to do at least: FLOPs, and bytes with every layer's input, weights and output moved once."""

from dataclasses import dataclass

from sdr.config import TEMPORAL_STRIDE, SDRConfig
from sdr.ftcn import STEM_KERNEL, res_kernel

AFFINE_BYTES = 8  # float32 scale and shift of one channel


@dataclass(frozen=True)
class Shape:
    """Sizes of a stem or bottleneck; two layers of the same sizes are the same work."""

    C_in: int
    inner: int  # channels of a and b; of the stem: its output's
    C_out: int
    kernel: int
    T: int
    H: int  # of the input, and W
    branch1: bool = False
    pool: bool = False
    time_pool: bool = False


@dataclass(frozen=True)
class Linear:
    """Sizes of a product of the head, [rows, K] by [K, N]."""

    rows: int
    K: int
    N: int
    norm: bool = False  # LayerNorm before it
    activation: str = "none"
    residual: bool = False


@dataclass(frozen=True)
class Attention:
    """Sizes of the transformer's attention."""

    clips: int
    tokens: int
    heads: int
    head_dim: int


class Work:
    """Something to do, of so many FLOPs and bytes."""

    flops: int
    bytes: int

    def floor(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds below which it cannot end on a machine of these measured rates."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)

    def bound(self, flops_per_s: float, bytes_per_s: float) -> str:
        """Which of the two sets the floor."""
        return "arithmetic" if self.flops / flops_per_s > self.bytes / bytes_per_s else "memory"


@dataclass(frozen=True)
class Layer(Work):
    """One op of the forward pass over all clips and branches."""

    name: str  # "stem", "res3.0", "spatial_mean", "qkv"
    op: str  # of sdr_kernels
    shape: Shape | Linear | Attention | None
    flops: int
    bytes: int

    @property
    def stage(self) -> str:
        """The part of the network that it belongs to: "stem", "res2" and so on, or "head"."""
        part = self.name.partition(".")[0]
        return part if part == "stem" or part.startswith("res") else "head"


def shapes_of(config: SDRConfig) -> dict[str, Shape]:
    """Layer name to sizes, in the order in which a branch runs them."""
    C, T, H = config.width, config.num_frames, config.image_size
    shapes = {"stem": Shape(3, C, C, STEM_KERNEL if config.temporal_kernels else 1, T, H)}
    H //= 4
    for stage in range(2, config.backbone_stages + 2):
        C_out = config.width * 2**stage
        blocks = config.blocks[stage - 2]
        for block in range(blocks):
            pool = stage > 2 and block == 0
            time_pool = stage == 2 and block == blocks - 1
            kernel = res_kernel(stage, block) if config.temporal_kernels else 1
            shapes[f"res{stage}.{block}"] = Shape(C, C_out // 4, C_out, kernel, T, H, C_out != C, pool, time_pool)
            C, T, H = C_out, T // TEMPORAL_STRIDE if time_pool else T, H // 2 if pool else H
    return shapes


def stem_work(s: Shape, itemsize: int, input_itemsize: int) -> tuple[int, int, int]:
    """FLOPs, bytes of one clip and branch, and bytes of a branch's weights."""
    pixels = s.T * s.H * s.H
    weights = s.kernel * s.C_in * s.C_out
    moved = pixels * s.C_in * input_itemsize + pixels // 16 * s.C_out * itemsize
    return 2 * pixels * weights, moved, weights * itemsize + s.C_out * AFFINE_BYTES


def bottleneck_work(s: Shape, itemsize: int) -> tuple[int, int, int]:
    """FLOPs, bytes of one clip and branch, and bytes of a branch's weights; only c runs after the pool."""
    rows = s.T * s.H * s.H
    rows_c = rows // 4 if s.pool else rows
    rows_out = rows_c // TEMPORAL_STRIDE if s.time_pool else rows_c
    before = s.kernel * s.C_in * s.inner + s.inner * s.inner + s.branch1 * s.C_in * s.C_out
    channels = 2 * s.inner + s.C_out * (1 + s.branch1)
    flops = 2 * (rows * before + rows_c * s.inner * s.C_out)
    weights = (before + s.inner * s.C_out) * itemsize + channels * AFFINE_BYTES
    return flops, (rows * s.C_in + rows_out * s.C_out) * itemsize, weights


def head_shapes(config: SDRConfig, clips: int) -> dict[str, Linear | Attention]:
    """TRFI's layers and the transformer's by name, in the order in which they run."""
    V, C, D, N = config.num_branches, config.backbone_channels, config.embed_dim, config.num_tokens
    inner = config.num_heads * config.head_dim
    concatenated = V > 1 and config.joint_feature in ("linear", "mlp")
    joined = V * C if concatenated else C
    shapes: dict[str, Linear | Attention] = {}
    if concatenated or joined != D:
        shapes["projection"] = Linear(clips * N, joined, D)
    if concatenated and config.joint_feature == "mlp":
        shapes["projection 2"] = Linear(clips * N, D, D)
    shapes["joint head"] = Linear(clips, V * C, 2)
    if V > 1:
        shapes["leave-one-out heads"] = Linear(clips, (V - 1) * C, 2 * V)
    rows = clips * (N + 1)
    for i in range(config.depth):
        shapes[f"qkv {i}"] = Linear(rows, D, 3 * inner, norm=True)
        shapes[f"attention {i}"] = Attention(clips, N + 1, config.num_heads, config.head_dim)
        shapes[f"attention projection {i}"] = Linear(rows, inner, D, residual=True)
        shapes[f"mlp in {i}"] = Linear(rows, D, config.mlp_dim, norm=True, activation="gelu")
        shapes[f"mlp out {i}"] = Linear(rows, config.mlp_dim, D, residual=True)
    shapes["logit"] = Linear(clips, D, 1, norm=True)
    return shapes


def head_layer(name: str, s: Linear | Attention, itemsize: int) -> Layer:
    if isinstance(s, Attention):
        values = s.clips * s.tokens * s.heads * s.head_dim
        return Layer(name, "token_attention", s, 4 * values * s.tokens, 4 * values * itemsize)
    moved = s.rows * s.K + s.K * s.N + s.rows * s.N * (1 + s.residual)
    return Layer(name, "norm_linear", s, 2 * s.rows * s.K * s.N, moved * itemsize)


def layers_of(config: SDRConfig, clips: int, itemsize: int = 2, input_itemsize: int | None = None) -> list[Layer]:
    """Every op of a forward pass, in order.

    Args:
        config: shapes and the number of branches.
        clips: B.
        itemsize: bytes of an activation or weight.
        input_itemsize: bytes of an input's value, a clip per branch; ``itemsize`` where not given.
    """
    V = config.num_branches
    layers = []
    for name, shape in shapes_of(config).items():
        if name == "stem":
            op, (flops, moved, weights) = "temporal_stem", stem_work(shape, itemsize, input_itemsize or itemsize)
        else:
            op, (flops, moved, weights) = "temporal_bottleneck", bottleneck_work(shape, itemsize)
        layers.append(Layer(name, op, shape, clips * V * flops, V * (clips * moved + weights)))
    N, C = config.num_tokens, config.backbone_channels
    side = config.image_size // 2 ** (config.backbone_stages + 1)
    features = clips * V * N * C
    layers.append(
        Layer("spatial_mean", "spatial_mean", None, features * side**2, features * (side**2 + 1) * itemsize),
    )
    return layers + [head_layer(name, shape, itemsize) for name, shape in head_shapes(config, clips).items()]


def distinct(layers: list[Layer]) -> list[tuple[Layer, int]]:
    """The first layer of every distinct op and sizes, and how many there are of it."""
    first: dict[tuple, Layer] = {}
    count: dict[tuple, int] = {}
    for layer in layers:
        key = (layer.op, layer.shape)
        first.setdefault(key, layer)
        count[key] = count.get(key, 0) + 1
    return [(first[key], count[key]) for key in first]
