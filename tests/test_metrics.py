"""Section 10: metrics of generated images against closed forms and slow, plain versions."""

import math

import pytest
import torch

import ebm_at
from ebm_at import BadInput


def with_moments(n, mean, cov, seed=0):
    """n float64 points whose sample mean and covariance are exactly `mean` and `cov`."""
    z = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov().view(len(mean), -1))).T
    return z @ torch.linalg.cholesky(cov).T + mean


def random_covariance(d, seed):
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T / d + 0.1 * torch.eye(d)


def matrix_root(c):  # of a symmetric positive semidefinite matrix
    values, vectors = torch.linalg.eigh(c)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


# ---- Frechet distance ----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3, 20])
def test_frechet_distance_of_gaussians_with_commuting_covariances(d):
    g = torch.Generator().manual_seed(d)
    a, b = torch.rand(2, d, generator=g).double() + 0.1  # variances
    m = torch.randn(2, d, generator=g).double()
    closed = (m[0] - m[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = ebm_at.frechet_distance(
        with_moments(50, m[0], a.diag(), 1), with_moments(70, m[1], b.diag(), 2)
    )
    assert abs(found - closed.item()) < 1e-6


@pytest.mark.parametrize("n, m, d", [(60, 90, 12), (40, 500, 30), (8, 9, 12), (8, 90, 12)])
def test_frechet_distance_against_the_matrix_square_root(n, m, d):
    g = torch.Generator().manual_seed(n + d)
    a, b = torch.randn(n, d, generator=g).double(), torch.randn(m, d, generator=g).double() * 2 + 1
    ca, cb = a.T.cov(), b.T.cov()
    root = matrix_root(ca)
    cross = matrix_root(root @ cb @ root).trace()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross
    assert abs(ebm_at.frechet_distance(a, b) - wanted.item()) < 1e-6


def test_frechet_distance_is_a_distance_and_ignores_rotations():
    a = with_moments(40, torch.zeros(6).double(), random_covariance(6, 0))
    b = with_moments(50, torch.ones(6).double(), random_covariance(6, 1))
    q = torch.linalg.qr(random_covariance(6, 2))[0]
    there = ebm_at.frechet_distance(a, b)
    assert ebm_at.frechet_distance(a, a) < 1e-9
    assert abs(there - ebm_at.frechet_distance(b, a)) < 1e-9
    assert abs(there - ebm_at.frechet_distance(a @ q + 3, b @ q + 3)) < 1e-9
    assert abs(ebm_at.frechet_distance(a, a + 2) - 4 * 6) < 1e-9  # only the mean moves


def test_frechet_distance_refuses_sets_that_do_not_fit():
    for a, b in ((torch.rand(5, 3), torch.rand(5, 4)), (torch.rand(1, 3), torch.rand(5, 3))):
        with pytest.raises(BadInput, match="two sets"):
            ebm_at.frechet_distance(a, b)


@pytest.mark.slow
def test_frechet_distance_of_10000_x_2048_in_a_minute():
    import time

    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(10_000, 2048, generator=g), torch.rand(10_000, 2048, generator=g)
    began = time.perf_counter()
    assert 0 < ebm_at.frechet_distance(a, b) < 100
    assert time.perf_counter() - began < 120  # 60 s with two free cores; the tests use one


# ---- inception score -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 10, 37])
def test_inception_score_of_certain_evenly_spread_classes_is_their_number(k):
    in_turn, by_class = torch.eye(k).repeat(100, 1), torch.eye(k).repeat_interleave(100, 0)
    for p in (in_turn, by_class):  # whatever their order, the classes must mix in every part
        mean, std = ebm_at.inception_score(p, 1)
        assert abs(mean - k) < 1e-9 * k and std == 0
        assert 0.8 * k < ebm_at.inception_score(p, 10)[0] <= k + 1e-9


def test_inception_score_of_unsure_or_uniform_judgements_is_one():
    same = torch.rand(1, 9, generator=torch.Generator().manual_seed(0)).softmax(1).expand(30, -1)
    assert abs(ebm_at.inception_score(same, 3)[0] - 1) < 1e-9
    one_class = torch.zeros(30, 9).index_fill(1, torch.tensor(4), 1.0)
    assert abs(ebm_at.inception_score(one_class, 3)[0] - 1) < 1e-9


def test_inception_score_by_its_definition():
    p = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)).softmax(1).double()
    scores = []
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        part = p[order[20 * i : 20 * i + 20]]
        kl = sum(float((row * (row / part.mean(0)).log()).sum()) for row in part) / len(part)
        scores.append(math.exp(kl))
    mean, std = ebm_at.inception_score(p, 3)
    spread = math.sqrt(sum((s - sum(scores) / 3) ** 2 for s in scores) / 3)
    assert abs(mean - sum(scores) / 3) < 1e-9 and abs(std - spread) < 1e-9
    for splits in (0, 61):
        with pytest.raises(BadInput, match="splits"):
            ebm_at.inception_score(p, splits)


