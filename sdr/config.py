"""Model configuration and its presets; every decision that the paper leaves open is a named field."""

import math
from dataclasses import dataclass, field
from typing import Literal

TEMPORAL_STRIDE = 2  # MaxPool (2,1,1) after res2: two frames become one token
STAGE_BLOCKS = (3, 4, 6, 3)  # blocks of res2..res5 in a ResNet-50
MAX_LAYERS = 1024  # of one kind, and branches: modules are made one by one
MAX_CLIP_PIXELS = 2**28  # of one clip, 160 times the paper's


def check(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise ValueError naming the field, its rule and what came."""
    if not condition:
        raise ValueError(f"{name} must {rule}, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, name, f"be one of {', '.join(choices)}", value)


def check_count(name: str, value: object) -> None:
    """A size: a whole number from 1, and small enough that no product of two sizes can overflow."""
    check(type(value) is int and 1 <= value < 2**31, name, "be at least 1 and a whole number below 2**31", value)


def check_layers(name: str, value: object) -> None:
    check_count(name, value)
    check(value <= MAX_LAYERS, name, f"not pass {MAX_LAYERS}", value)


def check_number(name: str, value: object) -> None:
    """A number that can be compared; it may still be NaN, which no range holds."""
    check(isinstance(value, int | float) and not isinstance(value, bool), name, "be a number", value)


def check_list(name: str, value: object, length: int | None = None) -> None:
    kinds = list | tuple | set | frozenset
    rule = "be a list" if length is None else f"be a list of {length}"
    check(isinstance(value, kinds) and length in (None, len(value)), name, rule, value)


def check_flag(name: str, value: object) -> None:
    check(isinstance(value, bool), name, "be true or false", value)


@dataclass(frozen=True)
class FTCNConfig:
    """One temporal-only 3D ResNet and its temporal transformer (FTCN, ICCV 2021).

    Args:
        num_frames: frames T of a clip; a multiple of 2.
        image_size: height and width of a clip's frames in pixels; every pool halves it exactly.
        width: channels of the stem; res2 has 4 x width, each later stage doubles it.
        backbone_stages: residual stages: 3 ends at res4 (published FTCN weights), 4 at res5 (full ResNet-50).
        blocks: bottlenecks of each stage, at least ``backbone_stages`` numbers.
        temporal_kernels: False makes every convolution 1x1x1: the control that cannot see time in the backbone.
        spatial_kernel: odd; above 1 the stem and conv b of every bottleneck also look sideways, as a plain 3D ResNet's
            do: the control that space may mislead. The kernels of :mod:`sdr.fast` are for 1 alone.
        embed_dim: width D of the transformer's tokens.
        depth: transformer layers.
        num_heads: attention heads.
        head_dim: width of one head; ``num_heads * head_dim`` need not equal ``embed_dim``.
        mlp_dim: hidden width of the transformer's MLP.
        dropout: rate after the positions and inside the MLP.
    """

    num_frames: int = 32
    image_size: int = 224
    width: int = 64
    backbone_stages: int = 3
    blocks: tuple[int, ...] = STAGE_BLOCKS
    temporal_kernels: bool = True
    spatial_kernel: int = 1
    embed_dim: int = 1024
    depth: int = 1
    num_heads: int = 16
    head_dim: int = 64
    mlp_dim: int = 2048
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_list("blocks", self.blocks)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        sizes = ("num_frames", "image_size", "width", "spatial_kernel", "embed_dim", "depth", "num_heads", "head_dim")
        for name in (*sizes, "mlp_dim"):
            check_count(name, getattr(self, name))
        check(self.spatial_kernel % 2 == 1, "spatial_kernel", "be odd", self.spatial_kernel)
        check(self.spatial_kernel <= self.image_size, "spatial_kernel", "not pass image_size", self.spatial_kernel)
        check_flag("temporal_kernels", self.temporal_kernels)
        check(self.num_frames % TEMPORAL_STRIDE == 0, "num_frames", "be even", self.num_frames)
        check(self.backbone_stages in (1, 2, 3, 4), "backbone_stages", "be 1, 2, 3 or 4", self.backbone_stages)
        halvings = 2 ** (self.backbone_stages + 1)
        check(self.image_size % halvings == 0, "image_size", f"be a multiple of {halvings}", self.image_size)
        check(len(self.blocks) >= self.backbone_stages, "blocks", "name every stage", self.blocks)
        for number in self.blocks:
            check_layers("blocks", number)
        check_layers("depth", self.depth)
        pixels = self.num_frames * self.image_size**2
        check(pixels <= MAX_CLIP_PIXELS, "num_frames * image_size**2", f"not pass {MAX_CLIP_PIXELS}", pixels)
        check_number("dropout", self.dropout)
        check(0 <= self.dropout < 1, "dropout", "lie in [0, 1)", self.dropout)

    @property
    def backbone_channels(self) -> int:
        """C: channels of the backbone's last stage."""
        return self.width * 4 * 2 ** (self.backbone_stages - 1)

    @property
    def num_tokens(self) -> int:
        """N: time steps after the temporal pool."""
        return self.num_frames // TEMPORAL_STRIDE


@dataclass(frozen=True)
class SDRConfig(FTCNConfig):
    """SDR: V branches, each an FTCN backbone, joined by TRFI before one temporal transformer.

    Args:
        num_branches: V, branches and views.
        share_weights: one backbone for all branches instead of V of them.
        joint_feature: how a time step's V branch features become one token: ``linear`` (concatenate, then W),
            ``mlp`` (concatenate, then two layers), ``mean`` or ``sum`` (then a projection where C differs from D).
    """

    num_branches: int = 4
    share_weights: bool = False
    joint_feature: Literal["linear", "mean", "sum", "mlp"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers("num_branches", self.num_branches)
        check_flag("share_weights", self.share_weights)
        check_choice("joint_feature", self.joint_feature, ("linear", "mean", "sum", "mlp"))

    def branch(self) -> FTCNConfig:
        """The configuration of FTCN alone: one branch, same backbone and transformer."""
        names = FTCNConfig.__dataclass_fields__
        return FTCNConfig(**{name: getattr(self, name) for name in names})


def paper() -> SDRConfig:
    """The paper's model: full ResNet-50 branches (C = 2048), W to 1024, 12 heads of 64."""
    return SDRConfig(backbone_stages=4, num_heads=12)


def ftcn_released() -> SDRConfig:
    """Branches to res4 (C = 1024) and 16 heads: the shape of FTCN's published weights."""
    return SDRConfig(backbone_stages=3)


def tiny() -> SDRConfig:
    """The smallest model that still learns: for tests and the demonstration on two cores."""
    return SDRConfig(
        image_size=64, width=8, backbone_stages=2, blocks=(1, 1), embed_dim=64, num_heads=4, head_dim=16, mlp_dim=128
    )


PRESETS = {"paper": paper, "ftcn_released": ftcn_released, "tiny": tiny}


@dataclass(frozen=True)
class LossConfig:
    """Weights and readings of SDR's losses.

    Args:
        ce: weight a of the binary cross-entropy on the logit.
        mi: weight b of the mutual-information loss.
        contrastive: weight c of the supervised InfoNCE.
        aux: weight of the cross-entropy on the joint and leave-one-out heads, which gives their P a meaning.
        mi_temperature: divides the heads' logits before the softmax.
        detach_joint: no gradient of the mutual-information loss reaches the joint head.
        direction: ``joint_to_loo`` is KL(P_Z || P_Z\\v), ``loo_to_joint`` the reverse.
        objective: ``shared`` minimises the divergence, ``complementary`` minimises exp(-divergence) (Ba et al.).
        temperature: of InfoNCE.
        anchors: ``all``, or ``real`` to pull only real clips together.
        weighting: ``fixed`` uses the weights above, ``uncertainty`` learns them (Liebel and Koerner, 2018).
    """

    ce: float = 1.0
    mi: float = 1.0
    contrastive: float = 0.1
    aux: float = 1.0
    mi_temperature: float = 1.5
    detach_joint: bool = True
    direction: Literal["joint_to_loo", "loo_to_joint"] = "joint_to_loo"
    objective: Literal["shared", "complementary"] = "shared"
    temperature: float = 0.07
    anchors: Literal["all", "real"] = "all"
    weighting: Literal["fixed", "uncertainty"] = "fixed"

    def __post_init__(self) -> None:
        check_flag("detach_joint", self.detach_joint)
        for name in ("ce", "mi", "contrastive", "aux", "mi_temperature", "temperature"):
            check_number(name, getattr(self, name))
        for name in ("ce", "mi", "contrastive", "aux"):
            check(0 <= getattr(self, name) < math.inf, name, "be finite and not negative", getattr(self, name))
        for name in ("mi_temperature", "temperature"):
            check(1e-6 <= getattr(self, name) <= 1e6, name, "lie in 1e-6..1e6", getattr(self, name))
        check_choice("direction", self.direction, ("joint_to_loo", "loo_to_joint"))
        check_choice("objective", self.objective, ("shared", "complementary"))
        check_choice("anchors", self.anchors, ("all", "real"))
        check_choice("weighting", self.weighting, ("fixed", "uncertainty"))


TPA_METHODS = ("color_jitter", "cutout", "flip", "crop")


@dataclass(frozen=True)
class TPAConfig:
    """Temporally-preserved Augmentation; view v uses ``methods[v % len(methods)]``.

    Args:
        methods: the augmentation of each view, in order; ``none`` leaves a view as it is.
        brightness: factor drawn from 1 -+ this.
        contrast: factor drawn from 1 -+ this, about mid-grey.
        saturation: factor drawn from 1 -+ this.
        hue: rotation drawn from -+ this, in turns.
        flip_probability: of a horizontal flip in the flip's view.
        crop_area: smallest and largest share of the frame that a crop keeps.
        crop_ratio: smallest and largest width / height of a crop, in units of the frame's own.
        cutout_area: smallest and largest share of the frame that the hole covers.
        cutout_ratio: smallest and largest width / height of the hole.
        cutout_fill: ``mean`` fills with 0 after normalisation, ``black`` with a black pixel.
        per_frame: methods drawn anew for every frame: the paper's "without TPA" ablation.
    """

    methods: tuple[str, ...] = TPA_METHODS
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    flip_probability: float = 1.0
    crop_area: tuple[float, float] = (0.7, 1.0)
    crop_ratio: tuple[float, float] = (0.9, 1.1)
    cutout_area: tuple[float, float] = (0.02, 0.33)
    cutout_ratio: tuple[float, float] = (0.3, 3.3)
    cutout_fill: Literal["mean", "black"] = "mean"
    per_frame: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for name in ("methods", "per_frame"):
            check_list(name, getattr(self, name))
        object.__setattr__(self, "per_frame", frozenset(self.per_frame))
        check(len(self.methods) > 0, "methods", "not be empty", self.methods)
        for method in self.methods:
            check_choice("methods", method, (*TPA_METHODS, "none"))
        for method in self.per_frame:
            check_choice("per_frame", method, TPA_METHODS)
        for name in ("brightness", "contrast", "saturation", "hue", "flip_probability"):
            check_number(name, getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            check(0 <= getattr(self, name) <= 1, name, "lie in [0, 1]", getattr(self, name))
        check(0 <= self.hue <= 0.5, "hue", "lie in [0, 0.5]", self.hue)
        check(0 <= self.flip_probability <= 1, "flip_probability", "lie in [0, 1]", self.flip_probability)
        for name in ("crop_area", "crop_ratio", "cutout_area", "cutout_ratio"):
            check_list(name, getattr(self, name), 2)
            for bound in getattr(self, name):
                check_number(name, bound)
            low, high = getattr(self, name)
            check(0 < low <= high < math.inf, name, "be a positive, ordered pair", getattr(self, name))
        for name in ("crop_area", "cutout_area"):
            check(getattr(self, name)[1] <= 1, name, "not pass 1", getattr(self, name))
        check_choice("cutout_fill", self.cutout_fill, ("mean", "black"))


@dataclass(frozen=True)
class GroupedConfig:
    """How :class:`sdr.fast.SDRModel` trains its branches.

    Args:
        scheme: of :func:`sdr_kernels.normed_bottleneck`: ``gram`` keeps least for the backward pass, ``fused`` what
            every convolution puts out.
        recompute: parts, of ``stem``, ``res2`` and so on, of which only the input is kept; the rest is computed again
            in the backward pass.
        impl: ``auto`` (Triton on a GPU, the plain branches on a CPU, where they take less time), ``triton``, ``cpu``,
            which keeps less for the backward pass, or ``reference``, the plain branches. Named, it runs or raises.
    """

    scheme: Literal["gram", "fused"] = "gram"
    recompute: tuple[str, ...] = ()
    impl: Literal["auto", "reference", "cpu", "triton"] = "auto"

    def __post_init__(self) -> None:
        check(isinstance(self.recompute, (list, tuple)), "recompute", "be a list of parts", self.recompute)
        object.__setattr__(self, "recompute", tuple(self.recompute))
        check_choice("scheme", self.scheme, ("gram", "fused"))
        check_choice("impl", self.impl, ("auto", "reference", "cpu", "triton"))
        parts = ("stem", "res2", "res3", "res4", "res5")
        check(set(self.recompute) <= set(parts), "recompute", f"name parts of {', '.join(parts)}", self.recompute)
