// The passes around the products of an angular map, for fp32 on a CPU: one loop over the elements for each of them.
//
// `library.py` compiles this file with its headers, and puts the coefficients of the polynomials in front of it (ARCSINE,
// SINE); `compiled.py` calls the functions at its end. What they compute is in `protocol.py`.
//
// Tensors lie in memory in one of three forms, in which the innermost loop is over adjacent elements:
//
//   ROWS    (rows, filters): linear maps and channels_last convolutions; a row has one norm. With groups, a row is one
//           group at one place, and row r has the filters of group r % groups.
//   CELLS   (rows, filters): channels_last with one channel a group; each element has a norm of its own.
//   PLANES  (planes, filters, places): contiguous convolutions; plane p is one group of one sample, the group
//           p % groups, and each place has a norm.

#include "curves.h"
#include "windows.h"

namespace {

// ---- Forward

// A strip of m adjacent elements. `each_norm`, `each_filter`: they change from element to element.
template <Curve C, bool each_norm, bool each_filter, bool rescaled>
inline void curve_strip(float* dot, const float* norm, const Filters& filters, Size f, float* y, Size m) {
    const float inverse = 1 / norm[0];
    const float *beta = &filters.beta[f], *shift = &filters.shift[f];
    const float *inverse_k = &filters.inverse_k[f], *stretch = &filters.stretch[f];
#pragma omp simd
    for (Size i = 0; i < m; ++i) {
        const Size j = each_filter ? i : 0;
        const float g = value<C>(each_norm ? dot[i] / norm[i] : dot[i] * inverse, inverse_k[j], stretch[j]);
        if (rescaled) y[i] = shift[j] + g * beta[j];
        if (!rescaled || y != dot) dot[i] = g;
    }
}

inline void activate(Activation activation, float* y, Size m) {
    if (activation == NONE) return;
    const bool hard = activation == HARDSWISH;
#pragma omp simd
    for (Size i = 0; i < m; ++i) y[i] = hard ? y[i] * clipped(y[i] + 3, 0, 6) * (1 / 6.f) : y[i] < 0 ? 0 : y[i];
}

template <Curve C, bool rescaled>
void curve_all(Form form, Size rows, Size groups, Size count, Size places, float* dot, const float* norm,
               const Filters& filters, float* y, Activation activation, int threads) {
    const bool few = rows * count * places < FEW;
    if (form == PLANES) {
        const Size strips = (places + STRIP - 1) / STRIP;
#pragma omp parallel for collapse(2) num_threads(few ? 1 : threads)
        for (Size p = 0; p < rows; ++p)
            for (Size s = 0; s < strips; ++s) {
                const Size at = s * STRIP, m = std::min(STRIP, places - at);
                for (Size c = 0; c < count; ++c) {
                    const Size i = (p * count + c) * places + at;
                    curve_strip<C, true, false, rescaled>(dot + i, norm + p * places + at, filters,
                                                          p % groups * count + c, y + (rescaled ? i : 0), m);
                    activate(activation, y + i, m);
                }
            }
        return;
    }
#pragma omp parallel for num_threads(few ? 1 : threads)
    for (Size r = 0; r < rows; ++r) {
        float* out = y + (rescaled ? r * count : 0);
        if (form == CELLS)
            curve_strip<C, true, true, rescaled>(dot + r * count, norm + r * count, filters, 0, out, count);
        else
            curve_strip<C, false, true, rescaled>(dot + r * count, norm + r, filters, r % groups * count, out, count);
        activate(activation, out, count);
    }
}

// ---- Backward

// Sums over places, one for each filter: of fp32 over a stretch of them, of float64 over the stretches.
struct Sums {
    std::vector<double> shift, beta, k;
    std::vector<float> part_shift, part_beta, part_k;

    explicit Sums(Size filters)
        : shift(filters), beta(filters), k(filters), part_shift(filters), part_beta(filters), part_k(filters) {}

