// g(θ) and its slope for fp32, and the numbers that they depend on; `kernels.cpp` includes this file.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Size = std::int64_t;

enum Form { ROWS, CELLS, PLANES };
enum Activation { NONE, RELU, HARDSWISH };
enum Curve { COSINE, LINEAR, SIGMOID, QUOTIENT, ANGLE, LOGISTIC };

constexpr float HALF_PI = 1.57079632679489662f;
constexpr Size STRIP = 1024;      // places of a plane that are done for all filters before the next
constexpr Size FEW = 1 << 14;     // elements for which one thread is faster than several

// ---- Functions of one number, without branches, so that loops over them are vectorized

inline float clipped(float x, float low, float high) {
    x = x < low ? low : x;  // NaN stays
    return x > high ? high : x;
}

template <int N>
inline float polynomial(const float (&coefficients)[N], float x) {
    float total = coefficients[N - 1];
    for (int i = N - 2; i >= 0; --i) total = total * x + coefficients[i];
    return total;
}

// 2/π·arcsin c, for c in [-1, 1]; see arcsine.py.
inline float arcsin_in_right_angles(float c) {
    const float m = std::fabs(c), s = std::sqrt(1 - m);
    const float fall = m < .25f ? -m / (1 + s) : s - 1;  // s - 1, which loses the digits of a small m
    return std::copysign(m + s * (fall - m * polynomial(ARCSINE, m)), c);
}

// sin(π/2·share), for a share in [-1, 1].
inline float sine_of_right_angles(float share) { return share * polynomial(SINE, share * share); }

// e^x to 1e-7, for x in [-87, 80], beyond which x is held.
inline float exponential(float x) {
    constexpr float TERMS[] = {1.f, 1.f, 1 / 2.f, 1 / 6.f, 1 / 24.f, 1 / 120.f, 1 / 720.f, 1 / 5040.f};
    x = clipped(x, -87, 80);
    const float shifted = x * 1.44269504088896341f + 12582912.f;  // whose last bits are the nearest whole number
    const float n = shifted - 12582912.f;
    const float rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
    std::int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return power * polynomial(TERMS, rest);
}

// The natural logarithm of a finite x >= 1, to 1e-7.
inline float logarithm(float x) {
    constexpr float TERMS[] = {2.f, 2 / 3.f, 2 / 5.f, 2 / 7.f, 2 / 9.f};
    std::int32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::int32_t exponent = (bits - 0x3f3504f3) >> 23;  // so that the rest is in [√½, √2)
    bits -= exponent << 23;
    float rest;
    std::memcpy(&rest, &bits, 4);
    const float s = (rest - 1) / (rest + 1);
    return exponent * 0.693147180559945309f + s * polynomial(TERMS, s * s);  // log = 2·artanh s
}

// ---- g(θ) and its slope, as in operators.py

// The numbers of one filter.
struct Filter {
    float beta, shift;
    float inverse_k, stretch;  // 1/k and 1/top
    float top;                 // tanh(π/4k)
    float by_flat;             // 1 / (2·k·top)
    float share_of_artanh;     // 4·k/π
    float by_k;                // π / (4·k²·top)
};

// The last three are what is left of the first three where all that is constant is part of the filters or of the scale
// (folded_layers.py).
template <Curve C>
inline float value(float cos, const float inverse_k, const float stretch) {
    if (C == QUOTIENT) return cos;
    cos = clipped(cos, -1, 1);
    if (C == COSINE) return cos;
    const float share = arcsin_in_right_angles(cos);
    if (C == LINEAR) return share;
    if (C == ANGLE) return share * HALF_PI;
    const float logistic = 1 / (1 + exponential(-(share * HALF_PI) * inverse_k));
    if (C == LOGISTIC) return logistic - .5f;
    return clipped(2 * stretch * logistic - stretch, -1, 1);
}

struct Slope {
    float cos, by_cos, by_k;
};

template <Curve C>
inline Slope slope(float g, float floor, float top, float by_flat, float share_of_artanh, float by_k) {
    if (C == COSINE) return {g, 1, 0};
    float share = g, flat = 1;
    Slope found{0, 0, 0};
    if (C == SIGMOID) {
        const float t = g * top, size = std::fabs(t);
        flat = 1 - t * t;
        const float artanh = .5f * logarithm((1 + size) / (1 - size));  // no number where size is 1
        const float angle = clipped(artanh * share_of_artanh, 0, 1);
        share = std::copysign(size < 1 ? angle : 1.f, t);  // for small k rounding takes t to 1: the pole
        found.by_k = (g * (1 - top * top) - flat * share) * by_k;
    }
    found.cos = sine_of_right_angles(share);
    const float sine = clipped(sine_of_right_angles(1 - std::fabs(share)), floor, 1);
    found.by_cos = (C == LINEAR ? 1 / HALF_PI : flat * by_flat) / sine;
    return found;
}

// The numbers of all filters; β is 1 and the shift 0 where there is none, k is one for each filter or for all.
struct Filters {
    std::vector<float> beta, shift, inverse_k, stretch, top, by_flat, share_of_artanh, by_k;

    Filters(Size count, const float* betas, const float* shifts, const float* ks, Size count_k)
        : beta(count, 1), shift(count, 0), inverse_k(count, 0), stretch(count, 0), top(count, 0), by_flat(count, 0),
          share_of_artanh(count, 0), by_k(count, 0) {
        if (betas) std::copy(betas, betas + count, beta.begin());
        if (shifts) std::copy(shifts, shifts + count, shift.begin());
        for (Size f = 0; ks && f < count; ++f) {
            const double k = ks[count_k == 1 ? 0 : f], t = std::tanh(HALF_PI / 2 / k);
            inverse_k[f] = 1 / k;
            stretch[f] = 1 / t;
            top[f] = t;
            by_flat[f] = 1 / (2 * k * t);
            share_of_artanh[f] = 2 * k / HALF_PI;
            by_k[f] = HALF_PI / (2 * k * k * t);
        }
    }
};

}  // namespace
