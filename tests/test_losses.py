"""The losses against float64 NumPy written from the formulas, and their edges."""

import numpy as np
import pytest
import torch

from sdr import LossConfig, SDRLoss
from sdr.model import SDROutput
from sdr_kernels import info_nce, leave_one_out_kl


def softmax(x, temperature):
    e = np.exp(x / temperature - (x / temperature).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl_numpy(joint, loo, temperature, *, reverse=False):
    """Sum over views of KL for each clip, by its definition."""
    total = np.zeros(len(joint))
    for b in range(len(joint)):
        for v in range(loo.shape[1]):
            p, q = softmax(joint[b], temperature), softmax(loo[b, v], temperature)
            if reverse:
                p, q = q, p
            total[b] += sum(p[k] * np.log(p[k] / q[k]) for k in range(len(p)))
    return total


def info_nce_numpy(features, labels, temperature, anchors="all"):
    """One anchor after the other, by the definition."""
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    losses = []
    for i in range(len(z)):
        if anchors == "real" and labels[i] == 1:
            continue
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        denominator = sum(np.exp(z[i] @ z[j] / temperature) for j in others)
        terms = [np.log(np.exp(z[i] @ z[j] / temperature) / denominator) for j in positives]
        losses.append(-np.mean(terms) if terms else 0.0)
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("objective", ["shared", "complementary"])
@pytest.mark.parametrize("direction", ["joint_to_loo", "loo_to_joint"])
def test_kl_against_numpy(direction, objective):
    rng = np.random.default_rng(0)
    joint, loo = rng.normal(size=(5, 2)) * 3, rng.normal(size=(5, 4, 2)) * 3
    divergence = kl_numpy(joint, loo, 1.5, reverse=direction == "loo_to_joint")
    expected = (np.exp(-divergence) if objective == "complementary" else divergence).mean()
    value = leave_one_out_kl(torch.tensor(joint), torch.tensor(loo), direction=direction, objective=objective)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_kl_detaches_the_joint_head_on_request():
    for detach in (True, False):
        joint = torch.randn(3, 2, requires_grad=True)
        loo = torch.randn(3, 4, 2, requires_grad=True)
        leave_one_out_kl(joint, loo, detach_joint=detach).backward()
        assert (joint.grad is None) == detach
        assert loo.grad.abs().sum() > 0


def test_kl_of_huge_logits_is_finite_and_not_negative():
    joint = torch.tensor([[1e4, -1e4]])
    value = leave_one_out_kl(joint, -joint[:, None].repeat(1, 2, 1).requires_grad_())
    assert value.item() == pytest.approx(2 * 2e4 / 1.5)
    assert leave_one_out_kl(joint, joint[:, None]).item() == 0


@pytest.mark.parametrize("anchors", ["all", "real"])
@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]], ids=str)
def test_info_nce_against_numpy(labels, anchors):
    features = np.random.default_rng(1).normal(size=(6, 5))
    expected = info_nce_numpy(features, labels, 0.07, anchors)
    value = info_nce(torch.tensor(features), torch.tensor(labels), anchors=anchors)
    assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.randn(2, 3), [0, 1]),  # no anchor has a positive
        (torch.randn(1, 3), [1]),  # nothing to compare with
        (torch.zeros(4, 3), [0, 0, 1, 1]),  # zero vectors
        (torch.ones(4, 3), [0, 0, 1, 1]),  # identical features
        (torch.randn(4, 3) * 1e4, [0, 0, 0, 0]),  # a single class, huge features
    ],
    ids=["no positives", "one row", "zero vectors", "identical", "one class"],
)
def test_info_nce_edges_are_finite(features, labels):
    features = features.clone().requires_grad_()
    value = info_nce(features, torch.tensor(labels))
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()
    if len(labels) <= 2:
        assert value.item() == 0
        assert (features.grad == 0).all()


def test_info_nce_of_identical_features_is_the_log_of_the_rest():
    value = info_nce(torch.ones(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
    assert value.item() == pytest.approx(np.log(4), rel=1e-12)


def make_output(seed=0, B=3, V=4, C=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return SDROutput(draw(B), draw(B, 4, 6), draw(B, V, C), draw(B, 2), draw(B, V, 2))


def expected_parts(output, labels):
    y = np.array(labels)
    x = output.logits.detach().numpy()
    p = 1 / (1 + np.exp(-x))
    ce = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    joint, loo = output.joint_logits.detach().numpy(), output.loo_logits.detach().numpy()
    mi = kl_numpy(joint, loo, 1.5).mean()
    V = output.features.shape[1]
    con = info_nce_numpy(output.features.detach().flatten(0, 1).numpy(), np.repeat(y, V), 0.07)
    heads = np.concatenate([joint[:, None], loo], 1)
    aux = -np.mean([np.log(softmax(heads[b, h], 1.0)[y[b]]) for b in range(len(y)) for h in range(V + 1)])
    return np.array([ce, mi, con, aux])


def test_total_is_the_weighted_sum_of_its_parts():
    labels = [0, 1, 0]
    output = make_output()
    losses = SDRLoss(LossConfig(ce=1.0, mi=0.5, contrastive=0.1, aux=2.0))(output, torch.tensor(labels))
    parts = expected_parts(output, labels)
    assert [x.item() for x in losses[1:]] == pytest.approx(parts, rel=1e-5)
    assert losses.total.item() == pytest.approx(parts @ [1.0, 0.5, 0.1, 2.0], rel=1e-5)


def test_uncertainty_weighting():
    labels = [0, 1, 0]
    loss = SDRLoss(LossConfig(weighting="uncertainty"))
    s = np.array([0.5, 1.0, 2.0, 1.5])
    with torch.no_grad():
        loss.scales.copy_(torch.tensor(s))
    parts = expected_parts(make_output(), labels)
    total = loss(make_output(), torch.tensor(labels)).total
    assert total.item() == pytest.approx(np.sum(parts / (2 * s**2) + np.log(1 + s**2)), rel=1e-5)
    total.backward()
    assert loss.scales.grad.tolist() == pytest.approx(-parts / s**3 + 2 * s / (1 + s**2), rel=1e-4)


def test_losses_are_float32_for_half_precision_features():
    losses = SDRLoss()(make_output(dtype=torch.bfloat16), torch.tensor([0, 1, 1]))
    assert {x.dtype for x in losses} == {torch.float32}


def test_one_branch_has_no_mutual_information():
    output = make_output(V=1)._replace(loo_logits=torch.zeros(3, 0, 2, dtype=torch.float64))
    assert SDRLoss()(output, torch.tensor([0, 1, 0])).mi.item() == 0


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"anchors": "fake"}, {"direction": "both"}, {"mi": -1}], ids=str
)
def test_rejects_wrong_options(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        LossConfig(**fields)


@pytest.mark.parametrize("objective", ["shared", "complementary"])
def test_kl_without_views_to_leave_out_is_zero(objective):
    assert leave_one_out_kl(torch.randn(3, 2), torch.zeros(3, 0, 2), objective=objective).item() == 0
