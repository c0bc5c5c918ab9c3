// Normalization of maps and the activation after it, forward and backward, on a CPU. Wu & He 2018; Ioffe & Szegedy 2015.
//
// A map is dense as [N images, P places, C channels], in float32 or bfloat16; every sum and product is in float32, sums over many
// places in float64. With a and b of each image and channel, h = a x + b and y = act(h); g = dy act'(h).
//
//   moments         mean and sum of squared deviations of x over the places of an image, [N, C] each
//   affine          y
//   sums            S1 = sum g and S2 = sum g (x - centre) over the places of an image, [N, C] each
//   input_gradient  dx = a g + p (x - centre) + q
//   group_norm...   GroupNorm as these four in one pass over the images, each of which then stays in a core's cache
//
// A sum over places goes through partial sums of fixed lengths, so results do not depend on the number of threads.
// a, b, centre, p and q of batch normalization are the same for all images: their stride is 0, otherwise C.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "numbers.h"
#include "vectors.h"

namespace {

enum Act { NONE, SILU, RELU, LEAKY };
constexpr float SLOPE = 0.2f;        // of LEAKY
constexpr int64_t SPAN = 512;        // floats that the inner loops go over at once, about
constexpr int64_t PARTIAL = 64;      // spans that are summed in float32
constexpr int64_t KEPT = 1 << 18;    // the most values of an image of which g is kept between two passes, in a core's cache
constexpr int64_t TOGETHER = 1 << 14;  // values of an image that one thread takes at once

// 1 / (1 + e^-h): to a rounding for float32, to a tenth of a rounding for bfloat16.
template <typename T> inline Floats logistic(Floats h) { return 1.0f / (1.0f + exponential(-h)); }
template <> inline Floats logistic<uint16_t>(Floats h) { return near_reciprocal(1.0f + near_power_of_two(h * -1.44269504f)); }

template <typename T, int ACT>
inline Floats activated(Floats h) {
    if (ACT == SILU) return h * logistic<T>(h);
    if (ACT == RELU) return h < 0.0f ? Floats{} : h;
    if (ACT == LEAKY) return h < 0.0f ? SLOPE * h : h;
    return h;
}

// act'(h), with torch's values where the derivative does not exist.
template <typename T, int ACT>
inline Floats slope(Floats h) {
    if (ACT == SILU) {
        Floats s = logistic<T>(h);
        return s * (1.0f + h * (1.0f - s));
    }
    if (ACT == RELU) return h > 0.0f ? all(1.0f) : Floats{};
    if (ACT == LEAKY) return h > 0.0f ? all(1.0f) : all(SLOPE);
    return all(1.0f);
}

// Rows of C values are taken `rows` at once, so that the inner loop is long where there are few channels, and goes over whole vectors.
struct Shape {
    int64_t places, channels, rows, span;
    Shape(int64_t P, int64_t C) : places(P), channels(C) {
        int64_t whole = LANES / std::gcd(LANES, C);
        rows = (std::max<int64_t>(1, SPAN / C) + whole - 1) / whole * whole;
        span = rows * C;
    }
    int64_t size() const { return places * channels; }
    // A vector of each channel, repeated for the rows of a span.
    std::vector<float> repeated(const float* values) const {
        std::vector<float> all(span);
        for (int64_t row = 0; row < rows; ++row) std::copy(values, values + channels, all.begin() + row * channels);
        return all;
    }
    // f(i, k, left) for the vectors from value i on of a map, at place k of a span; `left` values from there to the end of the map.
    template <typename F>
    void each_vector(int64_t begin, int64_t end, F f) const {
        for (int64_t base = begin; base < end; base += span)
            for (int64_t k = 0, length = std::min(span, end - base); k < length; k += LANES) f(base + k, k, end - base - k);
    }
};

// Two sums of each channel over the places of an image. `add(i, k, left, first, second)` adds the terms of the vector at value i of the map,
// at place k of a span, to the two partial sums.
template <typename F>
void sum_over_places(const Shape& shape, float* first, float* second, F add) {
    std::vector<float> a(shape.span), b(shape.span);
    std::vector<double> wide_a(shape.channels), wide_b(shape.channels);
    for (int64_t start = 0; start < shape.size(); start += PARTIAL * shape.span) {
        std::fill(a.begin(), a.end(), 0.0f);
        std::fill(b.begin(), b.end(), 0.0f);
        shape.each_vector(start, std::min(shape.size(), start + PARTIAL * shape.span), [&](int64_t i, int64_t k, int64_t left) {
            Floats sum = load(a.data() + k), other = load(b.data() + k);
            add(i, k, left, sum, other);
            store(a.data() + k, sum);
            store(b.data() + k, other);
        });
        for (int64_t k = 0; k < shape.span; ++k) {
            wide_a[k % shape.channels] += a[k];
            wide_b[k % shape.channels] += b[k];
        }
    }
    for (int64_t c = 0; c < shape.channels; ++c) {
        first[c] = static_cast<float>(wide_a[c]);
        second[c] = static_cast<float>(wide_b[c]);
    }
}

// Mean and sum of squared deviations of an image, from deviations from its first place, so that little cancels.
template <typename T>
void image_moments(const T* x, const Shape& shape, float* mean, float* deviations) {
    std::vector<float> first(shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) first[c] = number(x[c]);
    auto shift = shape.repeated(first.data());
    const float* s = shift.data();
    sum_over_places(shape, mean, deviations, [=](int64_t i, int64_t k, int64_t left, Floats& sum, Floats& square) {
        Floats d = only(load_some(x + i, left) - load(s + k), left);
        sum += d;
        square += d * d;
    });
    for (int64_t c = 0; c < shape.channels; ++c) {
        double d = static_cast<double>(mean[c]) / shape.places;
        deviations[c] = std::max(0.0f, static_cast<float>(deviations[c] - d * mean[c]));
        mean[c] = static_cast<float>(first[c] + d);
    }
}

template <typename T, int ACT>
void image_affine(const T* x, T* y, const Shape& shape, const float* scales, const float* shifts) {
    auto a = shape.repeated(scales), b = shape.repeated(shifts);
    const float *pa = a.data(), *pb = b.data();
    shape.each_vector(0, shape.size(), [=](int64_t i, int64_t k, int64_t left) {
        store_some(y + i, activated<T, ACT>(load_some(x + i, left) * load(pa + k) + load(pb + k)), left);
    });
}

// kept: where g is written, or null.
template <typename T, int ACT>
void image_sums(const T* dy, const T* x, const Shape& shape, const float* scales, const float* shifts,
                const float* centres, float* s1, float* s2, float* kept) {
    auto a = shape.repeated(scales), b = shape.repeated(shifts), c = shape.repeated(centres);
    const float *pa = a.data(), *pb = b.data(), *pc = c.data();
    sum_over_places(shape, s1, s2, [=](int64_t i, int64_t k, int64_t left, Floats& sum, Floats& product) {
        Floats value = load_some(x + i, left), g = load_some(dy + i, left) * slope<T, ACT>(value * load(pa + k) + load(pb + k));
        if (kept) store_some(kept + i, g, left);
        sum += g;
        product += g * (value - load(pc + k));
    });
}

// kept: g, or null for it to be computed.
template <typename T, int ACT>
void image_gradient(const T* dy, const T* x, T* dx, const Shape& shape, const float* scales, const float* shifts,
                    const float* centres, const float* slopes, const float* constants, const float* kept) {
    auto a = shape.repeated(scales), b = shape.repeated(shifts), c = shape.repeated(centres);
    auto p = shape.repeated(slopes), q = shape.repeated(constants);
    const float *pa = a.data(), *pb = b.data(), *pc = c.data(), *pp = p.data(), *pq = q.data();
    shape.each_vector(0, shape.size(), [=](int64_t i, int64_t k, int64_t left) {
        Floats value = load_some(x + i, left), scale = load(pa + k);
        Floats g = kept ? load_some(kept + i, left) : load_some(dy + i, left) * slope<T, ACT>(value * scale + load(pb + k));
        store_some(dx + i, scale * g + load(pp + k) * (value - load(pc + k)) + load(pq + k), left);
    });
}

// What GroupNorm needs of an image: mean and 1 / sigma of each group, and a and b of each channel.
struct Groups {
    int64_t groups, width;
    std::vector<float> a, b, mean;
    Groups(int64_t C, int64_t G) : groups(G), width(C / G), a(C), b(C), mean(C) {}
    void set(const float* means, const float* rstds, const float* weight, const float* bias) {
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                mean[c] = means[g];
                a[c] = weight[c] * rstds[g];
                b[c] = bias[c] - means[g] * a[c];
            }
    }
};

