// The bottleneck of a ladder's blocks, forward and backward, on a CPU: four convolutions, each after a GELU. Child 2021, figure 3.
//
//   h1 = conv1x1(gelu(x)), h2 = conv(gelu(h1)), h3 = conv(gelu(h2)), f = conv1x1(gelu(h3))
//
// x is the channels of one or two maps. The first outputs of f are a map of their own; to the others, as many as the first map has
// channels, that map is added. Maps are [N, C, H, W] in float32 or bfloat16, weights and their gradients in float32. Products are of numbers
// rounded to the maps' precision, sums in float32; h1, h2, h3 and the gradients between convolutions are rounded to it.
//
// A few images at once go through all layers, so that their maps stay in a core's cache. Their channels are planes of `stride` numbers: the
// rows of an image and a row of zeros, each row followed by a zero, so a window's place is a constant distance away. Convolutions take planes
// of pairs of channels in bfloat16 (units), because its products add two numbers: 16 places at once, times a weight for each output. Gradients
// of weights take planes of single channels and add over places. Where the processor multiplies tiles of bfloat16, both are products of them, with
// weights or pairs of places packed for it. Sums do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int64_t STEP = 32;       // places that loops go over at once; a plane has a multiple
constexpr int64_t TOGETHER = 1024;  // places of the images that one core takes at once, about
constexpr int64_t ENOUGH = 256;    // places that are worth a read of all weights
constexpr int64_t SLICES = 16;     // sums of weights' gradients are made of so many parts, if there are as many images
constexpr int64_t BLOCK = 16;      // outputs of a convolution that are computed before they are read; as many as a tile has rows
constexpr int TILE = 8, FEW = 4;   // outputs that are computed at once
constexpr int WIDE = 3;            // vectors of places that are computed at once

// A unit is what a convolution multiplies at once: a float, or two channels in bfloat16.
template <typename T> struct Kind;

