"""Shapes, orders and counts of FTCN, TRFI, the transformer and SDRModel, against facts and closed forms."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdr import FTCN, SDRConfig, SDRModel, ftcn_released, paper, tiny
from sdr.config import FTCNConfig
from sdr.ftcn import Backbone, Bottleneck, Stem, TemporalConv3d, res_kernel
from sdr.transformer import Attention, TemporalTransformer
from sdr.trfi import TRFI

PRESETS = {"paper": paper, "ftcn_released": ftcn_released}
# name: output of the module for one 32 x 224 x 224 clip
STAGES = {
    "stem": (64, 32, 56, 56),
    "res2": (256, 32, 56, 56),
    "time_pool": (256, 16, 56, 56),
    "res3": (512, 16, 28, 28),
    "res4": (1024, 16, 14, 14),
    "res5": (2048, 16, 7, 7),
}
KERNELS = {"res2": [3, 3, 3], "res3": [3, 1, 3, 1], "res4": [3, 1, 3, 1, 3, 1], "res5": [1, 3, 1]}


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def small(**fields) -> SDRConfig:
    return replace(tiny(), num_frames=8, image_size=32, **fields)


@pytest.mark.parametrize("preset", PRESETS)
def test_stage_shapes(preset):
    config = PRESETS[preset]()
    shapes = {}
    with torch.device("meta"):
        backbone = Backbone(config)
        for name, module in backbone.named_children():
            module.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
        backbone(torch.empty(1, 3, 32, 224, 224))
    last = f"res{config.backbone_stages + 1}"
    assert shapes == {name: shape for name, shape in STAGES.items() if name <= last or not name.startswith("res")}


@pytest.mark.parametrize("stage", KERNELS)
def test_temporal_kernels_follow_the_table(stage):
    assert [res_kernel(int(stage[-1]), block) for block in range(len(KERNELS[stage]))] == KERNELS[stage]


@pytest.mark.parametrize(
    ("stages", "backbone", "head"), [(3, 6_347_584, 8_418_305), (4, 17_118_016, 10_516_481)], ids=["res4", "res5"]
)
def test_parameter_counts_of_ftcn(stages, backbone, head):
    with torch.device("meta"):
        model = FTCN(replace(ftcn_released().branch(), backbone_stages=stages))
    assert count(model.backbone) == backbone
    assert count(model.transformer, model.proj) == head


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts_of_sdr(preset):
    config = PRESETS[preset]()
    with torch.device("meta"):
        model = SDRModel(config)
    V, C, D, inner = 4, config.backbone_channels, 1024, 64 * config.num_heads
    backbone = {1024: 6_347_584, 2048: 17_118_016}[C]
    trfi = (V * C + 1) * D + (V * C + 1) * 2 + V * ((V - 1) * C + 1) * 2
    attention = D * 3 * inner + (inner + 1) * D
    transformer = D + 17 * D + 3 * 2 * D + attention + (D + 1) * 2048 + (2048 + 1) * D + D + 1
    assert count(model) == V * backbone + trfi + transformer


@pytest.mark.parametrize("preset", PRESETS)
def test_output_shapes(preset):
    with torch.device("meta"):
        output = SDRModel(PRESETS[preset]())(torch.empty(2, 4, 3, 32, 224, 224))
    C = PRESETS[preset]().backbone_channels
    shapes = {name: tuple(value.shape) for name, value in output._asdict().items()}
    assert shapes == {
        "logits": (2,),
        "tokens": (2, 16, 1024),
        "features": (2, 4, C),
        "joint_logits": (2, 2),
        "loo_logits": (2, 4, 2),
    }


def test_no_convolution_looks_sideways():
    for module in SDRModel(tiny()).modules():
        if isinstance(module, nn.Conv3d):
            assert module.kernel_size[1:] == (1, 1)
            assert module.stride == (1, 1, 1)
            assert module.bias is None


def test_control_has_no_temporal_convolution():
    model = SDRModel(small(temporal_kernels=False))
    assert {m.kernel_size for m in model.modules() if isinstance(m, nn.Conv3d)} == {(1, 1, 1)}


def test_plain_resnet_looks_sideways_where_a_resnet_does():
    """(5,3,3) in the stem, (1,3,3) in every conv b, and nothing else but FTCN's."""
    plain = FTCN(small(spatial_kernel=3).branch())
    sizes = {name: m.kernel_size for name, m in plain.named_modules() if isinstance(m, nn.Conv3d)}
    for name, m in FTCN(small().branch()).named_modules():
        if isinstance(m, nn.Conv3d):
            sideways = (3, 3) if name.endswith((".b", "stem.conv")) else (1, 1)
            assert sizes.pop(name) == (m.kernel_size[0], *sideways), name
    assert sizes == {}
    assert plain(torch.randn(2, 3, 8, 32, 32)).logits.shape == (2,)
    assert SDRModel(small(spatial_kernel=3))(torch.randn(1, 3, 8, 32, 32)).logits.shape == (1,)


