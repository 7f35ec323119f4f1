"""Section 6: the PCA of a class, starts, energy guidance, the walk and when it stops."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from test_attacks import seeded

import ebm_at
from ebm_at import BadInput, fit_pca

K, SHAPE, D = 3, (2, 6, 5), 2 * 6 * 5


def make_images(n=20, rank=D, seed=0):
    """Images (n, 2, 6, 5) in [0, 1] of one class: a Gaussian of `rank` directions."""
    g = seeded(seed)
    basis, centre = torch.randn(rank, D, generator=g), torch.rand(D, generator=g) * 0.2 + 0.4
    return (centre + 0.02 * torch.randn(n, rank, generator=g) @ basis).clamp(0, 1).view(n, *SHAPE)


class Bowl(nn.Module):
    """Logits -|x - c_k|^2 / 2: E(x, y) is a quadratic bowl with its minimum, 0, at c_y."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.rand(K, *SHAPE, generator=seeded()) * 0.6 + 0.2)

    def forward(self, x):
        return -0.5 * (x.flatten(1)[:, None] - self.centres.flatten(1)).square().sum(2)


@pytest.mark.parametrize("n", [15, 100, 40_000])  # than D: fewer, more; of many, 20,000 are used
@pytest.mark.parametrize("components", [4, 0.9])
def test_pca_agrees_with_the_svd_of_the_class(n, components):
    x, state = make_images(n), torch.get_rng_state()
    pca = fit_pca(x, components)
    assert torch.equal(torch.get_rng_state(), state)  # it draws, but from numbers of its own
    flat = x[:: max(1, n // 20_000)].flatten(1).double().numpy()
    _, s, v = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    share = np.cumsum(s**2) / (s**2).sum()
    count = components if components >= 1 else int((share < components).sum()) + 1
    assert pca.directions.shape == (count, D) and np.allclose(pca.mean, flat.mean(0), atol=1e-6)
    assert np.allclose(pca.std, s[:count] / math.sqrt(len(flat) - 1), rtol=1e-3)
    assert np.allclose(np.abs((pca.directions.numpy() * v[:count]).sum(1)), 1, atol=1e-3)
    codes = (flat - flat.mean(0)) @ pca.directions.T.double().numpy()
    assert np.allclose(pca.codes, codes, atol=1e-5)


def test_decode_inverts_where_the_components_hold_everything():
    x = (make_images(15, rank=4) * 255).byte()[:, :1]
    for images in (x, x[:1]):  # a class with one image has no directions
        pca = fit_pca(images, 50)
        torch.testing.assert_close(pca.decode(pca.codes), images / 255, rtol=0, atol=1e-4)
    assert fit_pca(make_images(15, rank=4), 10).std.shape == (4,)  # none made of rounding noise


def test_starts_follow_the_generator_and_have_the_moments_of_the_class():
    pca = fit_pca(make_images(200), 4)
    scales = {"gaussian": 1.0, "pca": 0.35, "mean": 0.0}
    for init in ebm_at.STARTS:
        a, b, c = (ebm_at.draw_starts(pca, 8000, init, generator=seeded(s)) for s in (0, 0, 1))
        assert a.shape == (8000, *SHAPE) and 0 <= a.min() and a.max() <= 1
        assert torch.equal(a, b) and torch.equal(a, c) == (init == "mean")
        if init in scales:
            z, std = (a.flatten(1) - pca.mean) @ pca.directions.T, scales[init] * pca.std
            torch.testing.assert_close(z.std(0), std, rtol=0.05, atol=1e-5)
            assert (z.mean(0).abs() <= 4 * std / math.sqrt(8000) + 1e-5).all()


def test_local_codes_have_mean_and_covariance_of_the_neighbourhood():
    pca = fit_pca(make_images(10), 3)  # with all 10 as neighbours every anchor has the same ones
    z = ebm_at.local_codes(pca, 20_000, 10, 2.0, seeded())
    torch.testing.assert_close(z.mean(0), pca.codes.mean(0), rtol=0, atol=0.02 * pca.std.max())
    wanted = 2.0 * pca.codes.T.cov()
    assert (z.T.cov() - wanted).abs().max() < 0.05 * wanted.abs().max()
    z = ebm_at.local_codes(pca, 50, 4, 0.0, seeded())  # temperature 0: means of neighbourhoods
    means = pca.codes[torch.cdist(pca.codes, pca.codes).argsort(1)[:, :4]].mean(1)
    assert torch.cdist(z, means).min(1).values.max() < 1e-3


def test_what_generation_cannot_do_is_refused():
    pca, y, real = fit_pca(make_images(10), 3), torch.arange(10) % 2, [torch.zeros(2)] * K
    for words, function, *arguments in (
        ("components", fit_pca, make_images(), 0), ("components", fit_pca, make_images(), 2.5),
        ("neighbours", ebm_at.local_codes, pca, 2, 11),
        ("temperature", ebm_at.local_codes, pca, 2, 4, -1.0),
        ("did you mean 'local-pca'", ebm_at.draw_starts, pca, 2, "local_pca"),
        ("has no images", ebm_at.class_energies, Bowl(), make_images(10), y, K),
        ("unknown stop", ebm_at.stop_targets, real[0], 2, "never"),
        ("asked for", ebm_at.generate, Bowl(), [pca] * K, real, y + 2),
        (r"\[0, 1\]", ebm_at.sgld, Bowl(), make_images(10) * 2 - 1, y, torch.zeros(10)),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=words):
            function(*arguments)


def test_energies_of_real_images_and_the_targets_made_of_them(tiny_net):
    model, y = tiny_net(), torch.arange(23) % 5
    x = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    for k, found in enumerate(ebm_at.class_energies(model, x, y, 5, most=4)):
        wanted = -tiny_net().eval()(x[y == k][:4].float() / 255)[:, k].detach()
        torch.testing.assert_close(found, wanted)
    energies = torch.tensor([1.0, 2.0, 6.0])
    for *how, wanted in (("mean", 0, 3), ("quantile", 0.5, 2), ("quantile", 0.0, 1),
                         ("fixed", 0, -math.inf)):  # fmt: skip
        assert ebm_at.stop_targets(energies, 2, *how).tolist() == [wanted] * 2
    drawn = ebm_at.stop_targets(energies, 3000, generator=seeded())
    assert drawn.unique().tolist() == [1, 2, 6] and drawn.mean() == pytest.approx(3, abs=0.2)


def walk(model, x, y, targets=-math.inf, **options):
    targets = torch.as_tensor(targets).expand(len(y))
    return ebm_at.sgld(model, x, y, targets, **{"noise": 0.0} | options)


@pytest.mark.parametrize("guide", [ebm_at.energy_xy, ebm_at.cross_entropy])
def test_the_walk_is_the_loop_written_out(guide):
    model, x, y, seen = Bowl(), make_images(6), torch.arange(6) % K, []
    got, record = walk(
        model, x, y, steps=4, step_size=0.1, momentum=0.5, noise=0.01, guide=guide,
        generator=seeded(), on_progress=lambda step, x, rows: seen.append((step, x.clone(), rows)),
    )  # fmt: skip
    nu, centres, g = torch.zeros_like(x), model.centres.detach(), seeded()
    for step in range(5):
        assert seen[step][0] == step and seen[step][2].tolist() == list(range(6))
        torch.testing.assert_close(seen[step][1], x)
        energy = 0.5 * (x - centres[y]).flatten(1).square().sum(1)
        if step in (0, 4):
            torch.testing.assert_close(record["energy_end" if step else "energy_start"], energy)
        slope = x - centres[y]  # the bowl's gradient; that of E(x) is the mean of all bowls'
        if guide is ebm_at.cross_entropy:
            p = model(x).detach().softmax(1)
            slope = slope - (x - (p @ centres.flatten(1)).view_as(x))
        nu = 0.5 * nu - 0.1 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = (x + nu + 0.01 * torch.randn(x.shape, generator=g)).clamp(0, 1)
    assert torch.equal(got, seen[4][1]) and record["steps"].tolist() == [4] * 6


def test_each_image_stops_at_the_first_step_at_its_target():
    model, x, y, sizes = Bowl(), make_images(30), torch.arange(30) % K, []
    targets, options = torch.linspace(0.01, 1.0, 30), dict(step_size=0.05, momentum=0.0)
    hook = model.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    got, record = walk(model, x, y, targets, steps=60, **options)
    hook.remove()
    assert (record["energy_end"] <= targets).all() and record["steps"].unique().numel() > 3
    # Who has stopped leaves the batch: each image is looked at once more than it steps.
    assert sum(sizes) == (record["steps"] + 1).sum()
    for i, taken in enumerate(record["steps"].tolist()):  # alone, one step less is not enough
        alone = x[i : i + 1], y[i : i + 1]
        torch.testing.assert_close(got[i : i + 1], walk(model, *alone, steps=taken, **options)[0])
        if taken:
            before = walk(model, *alone, steps=taken - 1, **options)[1]["energy_end"]
            assert before > targets[i]


def test_who_cannot_or_need_not_walk_stays_at_the_start():
    model, x, y = Bowl(), make_images(6), torch.arange(6) % K
    for options in (dict(steps=0), dict(targets=1e9)):
        got, record = walk(model, x, y, **options)
        assert torch.equal(got, x) and record["steps"].sum() == 0
        assert torch.equal(record["energy_start"], record["energy_end"])
    model.centres.data[2] = math.nan  # an energy that is no number; the others do not notice
    got, record = walk(model, x, y, steps=5)
    assert torch.equal(got[2::3], x[2::3]) and record["steps"].tolist() == [5, 5, 0] * 2


def test_guidance_keeps_the_candidate_nearest_to_the_drawn_energy(monkeypatch):
    model, drawn, draw_starts = Bowl(), [], ebm_at.draw_starts
    pcas = [fit_pca(make_images(seed=k), 5) for k in range(K)]
    energies = [torch.tensor([10.0 * k, 10.0 * k + 2]) for k in range(K)]
    keep = lambda *a: drawn.append(draw_starts(*a)) or drawn[-1]  # noqa: E731
    monkeypatch.setattr(ebm_at, "draw_starts", keep)
    y = torch.arange(30) % K
    x, record = ebm_at.generate(model, pcas, energies, y, candidates=4, steps=0)
    for k in range(K):
        targets, of_class = record["target"][y == k], torch.stack(drawn[4 * k : 4 * k + 4])
        assert set(targets.tolist()) == {10.0 * k, 10.0 * k + 2}  # real ones, of its own class
        gaps = (0.5 * (of_class - model.centres[k]).flatten(2).square().sum(2) - targets).abs()
        assert torch.equal(x[y == k], of_class[gaps.argmin(0), torch.arange(10)])