template <> struct Kind<float> {
    typedef float Unit;
    typedef Floats Vector;
    typedef LooseFloats Loose;
    static constexpr int64_t CHANNELS = 1;  // of a unit
    static Unit unit(float first, float) { return first; }
    static Vector units(Floats first, Floats) { return first; }
    static Vector all_of(Unit w) { return all(w); }
    static Floats add_product(Floats sum, Vector a, Vector b) { return sum + a * b; }

    // P(X <= x) of a standard normal X, and its sum with x times the density, the slope of GELU; to 2e-7. Abramowitz & Stegun 1964, 7.1.26.
    static void normal(Floats x, Floats& below, Floats& slope) {
        constexpr float series[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
        Floats z = magnitude(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z), e = exponential(-z * z);
        Floats tail = 0.5f * polynomial(series, t) * t * e;
        below = x < 0.0f ? tail : 1.0f - tail;
        slope = below + x * 0.39894228f * e;
    }
};

template <> struct Kind<uint16_t> {
    typedef uint32_t Unit;
    typedef Ints Vector;
    typedef LooseInts Loose;
    static constexpr int64_t CHANNELS = 2;
    static Unit unit(float first, float second) {
        uint16_t low, high;
        put(&low, first);
        put(&high, second);
        return low | static_cast<uint32_t>(high) << 16;
    }
    static Vector units(Floats first, Floats second) {
        return __builtin_convertvector(rounded(first), Ints) | __builtin_convertvector(rounded(second), Ints) << 16;
    }
    static Vector all_of(Unit w) { return Vector{} + static_cast<int32_t>(w); }
    static Floats add_product(Floats sum, Vector a, Vector b) { return add_pairs(sum, a, b); }

    // As for floats, by polynomials of least maximum error: x times the first is true to 1e-4, the second to 3e-4,
    // less than a tenth of a rounding of values near 1.
    static void normal(Floats x, Floats& below, Floats& slope) {
        constexpr float first[] = {0.398420078f,    -0.0654535469f,    0.00925784429f,   -0.000940452206f,
                                   6.55276464e-05f, -2.93883958e-06f, 7.57096327e-08f, -8.46059592e-10f};
        constexpr float second[] = {0.797013131f,     -0.262976023f,    0.056809393f,     -0.00806630364f, 0.000772452735f,
                                    -4.91849184e-05f, 1.98285414e-06f, -4.55442609e-08f, 4.52083264e-10f};
        Floats near = at_least(-4.25f, at_most(4.25f, x)), square = near * near;
        below = x < -4.25f ? Floats{} : 0.5f + near * polynomial(first, square);  // not a rounding, times a large x
        slope = 0.5f + near * polynomial(second, square);
    }
};

template <typename T> using Unit = typename Kind<T>::Unit;

template <typename T>
struct Gelu {
    Floats operator()(Floats x) const {
        Floats below, slope;
        Kind<T>::normal(x, below, slope);
        return x * below;
    }
};

struct Same {
    Floats operator()(Floats x) const { return x; }
};

// Where the places of some images lie in a plane.
struct Plan {
    int64_t height, width, row, image, together, places, margin, stride;
    Plan(int64_t N, int64_t H, int64_t W, int64_t taps) : height(H), width(W) {
        row = taps > 1 ? W + 1 : W;
        image = taps > 1 ? (H + 1) * row : H * row;
        int64_t fair = std::max((N + SLICES - 1) / SLICES, std::min(ENOUGH / (H * W), (N + 3) / 4));
        together = std::max<int64_t>(1, std::min(TOGETHER / (H * W), fair));
        places = (together * image + STEP - 1) / STEP * STEP;
        margin = taps > 1 ? (row + LANES) / LANES * LANES : 0;
        stride = margin + places + margin + STEP;
        stride += (stride / LANES + 1) % 2 * LANES;  // an odd number of cache lines: planes lie in different parts of the cache
    }
    int64_t jobs(int64_t N) const { return (N + together - 1) / together; }
    int64_t slices(int64_t N) const { return std::min(SLICES, jobs(N)); }
    int64_t place(int64_t image_, int64_t y) const { return margin + image_ * image + y * row; }
};

// Zeroed memory of planes, aligned to vectors.
template <typename T>
struct Planes {
    std::unique_ptr<T[], void (*)(T*)> data;
    int64_t stride;
    Planes(int64_t count, int64_t stride_)
        : data(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * stride_ * sizeof(T) + 63) / 64 * 64)),
               [](T* p) { std::free(p); }),
          stride(stride_) {
        std::memset(data.get(), 0, std::max<int64_t>(count, 1) * stride * sizeof(T));
    }
    T* operator[](int64_t plane) { return data.get() + plane * stride; }
    const T* operator[](int64_t plane) const { return data.get() + plane * stride; }
};

template <typename T> bool by_tiles() { return std::is_same_v<T, uint16_t> && has_tiles(); }

template <typename T> int64_t units(int64_t channels) { return (channels + Kind<T>::CHANNELS - 1) / Kind<T>::CHANNELS; }

// A layer's weights [outputs, channels, taps], or those of its gradient by its inputs, as the convolution reads them:
// [tiles, taps, units, outputs of the tile]; for a product of tiles [blocks of 16 outputs, taps, groups of 16 units, outputs, units].
template <typename T>
struct Weights {
    int64_t outputs, channels;
    int taps;
    std::vector<Unit<T>> packed;
    std::vector<float> biases;
    const float* weight;
    bool transposed;