    void flush() {
        for (std::size_t f = 0; f < shift.size(); ++f) {
            shift[f] += part_shift[f];
            beta[f] += part_beta[f];
            k[f] += part_k[f];
        }
        for (auto* part : {&part_shift, &part_beta, &part_k}) std::fill(part->begin(), part->end(), 0.f);
    }

    void add(const Sums& other) {
        for (std::size_t f = 0; f < shift.size(); ++f) {
            shift[f] += other.shift[f];
            beta[f] += other.beta[f];
            k[f] += other.k[f];
        }
    }
};

// A strip of a row: all elements have one norm, each a filter of its own. Returns Σ d·cos.
template <Curve C, bool summed>
inline float backward_row(const float* grad, const float* g, float norm, float floor, const Filters& filters, Size f,
                          float* d_dot, Sums& sums, Size m) {
    const float *beta = &filters.beta[f], *top = &filters.top[f], *by_flat = &filters.by_flat[f];
    const float *share = &filters.share_of_artanh[f], *by_k = &filters.by_k[f];
    float *to_shift = &sums.part_shift[f], *to_beta = &sums.part_beta[f], *to_k = &sums.part_k[f];
    const float inverse = 1 / norm;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (Size i = 0; i < m; ++i) {
        const Slope s = slope<C>(g[i], floor, top[i], by_flat[i], share[i], by_k[i]);
        const float up = grad[i] * beta[i];
        if (summed) {
            to_shift[i] += grad[i];
            to_beta[i] += grad[i] * g[i];
            if (C == SIGMOID) to_k[i] += up * s.by_k;
        }
        const float d = up * s.by_cos;
        total += d * s.cos;
        d_dot[i] = d * inverse;
    }
    return total;
}

// A strip in which each element has a norm and a filter of its own.
template <Curve C, bool summed>
inline void backward_cells(const float* grad, const float* g, const float* norm, float floor, const Filters& filters,
                           float* d_dot, float* radial, Sums& sums, Size m) {
    const float *beta = filters.beta.data(), *top = filters.top.data(), *by_flat = filters.by_flat.data();
    const float *share = filters.share_of_artanh.data(), *by_k = filters.by_k.data();
    float *to_shift = sums.part_shift.data(), *to_beta = sums.part_beta.data(), *to_k = sums.part_k.data();
#pragma omp simd
    for (Size i = 0; i < m; ++i) {
        const Slope s = slope<C>(g[i], floor, top[i], by_flat[i], share[i], by_k[i]);
        const float up = grad[i] * beta[i];
        if (summed) {
            to_shift[i] += grad[i];
            to_beta[i] += grad[i] * g[i];
            if (C == SIGMOID) to_k[i] += up * s.by_k;
        }
        const float inverse = 1 / norm[i], d = up * s.by_cos * inverse;
        radial[i] = d * s.cos * inverse;
        d_dot[i] = d;
    }
}

// A strip of a plane: all elements have one filter, each a norm of its own; adds d·cos to `radial`.
template <Curve C, bool summed>
inline void backward_plane(const float* grad, const float* g, const float* norm, float floor, const Filters& filters,
                           Size f, float* d_dot, float* radial, Sums& sums, Size m) {
    const float beta = filters.beta[f], top = filters.top[f], by_flat = filters.by_flat[f];
    const float share = filters.share_of_artanh[f], by_k = filters.by_k[f];
    float to_shift = 0, to_beta = 0, to_k = 0;
#pragma omp simd reduction(+ : to_shift, to_beta, to_k)
    for (Size i = 0; i < m; ++i) {
        const Slope s = slope<C>(g[i], floor, top, by_flat, share, by_k);
        const float up = grad[i] * beta;
        if (summed) {
            to_shift += grad[i];
            to_beta += grad[i] * g[i];
            if (C == SIGMOID) to_k += up * s.by_k;
        }
        const float d = up * s.by_cos;
        radial[i] += d * s.cos;
        d_dot[i] = d / norm[i];
    }
    sums.shift[f] += to_shift;
    sums.beta[f] += to_beta;
    sums.k[f] += to_k;
}

template <Curve C, bool summed>
void backward_all(Form form, Size rows, Size groups, Size count, Size places, const float* grad, const float* g,
                  const float* norm, float floor, const Filters& filters, float* d_dot, float* radial, Sums& all,
                  int threads) {
    const Size total = form == CELLS ? count : groups * count;
    const Size strips = form == PLANES ? (places + STRIP - 1) / STRIP : 1;
    const Size rows_of_stretch = std::max<Size>(1, STRIP / 4);
    const Size tasks = form == PLANES ? rows * strips : (rows + rows_of_stretch - 1) / rows_of_stretch;
    const bool few = rows * count * places < FEW;
#pragma omp parallel num_threads(few ? 1 : threads)
    {
        Sums sums(total);
        std::vector<float> along(form == PLANES ? STRIP : 0);
#pragma omp for nowait
        for (Size task = 0; task < tasks; ++task) {
            if (form == PLANES) {
                const Size p = task / strips, at = task % strips * STRIP, m = std::min(STRIP, places - at);
                const float* n = norm + p * places + at;
                std::fill(along.begin(), along.begin() + m, 0.f);
                for (Size c = 0; c < count; ++c) {
                    const Size i = (p * count + c) * places + at;
                    backward_plane<C, summed>(grad + i, g + i, n, floor, filters, p % groups * count + c, d_dot + i,
                                              along.data(), sums, m);
                }
                float* out = radial + p * places + at;
#pragma omp simd
                for (Size i = 0; i < m; ++i) out[i] = along[i] / (n[i] * n[i]);
                continue;
            }
            for (Size r = task * rows_of_stretch; r < std::min(rows, (task + 1) * rows_of_stretch); ++r) {
                const Size i = r * count;
                if (form == CELLS)
                    backward_cells<C, summed>(grad + i, g + i, norm + i, floor, filters, d_dot + i, radial + i, sums,
                                              count);
                else
                    radial[r] = backward_row<C, summed>(grad + i, g + i, norm[r], floor, filters, r % groups * count,
                                                        d_dot + i, sums, count) / (norm[r] * norm[r]);
            }
            if (summed) sums.flush();
        }
        if (summed) {
#pragma omp critical
            all.add(sums);
        }
    }
}

}  // namespace

