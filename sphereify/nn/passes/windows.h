// Sums over the windows of a convolution and over channels; `kernels.cpp` includes this file.

#pragma once

#include "curves.h"

namespace {

// ---- Sums over windows

// The geometry of a window over images of (height, width, inner) elements.
struct Window {
    Size height, width, out_height, out_width, inner;
    Size kernel[2], stride[2], padding[2], dilation[2];
};

Window window_of(const Size* numbers) {
    Window w;
    std::memcpy(&w, numbers, sizeof w);
    return w;
}

// The sum over each window of one row of windows, of the elements or their squares. `column` has room for a padded row.
template <bool squared>
void sum_windows(const float* image, const Window& w, Size row, float* column, float* out) {
    const Size width = w.width * w.inner, inner = w.inner;
    float* middle = column + w.padding[1] * inner;
    std::fill(column, middle, 0.f);
    std::fill(middle + width, middle + width + w.padding[1] * inner, 0.f);
    bool first = true;
    for (Size j = 0; j < w.kernel[0]; ++j) {
        const Size y = row * w.stride[0] - w.padding[0] + j * w.dilation[0];
        if (y < 0 || y >= w.height) continue;
        const float* in = image + y * width;
        if (first) {
#pragma omp simd
            for (Size i = 0; i < width; ++i) middle[i] = squared ? in[i] * in[i] : in[i];
        } else {
#pragma omp simd
            for (Size i = 0; i < width; ++i) middle[i] += squared ? in[i] * in[i] : in[i];
        }
        first = false;
    }
    if (first) std::fill(middle, middle + width, 0.f);
    const Size step = w.stride[1] * inner, dilated = w.dilation[1] * inner, outs = w.out_width * inner;
    for (Size j = 0; j < w.kernel[1]; ++j) {
        const float* in = column + j * dilated;
        if (step == inner) {
            if (j == 0) {
                std::copy(in, in + outs, out);
            } else {
#pragma omp simd
                for (Size i = 0; i < outs; ++i) out[i] += in[i];
            }
            continue;
        }
        for (Size x = 0; x < w.out_width; ++x)
            for (Size c = 0; c < inner; ++c)
                out[x * inner + c] = (j ? out[x * inner + c] : 0) + in[x * step + c];
    }
}

// The adjoint: each element of one row of an image gets the sum over its windows. `row` has room for the padded image's
// width and for the windows' reach; the row begins behind the padding.
void spread_windows(const float* windows, const Window& w, Size y, float* column, float* row, Size room) {
    const Size outs = w.out_width * w.inner, inner = w.inner;
    std::fill(row, row + room, 0.f);
    bool any = false;
    for (Size j = 0; j < w.kernel[0]; ++j) {
        const Size from = y + w.padding[0] - j * w.dilation[0];
        if (from < 0 || from % w.stride[0] || from / w.stride[0] >= w.out_height) continue;
        const float* in = windows + from / w.stride[0] * outs;
        if (!any) {
            std::copy(in, in + outs, column);
        } else {
#pragma omp simd
            for (Size i = 0; i < outs; ++i) column[i] += in[i];
        }
        any = true;
    }
    if (!any) return;
    const Size step = w.stride[1] * inner;
    for (Size j = 0; j < w.kernel[1]; ++j) {
        float* out = row + j * w.dilation[1] * inner;
        if (step == inner) {
#pragma omp simd
            for (Size i = 0; i < outs; ++i) out[i] += column[i];
            continue;
        }
        for (Size x = 0; x < w.out_width; ++x)
            for (Size c = 0; c < inner; ++c) out[x * step + c] += column[x * inner + c];
    }
}

template <int N>
void short_rows(const float* x, Size rows, float* out, int threads) {
#pragma omp parallel for simd num_threads(rows * N < FEW ? 1 : threads)
    for (Size r = 0; r < rows; ++r) {
        float total = 0;
        for (int c = 0; c < N; ++c) total += x[r * N + c] * x[r * N + c];
        out[r] = total;
    }
}

inline float sum_of_squares(const float* x, Size m) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (Size i = 0; i < m; ++i) total += x[i] * x[i];
    return total;
}

void add_and_root(float* values, Size m, float eps) {
#pragma omp simd
    for (Size i = 0; i < m; ++i) values[i] = std::sqrt(values[i] + eps);
}

}  // namespace
