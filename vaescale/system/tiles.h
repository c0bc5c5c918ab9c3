// Products of tiles of bfloat16 (AMX), for planes of channels: 16 rows of 64 bytes at once. Where the compiler or the system has no tiles, `has_tiles` is false.

#pragma once

#include <cstdint>

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t SIDE = 16;  // rows of a tile, and numbers of 32 bits in a row

#ifdef __AMX_BF16__

// Whether the processor multiplies tiles and the system lets this process do so, which it has to be asked for.
inline bool has_tiles() {
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return allowed;
}

// What was written is in memory: a compiler does not know that tiles are read from there.
inline void finish_writes() { __asm__ volatile("" ::: "memory"); }

// Sets up a thread's eight tiles while it lives. Tiles 0 to 3 are sums, with `sums` rows.
class Tiles {
    struct alignas(64) {
        uint8_t palette = 1, first_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};  // of a row
        uint8_t rows[16] = {};
    } config;

public:
    // 4 and 6 are left operands of `sums` rows, 5 and 7 right ones: 4 and 5 are whole, 6 has `rest` numbers in a row and 7 so many rows.
    Tiles(int64_t sums, int64_t rest) {
        for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = i == 5 ? SIDE : sums;
        config.bytes[6] = 4 * rest, config.rows[7] = rest;
        if (rest == 0)
            for (int i : {6, 7}) config.bytes[i] = 0, config.rows[i] = 0;
        finish_writes();
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// Read the rows of tile `operand`, which is `left` or `right`, and add the product of both to tile `sum`. Of literals: the compiler writes them into instructions.
#define VAESCALE_ADD_PRODUCT(sum, left, right, operand, from, bytes) \
    do {                                                             \
        _tile_loadd(operand, from, bytes);                           \
        _tile_dpbf16ps(sum, left, right);                            \
    } while (0)

// Sums [16 outputs, 16 P places] at `out`: `start` [16, 16] plus, for each distance, weights times the rows of `in` there. stride: of the rows, in numbers.
// w: for each distance and each 16 rows, [16 outputs, 16 rows].
template <int P>
inline void multiply_by_weights(const uint32_t* in, const int64_t* away, int64_t distances, int64_t rows, int64_t stride, const uint32_t* w,
                                const float* start, float* out) {
    int64_t bytes = 4 * stride;
    finish_writes();
    _tile_loadd(0, start, 64);
    if constexpr (P > 1) _tile_loadd(1, start, 64);
    if constexpr (P > 2) _tile_loadd(2, start, 64);
    if constexpr (P > 3) _tile_loadd(3, start, 64);
    for (int64_t k = 0; k < distances; ++k) {
        const uint32_t* a = in + away[k];
        int64_t row = 0;
        for (; row + SIDE <= rows; row += SIDE, a += SIDE * stride, w += SIDE * SIDE) {
            _tile_loadd(4, w, 64);
            VAESCALE_ADD_PRODUCT(0, 4, 5, 5, a, bytes);
            if constexpr (P > 1) VAESCALE_ADD_PRODUCT(1, 4, 5, 5, a + SIDE, bytes);
            if constexpr (P > 2) VAESCALE_ADD_PRODUCT(2, 4, 5, 5, a + 2 * SIDE, bytes);
            if constexpr (P > 3) VAESCALE_ADD_PRODUCT(3, 4, 5, 5, a + 3 * SIDE, bytes);
        }
        if (row < rows) {
            _tile_loadd(6, w, 64);
            VAESCALE_ADD_PRODUCT(0, 6, 7, 7, a, bytes);
            if constexpr (P > 1) VAESCALE_ADD_PRODUCT(1, 6, 7, 7, a + SIDE, bytes);
            if constexpr (P > 2) VAESCALE_ADD_PRODUCT(2, 6, 7, 7, a + 2 * SIDE, bytes);
            if constexpr (P > 3) VAESCALE_ADD_PRODUCT(3, 6, 7, 7, a + 3 * SIDE, bytes);
            w += SIDE * SIDE;
        }
    }
    _tile_stored(0, out, bytes);
    if constexpr (P > 1) _tile_stored(1, out + SIDE, bytes);
    if constexpr (P > 2) _tile_stored(2, out + 2 * SIDE, bytes);
    if constexpr (P > 3) _tile_stored(3, out + 3 * SIDE, bytes);
}

// Sums over places of the rows at `left`, moved by P distances, times those of `right`: [P, 16, 16]. stride: of the rows of `left`, in numbers of 16 bits.
// right: for each 32 places, [16 pairs of places, 16 rows].
template <int P>
inline void multiply_over_places(const uint16_t* left, const int64_t* away, int64_t stride, const uint32_t* right, int64_t places, float* sums) {
    finish_writes();
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (P > 2) _tile_zero(2);
    for (int64_t q = 0; q < places; q += 2 * SIDE, right += SIDE * SIDE) {
        _tile_loadd(5, right, 64);
        VAESCALE_ADD_PRODUCT(0, 4, 5, 4, left + q + away[0], 2 * stride);
        if constexpr (P > 1) VAESCALE_ADD_PRODUCT(1, 4, 5, 4, left + q + away[1], 2 * stride);
        if constexpr (P > 2) VAESCALE_ADD_PRODUCT(2, 4, 5, 4, left + q + away[2], 2 * stride);
    }
    _tile_stored(0, sums, 64);
    if constexpr (P > 1) _tile_stored(1, sums + SIDE * SIDE, 64);
    if constexpr (P > 2) _tile_stored(2, sums + 2 * SIDE * SIDE, 64);
}

#undef VAESCALE_ADD_PRODUCT

#else

inline bool has_tiles() { return false; }

#endif

}  // namespace
