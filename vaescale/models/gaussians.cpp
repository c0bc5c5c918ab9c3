// Draws and KL of a ladder's Gaussians, forward and backward, on a CPU: each map is read once.
//
// With d = (mu - mu_p) / sigma_p and r = sigma / sigma_p, z = mu + sigma epsilon and KL = (d^2 + r^2 - 1) / 2 - log r, summed over the P places
// of a channel. Maps are float32 [N, Z, P], each image dense; the distance between images is that of a larger map of which they are a part.
// Without a prior's map it is the standard normal.

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr float BOUND = 8.0f;
constexpr int64_t TOGETHER = 1 << 12;  // values that one thread takes at once

// e^x - 1 - x, near 0 by its series, where the terms would cancel.
inline Floats excess(Floats x) {
    constexpr float series[] = {1.0f / 2,   1.0f / 6,    1.0f / 24,    1.0f / 120,    1.0f / 720,
                                1.0f / 5040, 1.0f / 40320, 1.0f / 362880, 1.0f / 3628800};
    return magnitude(x) < 1.0f ? x * x * polynomial(series, x) : exponential(x) - 1.0f - x;
}

inline Floats tanh_of(Floats x) {
    Floats twice = 2.0f * at_most(20.0f, magnitude(x)), less = twice + excess(twice), result = less / (less + 2.0f);
    return x < 0.0f ? -result : result;
}

inline float total(Floats x) {
    double sum = 0;
    for (int64_t i = 0; i < LANES; ++i) sum += x[i];
    return static_cast<float>(sum);
}

struct Map {
    const float* data;
    int64_t distance;  // between images
    const float* row(int64_t n, int64_t begin) const { return data ? data + n * distance + begin : nullptr; }
};

// What a value's draw and KL are made of.
struct Parts {
    Floats sigma, inverse, deviation, log_square;
    Parts(const float* mu, const float* log_sigma, const float* mu_p, const float* log_sigma_p, int64_t left) {
        Floats log_ratio = load_some(log_sigma, left);
        sigma = exponential(log_ratio);
        deviation = load_some(mu, left);
        inverse = all(1.0f);
        if (mu_p) {
            Floats log_of_prior = load_some(log_sigma_p, left);
            inverse = exponential(-log_of_prior);
            deviation = (deviation - load_some(mu_p, left)) * inverse;
            log_ratio = log_ratio - log_of_prior;
        }
        log_square = 2.0f * log_ratio;
    }
};

struct Sizes {
    int64_t images, channels, places;
};

// f(image, channel, first place, place within the image) for the channels of all images, by threads.
template <typename F>
void over_channels(const Sizes& sizes, int threads, F f) {
    int64_t few = std::max<int64_t>(1, TOGETHER / sizes.places);
#pragma omp parallel for num_threads(threads) schedule(static, few)
    for (int64_t job = 0; job < sizes.images * sizes.channels; ++job)
        f(job / sizes.channels, job, job % sizes.channels * sizes.places);
}

}  // namespace

extern "C" {

// z and the cost [N, Z] are dense.
void draw(const Sizes* sizes, const Map* mu, const Map* log_sigma, const Map* mu_p, const Map* log_sigma_p, const Map* epsilon, float* z,
          float* cost, int threads) {
    int64_t P = sizes->places;
    over_channels(*sizes, threads, [&](int64_t n, int64_t channel, int64_t begin) {
        const float *m = mu->row(n, begin), *s = log_sigma->row(n, begin), *m_p = mu_p->row(n, begin), *s_p = log_sigma_p->row(n, begin),
                    *e = epsilon->row(n, begin);
        Floats sum{};
        for (int64_t k = 0; k < P; k += LANES) {
            Parts parts(m + k, s + k, m_p ? m_p + k : m_p, s_p ? s_p + k : s_p, P - k);
            store_some(z + channel * P + k, load_some(m + k, P - k) + parts.sigma * load_some(e + k, P - k), P - k);
            sum = sum + 0.5f * (parts.deviation * parts.deviation + excess(parts.log_square));
        }
        cost[channel] = total(sum);
    });
}

// of_mu_p and of_log_sigma_p: nullptr without a prior. All gradients are dense.
void draw_backward(const Sizes* sizes, const Map* mu, const Map* log_sigma, const Map* mu_p, const Map* log_sigma_p, const Map* epsilon,
                   const float* of_z, const float* of_cost, float* of_mu, float* of_log_sigma, float* of_mu_p, float* of_log_sigma_p,
                   int threads) {
    int64_t P = sizes->places;
    over_channels(*sizes, threads, [&](int64_t n, int64_t channel, int64_t begin) {
        const float *m = mu->row(n, begin), *s = log_sigma->row(n, begin), *m_p = mu_p->row(n, begin), *s_p = log_sigma_p->row(n, begin),
                    *e = epsilon->row(n, begin);
        for (int64_t k = 0; k < P; k += LANES) {
            int64_t place = channel * P + k, left = P - k;
            Parts parts(m + k, s + k, m_p ? m_p + k : m_p, s_p ? s_p + k : s_p, left);
            Floats dz = load_some(of_z + place, left), of_deviation = parts.deviation * of_cost[channel];
            Floats of_ratio = (parts.log_square + excess(parts.log_square)) * of_cost[channel];  // r^2 - 1
            Floats moved = of_deviation * parts.inverse;
            store_some(of_mu + place, dz + moved, left);
            store_some(of_log_sigma + place, dz * load_some(e + k, left) * parts.sigma + of_ratio, left);
            if (!of_mu_p) continue;
            store_some(of_mu_p + place, -moved, left);
            store_some(of_log_sigma_p + place, -(of_deviation * parts.deviation + of_ratio), left);
        }
    });
}

// 8 tanh(x / 8), dense.
void bounded(const Sizes* sizes, const Map* x, float* y, int threads) {
    over_channels(*sizes, threads, [&](int64_t n, int64_t channel, int64_t begin) {
        const float* from = x->row(n, begin);
        for (int64_t k = 0, P = sizes->places; k < P; k += LANES)
            store_some(y + channel * P + k, BOUND * tanh_of(load_some(from + k, P - k) / BOUND), P - k);
    });
}

void bounded_backward(const Sizes* sizes, const Map* of_y, const float* y, float* of_x, int threads) {
    over_channels(*sizes, threads, [&](int64_t n, int64_t channel, int64_t begin) {
        const float* from = of_y->row(n, begin);
        for (int64_t k = 0, P = sizes->places; k < P; k += LANES) {
            int64_t place = channel * P + k;
            Floats ratio = load_some(y + place, P - k) / BOUND;
            store_some(of_x + place, load_some(from + k, P - k) * (1.0f - ratio * ratio), P - k);
        }
    });
}

}
