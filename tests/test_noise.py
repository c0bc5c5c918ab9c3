"""Philox against its authors' known answers; normals and uniforms against their distributions; independence of history."""

import importlib.util
import itertools
import math
import os

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from vaescale import kernels, noise
from vaescale.system import native

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


def plain_words(stream: noise.Stream, purpose: int, size: int) -> Tensor:
    """The words of one purpose in the plain arithmetic of `philox`, int64 [4, B, blocks]: the oracle of all faster ways."""
    blocks = -(-size // 4)
    slots = stream.slots.view(-1, 1).expand(-1, blocks)
    block = torch.arange(blocks).expand_as(slots)
    step, tag = (torch.full_like(block, value) for value in (stream.step & 0xFFFFFFFF, purpose))
    key = (stream.seed & 0xFFFFFFFF, stream.seed >> 32 & 0xFFFFFFFF)
    return torch.stack(noise.philox((block, slots & 0xFFFFFFFF, step, tag), key))


def plain_normal(stream: noise.Stream, purpose: int, size: int) -> Tensor:
    uniform = (plain_words(stream, purpose, size).float() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform[0::2]))
    angle = (2.0 * math.pi) * uniform[1::2]
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
    return pairs.permute(1, 2, 0).flatten(1)[:, :size]


def plain_uniform(stream: noise.Stream, purpose: int, size: int) -> Tensor:
    words = plain_words(stream, purpose, size).permute(1, 2, 0).flatten(1)[:, :size]
    return (words >> 8).float() * 2.0**-24


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer) -> None:
    words = noise.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_in_place_and_in_numpy_give_them_too(counter, key, answer) -> None:
    words = torch.tensor(counter).view(4, 1, 1)
    assert noise._philox_in_place(words, key).flatten().tolist() == list(answer)
    in_numpy = noise.philox(tuple(np.array([word]) for word in counter), key)
    assert [word.item() for word in in_numpy] == list(answer)


@pytest.mark.parametrize("way", ["torch", "numpy", "compiled"])
def test_each_way_gives_the_bits_of_the_oracle(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "FEW_BLOCKS", 1 << 15 if way == "numpy" else 0)
    if way == "torch":
        monkeypatch.setattr(native, "_switched_off", 1)
    elif way == "compiled" and native.load(noise.SOURCE) is None:
        pytest.skip("needs a C++ compiler and GNU OpenMP")
    streams = (
        stream(5),
        stream(3, seed=(1 << 40) + 7, step=2**31 + 3, first=2**40),
        stream(128, first=2**32 - 64),
    )
    for here, size in itertools.product(streams, (1, 3, 4, 18, 4096)):
        assert torch.equal(noise.normal(here, noise.PRIOR, (size,)), plain_normal(here, noise.PRIOR, size))
        assert torch.equal(noise.uniform(here, noise.FLIP, (size,)), plain_uniform(here, noise.FLIP, size))


@pytest.mark.parametrize("few", [0, 1 << 15], ids=["torch", "numpy"])
@pytest.mark.parametrize(("most", "draws"), [(1 << 19, 1), (1000, 5), (1, 7)])
def test_purposes_drawn_together_have_the_bits_of_each_alone(
    few: int, most: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "FEW_BLOCKS", few)
    monkeypatch.setattr(noise, "MOST_BLOCKS", most)
    words, counted = noise._words, []
    monkeypatch.setattr(noise, "_words", lambda *given: counted.append(given[1]) or words(*given))
    numbers = {noise.POSTERIOR + number: size for number, size in enumerate((16, 7, 1024, 64, 3, 2048, 5))}
    here = stream(9, first=77)
    drawn = noise.normals(here, numbers)
    first = next(drawn)
    assert len(counted) == 1, "later purposes are drawn when they are needed"
    for (purpose, size), rows in zip(numbers.items(), (first, *drawn), strict=True):
        assert torch.equal(rows, plain_normal(here, purpose, size))
    assert len(counted) == draws
    assert all(len(part) == 1 or 9 * sum(count for _, count in part) <= most for part in counted)


def test_compiled_noise_is_one_graph_with_the_same_values() -> None:
    def both(step: int, slots: Tensor) -> list[Tensor]:
        here = noise.Stream(3, step, slots)
        return [noise.uniform(here, noise.FLIP, (3,)), *noise.normals(here, {1: 5, 2: 16})]

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for step in (1, 2**31 + 5):
        for got, expected in zip(compiled(step, torch.arange(7)), both(step, torch.arange(7)), strict=True):
            assert torch.equal(got, expected)


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


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1",
)
def test_the_kernel_has_the_bits_of_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise.gpu, "can_draw_on", lambda _device: True)
    for here in (stream(3, seed=2**63 + 5, step=2**31 + 3, first=2**40), stream(8, first=2**32 - 4)):
        for size in (1, 18, 4096):
            assert torch.equal(
                noise.uniform(here, noise.FLIP, (size,)), plain_uniform(here, noise.FLIP, size)
            )
        sizes = {noise.PRIOR + 1: 5, 2: 16, 3: 1030}
        for (purpose, size), rows in zip(sizes.items(), noise.normals(here, sizes), strict=True):
            torch.testing.assert_close(rows, plain_normal(here, purpose, size), rtol=1e-6, atol=4e-6)


def test_the_answer_about_kernels_is_read_by_a_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_usable", [True])
    compiled = torch.compile(lambda x: x + kernels.kernels_run(), fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)) == 2


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
