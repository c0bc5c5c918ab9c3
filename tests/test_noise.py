"""Philox against its authors' known answers; normals and uniforms against their distributions; independence of history."""

import numpy as np
import pytest
import torch
from scipy import stats

from vaescale import noise

# Random123, kat_vectors, philox4x32 10: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def stream(count: int, *, seed: int = 3, step: int = 5, first: int = 0) -> noise.Stream:
    return noise.Stream(seed, step, torch.arange(first, first + count))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer) -> None:
    words = noise.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


class Int64(int):
    """A whole number whose sums and products must fit in int64."""

    def __mul__(self, other: int) -> "Int64":
        return fitting(int(self) * int(other))

    def __add__(self, other: int) -> "Int64":
        return fitting(int(self) + int(other))

    def __lshift__(self, other: int) -> "Int64":
        return fitting(int(self) << other)

    def __rshift__(self, other: int) -> "Int64":
        return fitting(int(self) >> other)

    def __and__(self, other: int) -> "Int64":
        return fitting(int(self) & other)

    def __xor__(self, other: int) -> "Int64":
        return fitting(int(self) ^ int(other))


def fitting(value: int) -> Int64:
    assert -(2**63) <= value < 2**63, value
    return Int64(value)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_compiled_philox_never_leaves_int64(counter, key, answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflow is undefined in C++: compiled by torch.compile for a CPU, it gave other numbers."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert noise.philox(tuple(Int64(word) for word in counter), key) == answer


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (16,), (2, 5, 7)])
def test_shapes(shape) -> None:
    assert noise.normal(stream(6), noise.POSTERIOR, shape).shape == (6, *shape)
    assert noise.uniform(stream(6), noise.POSTERIOR, shape).shape == (6, *shape)


def test_normals_are_normal_and_uniforms_uniform() -> None:
    normals = noise.normal(stream(4000), noise.PRIOR, (50,)).numpy().ravel()
    assert stats.kstest(normals, "norm").pvalue > 0.01
    assert stats.kstest(normals**2, stats.chi2(1).cdf).pvalue > 0.01
    uniforms = noise.uniform(stream(4000), noise.PRIOR, (50,)).numpy().ravel()
    assert stats.kstest(uniforms, "uniform").pvalue > 0.01
    assert uniforms.min() >= 0
    assert uniforms.max() < 1


def test_neighbours_are_uncorrelated() -> None:
    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs(float(np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1]))

    values = noise.normal(stream(2000), noise.POSTERIOR, (20,))
    bound = 4 / np.sqrt(values.numel())  # four standard errors
    assert correlation(values[:, :-1], values[:, 1:]) < bound
    assert correlation(values[:-1], values[1:]) < bound
    assert correlation(values, noise.normal(stream(2000, step=6), noise.POSTERIOR, (20,))) < bound
    assert correlation(values, noise.normal(stream(2000, seed=4), noise.POSTERIOR, (20,))) < bound
    assert correlation(values, noise.normal(stream(2000), noise.PRIOR, (20,))) < bound


def test_a_slot_does_not_depend_on_its_company() -> None:
    together = noise.normal(stream(8), noise.POSTERIOR, (5,))
    assert torch.equal(together[3:6], noise.normal(stream(3, first=3), noise.POSTERIOR, (5,)))


def test_more_latents_extend_a_row() -> None:
    assert torch.equal(
        noise.uniform(stream(3), noise.PRIOR, (4,)), noise.uniform(stream(3), noise.PRIOR, (8,))[:, :4]
    )


def test_large_seeds_steps_and_slots_count() -> None:
    base = noise.normal(stream(2), noise.PRIOR, (4,))
    for other in (stream(2, seed=3 + 2**32), stream(2, step=5 + 2**20), stream(2, first=2**31)):
        assert not torch.equal(base, noise.normal(other, noise.PRIOR, (4,)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same() -> None:
    there = noise.Stream(3, 5, torch.arange(100, device="cuda"))
    on_gpu = noise.normal(there, noise.PRIOR, (33,)).cpu()
    torch.testing.assert_close(on_gpu, noise.normal(stream(100), noise.PRIOR, (33,)), rtol=0, atol=1e-5)