template <typename T, int ACT>
void group_norm_forward_of(const T* x, T* y, int64_t N, int64_t P, int64_t C, int64_t G, const float* weight,
                           const float* bias, float eps, float* mean, float* rstd, int threads) {
    Shape shape(P, C);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        Groups groups(C, G);
        std::vector<float> means(C), deviations(C);
        image_moments(x + n * shape.size(), shape, means.data(), deviations.data());
        for (int64_t g = 0; g < G; ++g) {
            double sum = 0, square = 0;
            for (int64_t c = g * groups.width; c < (g + 1) * groups.width; ++c) sum += means[c];
            double centre = sum / groups.width;
            for (int64_t c = g * groups.width; c < (g + 1) * groups.width; ++c)
                square += deviations[c] + P * (means[c] - centre) * (means[c] - centre);
            mean[n * G + g] = static_cast<float>(centre);
            rstd[n * G + g] = static_cast<float>(1 / std::sqrt(square / (groups.width * P) + eps));
        }
        groups.set(mean + n * G, rstd + n * G, weight, bias);
        image_affine<T, ACT>(x + n * shape.size(), y + n * shape.size(), shape, groups.a.data(), groups.b.data());
    }
}

template <typename T, int ACT>
void group_norm_backward_of(const T* dy, const T* x, T* dx, int64_t N, int64_t P, int64_t C, int64_t G,
                            const float* weight, const float* bias, const float* mean, const float* rstd, float* s1,
                            float* s2, int threads) {
    Shape shape(P, C);
    bool keeps = ACT == SILU && shape.size() <= KEPT;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> kept(keeps ? shape.size() : 0);
        float* g_n = keeps ? kept.data() : nullptr;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n) {
            Groups groups(C, G);
            groups.set(mean + n * G, rstd + n * G, weight, bias);
            const T *dy_n = dy + n * shape.size(), *x_n = x + n * shape.size();
            float *first = s1 + n * C, *second = s2 + n * C;
            image_sums<T, ACT>(dy_n, x_n, shape, groups.a.data(), groups.b.data(), groups.mean.data(), first, second, g_n);
            std::vector<float> p(C), q(C);
            for (int64_t g = 0; g < G; ++g) {
                double m1 = 0, m2 = 0, r = rstd[n * G + g];
                for (int64_t c = g * groups.width; c < (g + 1) * groups.width; ++c) {
                    second[c] = static_cast<float>(second[c] * r);  // sum of g x^, x^ = (x - mean) rstd
                    m1 += weight[c] * first[c];
                    m2 += weight[c] * second[c];
                }
                double count = static_cast<double>(groups.width) * P;
                for (int64_t c = g * groups.width; c < (g + 1) * groups.width; ++c) {
                    p[c] = static_cast<float>(-r * r * m2 / count);
                    q[c] = static_cast<float>(-r * m1 / count);
                }
            }
            image_gradient<T, ACT>(dy_n, x_n, dx + n * shape.size(), shape, groups.a.data(), groups.b.data(),
                                   groups.mean.data(), p.data(), q.data(), g_n);
        }
    }
}

