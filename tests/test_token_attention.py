"""token_attention against float64, the transformer's own attention, closed forms, and what it must refuse."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compare import assert_matches_reference

from sdr_kernels import token_attention
from sdr_kernels.token_attention import token_attention_reference

# B, N, num_heads, head_dim: on and off every block size
SHAPES = [
    (1, 1, 1, 1),
    (2, 17, 3, 16),
    (1, 16, 2, 64),
    (2, 32, 1, 20),
    (1, 33, 2, 40),
    (1, 65, 1, 100),
    (1, 129, 1, 8),
    (1, 5, 1, 128),
    (0, 4, 2, 16),
]

# numpy, which computes interpreted kernels, warns of the NaN and overflow that a GPU passes on in silence
QUIET = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning")


def make_qkv(shape, dtype, device):
    B, N, num_heads, head_dim = shape
    return torch.randn(B, N, 3 * num_heads * head_dim).to(dtype).to(device)


def assert_right(qkv, num_heads):
    assert_matches_reference(partial(token_attention, impl="triton"), token_attention_reference, [qkv, num_heads])


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    assert_right(make_qkv(shape, dtype, device), shape[2])


def misaligned(x):
    """The same values, one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def sliced(x):
    """The same values with gaps on every axis."""
    wide = x.new_full([2 * size for size in x.shape], 99)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", [misaligned, sliced, lambda x: x.mT.contiguous().mT])
def test_any_layout(layout, dtype, device):
    assert_right(layout(make_qkv((2, 9, 2, 24), dtype, device)), 2)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_equals_torchs_attention(impl, device):
    qkv = make_qkv((2, 18, 3, 20), torch.float32, device)
    q, k, v = qkv.view(2, 18, 3, 3, 20).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(token_attention(qkv, 3, impl=impl), expected, rtol=1e-5, atol=1e-6)


def test_zero_queries_give_the_mean(device):
    qkv = make_qkv((1, 37, 2, 16), torch.float32, device)
    qkv[..., :32] = 0
    expected = qkv[..., 64:].mean(1, keepdim=True).expand(-1, 37, -1)
    torch.testing.assert_close(token_attention(qkv, 2, impl="triton"), expected, rtol=1e-5, atol=1e-6)


def test_a_sharp_match_picks_its_value(dtype, device):
    """Token i asks for key (i + 1) % N with a score so far above the others that their weights are 0."""
    N = 40
    key = torch.eye(N, device=device)
    value = torch.randn(N, N, device=device)
    qkv = torch.cat([4000 * key.roll(-1, 0), key, value], dim=1)[None].to(dtype)
    assert torch.equal(token_attention(qkv, 1, impl="triton")[0], qkv[0, :, 2 * N :].roll(-1, 0))


def test_one_token_sees_itself(dtype, device):
    qkv = make_qkv((3, 1, 2, 16), dtype, device)
    assert torch.equal(token_attention(qkv, 2, impl="triton"), qkv[..., 64:])


@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
def test_large_scores(shift, dtype, device):
    """Scores near 1e4 and -1e4, which only a softmax about the largest of them survives."""
    qkv = make_qkv((1, 40, 1, 16), dtype, device)
    qkv[..., 16] = 1  # of every key: moves all of a token's scores alike
    qkv[..., 0] = 4 * shift
    assert_right(qkv, 1)
    qkv[..., :16] = 0
    qkv[..., 1] = 4e4 * torch.tensor([-1, 1], device=device).repeat(20)
    qkv[..., 17] = torch.linspace(-1, 1, 40, device=device)
    assert_right(qkv, 1)


@pytest.mark.promise(row="odd inputs")
@QUIET
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_where_float64_has_them(value, part, dtype, device):
    qkv = make_qkv((2, 36, 2, 16), dtype, device)
    qkv[1, 34, part * 32 + 20] = value  # of the second head
    assert_right(qkv, 2)
    clean = token_attention(qkv, 2, impl="triton").isfinite()
    assert clean[0].all()
    assert clean[1, :, :16].all()


@QUIET
def test_tiles_of_keys_that_are_out_of_reach(device):
    """The first 35 scores are -inf: their weights are 0, not NaN."""
    qkv = make_qkv((1, 40, 1, 16), torch.float32, device)
    qkv[..., 0] = 1
    qkv[:, :35, 16] = -float("inf")
    assert token_attention_reference(qkv, 1).isfinite().all()
    assert_right(qkv, 1)


def test_gradients_come_from_the_reference_alone(device):
    qkv = make_qkv((1, 3, 1, 4), torch.float32, device).requires_grad_()
    (grad,) = torch.autograd.grad(token_attention(qkv, 1).square().sum(), qkv)
    assert grad.abs().max() > 0
    with pytest.raises(RuntimeError, match="no gradients"):
        token_attention(qkv, 1, impl="triton")
    with torch.no_grad():
        torch.testing.assert_close(token_attention(qkv, 1, impl="triton"), token_attention_reference(qkv, 1))


@pytest.mark.promise(row="registered right")
def test_registration(dtype, device):
    qkv = make_qkv((2, 7, 2, 20), dtype, device)
    torch.library.opcheck(torch.ops.sdr_kernels.token_attention_fwd.default, (qkv, 2, "triton"))


@pytest.mark.promise(row="registered right")
def test_compiles_whole(device):
    qkv = make_qkv((2, 7, 2, 20), torch.float32, device)
    function = partial(token_attention, num_heads=2, impl="triton")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), function(qkv), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, 24), (1, 0, 24), (1, 5, 0), (1, 5, 25)], ids=str)
def test_rejects_shape(shape):
    with pytest.raises(ValueError, match=r"qkv must be \[B, N, 3 \* 2 \* head_dim\].*multiple of 6, got \["):
        token_attention(torch.zeros(shape), 2)


def test_rejects_no_heads():
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        token_attention(torch.zeros(1, 2, 6), 0)


def test_rejects_dtype(device):
    with pytest.raises(TypeError, match=r"qkv must be float32.*got torch.int64"):
        token_attention(torch.zeros(1, 2, 6, dtype=torch.int64), 1)
    with pytest.raises(RuntimeError, match="qkv must not be float64"):
        token_attention(torch.zeros(1, 2, 6, dtype=torch.float64, device=device), 1, impl="triton")


def test_wide_heads_are_left_to_the_reference(device):
    qkv = make_qkv((1, 3, 1, 129), torch.float32, device)
    assert torch.equal(token_attention(qkv, 1), token_attention_reference(qkv, 1))
    with pytest.raises(RuntimeError, match="head_dim must be at most 128, got 129"):
        token_attention(qkv, 1, impl="triton")


def test_rejects_unknown_impl():
    with pytest.raises(ValueError, match=r"impl must be one of .*got 'hip'"):
        token_attention(torch.zeros(1, 2, 6), 1, impl="hip")
