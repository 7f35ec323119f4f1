"""Energies against formulas written out here, and the identities the whole project rests on."""

import math

import pytest
import torch

from ebm_at import cross_entropy, delta_energy, energy_x, energy_xy, kl_divergence


@pytest.fixture
def drawn():
    """Random logits (40, 7) of different scales and heights, a twin of them, labels."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 7, generator=g) * torch.linspace(0.1, 4, 40)[:, None]
    logits += torch.linspace(-8, 8, 40)[:, None]
    return logits, logits + torch.randn(40, 7, generator=g), torch.randint(7, (40,), generator=g)


def test_energies_and_cross_entropy_are_what_the_definitions_say(drawn):
    logits, _, y = drawn
    for i, row in enumerate(logits.double().tolist()):
        log_sum = math.log(sum(math.exp(v) for v in row))
        assert energy_x(logits)[i].item() == pytest.approx(-log_sum, abs=1e-5)
        assert energy_xy(logits, y)[i].item() == pytest.approx(-row[y[i]], abs=1e-6)
        assert cross_entropy(logits, y)[i].item() == pytest.approx(log_sum - row[y[i]], abs=1e-5)


def test_gradients_of_the_energies(drawn):
    """dE(x)/df_k = -p(k|x) and dE(x, y)/df_k = -[k = y]."""
    logits, _, y = drawn
    exp = logits.exp()
    (g,) = torch.autograd.grad(energy_x(logits.requires_grad_()).sum(), logits)
    torch.testing.assert_close(g, -exp / exp.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    (g,) = torch.autograd.grad(energy_xy(logits, y).sum(), logits)
    torch.testing.assert_close(g, -torch.eye(7)[y])


def test_delta_energy_in_both_forms(drawn):
    logits, twin, y = drawn
    torch.testing.assert_close(delta_energy(logits, twin), energy_x(logits) - energy_x(twin))
    torch.testing.assert_close(delta_energy(logits, twin, y), (twin - logits)[range(40), y])
    # The sign: a twin whose logits are all higher has the lower energy, and dE is positive.
    torch.testing.assert_close(delta_energy(logits, logits + 1), torch.ones(40))


def test_kl_divergence_in_energies(drawn):
    """KL(p(.|x) || p(.|x*)) = sum_k p(k|x) (E(x*, k) - E(x, k)) + dE(x), and by its definition."""
    logits, twin, _ = drawn
    p, q = logits.double().softmax(1), twin.double().softmax(1)
    moved = torch.stack([-delta_energy(logits, twin, torch.full((40,), k)) for k in range(7)], 1)
    for expected in ((p * (p / q).log()).sum(1), (p * moved).sum(1) + delta_energy(logits, twin)):
        found = kl_divergence(logits, twin).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_energies(half, drawn):
    """A logsumexp in bf16 has 8 bits: dE would drown in rounding. Results must be fp32."""
    a, b, y = drawn[0].to(half), drawn[1].to(half), drawn[2]
    of_one, of_two = (energy_xy, cross_entropy), (delta_energy, kl_divergence)
    for function, *given in ((energy_x, a), (delta_energy, a, b, y), *((f, a, y) for f in of_one),
                             *((f, a, b) for f in of_two)):  # fmt: skip
        found, expected = function(*given), function(*(t if t is y else t.float() for t in given))
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4], [300.0, 300.0]])
    expected = torch.tensor([-1e4, 1e4 - math.log(2), -300 - math.log(2)])
    torch.testing.assert_close(energy_x(logits), expected)