// The places of all images in pieces for threads: f(image, first place, number of places).
template <typename F>
void over_pieces(int64_t N, int64_t P, int64_t C, int threads, F f) {
    int64_t places = std::max<int64_t>(1, TOGETHER / C), pieces = (P + places - 1) / places;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t job = 0; job < N * pieces; ++job) {
        int64_t start = job % pieces * places;
        f(job / pieces, start, std::min(places, P - start));
    }
}

// Call f<T, ACT>() with the type and activation that two codes name.
template <typename T, typename F>
void with_act(int act, F f) {
    if (act == SILU) f.template operator()<T, SILU>();
    else if (act == RELU) f.template operator()<T, RELU>();
    else if (act == LEAKY) f.template operator()<T, LEAKY>();
    else f.template operator()<T, NONE>();
}

template <typename F>
void with_types(int is_bf16, int act, F f) {
    if (is_bf16) with_act<uint16_t>(act, f);
    else with_act<float>(act, f);
}

}  // namespace

extern "C" {

void group_norm_forward(int is_bf16, int act, const void* x, void* y, int64_t N, int64_t P, int64_t C, int64_t G,
                        const float* weight, const float* bias, float eps, float* mean, float* rstd, int threads) {
    with_types(is_bf16, act, [&]<typename T, int ACT>() {
        group_norm_forward_of<T, ACT>(static_cast<const T*>(x), static_cast<T*>(y), N, P, C, G, weight, bias, eps, mean,
                                      rstd, threads);
    });
}

void group_norm_backward(int is_bf16, int act, const void* dy, const void* x, void* dx, int64_t N, int64_t P, int64_t C,
                         int64_t G, const float* weight, const float* bias, const float* mean, const float* rstd,
                         float* s1, float* s2, int threads) {
    with_types(is_bf16, act, [&]<typename T, int ACT>() {
        group_norm_backward_of<T, ACT>(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), N, P,
                                       C, G, weight, bias, mean, rstd, s1, s2, threads);
    });
}

