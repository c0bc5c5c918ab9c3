// Philox 4x32-10 for many counters on a CPU: the words of `philox` in __init__.py. Salmon, Moraes, Dror & Shaw 2011.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int ROUNDS = 10;
constexpr int64_t TOGETHER = 1024;  // blocks that one thread computes at once
constexpr uint64_t MASK = 0xffffffff, FIRST = 0xd2511f53, SECOND = 0xcd9e8d57, WEYL = 0x9e3779b9, OTHER_WEYL = 0xbb67ae85;

}  // namespace

extern "C" {

// Words in out [4, B, T], of which each is below 2^32: of the blocks numbers[t] of the purposes tags[t], for each of the B slots.
void words(const int64_t* slots, int64_t B, const int64_t* numbers, const int64_t* tags, int64_t T, int64_t step, int64_t key, int64_t other_key,
           int64_t* out, int threads) {
    int64_t pieces = (T + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t job = 0; job < B * pieces; ++job) {
        int64_t b = job / pieces, begin = job % pieces * TOGETHER, end = std::min(T, begin + TOGETHER);
        uint64_t slot = static_cast<uint64_t>(slots[b]) & MASK;
        int64_t *w0 = out + b * T, *w1 = w0 + B * T, *w2 = w1 + B * T, *w3 = w2 + B * T;
#pragma omp simd
        for (int64_t t = begin; t < end; ++t) {
            uint64_t c0 = static_cast<uint64_t>(numbers[t]) & MASK, c1 = slot, c2 = static_cast<uint64_t>(step) & MASK,
                     c3 = static_cast<uint64_t>(tags[t]) & MASK, k0 = static_cast<uint64_t>(key), k1 = static_cast<uint64_t>(other_key);
            for (int round = 0; round < ROUNDS; ++round) {
                uint64_t first = c0 * FIRST, second = c2 * SECOND;
                c0 = (second >> 32) ^ c1 ^ k0;
                c2 = (first >> 32) ^ c3 ^ k1;
                c1 = second & MASK;
                c3 = first & MASK;
                k0 = (k0 + WEYL) & MASK;
                k1 = (k1 + OTHER_WEYL) & MASK;
            }
            w0[t] = static_cast<int64_t>(c0);
            w1[t] = static_cast<int64_t>(c1);
            w2[t] = static_cast<int64_t>(c2);
            w3[t] = static_cast<int64_t>(c3);
        }
    }
}

}