    Weights(const float* weight_, const float* bias, int64_t O, int64_t C, int taps_, bool transposed_)
        : outputs(transposed_ ? C : O), channels(transposed_ ? O : C), taps(taps_), weight(weight_), transposed(transposed_) {
        int64_t some = by_tiles<T>() ? SIDE : FEW, whole = (outputs + some - 1) / some * some;
        packed.resize(whole * taps * columns());
        biases.assign(whole, 0.0f);
        if (bias) std::copy(bias, bias + outputs, biases.begin());
    }
    // Units for each tap and output in `packed`.
    int64_t columns() const {
        int64_t count = units<T>(channels);
        return by_tiles<T>() ? (count + SIDE - 1) / SIDE * SIDE : count;
    }
    // In a parallel region: the threads share the work, and wait for each other later.
    void pack() {
        if (by_tiles<T>()) return pack_blocks();
        int64_t count = units<T>(channels);
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < outputs; first += TILE) {
            int size = tile(first);
            Unit<T>* next = packed.data() + first * taps * count;
            for (int tap = 0; tap < taps; ++tap)
                for (int64_t c = 0; c < count * Kind<T>::CHANNELS; c += Kind<T>::CHANNELS)
                    for (int o = 0; o < size; ++o) *next++ = Kind<T>::unit(value(first + o, c, tap), value(first + o, c + 1, tap));
        }
    }
    void pack_blocks() {
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < outputs; first += SIDE) {
            Unit<T>* next = packed.data() + first * taps * columns();
            for (int tap = 0; tap < taps; ++tap)
                for (int64_t unit = 0; unit < columns(); unit += SIDE)
                    for (int64_t o = first; o < first + SIDE; ++o)
                        for (int64_t c = 2 * unit; c < 2 * (unit + SIDE); c += 2) *next++ = Kind<T>::unit(value(o, c, tap), value(o, c + 1, tap));
        }
    }
    float value(int64_t o, int64_t c, int tap) const {
        if (o >= outputs || c >= channels) return 0.0f;
        return transposed ? weight[(c * outputs + o) * taps + taps - 1 - tap] : weight[(o * channels + c) * taps + tap];
    }
    int tile(int64_t first) const { return outputs - first > FEW ? TILE : FEW; }
    const Unit<T>* of_tile(int64_t first) const { return packed.data() + first * taps * columns(); }
};

// What a thread knows of a job besides its planes.
struct Job {
    const Plan& plan;
    int64_t first, images;
    std::vector<int32_t> mask;  // of each place of a plane, all bits or none: whether it is one of an image
    std::vector<int64_t> away;  // the distance of each place of a window

    Job(const Plan& plan_, int taps) : plan(plan_), first(0), images(0), mask(plan_.stride), away(taps) {
        if (taps > 1)
            for (int tap = 0; tap < taps; ++tap) away[tap] = (tap / 3 - 1) * plan.row + tap % 3 - 1;
    }
    void set(int64_t number, int64_t N) {
        first = number * plan.together;
        int64_t count = std::min(plan.together, N - first);
        if (count == images) return;
        images = count;
        std::fill(mask.begin(), mask.end(), 0);
        each_row([&](int64_t, int64_t, int64_t place) { std::fill_n(mask.begin() + place, plan.width, -1); });
    }
    // f(image, row, its place in a plane).
    template <typename F>
    void each_row(F f) const {
        for (int64_t n = 0; n < images; ++n)
            for (int64_t y = 0; y < plan.height; ++y) f(n, y, plan.place(n, y));
    }
    // f(where a row of a channel begins in a map of so many channels, its place in a plane).
    template <typename F>
    void each_row_of(int64_t channels, int64_t channel, F f) const {
        int64_t size = plan.height * plan.width;
        each_row([&](int64_t n, int64_t y, int64_t place) {
            f(((first + n) * channels + channel) * size + y * plan.width, place);
        });
    }
    template <typename T>
    void load(const T* map, int64_t channels, int64_t channel, T* plane) const {
        if (images < plan.together) std::fill(plane + plan.margin, plane + plan.margin + plan.places, T(0));
        each_row_of(channels, channel, [&](int64_t row, int64_t place) {
            std::memcpy(plane + place, map + row, plan.width * sizeof(T));
        });
    }
    // A plane as a channel of a map, plus the same channel of another map if there is one.
    template <typename T>
    void store(const float* plane, const T* added, int64_t channels, int64_t channel, T* map) const {
        each_row_of(channels, channel, [&](int64_t row, int64_t place) {
            if (added)
                for (int64_t k = 0; k < plan.width; ++k) put(map + row + k, number(added[row + k]) + plane[place + k]);
            else
                for (int64_t k = 0; k < plan.width; ++k) put(map + row + k, plane[place + k]);
        });
    }
};