def test_sideways_convolution_against_its_sum():
    conv = TemporalConv3d(2, 3, 3, 3).double()
    x = torch.randn(1, 2, 4, 5, 5, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1, 1, 1))
    expected = torch.zeros(1, 3, 4, 5, 5, dtype=torch.float64)
    for t in range(3):
        for i in range(3):
            for j in range(3):
                part = padded[:, :, t : t + 4, i : i + 5, j : j + 5]
                expected += torch.einsum("oc,bcthw->bothw", conv.weight[:, :, t, i, j], part)
    assert torch.allclose(conv(x), expected, atol=1e-12)


def neighbours_seen(config: FTCNConfig) -> bool:
    """Whether the order of pixels inside each 2x2 window of the first pool changes a token."""
    backbone = Backbone(config).eval()
    clip = torch.randn(1, 3, 8, 32, 32)
    turned = clip.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).flip(-1, -3).flatten(-2).flatten(-3, -2)
    with torch.no_grad():
        return not torch.allclose(backbone.tokens(clip), backbone.tokens(turned), atol=1e-6)


def test_only_the_plain_resnet_sees_how_pixels_lie_inside_a_pool():
    assert not neighbours_seen(small())
    assert neighbours_seen(small(spatial_kernel=3))


def test_spatial_kernel_of_1_moves_no_random_draw():
    """The branch's weights are those that a loop over bare convolutions of the same shapes draws."""
    torch.manual_seed(3)
    backbone = Backbone(small())
    after = torch.randn(3)
    torch.manual_seed(3)
    convs = {}
    C = 8
    shapes = {"stem.conv": (3, C, 5), "res2.0.a": (C, C, 3), "res2.0.b": (C, C, 1), "res2.0.c": (C, 4 * C, 1)}
    shapes |= {"res2.0.branch1": (C, 4 * C, 1), "res3.0.a": (4 * C, 2 * C, 3), "res3.0.b": (2 * C, 2 * C, 1)}
    shapes |= {"res3.0.c": (2 * C, 8 * C, 1), "res3.0.branch1": (4 * C, 8 * C, 1)}
    for name, (C_in, C_out, k) in shapes.items():
        convs[name] = nn.Conv3d(C_in, C_out, (k, 1, 1), bias=False)
    for conv in convs.values():
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    assert torch.equal(after, torch.randn(3))
    for name, conv in convs.items():
        assert torch.equal(backbone.get_submodule(name).weight, conv.weight), name


def test_initialisation():
    block = Bottleneck(64, 64, kernel=3, pool=False)
    backbone = Backbone(tiny())
    assert (backbone.res2[0].c_bn.weight == 0).all()
    assert (backbone.res2[0].b_bn.weight == 1).all()
    weight = Backbone(replace(tiny(), width=64)).res2[0].a.weight  # He: variance 2 / (fan out = 64 * 3)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 3)), rel=0.03)
    assert block.a_bn.eps == 1e-5
    assert block.a_bn.momentum == 0.1


def test_temporal_convolution_pads_time_with_zeros():
    conv = TemporalConv3d(1, 1, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3, 1, 1))
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1, 1)
    assert conv(x).flatten().tolist() == [10 * 1 + 100 * 2, 1 * 1 + 10 * 2 + 100 * 3, 1 * 2 + 10 * 3]


