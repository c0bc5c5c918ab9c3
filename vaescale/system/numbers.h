// The numbers that the compiled functions read and write; a bfloat16 is its 16 bits. Loops of these functions can be vectorized.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float number(float value) { return value; }

inline float number(uint16_t value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline void put(float* place, float value) { *place = value; }

// To the nearest bfloat16, ties to even.
inline void put(uint16_t* place, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *place = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace
