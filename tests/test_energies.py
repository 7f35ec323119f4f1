"""Energies against formulas written out here, and the identities the whole project rests on."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ebm_at import delta_energy, energy_x, energy_xy, kl_per_image

SEEDS = range(5)


def draw(seed, scale=3.0):
    """Random logits (N, K), a twin of them, labels; N, K and the offset follow from the seed."""
    g = torch.Generator().manual_seed(seed)
    n, k = 1 + seed * 3, 2 + seed * 2
    logits = torch.randn(n, k, generator=g) * scale + seed
    twin = logits + torch.randn(n, k, generator=g)
    return logits, twin, torch.randint(k, (n,), generator=g)


@pytest.mark.parametrize("seed", SEEDS)
def test_energies_are_what_the_definitions_say(seed):
    logits, _, y = draw(seed)
    for i, row in enumerate(logits.double().tolist()):
        expected = -math.log(sum(math.exp(v) for v in row))
        assert energy_x(logits)[i].item() == pytest.approx(expected, abs=1e-5)
        assert energy_xy(logits, y)[i].item() == pytest.approx(-row[y[i]], abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_cross_entropy_is_the_difference_of_the_energies(seed):
    logits, _, y = draw(seed)
    difference = energy_xy(logits, y) - energy_x(logits)
    torch.testing.assert_close(difference, F.cross_entropy(logits, y, reduction="none"))
    probability = logits.double().softmax(1)[torch.arange(len(y)), y]
    torch.testing.assert_close((-difference.double()).exp(), probability, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shift_of_all_logits_shifts_energies_and_leaves_softmax(seed):
    """Cross-entropy cannot see the height of the energy landscape; E(x) can. DER works on that."""
    logits, _, y = draw(seed)
    shifted = logits + 2.5
    torch.testing.assert_close(energy_x(shifted), energy_x(logits) - 2.5)
    torch.testing.assert_close(energy_xy(shifted, y), energy_xy(logits, y) - 2.5)
    ce, ce_shifted = (energy_xy(f, y) - energy_x(f) for f in (logits, shifted))
    torch.testing.assert_close(ce, ce_shifted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_of_the_energies(seed):
    """dE(x)/df_k = -p(k|x) and dE(x, y)/df_k = -[k = y]."""
    logits, _, y = draw(seed)
    logits.requires_grad_(True)
    (g,) = torch.autograd.grad(energy_x(logits).sum(), logits)
    exp = np.exp(logits.detach().double().numpy())
    np.testing.assert_allclose(g.numpy(), -exp / exp.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)
    (g,) = torch.autograd.grad(energy_xy(logits, y).sum(), logits)
    torch.testing.assert_close(g, -F.one_hot(y, logits.shape[1]).float())


@pytest.mark.parametrize("seed", SEEDS)
def test_delta_energy_in_both_forms(seed):
    logits, twin, y = draw(seed)
    torch.testing.assert_close(delta_energy(logits, twin), energy_x(logits) - energy_x(twin))
    expected = twin[torch.arange(len(y)), y] - logits[torch.arange(len(y)), y]
    torch.testing.assert_close(delta_energy(logits, twin, y), expected)
    torch.testing.assert_close(delta_energy(twin, logits), -delta_energy(logits, twin))
    # The sign: a twin whose logits are all higher has the lower energy, and dE is positive.
    torch.testing.assert_close(delta_energy(logits, logits + 1), torch.ones(len(y)))


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_divergence_in_energies(seed):
    """KL(p(.|x) || p(.|x*)) = E_{k ~ p(.|x)} [E(x*, k) - E(x, k)] + E(x) - E(x*)."""
    logits, twin, _ = draw(seed)
    n, k = logits.shape
    p = logits.double().softmax(1)
    moved = torch.stack(
        [-delta_energy(logits, twin, torch.full((n,), label)) for label in range(k)], 1
    )
    kl = (p * moved.double()).sum(1) + delta_energy(logits, twin).double()
    expected = F.kl_div(
        twin.double().log_softmax(1), logits.double().log_softmax(1),
        reduction="none", log_target=True,
    ).sum(1)  # fmt: skip
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kl_per_image(logits, twin).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_energies(half):
    """A logsumexp in bf16 has 8 bits: dE would drown in rounding. Results must be fp32."""
    logits, twin, y = draw(4)
    a, b = logits.to(half), twin.to(half)
    for found, expected in (
        (energy_x(a), energy_x(a.float())),
        (energy_xy(a, y), energy_xy(a.float(), y)),
        (delta_energy(a, b), delta_energy(a.float(), b.float())),
        (delta_energy(a, b, y), delta_energy(a.float(), b.float(), y)),
        (kl_per_image(a, b), kl_per_image(a.float(), b.float())),
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4], [300.0, 300.0]])
    expected = torch.tensor([-1e4, 1e4 - math.log(2), -300 - math.log(2)])
    torch.testing.assert_close(energy_x(logits), expected)