template <typename T, int O, int P>
inline void convolve_tile(const Unit<T>* in, int64_t stride, int64_t count, const std::vector<int64_t>& away, const Unit<T>* w,
                          const float* biases, const int32_t* mask, float* out) {
    Floats sums[O][P];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sums[o][p] = Floats{} + biases[o];
    for (int64_t distance : away) {
        const Unit<T>* a = in + distance;
        for (int64_t k = 0; k < count; ++k, a += stride, w += O) {
            typename Kind<T>::Vector values[P];
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) values[p] = *reinterpret_cast<const typename Kind<T>::Loose*>(a + p * LANES);
#pragma GCC unroll 8
            for (int o = 0; o < O; ++o) {
                auto weight = Kind<T>::all_of(w[o]);
#pragma GCC unroll 4
                for (int p = 0; p < P; ++p) sums[o][p] = Kind<T>::add_product(sums[o][p], values[p], weight);
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            Ints keep = *reinterpret_cast<const LooseInts*>(mask + p * LANES);
            *reinterpret_cast<LooseFloats*>(out + o * stride + p * LANES) = as_floats(as_ints(sums[o][p]) & keep);
        }
}

template <typename T, int O>
void convolve_tiles(const Job& job, const Unit<T>* in, int64_t count, const Unit<T>* w, const float* biases, float* out) {
    int64_t stride = job.plan.stride, end = job.plan.margin + job.plan.places, q = job.plan.margin;
    auto tile = [&]<int P>() {
        convolve_tile<T, O, P>(in + q, stride, count, job.away, w, biases, job.mask.data() + q, out + q);
        q += P * LANES;
    };
    while (q + WIDE * LANES <= end) tile.template operator()<WIDE>();
    while (q + 2 * LANES <= end) tile.template operator()<2>();
    while (q < end) tile.template operator()<1>();
}

#ifdef __AMX_BF16__
// A block of 16 outputs, or of the last ones, by products of tiles.
inline void convolve_block(const Job& job, const uint32_t* in, int64_t count, const uint32_t* w, const float* biases, int64_t number, float* out) {
    int64_t stride = job.plan.stride, end = job.plan.margin + job.plan.places, q = job.plan.margin;
    float start[SIDE * SIDE];
    for (int64_t i = 0; i < SIDE * SIDE; ++i) start[i] = biases[i / SIDE];
    auto tiles = [&]<int P>() {
        multiply_by_weights<P>(in + q, job.away.data(), job.away.size(), count, stride, w, start, out + q);
        for (int64_t o = 0; o < number; ++o)
            for (int64_t place = q; place < q + P * LANES; place += LANES) {
                Ints keep = *reinterpret_cast<const LooseInts*>(job.mask.data() + place);
                store(out + o * stride + place, as_floats(as_ints(load(out + o * stride + place)) & keep));
            }
        q += P * LANES;
    };
    while (q + 4 * LANES <= end) tiles.template operator()<4>();
    while (q < end) tiles.template operator()<1>();
}

// Planes as pairs of neighbouring places, for each 32 places [16 pairs, 16 planes]; zeros where there are no more planes.
inline void transpose_pairs(const uint16_t* planes, int64_t stride, int64_t number, int64_t places, uint32_t* out) {
    for (int64_t q = 0; q < places; q += 2 * LANES, out += SIDE * SIDE) {
        Ints x[16];
        for (int64_t i = 0; i < SIDE; ++i) x[i] = i < number ? *reinterpret_cast<const LooseInts*>(planes + i * stride + q) : Ints{};
        auto swap = [&]<int D>(Ints low) {  // the bit D of rows with that of places
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                if (i & D) continue;
                Ints a = x[i], b = x[i + D];
                x[i] = __builtin_shuffle(a, b, low);
                x[i + D] = __builtin_shuffle(a, b, low + D);
            }
        };
        swap.template operator()<8>(Ints{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
        swap.template operator()<4>(Ints{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27});
        swap.template operator()<2>(Ints{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
        swap.template operator()<1>(Ints{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30});
        for (int64_t i = 0; i < SIDE; ++i) *reinterpret_cast<LooseInts*>(out + i * SIDE) = x[i];
    }
}

// `add_gradient` by products of tiles.
inline void add_gradient_by_tiles(const Job& job, const Planes<uint16_t>& dy, int64_t outputs, const Planes<uint16_t>& x, int64_t channels,
                                  int64_t column, int64_t columns, int taps, bool anew, float* gradient) {
    int64_t begin = job.plan.margin, places = job.plan.places, none = 0;
    const int64_t* away = taps == 1 ? &none : job.away.data();
    std::vector<uint32_t> pairs(places / 2 * SIDE);
    float sums[3 * SIDE * SIDE];
    for (int64_t o = 0; o < outputs; o += SIDE) {
        int64_t wide = std::min(SIDE, outputs - o);
        transpose_pairs(dy[o] + begin, dy.stride, wide, places, pairs.data());
        for (int64_t c = 0; c < channels; c += SIDE) {
            int64_t high = std::min(SIDE, channels - c);
            Tiles tiles(high, 0);
            for (int tap = 0; tap < taps; tap += 3) {  // 1 or 9
                int number = std::min(3, taps - tap);
                auto multiply = number == 3 ? multiply_over_places<3> : multiply_over_places<1>;
                multiply(x[c] + begin, away + tap, x.stride, pairs.data(), places, sums);
                for (int t = 0; t < number; ++t)
                    for (int64_t i = 0; i < high; ++i)
                        for (int64_t j = 0; j < wide; ++j) {
                            float& sum = gradient[((o + j) * columns + column + c + i) * taps + tap + t];
                            float more = sums[(t * SIDE + i) * SIDE + j];
                            sum = anew ? more : sum + more;
                        }
            }
        }
    }
}
#endif

// A convolution of planes of units, a block of its outputs after another, 0 outside of the images: use(out, first, number) with planes of
// floats.
template <typename T, typename F>
void convolve(const Job& job, const Planes<Unit<T>>& in, const Weights<T>& weights, Planes<float>& out, F use) {
    int64_t count = units<T>(weights.channels);
    Job one(job);
    if (weights.taps == 1) one.away.assign(1, 0);
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<T, uint16_t>)
        if (by_tiles<T>()) {
            for (int64_t first = 0; first < weights.outputs; first += BLOCK) {
                int64_t number = std::min(BLOCK, weights.outputs - first);
                {
                    Tiles tiles(SIDE, count % SIDE);
                    convolve_block(one, in[0], count, weights.of_tile(first), weights.biases.data() + first, number, out[0]);
                }
                use(out, first, number);
            }
            return;
        }
#endif
    for (int64_t first = 0; first < weights.outputs; first += BLOCK) {
        int64_t number = std::min(BLOCK, weights.outputs - first);
        for (int64_t o = first; o < first + number;) {
            int size = weights.tile(o);
            auto tiles = size == TILE ? convolve_tiles<T, TILE> : convolve_tiles<T, FEW>;
            tiles(one, in[0], count, weights.of_tile(o), weights.biases.data() + o, out[o - first]);
            o += size;
        }
        use(out, first, number);
    }
}

// Add to the gradient of weights [outputs, columns, taps], from column `column` on, the sums over places of the planes dy times the planes
// x; anew: there is nothing to add to yet.
template <typename T>
void add_gradient(const Job& job, const Planes<T>& dy, int64_t outputs, const Planes<T>& x, int64_t channels, int64_t column,
                  int64_t columns, int taps, bool anew, float* gradient) {
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<T, uint16_t>)
        if (by_tiles<T>()) return add_gradient_by_tiles(job, dy, outputs, x, channels, column, columns, taps, anew, gradient);
#endif
    constexpr int64_t places = LANES * Kind<T>::CHANNELS;
    typedef typename Kind<T>::Loose Loose;
    int64_t begin = job.plan.margin, end = begin + job.plan.places;
    for (int tap = 0; tap < taps; ++tap) {
        int64_t distance = taps == 1 ? 0 : job.away[tap];
        for (int64_t c = 0; c < channels; c += 4)
            for (int64_t o = 0; o < outputs; o += 4) {
                const T *rows[4], *shifted[4];
                for (int i = 0; i < 4; ++i) {
                    rows[i] = dy[std::min(o + i, outputs - 1)];
                    shifted[i] = x[std::min(c + i, channels - 1)] + distance;
                }
                Floats sums[16] = {};
                for (int64_t q = begin; q < end; q += places) {
                    typename Kind<T>::Vector a[4], b[4];
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) {
                        a[i] = *reinterpret_cast<const Loose*>(rows[i] + q);
                        b[i] = *reinterpret_cast<const Loose*>(shifted[i] + q);
                    }
#pragma GCC unroll 16
                    for (int i = 0; i < 16; ++i) sums[i] = Kind<T>::add_product(sums[i], a[i / 4], b[i % 4]);
                }
                Floats total = sums_of(sums);
                for (int i = 0; i < 16; ++i) {
                    if (o + i / 4 >= outputs || c + i % 4 >= channels) continue;
                    float& sum = gradient[((o + i / 4) * columns + column + c + i % 4) * taps + tap];
                    sum = anew ? total[i] : sum + total[i];
                }
            }
    }
}

template <typename T>
void add_sums(const Job& job, const Planes<T>& dy, int64_t outputs, bool anew, float* sums) {
    int64_t begin = job.plan.margin, end = begin + job.plan.places;
    for (int64_t o = 0; o < outputs; ++o) {
        const T* plane = dy[o];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t q = begin; q < end; ++q) sum += number(plane[q]);
        sums[o] = anew ? sum : sums[o] + sum;
    }
}

