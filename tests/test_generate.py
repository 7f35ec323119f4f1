"""Section 9: class-wise PCA, starts, energy guidance, the walk and when it stops."""

import math

import pytest
import torch
import torch.nn as nn

import ebm_at
from ebm_at import BadInput, ClassPCA

K, SHAPE = 3, (2, 6, 5)
D = 2 * 6 * 5


def make_images(n=60, rank=D, seed=0, spread=0.02):
    """Images (n, 2, 6, 5) in [0, 1] of K classes, each class a Gaussian of `rank` directions."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    basis, centre = torch.randn(K, rank, D, generator=g), torch.rand(K, D, generator=g) * 0.2 + 0.4
    x = centre[y] + spread * (torch.randn(n, 1, rank, generator=g) @ basis[y]).squeeze(1)
    return x.clamp(0, 1).view(n, *SHAPE), y


class Bowl(nn.Module):
    """Logits -|x - c_k|^2 / 2: E(x, y) is a quadratic bowl with its minimum, 0, at c_y."""

    def __init__(self, centres):
        super().__init__()
        self.centres = nn.Parameter(centres.clone())

    def forward(self, x):
        return -0.5 * (x.flatten(1)[:, None] - self.centres.flatten(1)).square().sum(2)


def bowl(seed=0):
    g = torch.Generator().manual_seed(seed)
    return Bowl(torch.rand(K, *SHAPE, generator=g) * 0.6 + 0.2)


# ---- ClassPCA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, 300])  # fewer and more images per class than the D = 60 pixels
@pytest.mark.parametrize("components", [4, 7, 0.9])
def test_pca_agrees_with_the_svd_of_each_class(n, components):
    x, y = make_images(n)
    pca = ClassPCA.fit(x, y, K, components)
    for k in range(K):
        flat = x[y == k].flatten(1)
        centred = flat - flat.mean(0)
        _, s, v = torch.linalg.svd(centred.double(), full_matrices=False)
        share = (s**2).cumsum(0) / (s**2).sum()
        count = components if components >= 1 else int((share < components).sum()) + 1
        assert int((pca.std[k] > 0).sum()) == count
        torch.testing.assert_close(pca.mean[k], flat.mean(0))
        torch.testing.assert_close(
            pca.std[k, :count].double(), s[:count] / math.sqrt(len(flat) - 1), rtol=1e-3, atol=1e-5
        )
        mine = pca.components[k, :count].double()
        torch.testing.assert_close((mine * v[:count]).sum(1).abs(), torch.ones(count).double(),
                                   rtol=0, atol=1e-3)  # fmt: skip


def test_the_randomised_route_finds_what_the_exact_one_finds():
    g = torch.Generator().manual_seed(1)
    scales = 0.9 ** torch.arange(120.0)  # a slowly decaying spectrum, the hard case
    flat = torch.randn(400, 120, generator=g) * scales
    flat = flat - flat.mean(0)
    v, s = ebm_at.principal_components(flat, 5)  # 20 * 5 < 120: by orthogonal iteration
    _, exact, w = torch.linalg.svd(flat, full_matrices=False)
    torch.testing.assert_close(s, exact[:5] / math.sqrt(399), rtol=1e-4, atol=0)
    torch.testing.assert_close(v @ v.T, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close((v * w[:5]).sum(1).abs(), torch.ones(5), rtol=0, atol=1e-3)
    state = torch.get_rng_state()
    assert torch.equal(ebm_at.principal_components(flat, 5)[0], v)  # deterministic ...
    assert torch.equal(torch.get_rng_state(), state)  # ... and no random number is used up


def test_decode_inverts_encode_where_the_components_hold_everything():
    x, y = make_images(45, rank=4)
    pca = ClassPCA.fit(x, y, K, 10)
    assert (pca.std > 0).sum(1).tolist() == [4, 4, 4]  # no directions made of rounding noise
    torch.testing.assert_close(pca.decode(pca.encode(x, y), y), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(pca.codes, pca.encode(x, y))


def test_pca_takes_uint8_single_images_and_grey_pictures():
    x8 = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])  # class 2 has a single image: no directions
    pca = ClassPCA.fit(x8, y, K, 50)
    assert pca.std[2].sum() == 0
    torch.testing.assert_close(pca.decode(pca.codes, y), x8.float() / 255, rtol=0, atol=1e-4)


def test_pca_of_many_images_is_fitted_to_some_and_encodes_all(monkeypatch):
    """AT_ONCE bounds the memory: here ten images of D = 60 at a time, taken evenly."""
    x, y = make_images(100)
    monkeypatch.setattr(ClassPCA, "AT_ONCE", 600)
    pca, some = ClassPCA.fit(x, y, K, 4), torch.zeros(len(y), dtype=torch.bool)
    for k in range(K):
        rows = (y == k).nonzero().squeeze(1)
        some[rows[torch.arange(10) * len(rows) // 10]] = True
    of_some = ClassPCA.fit(x[some], y[some], K, 4)
    torch.testing.assert_close(pca.mean, of_some.mean)
    torch.testing.assert_close(pca.components, of_some.components)
    assert pca.codes.shape == (len(y), 4)
    torch.testing.assert_close(pca.codes[some], of_some.codes)


def test_pca_refuses_an_empty_class_and_impossible_numbers_of_components():
    x, y = make_images()
    with pytest.raises(BadInput, match="class 3 has no images"):
        ClassPCA.fit(x, y, K + 1)
    with pytest.raises(BadInput, match="labels from 0 to 2, but 2 classes"):
        ClassPCA.fit(x, y, K - 1)
    for components in (0, -1, 2.5, math.inf, math.nan):
        with pytest.raises(BadInput, match="components"):
            ClassPCA.fit(x, y, K, components)


# ---- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ebm_at.STARTS)
def test_starts_lie_in_the_unit_range_and_follow_the_generator(init):
    x, y = make_images()
    pca, labels = ClassPCA.fit(x, y, K, 5), torch.tensor([2, 0, 0, 1, 2])

    def draw(seed):
        return ebm_at.draw_starts(
            pca, labels, init, neighbours=6, generator=torch.Generator().manual_seed(seed)
        )

    assert draw(0).shape == (5, *SHAPE) and draw(0).min() >= 0 and draw(0).max() <= 1
    assert torch.equal(draw(0), draw(0))
    assert torch.equal(draw(0), draw(1)) == (init == "mean")


@pytest.mark.parametrize("init, scale", [("gaussian", 1.0), ("pca", 0.35), ("mean", 0.0)])
def test_gaussian_starts_have_the_moments_of_the_class(init, scale):
    x, y = make_images(600)
    pca, labels = ClassPCA.fit(x, y, K, 4), torch.ones(8000, dtype=torch.int64)
    z = pca.encode(ebm_at.draw_starts(pca, labels, init, generator=torch.Generator()), labels)
    torch.testing.assert_close(z.std(0), scale * pca.std[1], rtol=0.05, atol=1e-5)
    assert (z.mean(0).abs() <= 4 * scale * pca.std[1] / math.sqrt(8000) + 1e-5).all()


def test_local_codes_have_mean_and_covariance_of_the_neighbourhood():
    x, y = make_images(30)
    pca, labels = ClassPCA.fit(x, y, K, 3), torch.ones(20_000, dtype=torch.int64)
    own = pca.codes[y == 1]  # with all 10 images as neighbours every anchor has the same ones
    z = ebm_at.local_codes(pca, labels, 10, 2.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), own.mean(0), rtol=0, atol=0.02 * own.std().item())
    wanted = 2.0 * own.T.cov()
    assert (z.T.cov() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_temperature_0_gives_means_of_real_neighbourhoods():
    x, y = make_images(60)
    pca, labels = ClassPCA.fit(x, y, K, 3), torch.zeros(50, dtype=torch.int64)
    z = ebm_at.local_codes(pca, labels, 4, 0.0, torch.Generator().manual_seed(0))
    own = pca.codes[y == 0]
    near = torch.cdist(own, own).argsort(1)[:, :4]
    means = own[near].mean(1)
    assert torch.cdist(z, means).min(1).values.max() < 1e-3


def test_starts_refuse_unknown_names_and_more_neighbours_than_images():
    x, y = make_images(30)
    pca, labels = ClassPCA.fit(x, y, K, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(BadInput, match="did you mean 'local-pca'"):
        ebm_at.draw_starts(pca, labels, "local_pca")
    with pytest.raises(BadInput, match="11 neighbours, but class 0 has only 10"):
        ebm_at.local_codes(pca, labels, 11)
    for neighbours, temperature in ((1, 1.0), (4, -1.0)):
        with pytest.raises(BadInput, match="at least 2"):
            ebm_at.local_codes(pca, labels, neighbours, temperature)


# ---- energies and targets ------------------------------------------------------------------------


def test_class_energies_are_those_of_the_images_of_each_class(tiny_net):
    model, g = tiny_net(), torch.Generator().manual_seed(0)
    x, y = (
        torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=g),
        torch.arange(23) % 5,
    )
    found = ebm_at.class_energies(model, x, y, 5, most=4, batch_size=7)
    model.eval()
    for k in range(5):
        with torch.no_grad():
            wanted = -model(x[y == k][:4].float() / 255)[:, k]
        torch.testing.assert_close(found[k], wanted)
    with pytest.raises(BadInput, match="class 5 has no images"):
        ebm_at.class_energies(model, x, y, 6)


def test_targets_by_their_definitions():
    energies = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([10.0, 20.0])]
    y, drawn = torch.tensor([1, 0, 0]), torch.tensor([5.0, 6.0, 7.0])
    assert ebm_at.stop_targets(energies, y, "mean").tolist() == [15, 3, 3]
    assert ebm_at.stop_targets(energies, y, "quantile", 0.5).tolist() == [15, 2, 2]
    assert ebm_at.stop_targets(energies, y, "quantile", 0.0).tolist() == [10, 1, 1]
    assert ebm_at.stop_targets(energies, y, "sampled", drawn=drawn).tolist() == [5, 6, 7]
    assert ebm_at.stop_targets(energies, y, "fixed").tolist() == [-math.inf] * 3
    with pytest.raises(BadInput, match="quantile"):
        ebm_at.stop_targets(energies, y, "quantile", 1.5)
    with pytest.raises(BadInput, match="stop"):
        ebm_at.stop_targets(energies, y, "never")


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_energy_gradient_by_finite_differences(tiny_net, mix):
    model = tiny_net(dtype=torch.float64).eval()
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 6, 6, generator=g, dtype=torch.float64), torch.tensor([1, 4])
    energy, gradient = ebm_at.energy_gradient(model, x, y, mix)
    direction = torch.randn(x.shape, generator=g, dtype=torch.float64)

    def guide(h):
        with torch.no_grad():
            logits = model(x + h * direction).double()
            joint = -logits.gather(1, y[:, None]).squeeze(1)
            return (1 - mix) * joint - mix * logits.logsumexp(1)

    torch.testing.assert_close(energy, -model(x)[[0, 1], y].detach().float())
    slope = (guide(1e-6) - guide(-1e-6)) / 2e-6
    torch.testing.assert_close(
        (gradient * direction).flatten(1).sum(1), slope, rtol=1e-4, atol=1e-6
    )


# ---- the walk ------------------------------------------------------------------------------------


def walk(model, x, y, target=-math.inf, **options):
    targets = torch.full((len(y),), float(target))
    return ebm_at.sgld(model, x, y, targets, **({"noise": 0.0} | options))


def test_the_walk_is_the_recurrence_written_out():
    model, (x, y) = bowl(), make_images(6)
    got, record = walk(model, x, y, steps=4, step_size=0.1, momentum=0.5, normalize=False)
    nu, wanted = torch.zeros_like(x), x.clone()
    for _ in range(4):
        nu = 0.5 * nu - 0.1 * (wanted - model.centres[y].detach())  # the bowl's gradient
        wanted = (wanted + nu).clamp(0, 1)
    torch.testing.assert_close(got, wanted)
    assert record["steps"].tolist() == [4] * 6 and record["stopped"].tolist() == [0] * 6
    energy = 0.5 * (wanted - model.centres[y].detach()).flatten(1).square().sum(1)
    torch.testing.assert_close(record["energy_end"], energy)


def test_a_normalised_step_has_the_length_of_the_step():
    model, (x, y) = bowl(), make_images(6)
    got, _ = walk(model, x, y, steps=1, step_size=0.05)
    torch.testing.assert_close((got - x).flatten(1).norm(dim=1), torch.full((6,), 0.05))


def test_each_image_stops_at_the_first_step_at_its_target():
    model, (x, y) = bowl(), make_images(30)
    targets = torch.linspace(0.01, 1.0, 30)
    options = dict(step_size=0.05, momentum=0.0, noise=0.0)
    got, record = ebm_at.sgld(model, x, y, targets, steps=60, **options)
    assert (record["stopped"] == 1).all() and record["steps"].unique().numel() > 3
    for i, taken in enumerate(record["steps"].tolist()):  # alone, one step less is not enough
        alone = x[i : i + 1], y[i : i + 1]
        same, _ = walk(model, *alone, steps=taken, **options)
        torch.testing.assert_close(got[i : i + 1], same)
        energies = [record["energy_end"][i]]
        if taken:
            before = walk(model, *alone, steps=taken - 1, **options)[1]["energy_end"][0]
            energies.append(before)
            assert before > targets[i]
        assert energies[0] <= targets[i]


def test_no_steps_and_a_reached_target_return_the_start():
    model, (x, y) = bowl(), make_images(6)
    got, record = walk(model, x, y, steps=0)
    assert torch.equal(got, x) and record["steps"].sum() == 0
    got, record = walk(model, x, y, target=1e9)
    assert torch.equal(got, x) and (record["stopped"] == 1).all()
    assert torch.equal(record["energy_start"], record["energy_end"])


def test_stopped_images_leave_the_batch():
    model, (x, y), calls = bowl(), make_images(20), []
    targets = torch.where(torch.arange(20) < 15, 1e9, -math.inf)
    hook = model.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    ebm_at.sgld(model, x, y, targets, steps=3)
    hook.remove()
    assert calls == [20, 5, 5, 5]


class Broken(nn.Module):
    """A bowl whose energy is NaN where the first pixel exceeds .9."""

    def __init__(self, inner, value=math.nan):
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, x):
        bad = (x[:, :1, 0, 0] > 0.9).float()
        return torch.where(bad > 0, self.value, self.inner(x))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e6])
def test_energies_that_break_stop_their_image_and_are_counted(value):
    model, (x, y) = bowl(), make_images(9)
    with torch.no_grad():
        model.centres[:, 0, 0, 0] = 1.0  # the walk leads into the bad region ...
    x[:, 0, 0, 0] = 0.5
    stays = y == 2
    with torch.no_grad():
        model.centres[2, 0, 0, 0] = 0.2  # ... except for class 2
    got, record = walk(Broken(model, value), x, y, steps=40, step_size=0.2, normalize=False)
    assert record["stopped"].tolist() == [0 if s else 2 for s in stays.tolist()]
    assert got.isfinite().all() and got.min() >= 0 and got.max() <= 1
    clean, _ = walk(model, x[stays], y[stays], steps=40, step_size=0.2, normalize=False)
    torch.testing.assert_close(got[stays], clean)  # the others do not notice


def test_the_sampler_leaves_no_trace_in_the_model(tiny_net):
    model, x, y = tiny_net(), torch.rand(4, 3, 8, 8), torch.arange(4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = x.clone()
    walk(model, x, y, steps=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"step_size": 0.0}, {"momentum": 1.0}, {"noise": -1.0}, {"mix": 2.0},
     {"batch_size": 0}, {"step_size": math.nan}],
)  # fmt: skip
def test_the_walk_refuses_settings_that_cannot_work(options):
    model, (x, y) = bowl(), make_images(3)
    with pytest.raises(BadInput):
        walk(model, x, y, **options)
    with pytest.raises(BadInput, match=r"\[0, 1\]"):
        walk(model, x * 2 - 1, y)


# ---- generate ------------------------------------------------------------------------------------


def parts(model, n=60):
    x, y = make_images(n)
    return ClassPCA.fit(x, y, K, 5), ebm_at.class_energies(model, x, y, K)


@pytest.mark.parametrize("init", ebm_at.STARTS)
def test_same_seed_same_pictures_whatever_the_batch_size(tiny_net, init):
    model, g = tiny_net(channels=3, classes=3), torch.Generator().manual_seed(0)
    x, y = torch.rand(45, 3, 8, 8, generator=g), torch.arange(45) % 3
    pca, energies = ClassPCA.fit(x, y, 3, 5), ebm_at.class_energies(model, x, y, 3)
    labels = torch.arange(20) % 3
    options = dict(init=init, neighbours=5, candidates=3, stop="sampled", steps=8, noise=0.01)

    def make(seed, batch_size):
        return ebm_at.generate(model, pca, labels, energies, seed=seed, batch_size=batch_size,
                               **options)  # fmt: skip

    a, record = make(0, 500)
    b, other = make(0, 3)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert torch.equal(record["steps"], other["steps"])
    assert torch.equal(a, make(0, 500)[0])
    assert not torch.equal(a, make(1, 500)[0])


def test_guided_starts_have_energies_nearer_to_real_ones():
    model = bowl()
    pca, real = parts(model)
    energies, labels = [e.median()[None] for e in real], torch.arange(300) % K
    wanted = torch.cat(energies)[labels]

    def gap(candidates):
        _, record = ebm_at.generate(model, pca, labels, energies, neighbours=6, steps=0,
                                    candidates=candidates)  # fmt: skip
        return (record["energy_start"] - wanted).abs()

    assert gap(16).mean() < 0.5 * gap(1).mean()


def test_sampled_targets_are_real_energies_of_the_right_class():
    model = bowl()
    pca, _ = parts(model)
    energies = [torch.tensor([10.0 * k + 1, 10.0 * k + 2]) for k in range(K)]
    labels = torch.arange(90) % K
    _, record = ebm_at.generate(model, pca, labels, energies, neighbours=6, stop="sampled", steps=0)
    for k in range(K):
        assert set(record["target"][labels == k].tolist()) == {10.0 * k + 1, 10.0 * k + 2}


def test_generate_refuses_no_candidates():
    model = bowl()
    pca, energies = parts(model)
    with pytest.raises(BadInput, match="candidates"):
        ebm_at.generate(model, pca, torch.arange(3), energies, candidates=0)
    for classes in ([0, 3], [-1, 0]):
        with pytest.raises(BadInput, match="asked for, but there are 3"):
            ebm_at.generate(model, pca, torch.tensor(classes), energies)


@pytest.mark.parametrize("classes, channels, size", [(10, 3, 32), (100, 1, 28), (7, 3, 64)])
def test_ten_thousand_starts_take_seconds(classes, channels, size):
    import time

    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (20 * classes, channels, size, size), dtype=torch.uint8, generator=g)
    pca = ClassPCA.fit(x, torch.arange(20 * classes) % classes, classes, 50)
    n = 10_000 * 28 * 28 // (channels * size * size)  # the same number of pixels each time
    began = time.perf_counter()
    starts = ebm_at.draw_starts(pca, torch.arange(n) % classes, neighbours=10)
    assert starts.shape == (n, channels, size, size) and time.perf_counter() - began < 10
