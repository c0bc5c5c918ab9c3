// Sixteen floats at once, for the compiled functions: read and written as float32 or bfloat16, polynomials and exponentials.

#pragma once

#include <cstdint>

#ifdef __AVX512BF16__
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

}  // namespace
