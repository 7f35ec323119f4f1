"""Metrics of generated images against closed forms and slow, plain versions."""

import math
import statistics

import pytest
import torch

from ebm_at import (
    BadInput, class_agreement, frechet_distance, inception_score, judge_images, nearest_distance,
    precision_recall,
)  # fmt: skip


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("n, m, d", [(60, 90, 1), (60, 90, 12), (8, 9, 12), (8, 90, 12)])
def test_frechet_distance_by_the_eigenvalues_of_the_product(n, m, d):
    a, b = randn(n, n, d), randn(m, m, d) * 2 + 1
    ca, cb = a.T.cov().view(d, d), b.T.cov().view(d, d)
    cross = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), abs=1e-6)


def test_frechet_distance_to_the_same_images_and_to_shifted_ones():
    a = randn(0, 40, 6)
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 6, abs=1e-9)  # only the mean moves


def test_inception_score_at_the_extremes():
    """Certain judgements, evenly spread over k classes: k. Unsure or uniform ones: 1."""
    for k in (2, 10, 37):  # whatever their order, the classes must mix in every part
        for p in (torch.eye(k).repeat(100, 1), torch.eye(k).repeat_interleave(100, 0)):
            assert inception_score(p, 1) == pytest.approx((k, 0))
            assert 0.8 * k < inception_score(p, 10)[0] <= k + 1e-9
    for p in (randn(0, 1, 9).softmax(1).expand(30, -1), torch.eye(9)[[4] * 30]):
        assert inception_score(p, 3)[0] == pytest.approx(1, abs=1e-9)


def test_inception_score_by_its_definition():
    p, scores = randn(0, 60, 7).softmax(1), []
    for rows in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(20):
        part = p[rows]
        kl = sum(float((row * (row / part.mean(0)).log()).sum()) for row in part) / len(part)
        scores.append(math.exp(kl))
    expected = statistics.mean(scores), statistics.pstdev(scores)
    assert inception_score(p, 3) == pytest.approx(expected, abs=1e-9)


def test_precision_and_recall_by_their_definition():
    real, fake = randn(0, 25, 4), randn(1, 18, 4) * 0.6 + 0.5

    def covered(points, centres):
        radii = [sorted((c - o).norm() for o in centres)[3] for c in centres]  # the 0th is itself
        return sum(any((p - c).norm() <= r for c, r in zip(centres, radii)) for p in points)

    expected = covered(fake, real) / 18, covered(real, fake) / 25
    for batch_size in (3, 1000):
        assert precision_recall(real, fake, 3, batch_size) == pytest.approx(expected)
    assert precision_recall(real, real.flip(0)) == (1.0, 1.0)
    precision, recall = precision_recall(real, real[:1] + 1e-3 * fake)
    assert precision == 1.0 and recall < 0.1  # good pictures, all alike


def test_neighbours_are_those_of_brute_force_and_a_copy_is_at_distance_zero():
    for n, m, d, batch_size in ((7, 5, 3, 2), (40, 60, 30, 1000), (1, 1, 1, 1)):
        a, b = randn(n, n, d), randn(m, m, d)
        every = (a[:, None] - b[None]).norm(dim=2)
        torch.testing.assert_close(nearest_distance(a, b, batch_size), tuple(every.min(1)))
    b = torch.rand(50, 3072, generator=torch.Generator().manual_seed(0)) + 10  # far from the origin
    distance, row = nearest_distance(b[[4, 40]], b)
    assert distance.tolist() == [0, 0] and row.tolist() == [4, 40]


def test_neighbours_are_the_same_far_from_the_origin():
    """|a|^2 + |b|^2 - 2ab would lose every digit there in fp32."""
    real = randn(0, 100, 64).mul(64).round().float() / 64  # so that adding rounds little
    fake = randn(1, 80, 64).mul(32).round().float() / 64
    far = real - 1e4, fake - 1e4
    assert precision_recall(*far) == precision_recall(real, fake) == (1.0, 0.0)
    torch.testing.assert_close(nearest_distance(*far), nearest_distance(real, fake))


def test_sets_that_do_not_fit_are_refused():
    """Compared with nan, no distance is small: recall would come out a little low, in silence."""
    good, nan, inf = torch.rand(50, 4), torch.rand(50, 4), torch.rand(50, 4)
    nan[7, 1], inf[7, 1] = math.nan, math.inf
    for word, metric, *given in (
        ("two sets", frechet_distance, good, torch.rand(50, 3)),
        ("two sets", frechet_distance, good[:1], good),
        ("k 50", precision_recall, good, good, 50),
        ("splits", inception_score, good, 0), ("splits", inception_score, good, 51),
        *(("NaN or infinite", metric, *pair) for metric in (frechet_distance, precision_recall)
          for pair in ((good, nan), (nan, good), (good, inf), (inf, good))),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            metric(*given)


def test_judge_sees_what_the_head_is_given_and_agrees_where_it_names_the_class(tiny_net):
    model, x = tiny_net(), torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features, p = judge_images(model, x, batch_size=4)
    assert model.training and not model[-1]._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(features, model.eval()[:-1](x))
        torch.testing.assert_close(p, model(x).softmax(1))
    assert class_agreement(p, p.argmax(1).where(torch.arange(11) > 2, -1)) == pytest.approx(8 / 11)
    x8 = (x * 255).round().to(torch.uint8)
    torch.testing.assert_close(judge_images(model, x8)[0], judge_images(model, x8 / 255)[0])