# ---- neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 1000])
def test_precision_and_recall_by_their_definition(batch_size):
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(25, 4, generator=g), torch.randn(18, 4, generator=g) * 0.6 + 0.5

    def covered(points, centres, k):
        inside = 0
        for p in points:
            for i, c in enumerate(centres):
                others = sorted(float((c - o).norm()) for j, o in enumerate(centres) if j != i)
                if float((p - c).norm()) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    found = ebm_at.precision_recall(real, fake, 3, batch_size)
    assert found == pytest.approx((covered(fake, real, 3), covered(real, fake, 3)))


@pytest.mark.parametrize("offset", [3000.0, -1e4])
def test_neighbours_are_the_same_far_from_the_origin(offset):
    """|a|^2 + |b|^2 - 2ab would lose every digit there in fp32."""
    g = torch.Generator().manual_seed(0)
    real = torch.randn(100, 64, generator=g).mul(64).round() / 64  # so that adding rounds little
    fake = torch.randn(80, 64, generator=g).mul(32).round() / 64
    far = real + offset, fake + offset
    assert ebm_at.precision_recall(*far) == ebm_at.precision_recall(real, fake) == (1.0, 0.0)
    assert torch.equal(ebm_at.nearest_distance(*far)[1], ebm_at.nearest_distance(real, fake)[1])


def test_precision_and_recall_at_the_extremes():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(50, 4, generator=g)
    assert ebm_at.precision_recall(real, real.flip(0)) == (1.0, 1.0)
    assert ebm_at.precision_recall(real, real + 100) == (0.0, 0.0)
    one_mode = real[:1] + 1e-3 * torch.randn(50, 4, generator=g)  # good pictures, all alike
    precision, recall = ebm_at.precision_recall(real, one_mode)
    assert precision == 1.0 and recall < 0.1
    with pytest.raises(BadInput, match="k 50"):
        ebm_at.precision_recall(real, real, 50)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad):
    """Compared with nan, no distance is small: recall would come out a little low, in silence."""
    good = torch.rand(50, 4)
    broken = good.clone()
    broken[7, 1] = bad
    for metric in (ebm_at.frechet_distance, ebm_at.precision_recall):
        for pair in ((good, broken), (broken, good)):
            with pytest.raises(BadInput, match="NaN or infinite"):
                metric(*pair)


@pytest.mark.parametrize("n, m, d, batch_size", [(7, 5, 3, 2), (40, 60, 30, 1000), (1, 1, 1, 1)])
def test_nearest_distance_by_brute_force(n, m, d, batch_size):
    g = torch.Generator().manual_seed(n)
    a, b = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
    distance, row = ebm_at.nearest_distance(a, b, batch_size)
    every = (a[:, None] - b[None]).norm(dim=2)
    torch.testing.assert_close(distance, every.min(1).values)
    assert torch.equal(row, every.argmin(1))


def test_a_copy_has_distance_zero_exactly():
    b = torch.rand(50, 3072, generator=torch.Generator().manual_seed(0)) + 10  # far from the origin
    distance, row = ebm_at.nearest_distance(b[[4, 40]], b)
    assert distance.tolist() == [0, 0] and row.tolist() == [4, 40]


def test_class_agreement():
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7]])
    assert ebm_at.class_agreement(p, torch.tensor([0, 1, 1, 1])) == 0.75


# ---- judges --------------------------------------------------------------------------------------


def test_judge_features_are_what_the_head_is_given(tiny_net):
    model, x = tiny_net(), torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features, p = ebm_at.judge_images(model, x, batch_size=4)
    assert model.training and not model[-1]._forward_pre_hooks
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(features, model[:-1](x))
        torch.testing.assert_close(p, model(x).softmax(1))
    x8 = (x * 255).round().to(torch.uint8)
    same, _ = ebm_at.judge_images(model, x8.float() / 255)
    torch.testing.assert_close(ebm_at.judge_images(model, x8)[0], same)


@pytest.mark.parametrize("name, width", [("small", 64), ("preactresnet18", 512)])
def test_any_of_our_models_can_judge(name, width):
    model = ebm_at.make_model(name, 4, width=8).eval()
    x = torch.rand(2, 3, 16, 16)
    features, p = ebm_at.judge_images(model, x)
    assert features.shape == (2, width)
    torch.testing.assert_close(model.head(features).softmax(1).detach(), p)
