// Convolutions with few outputs, such as the last layer of a decoder, and the gradient of their weights, on a CPU. Stride 1.
//
// Maps are dense as [N, H, W, C] in float32 or bfloat16, with a multiple of 32 channels; weights and their gradient [O, k, k, C], sums in float32.
// torch computes as many outputs as a vector has places. Here a vector has the channels of a place: four places and four outputs at once,
// whose sums over the vectors' lanes are formed together. Sums do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"
#include "vectors.h"

namespace {

constexpr int64_t CHANNELS = 32;  // that are read at once
constexpr int64_t SLICES = 16;    // sums of gradients are made of so many parts, if there are as many images
constexpr int FOUR = 4, THREE = 3;

struct Sizes {
    int64_t images, height, width, channels, outputs, kernel, padding;
    int64_t high() const { return height + 2 * padding - kernel + 1; }
    int64_t wide() const { return width + 2 * padding - kernel + 1; }
    int64_t row() const { return width * channels; }
    int64_t weights() const { return outputs * kernel * kernel * channels; }
};

typedef uint16_t Words __attribute__((vector_size(64)));

// 32 channels times as many weights, added to 16 lanes.
inline Floats add_products(Floats sum, const float* x, const float* w) {
    return sum + load(x) * load(w) + load(x + LANES) * load(w + LANES);
}
inline Floats add_products(Floats sum, const uint16_t* x, const uint16_t* w) {
    return add_pairs(sum, *reinterpret_cast<const LooseInts*>(x), *reinterpret_cast<const LooseInts*>(w));
}

// The places that are multiplied at once with the gradients of their outputs, and the products of 32 channels.
template <typename T> struct Places;

template <> struct Places<float> {
    static constexpr int64_t COUNT = 1;
    typedef float Gradient;
    static Gradient gradient(const float* dy, int64_t, bool) { return *dy; }
    static void add(Floats& low, Floats& high, Gradient g, const Floats (&x)[2]) {
        low = low + g * x[0];
        high = high + g * x[1];
    }
    static void read(const float* x, const float*, Floats (&values)[2]) { values[0] = load(x), values[1] = load(x + LANES); }
    typedef Floats Vector;
};

template <> struct Places<uint16_t> {
    static constexpr int64_t COUNT = 2;
    typedef int32_t Gradient;
    typedef Ints Vector;
    static Gradient gradient(const uint16_t* dy, int64_t outputs, bool has_second) {
        return static_cast<int32_t>(dy[0] | (has_second ? static_cast<uint32_t>(dy[outputs]) << 16 : 0u));
    }
    static void add(Floats& low, Floats& high, Gradient g, const Ints (&x)[2]) {
        Ints both = Ints{} + g;
        low = add_pairs(low, x[0], both);
        high = add_pairs(high, x[1], both);
    }
    // The same channel of both places side by side.
    static void read(const uint16_t* x, const uint16_t* next, Ints (&values)[2]) {
        constexpr Words first{0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        Words a = reinterpret_cast<Words>(Ints(*reinterpret_cast<const LooseInts*>(x)));
        Words b = reinterpret_cast<Words>(Ints(*reinterpret_cast<const LooseInts*>(next)));
        values[0] = reinterpret_cast<Ints>(__builtin_shuffle(a, b, first));
        values[1] = reinterpret_cast<Ints>(__builtin_shuffle(a, b, first + 16));
    }
};

// A place's channels, or zeros beside the map.
template <typename T>
inline const T* place_of(const Sizes& s, const T* row, int64_t x, const T* zeros) {
    return x >= 0 && x < s.width ? row + x * s.channels : zeros;
}

template <typename T>
void forward_of(const Sizes& s, const T* x, const T* w, const float* bias, T* y, int threads) {
    std::vector<T> zeros(s.channels);
    int64_t square = s.kernel * s.kernel * s.channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < s.images * s.high(); ++line) {
        int64_t n = line / s.high(), high = line % s.high();
        for (int64_t left = 0; left < s.wide(); left += FOUR)
            for (int64_t o = 0; o < s.outputs; o += FOUR) {
                Floats sums[16] = {};
                const T* weights[FOUR];
                for (int i = 0; i < FOUR; ++i) weights[i] = w + std::min(o + i, s.outputs - 1) * square;
                for (int64_t ky = 0; ky < s.kernel; ++ky) {
                    int64_t source = high + ky - s.padding;
                    if (source < 0 || source >= s.height) continue;
                    const T* row = x + (n * s.height + source) * s.row();
                    for (int64_t kx = 0; kx < s.kernel; ++kx) {
                        const T* at[FOUR];
                        for (int i = 0; i < FOUR; ++i) at[i] = place_of(s, row, left + i + kx - s.padding, zeros.data());
                        int64_t tap = (ky * s.kernel + kx) * s.channels;
                        for (int64_t c = 0; c < s.channels; c += CHANNELS)
#pragma GCC unroll 16
                            for (int i = 0; i < 16; ++i) sums[i] = add_products(sums[i], at[i / FOUR] + c, weights[i % FOUR] + tap + c);
                    }
                }
                Floats total = sums_of(sums);
                for (int i = 0; i < 16; ++i) {
                    int64_t place = left + i / FOUR, output = o + i % FOUR;
                    if (place < s.wide() && output < s.outputs)
                        put(y + (line * s.wide() + place) * s.outputs + output, total[i] + (bias ? bias[output] : 0.0f));
                }
            }
    }
}

// Adds to the gradient of four outputs' weights at three neighbouring columns of the kernel, for 32 channels, what an image has.
template <typename T>
void add_gradient(const Sizes& s, const T* x, const T* dy, const T* zeros, int64_t o, int64_t ky, int64_t kx, int64_t c, float* gradient) {
    typedef Places<T> P;
    Floats sums[FOUR][THREE][2] = {};
    int64_t last = s.outputs - 1;
    for (int64_t high = 0; high < s.high(); ++high) {
        int64_t source = high + ky - s.padding;
        if (source < 0 || source >= s.height) continue;
        const T *row = x + source * s.row(), *line = dy + high * s.wide() * s.outputs;
        for (int64_t left = 0; left < s.wide(); left += P::COUNT) {
            typename P::Gradient gradients[FOUR];
            for (int i = 0; i < FOUR; ++i)
                gradients[i] = P::gradient(line + left * s.outputs + std::min(o + i, last), s.outputs, left + 1 < s.wide());
#pragma GCC unroll 3
            for (int k = 0; k < THREE; ++k) {
                int64_t at = left + kx + k - s.padding;
                typename P::Vector values[2];
                const T* next = left + 1 < s.wide() ? place_of(s, row, at + 1, zeros) : zeros;
                P::read(place_of(s, row, at, zeros) + c, next + c, values);
#pragma GCC unroll 4
                for (int i = 0; i < FOUR; ++i) P::add(sums[i][k][0], sums[i][k][1], gradients[i], values);
            }
        }
    }
    for (int i = 0; i < FOUR && o + i < s.outputs; ++i)
        for (int k = 0; k < THREE && kx + k < s.kernel; ++k) {
            float* place = gradient + (((o + i) * s.kernel + ky) * s.kernel + kx + k) * s.channels + c;
            store(place, load(place) + sums[i][k][0]);
            store(place + LANES, load(place + LANES) + sums[i][k][1]);
        }
}

template <typename T>
void gradient_of(const Sizes& s, const T* x, const T* dy, float* gradient, int threads) {
    int64_t slices = std::min(SLICES, s.images), number = s.weights();
    std::vector<T> zeros(s.channels);
    std::vector<float> parts(slices * number);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t slice = 0; slice < slices; ++slice)
            for (int64_t n = slice; n < s.images; n += slices)
                for (int64_t o = 0; o < s.outputs; o += FOUR)
                    for (int64_t ky = 0; ky < s.kernel; ++ky)
                        for (int64_t kx = 0; kx < s.kernel; kx += THREE)
                            for (int64_t c = 0; c < s.channels; c += CHANNELS)
                                add_gradient(s, x + n * s.height * s.row(), dy + n * s.high() * s.wide() * s.outputs, zeros.data(), o, ky, kx,
                                             c, parts.data() + slice * number);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < number; ++k) {
            float sum = 0;
            for (int64_t slice = 0; slice < slices; ++slice) sum += parts[slice * number + k];
            gradient[k] = sum;
        }
    }
}

}  // namespace

extern "C" {

// bias: float32 [O], or nullptr. y: [N, H', W', O].
void forward(int is_bf16, const Sizes* sizes, const void* x, const void* w, const float* bias, void* y, int threads) {
    if (is_bf16) forward_of(*sizes, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(w), bias, static_cast<uint16_t*>(y), threads);
    else forward_of(*sizes, static_cast<const float*>(x), static_cast<const float*>(w), bias, static_cast<float*>(y), threads);
}

// gradient: float32 [O, k, k, C].
void weight_gradient(int is_bf16, const Sizes* sizes, const void* x, const void* dy, float* gradient, int threads) {
    if (is_bf16) gradient_of(*sizes, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(dy), gradient, threads);
    else gradient_of(*sizes, static_cast<const float*>(x), static_cast<const float*>(dy), gradient, threads);
}

}