// Planes of units from those of single channels, each number through f.
template <typename T, typename F>
void pair_up(const Plan& plan, const T* first, const T* second, Unit<T>* out, F f) {
    for (int64_t q = plan.margin; q < plan.margin + plan.places; q += LANES) {
        Floats low = f(load(first + q)), high = Kind<T>::CHANNELS == 1 ? low : f(load(second + q));
        *reinterpret_cast<typename Kind<T>::Loose*>(out + q) = Kind<T>::units(low, high);
    }
}

// The planes of all channels as units, each number through f; planes(c) is that of channel c.
template <typename T, typename P, typename F>
void pair_all(const Plan& plan, int64_t channels, P planes, Planes<Unit<T>>& out, int64_t first_unit, F f) {
    std::vector<T> nothing;
    for (int64_t c = 0; c < channels; c += Kind<T>::CHANNELS) {
        bool single = Kind<T>::CHANNELS == 2 && c + 1 == channels;
        if (single) nothing.assign(plan.stride, T(0));
        const T* one = planes(c);
        const T* second = Kind<T>::CHANNELS == 1 ? one : single ? nothing.data() : planes(c + 1);
        pair_up<T>(plan, one, second, out[first_unit + c / Kind<T>::CHANNELS], f);
    }
}

// GELU of h, and the gradient of h from that of GELU's value.
template <typename T, typename U>
void through_gelu(const Plan& plan, const T* h, const float* gradient, T* value, U* of_h) {
    for (int64_t q = plan.margin; q < plan.margin + plan.places; q += LANES) {
        Floats x = load(h + q), below, slope;
        Kind<T>::normal(x, below, slope);
        store(value + q, x * below);
        store(of_h + q, load(gradient + q) * slope);
    }
}