void moments(int is_bf16, const void* x, int64_t N, int64_t P, int64_t C, float* mean, float* deviations, int threads) {
    with_types(is_bf16, NONE, [&]<typename T, int ACT>() {
        Shape shape(P, C);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t n = 0; n < N; ++n)
            image_moments(static_cast<const T*>(x) + n * shape.size(), shape, mean + n * C, deviations + n * C);
    });
}

void affine(int is_bf16, int act, const void* x, void* y, int64_t N, int64_t P, int64_t C, const float* a,
            const float* b, int64_t stride, int threads) {
    with_types(is_bf16, act, [&]<typename T, int ACT>() {
        over_pieces(N, P, C, threads, [&](int64_t n, int64_t start, int64_t places) {
            int64_t offset = (n * P + start) * C;
            image_affine<T, ACT>(static_cast<const T*>(x) + offset, static_cast<T*>(y) + offset, Shape(places, C),
                                 a + n * stride, b + n * stride);
        });
    });
}

void sums(int is_bf16, int act, const void* dy, const void* x, int64_t N, int64_t P, int64_t C, const float* a,
          const float* b, const float* centre, int64_t stride, float* s1, float* s2, int threads) {
    with_types(is_bf16, act, [&]<typename T, int ACT>() {
        Shape shape(P, C);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t n = 0; n < N; ++n)
            image_sums<T, ACT>(static_cast<const T*>(dy) + n * shape.size(), static_cast<const T*>(x) + n * shape.size(),
                               shape, a + n * stride, b + n * stride, centre + n * stride, s1 + n * C, s2 + n * C, nullptr);
    });
}

void input_gradient(int is_bf16, int act, const void* dy, const void* x, void* dx, int64_t N, int64_t P, int64_t C,
                    const float* a, const float* b, const float* centre, const float* p, const float* q, int64_t stride,
                    int threads) {
    with_types(is_bf16, act, [&]<typename T, int ACT>() {
        over_pieces(N, P, C, threads, [&](int64_t n, int64_t start, int64_t places) {
            int64_t offset = (n * P + start) * C, own = n * stride;
            image_gradient<T, ACT>(static_cast<const T*>(dy) + offset, static_cast<const T*>(x) + offset,
                                   static_cast<T*>(dx) + offset, Shape(places, C), a + own, b + own, centre + own,
                                   p + own, q + own, nullptr);
        });
    });
}

}