def test_stem_is_bn_then_pool_then_relu_then_pool():
    stem = Stem(1, 1).eval()
    with torch.no_grad():
        stem.conv.weight.copy_(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1, 1))
        stem.bn.weight.fill_(-1)  # a negative gamma tells BN -> pool from pool -> BN
        stem.bn.bias.fill_(4)
    x = torch.zeros(1, 3, 1, 8, 8)
    x[0, 0, 0] = torch.arange(64.0).view(8, 8) / 8
    scaled = 4 - x[0, 0, 0] / math.sqrt(1 + 1e-5)
    pooled = [[max(0.0, scaled[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max().item()) for j in range(4)] for i in range(4)]
    expected = [
        [max(pooled[a][b] for a in range(max(0, 2 * i - 1), 2 * i + 2) for b in range(max(0, 2 * j - 1), 2 * j + 2))
         for j in range(2)]
        for i in range(2)
    ]  # fmt: skip
    assert torch.allclose(stem(x)[0, 0, 0], torch.tensor(expected), atol=1e-6)


def test_bottleneck_pools_between_bn_and_relu():
    block = Bottleneck(4, 1, kernel=1, pool=True).eval()
    block.has_branch1 = True
    block.branch1, block.branch1_bn = TemporalConv3d(4, 4), nn.BatchNorm3d(4)
    with torch.no_grad():
        for conv in (block.a, block.b, block.c, block.branch1):
            conv.weight.zero_()
            conv.weight[:, 0] = 1
        for norm in (block.a_bn, block.b_bn, block.c_bn):
            norm.eps = 0.0
        block.b_bn.weight.fill_(-1)
        block.b_bn.bias.fill_(3)
        block.branch1_bn.weight.zero_()
    block.eval()
    x = torch.zeros(1, 4, 1, 2, 2)
    x[0, 0, 0] = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
    # 3 - {1, 2, 4, 5} = {2, 1, -1, -2}: the largest is 2; a pool before BN would give 3 - 5, then 0
    assert torch.allclose(block(x), torch.full((1, 4, 1, 1, 1), 2.0), atol=1e-5)


def test_time_pool_takes_the_larger_of_two_frames():
    backbone = Backbone(small())
    assert backbone.time_pool(torch.tensor([1.0, 5.0, 7.0, 2.0]).view(1, 1, 4, 1, 1)).flatten().tolist() == [5, 7]


def test_frames_do_not_mix_without_temporal_kernels():
    backbone = Backbone(small(temporal_kernels=False)).eval()
    clip = torch.randn(1, 3, 8, 32, 32)
    other = clip.clone()
    other[:, :, 6:] += 1
    with torch.no_grad():
        change = (backbone.tokens(clip) - backbone.tokens(other)).abs().amax(-1)[0]
    assert (change[:3] == 0).all()  # token 3 pools frames 6 and 7
    assert change[3] > 0


def test_attention_against_its_formula():
    torch.manual_seed(0)
    attention = Attention(6, num_heads=2, head_dim=4).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    q, k, v = (x @ attention.qkv.weight.T).split(8, -1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias
    assert torch.allclose(attention(x), expected, atol=1e-12)


def test_transformer_against_its_formula():
    torch.manual_seed(0)
    tt = TemporalTransformer(FTCNConfig(num_frames=8, embed_dim=6, num_heads=2, head_dim=4, mlp_dim=10)).double().eval()
    tokens = torch.randn(2, 4, 6, dtype=torch.float64)
    layer = tt.layers[0]
    x = torch.cat([tt.cls_token.expand(2, 1, 6), tokens], 1) + tt.pos_embed
    x = x + layer.attn(F.layer_norm(x, (6,), layer.attn_norm.weight, layer.attn_norm.bias, 1e-5))
    first, second = layer.mlp[0], layer.mlp[3]
    hidden = F.layer_norm(x, (6,), layer.mlp_norm.weight, layer.mlp_norm.bias, 1e-5) @ first.weight.T + first.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    x = x + gelu @ second.weight.T + second.bias
    expected = F.layer_norm(x[:, 0], (6,), tt.norm.weight, tt.norm.bias, 1e-5) @ tt.head.weight.T + tt.head.bias
    assert torch.allclose(tt(tokens), expected[:, 0], atol=1e-12)


def test_transformer_names_the_expected_length():
    tt = TemporalTransformer(small())
    with pytest.raises(ValueError, match="tokens must have 4 time steps, got"):
        tt(torch.zeros(1, 5, 64))


@pytest.mark.parametrize("joint", ["linear", "mean", "sum", "mlp"])
@pytest.mark.parametrize("V", [1, 3])
def test_trfi(joint, V):
    torch.manual_seed(0)
    config = small(num_branches=V, joint_feature=joint)
    trfi = TRFI(config).double()
    C = config.backbone_channels
    tokens = torch.randn(2, V, 4, C, dtype=torch.float64)
    out = trfi(tokens)
    features = tokens.mean(2)
    assert torch.equal(out.features, features)
    joined = torch.cat([tokens[:, v] for v in range(V)], -1)
    source = {"mean": tokens.mean(1), "sum": tokens.sum(1)}.get(joint, joined)
    assert torch.allclose(out.tokens, trfi.proj(source), atol=1e-12)
    Z = torch.cat([features[:, v] for v in range(V)], -1)
    assert torch.allclose(out.joint_logits, trfi.joint_head(Z), atol=1e-12)
    assert out.loo_logits.shape == (2, V if V > 1 else 0, 2)
    for v in range(V if V > 1 else 0):
        rest = torch.cat([features[:, u] for u in range(V) if u != v], -1)
        assert torch.allclose(out.loo_logits[:, v], trfi.loo_heads[v](rest), atol=1e-12)


def test_leave_one_out_head_does_not_see_its_view():
    config = small(num_branches=3)
    trfi = TRFI(config)
    tokens = torch.randn(1, 3, 4, config.backbone_channels)
    other = tokens.clone()
    other[:, 1] += 1
    change = (trfi(tokens).loo_logits - trfi(other).loo_logits).abs().amax(-1)[0]
    assert change[1] == 0
    assert (change[[0, 2]] > 0).all()


def test_one_clip_means_the_same_clip_for_every_branch():
    model = SDRModel(small()).eval()
    clip = torch.randn(2, 3, 8, 32, 32)
    same, stacked = model(clip), model(clip.unsqueeze(1).expand(-1, 4, -1, -1, -1, -1))
    for a, b in zip(same, stacked, strict=True):
        assert torch.equal(a, b)


def test_uint8_is_normalised():
    model = SDRModel(small()).eval()
    clip = torch.randint(0, 256, (1, 3, 8, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1, 1)
    normalised = ((clip.double() / 255 - mean) / std).float()
    assert torch.allclose(model(clip).logits, model(normalised).logits, atol=1e-5)


def test_branches_have_their_own_weights_unless_shared():
    own, shared = SDRModel(small()), SDRModel(small(share_weights=True))
    assert len({id(p) for p in own.branches.parameters()}) == 4 * len(list(shared.branches.parameters()))
    assert {name.split(".")[1] for name in shared.state_dict() if name.startswith("branches")} == {"0"}
    features = shared.eval()(torch.randn(1, 3, 8, 32, 32)).features
    assert torch.equal(features[:, 0], features[:, 3])


def test_every_parameter_gets_a_gradient():
    from sdr import SDRLoss

    torch.manual_seed(0)
    model = SDRModel(small())
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.ones_(module.c_bn.weight)  # gamma of 0 stops the gradient of a and b at the first step
    SDRLoss()(model(torch.randn(4, 4, 3, 8, 32, 32)), torch.tensor([0, 1, 0, 1])).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (torch.zeros(1, 3, 3, 8, 32, 32), "views must have 4 views, got"),
        (torch.zeros(1, 4, 3, 6, 32, 32), "clip must end in"),
        (torch.zeros(1, 1, 8, 32, 32), "clip must end in"),
        (torch.zeros(3, 8, 32, 32), "5 axes"),
    ],
)
def test_rejects_wrong_views(views, message):
    with pytest.raises(ValueError, match=message):
        SDRModel(small())(views)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 7}, "num_frames must be even, got 7"),
        ({"backbone_stages": 5}, "backbone_stages must be 1, 2, 3 or 4, got 5"),
        ({"joint_feature": "max"}, "joint_feature must be one of"),
        ({"num_branches": 0}, "num_branches must be at least 1 and .*, got 0"),
        ({"blocks": (1,)}, "blocks must name every stage"),
        ({"width": 8.0}, "width must be at least 1 and a whole number"),
        ({"temporal_kernels": "no"}, "temporal_kernels must be true or false"),
        ({"spatial_kernel": 2}, "spatial_kernel must be odd, got 2"),
        ({"spatial_kernel": 0}, "spatial_kernel must be at least 1"),
        ({"image_size": 32, "spatial_kernel": 33}, "spatial_kernel must not pass image_size, got 33"),
        ({"image_size": 40}, "image_size must be a multiple of 16, got 40"),
    ],
)
def test_rejects_wrong_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        SDRConfig(**fields)
