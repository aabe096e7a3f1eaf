// Elementwise part of a training step, forward and backward; the caller multiplies the matrices. Each instruction set
// includes this file after its ``Simd``.
#pragma once

#include "elementwise.h"
#include "kernel.h"

namespace {

using slimlstm::BackwardPass;
using slimlstm::BackwardStep;
using slimlstm::ForwardPass;
using slimlstm::ForwardStep;
using slimlstm::Passes;
using slimlstm::SmallMatrix;

SLIMLSTM_INLINE float from_half(uint16_t half) {
    uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
SLIMLSTM_INLINE uint16_t to_half(float value) {
    uint32_t bits = static_cast<uint32_t>(bits_of(value));
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Reads ``count`` gates from index ``at``, of one or two summands in float32 or bfloat16.
SLIMLSTM_INLINE void read_gates(const ForwardStep& s, ptrdiff_t at, ptrdiff_t count, float* to) {
    if (s.is_half) {
        const uint16_t *gates = static_cast<const uint16_t*>(s.gates) + at;
        const uint16_t *more = s.recurrent ? static_cast<const uint16_t*>(s.recurrent) + at : nullptr;
        for (ptrdiff_t k = 0; k < count; ++k) to[k] = from_half(gates[k]) + (more ? from_half(more[k]) : 0.0f);
    } else {
        const float *gates = static_cast<const float*>(s.gates) + at;
        const float *more = s.recurrent ? static_cast<const float*>(s.recurrent) + at : nullptr;
        for (ptrdiff_t k = 0; k < count; ++k) to[k] = gates[k] + (more ? more[k] : 0.0f);
    }
}

// Runs ``count`` units of a row, at most N vectors.
template <int N>
SLIMLSTM_INLINE void forward_units(const ForwardStep& s, ptrdiff_t row, ptrdiff_t unit, ptrdiff_t count) {
    const ptrdiff_t hidden = s.hidden, at = row * hidden + unit, first = row * 4 * hidden + unit;
    float gates[4][N * L] = {}, c[N * L] = {}, h[N * L];
    for (ptrdiff_t gate = 0; gate < 4; ++gate) read_gates(s, first + gate * hidden, count, gates[gate]);
    copy(c, s.c_before + at, count);
    F sigmoids[3 * N], g[N], q[N], cell[N], tanh_c[N];
    SLIMLSTM_UNROLL(n, N) {
        sigmoids[n] = Simd::load(gates[0] + n * L);
        sigmoids[N + n] = Simd::load(gates[1] + n * L);
        sigmoids[2 * N + n] = Simd::load(gates[3] + n * L);
        g[n] = Simd::load(gates[2] + n * L);
    }
    tanh_fractions<N>(g, q);
    inverse_sigmoids<3 * N>(sigmoids);
    SLIMLSTM_UNROLL(n, 3 * N) sigmoids[n] = Simd::reciprocal(sigmoids[n]);
    SLIMLSTM_UNROLL(n, N) {
        g[n] = Simd::mul(g[n], Simd::reciprocal(q[n]));
        cell[n] = Simd::fma(Simd::load(c + n * L), sigmoids[N + n], Simd::mul(sigmoids[n], g[n]));
        tanh_c[n] = cell[n];
    }
    tanh_fractions<N>(tanh_c, q);
    SLIMLSTM_UNROLL(n, N) {
        Simd::store(gates[0] + n * L, sigmoids[n]);
        Simd::store(gates[1] + n * L, sigmoids[N + n]);
        Simd::store(gates[2] + n * L, g[n]);
        Simd::store(gates[3] + n * L, sigmoids[2 * N + n]);
        Simd::store(c + n * L, cell[n]);
        Simd::store(h + n * L, Simd::mul(sigmoids[2 * N + n], Simd::mul(tanh_c[n], Simd::reciprocal(q[n]))));
    }
    for (ptrdiff_t gate = 0; gate < 4; ++gate) copy(s.activations + first + gate * hidden, gates[gate], count);
    copy(s.c + at, c, count);
    copy(s.h + at, h, count);
    for (ptrdiff_t k = 0; s.h_half && k < count; ++k) s.h_half[at + k] = to_half(h[k]);
}

template <int N>
SLIMLSTM_INLINE void backward_units(const BackwardStep& s, ptrdiff_t row, ptrdiff_t unit, ptrdiff_t count) {
    const ptrdiff_t hidden = s.hidden, at = row * hidden + unit, first = row * 4 * hidden + unit;
    const float *i = s.activations + first, *f = i + hidden, *g = f + hidden, *o = g + hidden;
    float tanh_c[N * L] = {}, d_h[N * L], d[4][N * L];
    copy(tanh_c, s.c + at, count);
    F p[N], q[N];
    SLIMLSTM_UNROLL(n, N) p[n] = Simd::load(tanh_c + n * L);
    tanh_fractions<N>(p, q);
    SLIMLSTM_UNROLL(n, N) Simd::store(tanh_c + n * L, Simd::mul(p[n], Simd::reciprocal(q[n])));
    copy_or_clear(d_h, s.d_output ? s.d_output + at : nullptr, count);
    if (s.d_h && s.is_half) {
        const uint16_t* more = static_cast<const uint16_t*>(s.d_h) + at;
        for (ptrdiff_t k = 0; k < count; ++k) d_h[k] += from_half(more[k]);
    } else if (s.d_h) {
        const float* more = static_cast<const float*>(s.d_h) + at;
        for (ptrdiff_t k = 0; k < count; ++k) d_h[k] += more[k];
    }
    const float* c_before = s.c_before + at;
    float kept[N * L], d_cell[N * L];
    copy(kept, s.d_c + at, count);
    for (ptrdiff_t k = 0; k < count; ++k) {
        float d_c = kept[k] + d_h[k] * o[k] * (1.0f - tanh_c[k] * tanh_c[k]);
        d[0][k] = d_c * g[k] * i[k] * (1.0f - i[k]);
        d[1][k] = d_c * c_before[k] * f[k] * (1.0f - f[k]);
        d[2][k] = d_c * i[k] * (1.0f - g[k] * g[k]);
        d[3][k] = d_h[k] * tanh_c[k] * o[k] * (1.0f - o[k]);
        d_cell[k] = d_c * f[k];
    }
    copy(s.d_c + at, d_cell, count);
    for (ptrdiff_t gate = 0; gate < 4; ++gate) {
        const ptrdiff_t to = first + gate * hidden;
        if (s.is_half) {
            uint16_t* halves = static_cast<uint16_t*>(s.d_gates) + to;
            for (ptrdiff_t k = 0; k < count; ++k) halves[k] = to_half(d[gate][k]);
        } else {
            copy(static_cast<float*>(s.d_gates) + to, d[gate], count);
        }
    }
}

// Calls take(row, unit, count) for all blocks of up to N vectors of units, with a constant count wherever a block is whole.
template <int N, class Step, class Take>
SLIMLSTM_INLINE void over_units(const Step& s, const Take& take) {
    for (ptrdiff_t row = 0; row < s.rows; ++row) {
        ptrdiff_t unit = 0;
        for (; unit + N * L <= s.hidden; unit += N * L) take(row, unit, N * L);
        if (unit < s.hidden) take(row, unit, s.hidden - unit);
    }
}

void train_forward(const ForwardStep& s) {
    if (s.hidden <= L)
        over_units<1>(s, [&](auto... block) { forward_units<1>(s, block...); });
    else
        over_units<2>(s, [&](auto... block) { forward_units<2>(s, block...); });
}

void train_backward(const BackwardStep& s) {
    if (s.hidden <= L)
        over_units<1>(s, [&](auto... block) { backward_units<1>(s, block...); });
    else
        over_units<2>(s, [&](auto... block) { backward_units<2>(s, block...); });
}

// A matrix whose rows, one for each input, are contiguous and padded with zeros to whole vectors.
struct Padded {
    const float* data;
    ptrdiff_t inputs, outputs, stride;
};

// Computes M rows by W vectors of a product, from column ``first``.
template <int M, int W>
void tile(const float* a, ptrdiff_t a_stride, const Padded& b, ptrdiff_t first, float* to, ptrdiff_t to_stride, bool add) {
    constexpr int S = M * W >= 8 ? 1 : M * W >= 4 ? 2 : 4;  // independent sums, so that additions need not wait
    F sums[S][M][W];
    SLIMLSTM_UNROLL(s, S) SLIMLSTM_UNROLL(m, M) SLIMLSTM_UNROLL(w, W) sums[s][m][w] = Simd::zero();
    const float* row = b.data + first;
    ptrdiff_t k = 0;
    for (; k + S <= b.inputs; k += S)
        SLIMLSTM_UNROLL(s, S) {
            F weights[W];
            SLIMLSTM_UNROLL(w, W) weights[w] = Simd::load(row + w * L);
            SLIMLSTM_UNROLL(m, M) {
                F input = Simd::all(a[m * a_stride + k + s]);
                SLIMLSTM_UNROLL(w, W) sums[s][m][w] = Simd::fma(input, weights[w], sums[s][m][w]);
            }
            row += b.stride;
        }
    for (; k < b.inputs; ++k, row += b.stride)
        SLIMLSTM_UNROLL(m, M) {
            F input = Simd::all(a[m * a_stride + k]);
            SLIMLSTM_UNROLL(w, W) sums[0][m][w] = Simd::fma(input, Simd::load(row + w * L), sums[0][m][w]);
        }
    SLIMLSTM_UNROLL(m, M)
        SLIMLSTM_UNROLL(w, W) {
            SLIMLSTM_UNROLL(s, S - 1) sums[0][m][w] = Simd::add(sums[0][m][w], sums[s + 1][m][w]);
            const ptrdiff_t at = first + w * L, left = b.outputs - at;
            float* where = to + m * to_stride + at;
            if (left >= L) {
                F sum = add ? Simd::add(Simd::load(where), sums[0][m][w]) : sums[0][m][w];
                Simd::store(where, sum);
                continue;
            }
            float values[L];
            Simd::store(values, sums[0][m][w]);
            for (ptrdiff_t n = 0; n < left; ++n) where[n] = values[n] + (add ? where[n] : 0.0f);
        }
}

template <int W, int M = Simd::max_rows>
void tile_of(ptrdiff_t m, const float* a, ptrdiff_t a_stride, const Padded& b, ptrdiff_t first, float* to,
             ptrdiff_t to_stride, bool add) {
    if constexpr (M > 1)
        if (m < M) return tile_of<W, M - 1>(m, a, a_stride, b, first, to, to_stride, add);
    tile<M, W>(a, a_stride, b, first, to, to_stride, add);
}

// Computes ``rows`` rows of a b, or adds them to ``to``.
inline void multiply_small(const float* a, ptrdiff_t a_stride, ptrdiff_t rows, const Padded& b, float* to,
                           ptrdiff_t to_stride, bool add) {
    for (ptrdiff_t first = 0; first < b.outputs; first += 4 * L)
        for (ptrdiff_t row = 0; row < rows;) {
            const ptrdiff_t m = rows - row < Simd::max_rows ? rows - row : Simd::max_rows;
            const float* from = a + row * a_stride;
            float* where = to + row * to_stride;
            switch ((b.outputs - first + L - 1) / L) {
                case 1: tile_of<1>(m, from, a_stride, b, first, where, to_stride, add); break;
                case 2: tile_of<2>(m, from, a_stride, b, first, where, to_stride, add); break;
                case 3: tile_of<3>(m, from, a_stride, b, first, where, to_stride, add); break;
                default: tile_of<4>(m, from, a_stride, b, first, where, to_stride, add);
            }
            row += m;
        }
}

// The matrices of a pass, copied into its workspace.
struct Product {
    Padded parts[2];
    int count;
    ptrdiff_t batch;
    float* thin;  // results between two factors

    explicit Product(const Passes& sizes) : count(sizes.factors), batch(sizes.batch) {
        float* memory = sizes.workspace;
        for (int part = 0; part < count; ++part) {
            const SmallMatrix& from = sizes.matrices[part];
            const ptrdiff_t stride = (from.outputs + L - 1) / L * L;
            parts[part] = {memory, from.inputs, from.outputs, stride};
            for (ptrdiff_t k = 0; k < from.inputs; ++k)
                for (ptrdiff_t n = 0; n < stride; ++n)
                    *memory++ = n < from.outputs ? from.data[k * from.input_stride + n * from.output_stride] : 0.0f;
        }
        thin = memory;
    }

    // The floats that the thin results take.
    ptrdiff_t thin_size() const { return count == 2 ? batch * parts[0].stride : 0; }

    void multiply(const float* a, ptrdiff_t a_stride, float* to, ptrdiff_t to_stride, bool add) const {
        if (count == 1) return multiply_small(a, a_stride, batch, parts[0], to, to_stride, add);
        multiply_small(a, a_stride, batch, parts[0], thin, parts[0].stride, false);
        multiply_small(thin, parts[0].stride, batch, parts[1], to, to_stride, add);
    }
};

void train_forward_all(const ForwardPass& pass) {
    const Passes& sizes = pass.sizes;
    const ptrdiff_t batch = sizes.batch, hidden = sizes.hidden, states = batch * hidden;
    const Product product(sizes);
    for (ptrdiff_t number = 0; number < sizes.steps; ++number) {
        const ptrdiff_t step = sizes.reverse ? sizes.steps - 1 - number : number;
        const ptrdiff_t before = (sizes.reverse ? step + 1 : step) * states, after = (sizes.reverse ? step : step + 1) * states;
        float* gates = pass.activations + step * 4 * states;
        if (number || !pass.from_zero) product.multiply(pass.h + before, hidden, gates, 4 * hidden, true);
        train_forward({batch, hidden, false, gates, nullptr, pass.c + before, gates, pass.c + after, pass.h + after, nullptr});
    }
}

void train_backward_all(const BackwardPass& pass) {
    const Passes& sizes = pass.sizes;
    const ptrdiff_t batch = sizes.batch, hidden = sizes.hidden, states = batch * hidden;
    const Product product(sizes);
    float* d_h = product.thin + product.thin_size();
    for (ptrdiff_t number = 0; number < sizes.steps; ++number) {
        const ptrdiff_t step = sizes.reverse ? number : sizes.steps - 1 - number;
        const ptrdiff_t before = (sizes.reverse ? step + 1 : step) * states, after = (sizes.reverse ? step : step + 1) * states;
        float* d_gates = pass.d_gates + step * 4 * states;
        train_backward({batch, hidden, false, pass.activations + step * 4 * states, pass.c + before, pass.c + after,
                        pass.d_output ? pass.d_output + step * states : nullptr, number ? d_h : nullptr, pass.d_c, d_gates});
        const bool is_last = number == sizes.steps - 1;
        if (is_last && !pass.d_h0) return;
        product.multiply(d_gates, 4 * hidden, is_last ? pass.d_h0 : d_h, hidden, false);
    }
}

}  // namespace