struct Sizes {
    int64_t images, height, width, first, second, inner, apart, added;  // channels of both maps, inner ones, and outputs of both kinds
    int taps;
    int64_t channels() const { return first + second; }
    int64_t outputs() const { return apart + added; }
    int64_t weights(int layer) const {
        return layer == 0 ? inner * channels() : layer == 3 ? outputs() * inner : inner * inner * taps;
    }
};

// The weight and the bias of each layer.
struct Parameters {
    const float* of[8];
};

template <typename T>
Weights<T> weights_of(const Sizes& sizes, const Parameters& all, int layer, bool transposed) {
    int64_t O = layer == 3 ? sizes.outputs() : sizes.inner, C = layer == 0 ? sizes.channels() : sizes.inner;
    int taps = layer == 0 || layer == 3 ? 1 : sizes.taps;
    return Weights<T>(all.of[2 * layer], transposed ? nullptr : all.of[2 * layer + 1], O, C, taps, transposed);
}

// The channels of both maps, one after another.
template <typename T>
void load_channel(const Sizes& sizes, const Job& job, const T* x, const T* seen, int64_t channel, T* plane) {
    if (channel < sizes.first) job.load(x, sizes.first, channel, plane);
    else job.load(seen, sizes.second, channel - sizes.first, plane);
}