// ---- What is called. `threads`: how many may be used. Results are written to memory that the caller provides.

extern "C" {

// w / N and N = sqrt(‖w‖² + ε); w (filters, fan_in).
void normalize_filters(const float* w, Size filters, Size fan_in, float eps, float* unit, float* norm, int threads) {
#pragma omp parallel for num_threads(filters * fan_in < FEW ? 1 : threads)
    for (Size f = 0; f < filters; ++f) {
        const float* in = w + f * fan_in;
        const float n = std::sqrt(sum_of_squares(in, fan_in) + eps);
        norm[f] = n;
#pragma omp simd
        for (Size i = 0; i < fan_in; ++i) unit[f * fan_in + i] = in[i] / n;
    }
}

// (v - ŵ (ŵ·v)) / N, in place of v.
void filter_gradient(float* v, const float* w, const float* norm, Size filters, Size fan_in, int threads) {
#pragma omp parallel for num_threads(filters * fan_in < FEW ? 1 : threads)
    for (Size f = 0; f < filters; ++f) {
        float* out = v + f * fan_in;
        const float* in = w + f * fan_in;
        float inward = 0;
#pragma omp simd reduction(+ : inward)
        for (Size i = 0; i < fan_in; ++i) inward += in[i] * out[i];
        const float inverse = 1 / norm[f];
        inward *= inverse * inverse;
#pragma omp simd
        for (Size i = 0; i < fan_in; ++i) out[i] = (out[i] - in[i] * inward) * inverse;
    }
}

// The sum of squares over channels: x (rows, channels) or (planes, channels, places) -> (rows,) or (planes, places);
// with `rooted` sqrt(· + ε).
void sum_squares(const float* x, int planes, Size rows, Size channels, Size places, int rooted, float eps, float* out,
                 int threads) {
    const bool few = rows * channels * places < FEW;
    if (planes) {
        const Size strips = (places + STRIP - 1) / STRIP;
#pragma omp parallel for collapse(2) num_threads(few ? 1 : threads)
        for (Size p = 0; p < rows; ++p)
            for (Size s = 0; s < strips; ++s) {
                const Size at = s * STRIP, m = std::min(STRIP, places - at);
                float* total = out + p * places + at;
                std::fill(total, total + m, 0.f);
                for (Size c = 0; c < channels; ++c) {
                    const float* in = x + (p * channels + c) * places + at;
#pragma omp simd
                    for (Size i = 0; i < m; ++i) total[i] += in[i] * in[i];
                }
                if (rooted) add_and_root(total, m, eps);
            }
        return;
    }
    if (channels <= 4) {
        void (*const sums[])(const float*, Size, float*, int) = {short_rows<1>, short_rows<2>, short_rows<3>,
                                                                 short_rows<4>};
        sums[channels - 1](x, rows, out, threads);
        if (rooted) add_and_root(out, rows, eps);
        return;
    }
#pragma omp parallel for num_threads(few ? 1 : threads)
    for (Size r = 0; r < rows; ++r) {
        const float total = sum_of_squares(x + r * channels, channels);
        out[r] = rooted ? std::sqrt(total + eps) : total;
    }
}

// The sum over each window of x (images, height, width, inner), or of its squares; with `rooted` sqrt(· + ε).
void box_sum(const float* x, Size images, const Size* numbers, int squared, int rooted, float eps, float* out,
             int threads) {
    const Window w = window_of(numbers);
    const Size outs = w.out_width * w.inner, each = w.height * w.width * w.inner;
#pragma omp parallel num_threads(images * each < FEW ? 1 : threads)
    {
        std::vector<float> column((w.width + 2 * w.padding[1]) * w.inner);
#pragma omp for collapse(2) nowait
        for (Size image = 0; image < images; ++image)
            for (Size row = 0; row < w.out_height; ++row) {
                float* to = out + (image * w.out_height + row) * outs;
                (squared ? sum_windows<true> : sum_windows<false>)(x + image * each, w, row, column.data(), to);
                if (rooted) add_and_root(to, outs, eps);
            }
    }
}

// g of dot / norm in place of dot, and β·g + shift, which may be written to the memory of dot.
void curve(int form, int which, Size rows, Size groups, Size count, Size places, float* dot, const float* norm,
           const float* k, Size count_k, const float* beta, const float* shift, float* y, int threads) {
    const Filters filters(form == CELLS ? count : groups * count, beta, shift, k, count_k);
    const Form f = static_cast<Form>(form);
    const auto run = [&](auto plain, auto rescaled) {
        (y ? rescaled : plain)(f, rows, groups, count, places, dot, norm, filters, y, NONE, threads);
    };
    if (which == COSINE) run(curve_all<COSINE, false>, curve_all<COSINE, true>);
    if (which == LINEAR) run(curve_all<LINEAR, false>, curve_all<LINEAR, true>);
    if (which == SIGMOID) run(curve_all<SIGMOID, false>, curve_all<SIGMOID, true>);
}

// scale·f(dot / norm) + shift in place of dot, where f is the quotient, its arcsin, or logistic(sharpness·arcsin) - ½; then
// the activation.
void folded(int form, int which, Size rows, Size groups, Size count, Size places, float* dot, const float* norm,
            const float* sharpness, Size count_sharpness, const float* scale, const float* shift, int activation,
            int threads) {
    const Size total = form == CELLS ? count : groups * count;
    Filters filters(total, scale, shift, nullptr, 0);
    for (Size f = 0; sharpness && f < total; ++f) filters.inverse_k[f] = sharpness[count_sharpness == 1 ? 0 : f];
    const Form f = static_cast<Form>(form);
    const auto run = [&](auto all) {
        all(f, rows, groups, count, places, dot, norm, filters, dot, static_cast<Activation>(activation), threads);
    };
    if (which == COSINE) run(curve_all<QUOTIENT, true>);
    if (which == LINEAR) run(curve_all<ANGLE, true>);
    if (which == SIGMOID) run(curve_all<LOGISTIC, true>);
}

// What becomes of the gradient of β·g + shift. by_k has count_k elements, by_beta and by_shift one for each filter.
void curve_backward(int form, int which, Size rows, Size groups, Size count, Size places, const float* grad,
                    const float* g, const float* norm, float floor, const float* k, Size count_k, const float* beta,
                    float* d_dot, float* radial, float* by_k, float* by_beta, float* by_shift, int threads) {
    const Size total = form == CELLS ? count : groups * count;
    const Filters filters(total, beta, nullptr, k, count_k);
    Sums sums(total);
    const Form f = static_cast<Form>(form);
    const bool summed = by_k || by_beta || by_shift;
    const auto run = [&](auto plain, auto with_sums) {
        (summed ? with_sums : plain)(f, rows, groups, count, places, grad, g, norm, floor, filters, d_dot, radial, sums,
                                     threads);
    };
    if (which == COSINE) run(backward_all<COSINE, false>, backward_all<COSINE, true>);
    if (which == LINEAR) run(backward_all<LINEAR, false>, backward_all<LINEAR, true>);
    if (which == SIGMOID) run(backward_all<SIGMOID, false>, backward_all<SIGMOID, true>);
    for (Size i = 0; by_k && i < total; ++i) {
        if (count_k > 1 || i == 0) by_k[i] = 0;
        by_k[count_k > 1 ? i : 0] += sums.k[i];
    }
    for (Size i = 0; by_beta && i < total; ++i) by_beta[i] = sums.beta[i];
    for (Size i = 0; by_shift && i < total; ++i) by_shift[i] = sums.shift[i];
}

// grad - x · (the sum of radial over the windows of each element), in place of grad. In rows: x (images, height, width,
// inner, channels), radial (images, out_height, out_width, inner). In planes: inner is 1, x (images, channels, height,
// width).
void subtract_radial(float* grad, const float* x, const float* radial, int planes, Size images, Size channels,
                     const Size* numbers, int threads) {
    const Window w = window_of(numbers);
    const Size inner = w.inner, outs = w.out_width * inner, width = w.width * inner;
    const Size reach = (w.out_width - 1) * w.stride[1] + (w.kernel[1] - 1) * w.dilation[1] + 1;
    const Size room = std::max(reach, w.width + 2 * w.padding[1]) * inner;
    const Size each = w.height * width * channels;
#pragma omp parallel num_threads(images * each < FEW ? 1 : threads)
    {
        std::vector<float> column(outs), row(room);
#pragma omp for collapse(2) nowait
        for (Size image = 0; image < images; ++image)
            for (Size y = 0; y < w.height; ++y) {
                spread_windows(radial + image * w.out_height * outs, w, y, column.data(), row.data(), room);
                const float* place = row.data() + w.padding[1] * inner;
                if (planes || channels == 1) {
                    for (Size c = 0; c < channels; ++c) {
                        const Size at = image * each + (c * w.height + y) * width;
                        float* out = grad + at;
                        const float* in = x + at;
#pragma omp simd
                        for (Size i = 0; i < width; ++i) out[i] -= in[i] * place[i];
                    }
                    continue;
                }
                for (Size r = 0; r < width; ++r) {
                    const Size at = image * each + (y * width + r) * channels;
                    float* out = grad + at;
                    const float* in = x + at;
                    const float along = place[r];
#pragma omp simd
                    for (Size i = 0; i < channels; ++i) out[i] -= in[i] * along;
                }
            }
    }
}

// The same where each element has one window: rows of channels, each with one value.
void subtract_rows(float* grad, const float* x, const float* radial, Size rows, Size channels, int threads) {
#pragma omp parallel for num_threads(rows * channels < FEW ? 1 : threads)
    for (Size r = 0; r < rows; ++r) {
        float* out = grad + r * channels;
        const float* in = x + r * channels;
        const float along = radial[r];
#pragma omp simd
        for (Size i = 0; i < channels; ++i) out[i] -= in[i] * along;
    }
}

}
