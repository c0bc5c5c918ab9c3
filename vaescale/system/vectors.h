// Sixteen floats at once, for the compiled functions: read and written as float32 or bfloat16, polynomials and exponentials.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef Floats LooseFloats __attribute__((aligned(2), may_alias));
typedef Ints LooseInts __attribute__((aligned(2), may_alias));
typedef Shorts LooseShorts __attribute__((aligned(2), may_alias));

inline Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }
inline Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }
inline Floats all(float x) { return Floats{} + x; }
// The smaller and the larger one; NaN for a NaN x.
inline Floats at_most(float limit, Floats x) { return x > limit ? all(limit) : x; }
inline Floats at_least(float limit, Floats x) { return x < limit ? all(limit) : x; }
inline Floats magnitude(Floats x) { return as_floats(as_ints(x) & 0x7fffffff); }

// To the nearest bfloat16, ties to even.
inline Shorts rounded(Floats x) {
#ifdef __AVX512BF16__
    return reinterpret_cast<Shorts>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    Ints bits = as_ints(x), even = bits + 0x7fff + (bits >> 16 & 1);
    return __builtin_convertvector((x == x ? even : Ints{} + 0x7fc00000) >> 16 & 0xffff, Shorts);
#endif
}

inline Floats load(const float* place) { return *reinterpret_cast<const LooseFloats*>(place); }
inline Floats load(const uint16_t* place) {
    return as_floats(__builtin_convertvector(*reinterpret_cast<const LooseShorts*>(place), Ints) << 16);
}
inline void store(float* place, Floats values) { *reinterpret_cast<LooseFloats*>(place) = values; }
inline void store(uint16_t* place, Floats values) { *reinterpret_cast<LooseShorts*>(place) = rounded(values); }

// At most `left` values, and zeros.
template <typename T>
inline Floats load_some(const T* place, int64_t left) {
    if (left >= LANES) return load(place);
    T values[LANES] = {};
    std::memcpy(values, place, left * sizeof(T));
    return load(values);
}

template <typename T>
inline void store_some(T* place, Floats values, int64_t left) {
    if (left >= LANES) return store(place, values);
    T rest[LANES];
    store(rest, values);
    std::memcpy(place, rest, left * sizeof(T));
}

// The first `left` values, and zeros.
inline Floats only(Floats values, int64_t left) {
    if (left < LANES)
        for (int64_t i = left; i < LANES; ++i) values[i] = 0.0f;
    return values;
}

// The sum of products of two bfloat16 in each lane, added to a float.
inline Floats add_pairs(Floats sum, Ints a, Ints b) {
#ifdef __AVX512BF16__
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
    Ints high = Ints{} + static_cast<int32_t>(0xffff0000);
    return sum + as_floats(a << 16) * as_floats(b << 16) + as_floats(a & high) * as_floats(b & high);
#endif
}

// The sums over the lanes of 16 vectors, as one.
inline Floats sums_of(const Floats (&x)[16]) {
    Floats half[8], quarter[4], eighth[2];
    constexpr Ints low8{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    constexpr Ints low4{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    constexpr Ints low2{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    constexpr Ints low1{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    auto folded = [](Floats a, Floats b, Ints low, int32_t distance) {
        return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + distance);
    };
    // Lane i of the result is the sum of x[i]: its bits choose the operand at each fold.
    for (int i = 0; i < 8; ++i) half[i] = folded(x[i], x[i + 8], low8, 8);
    for (int i = 0; i < 4; ++i) quarter[i] = folded(half[i], half[i + 4], low4, 4);
    for (int i = 0; i < 2; ++i) eighth[i] = folded(quarter[i], quarter[i + 2], low2, 2);
    return folded(eighth[0], eighth[1], low1, 1);
}

// The lowest power first.
template <int N>
inline Floats polynomial(const float (&coefficients)[N], Floats x) {
    Floats sum = all(coefficients[N - 1]);
#pragma GCC unroll 16
    for (int k = N - 2; k >= 0; --k) sum = sum * x + coefficients[k];
    return sum;
}

// e^x to 2 units of the last place: 2^n times the Taylor series of e^r, |r| <= ln(2) / 2. Inf from 88.4 on.
inline Floats exponential(Floats x) {
    constexpr float series[] = {1.0f, 1.0f, 0.5f, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
    constexpr float shift = 12582912.0f;  // a float next to it has no digits after the point
    x = at_least(-87.0f, at_most(89.0f, x));
    Floats n = (x * 1.44269504f + shift) - shift;
    Floats r = x - n * 0.693115234375f;  // ln 2 in two parts; the first has few digits, so the product is exact
    r = r - n * 3.19461832987e-5f;
    return polynomial(series, r) * as_floats((__builtin_convertvector(n, Ints) + 127) << 23);
}

// 2^x to 3e-6 of it, by a polynomial of least maximum error; 0 and Inf beyond the range of floats.
inline Floats near_power_of_two(Floats x) {
    constexpr float series[] = {0.999999261f, 0.693121815f, 0.240247448f, 0.0559178616f, 0.00957010195f};
#ifdef __AVX512DQ__
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m512 wide = reinterpret_cast<__m512>(x), n = _mm512_roundscale_ps(wide, nearest);
    Floats rest = reinterpret_cast<Floats>(_mm512_reduce_ps(wide, nearest));  // x - n; 0 for Inf
    return reinterpret_cast<Floats>(_mm512_scalef_ps(reinterpret_cast<__m512>(polynomial(series, rest)), n));
#else
    constexpr float shift = 12582912.0f;
    x = at_least(-126.0f, at_most(128.0f, x));
    Floats n = (x + shift) - shift;
    return polynomial(series, x - n) * as_floats((__builtin_convertvector(n, Ints) + 127) << 23);
#endif
}

// 1 / x to 6e-5 of it.
inline Floats near_reciprocal(Floats x) {
#ifdef __AVX512F__
    return reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
#else
    return 1.0f / x;
#endif
}

}  // namespace