// kept: nullptr, or h1, h2 and h3 of each job as planes.
template <typename T>
void forward_of(const Sizes& sizes, const Parameters& all, const T* x, const T* seen, T* apart, T* added, T* kept, int threads) {
    Plan plan(sizes.images, sizes.height, sizes.width, sizes.taps);
    std::vector<Weights<T>> layers;
    for (int layer = 0; layer < 4; ++layer) layers.push_back(weights_of<T>(sizes, all, layer, false));
    int64_t jobs = plan.jobs(sizes.images), inner = sizes.inner;
#pragma omp parallel num_threads(threads)
    {
        Job job(plan, sizes.taps);
        Planes<T> some(2, plan.stride), own(kept ? 0 : inner, plan.stride);
        Planes<Unit<T>> wide(units<T>(sizes.channels()), plan.stride), narrow(units<T>(inner), plan.stride),
            other(units<T>(inner), plan.stride);
        Planes<float> out(BLOCK, plan.stride);
        for (auto& layer : layers) layer.pack();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t number_ = 0; number_ < jobs; ++number_) {
            job.set(number_, sizes.images);
            auto channel = [&](int64_t c) {
                T* plane = some[c % 2];
                load_channel(sizes, job, x, seen, c, plane);
                return plane;
            };
            pair_all<T>(plan, sizes.channels(), channel, wide, 0, Gelu<T>());
            Planes<Unit<T>>*in = &wide, *next = &narrow;
            for (int layer = 0; layer < 3; ++layer) {
                T* h = kept ? kept + (number_ * 3 + layer) * inner * plan.stride : own[0];
                convolve<T>(job, *in, layers[layer], out, [&](Planes<float>& block, int64_t first, int64_t count) {
                    for (int64_t o = 0; o < count; ++o) {
                        const float* from = block[o];
                        T* to = h + (first + o) * plan.stride;
                        for (int64_t q = plan.margin; q < plan.margin + plan.places; q += LANES)
                            store(to + q, load(from + q));
                    }
                    auto plane = [&](int64_t c) { return h + (first + c) * plan.stride; };
                    pair_all<T>(plan, count, plane, *next, first / Kind<T>::CHANNELS, Gelu<T>());
                });
                in = next;
                next = in == &narrow ? &other : &narrow;
            }
            convolve<T>(job, *in, layers[3], out, [&](Planes<float>& block, int64_t first, int64_t count) {
                for (int64_t o = first; o < first + count; ++o) {
                    if (o < sizes.apart) job.store<T>(block[o - first], nullptr, sizes.apart, o, apart);
                    else job.store(block[o - first], x, sizes.added, o - sizes.apart, added);
                }
            });
        }
    }
}

template <typename T>
void backward_of(const Sizes& sizes, const Parameters& all, const T* x, const T* seen, const T* dapart, const T* dadded, const T* kept,
                 T* dx, T* dseen, float* const* gradients, int threads) {
    Plan plan(sizes.images, sizes.height, sizes.width, sizes.taps);
    std::vector<Weights<T>> layers;
    for (int layer = 0; layer < 4; ++layer) layers.push_back(weights_of<T>(sizes, all, layer, true));
    int64_t inner = sizes.inner, slices = plan.slices(sizes.images), jobs = plan.jobs(sizes.images);
    int64_t begin[9] = {0};  // of each layer's weights and biases in a slice's sums
    for (int layer = 0; layer < 4; ++layer) {
        begin[2 * layer + 1] = begin[2 * layer] + sizes.weights(layer);
        begin[2 * layer + 2] = begin[2 * layer + 1] + (layer == 3 ? sizes.outputs() : inner);
    }
    std::unique_ptr<float[]> sums(new float[slices * begin[8]]);
#pragma omp parallel num_threads(threads)
    {
        Job job(plan, sizes.taps);
        Planes<T> dy(sizes.outputs(), plan.stride), a(std::max(inner, BLOCK), plan.stride), narrow(inner, plan.stride),
            other(inner, plan.stride), some(1, plan.stride);
        Planes<Unit<T>> dy_units(units<T>(sizes.outputs()), plan.stride), narrow_units(units<T>(inner), plan.stride),
            other_units(units<T>(inner), plan.stride);
        Planes<float> out(BLOCK, plan.stride);
        for (auto& layer : layers) layer.pack();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t slice = 0; slice < slices; ++slice) {
            float* sum = sums.get() + slice * begin[8];
            for (int64_t number_ = slice; number_ < jobs; number_ += slices) {
                job.set(number_, sizes.images);
                bool anew = number_ == slice;
                for (int64_t o = 0; o < sizes.outputs(); ++o) {
                    if (o < sizes.apart) job.load(dapart, sizes.apart, o, dy[o]);
                    else job.load(dadded, sizes.added, o - sizes.apart, dy[o]);
                }
                pair_all<T>(plan, sizes.outputs(), [&](int64_t c) { return dy[c]; }, dy_units, 0, Same());
                Planes<T>*dh = &dy, *next = &narrow;
                Planes<Unit<T>>*dh_units = &dy_units, *next_units = &narrow_units;
                int64_t outputs = sizes.outputs();
                for (int layer = 3; layer > 0; --layer) {
                    const T* h = kept + (number_ * 3 + layer - 1) * inner * plan.stride;
                    convolve<T>(job, *dh_units, layers[layer], out, [&](Planes<float>& block, int64_t first, int64_t count) {
                        for (int64_t o = 0; o < count; ++o)
                            through_gelu(plan, h + (first + o) * plan.stride, block[o], a[first + o], (*next)[first + o]);
                        auto plane = [&](int64_t c) { return (*next)[first + c]; };
                        pair_all<T>(plan, count, plane, *next_units, first / Kind<T>::CHANNELS, Same());
                    });
                    int taps = layer == 3 ? 1 : sizes.taps;
                    add_gradient<T>(job, *dh, outputs, a, inner, 0, inner, taps, anew, sum + begin[2 * layer]);
                    add_sums<T>(job, *dh, outputs, anew, sum + begin[2 * layer + 1]);
                    dh = next, dh_units = next_units, outputs = inner;
                    next = dh == &narrow ? &other : &narrow;
                    next_units = dh_units == &narrow_units ? &other_units : &narrow_units;
                }
                add_sums<T>(job, *dh, inner, anew, sum + begin[1]);
                convolve<T>(job, *dh_units, layers[0], out, [&](Planes<float>& block, int64_t first, int64_t count) {
                    for (int64_t o = 0; o < count; ++o) {
                        int64_t c = first + o;
                        load_channel(sizes, job, x, seen, c, some[0]);
                        float* from = block[o];
                        through_gelu(plan, some[0], from, a[o], from);
                        const T* skipped = sizes.added ? dadded : nullptr;
                        if (c < sizes.first) job.store(from, skipped, sizes.first, c, dx);
                        else job.store<T>(from, nullptr, sizes.second, c - sizes.first, dseen);
                    }
                    add_gradient<T>(job, *dh, inner, a, count, first, sizes.channels(), 1, anew, sum + begin[0]);
                });
            }
        }
        for (int part = 0; part < 8; ++part) {
#pragma omp for schedule(static)
            for (int64_t k = begin[part]; k < begin[part + 1]; ++k) {
                float total = 0;
                for (int64_t slice = 0; slice < slices; ++slice) total += sums[slice * begin[8] + k];
                gradients[part][k - begin[part]] = total;
            }
        }
    }
}

}  // namespace

extern "C" {

// Whether convolutions of bfloat16 are products of tiles.
int multiplies_tiles() { return has_tiles(); }

// Numbers that `kept` holds.
int64_t kept_size(const Sizes* sizes) {
    Plan plan(sizes->images, sizes->height, sizes->width, sizes->taps);
    return plan.jobs(sizes->images) * 3 * sizes->inner * plan.stride;
}

void forward(int is_bf16, const Sizes* sizes, const Parameters* all, const void* x, const void* seen, void* apart, void* added, void* kept,
             int threads) {
    auto run = [&]<typename T>() {
        forward_of<T>(*sizes, *all, static_cast<const T*>(x), static_cast<const T*>(seen), static_cast<T*>(apart), static_cast<T*>(added),
                      static_cast<T*>(kept), threads);
    };
    if (is_bf16) run.template operator()<uint16_t>();
    else run.template operator()<float>();
}

// gradients: of the weight and the bias of each layer.
void backward(int is_bf16, const Sizes* sizes, const Parameters* all, const void* x, const void* seen, const void* dapart,
              const void* dadded, const void* kept, void* dx, void* dseen, float* const* gradients, int threads) {
    auto run = [&]<typename T>() {
        backward_of<T>(*sizes, *all, static_cast<const T*>(x), static_cast<const T*>(seen), static_cast<const T*>(dapart),
                       static_cast<const T*>(dadded), static_cast<const T*>(kept), static_cast<T*>(dx), static_cast<T*>(dseen), gradients,
                       threads);
    };
    if (is_bf16) run.template operator()<uint16_t>();
    else run.template operator()<float>();
}

}
