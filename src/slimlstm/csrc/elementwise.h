// Elementwise operations. They process several vectors at a time, because a single dependent chain of operations leaves
// the processor idle. Each instruction set includes this file after its ``Simd``.
#pragma once

#include <cstddef>
#include <cstdint>

namespace {

constexpr ptrdiff_t L = Simd::lanes;
using F = Simd::F;
using I = Simd::I;

#define SLIMLSTM_INLINE inline __attribute__((always_inline))
#define SLIMLSTM_UNROLL(index, count) _Pragma("GCC unroll 16") for (int index = 0; index < (count); ++index)

SLIMLSTM_INLINE int32_t bits_of(float value) {
    int32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline void copy(float* to, const float* from, ptrdiff_t count) {
    for (ptrdiff_t k = 0; k < count; ++k) to[k] = from[k];
}

inline void copy_or_clear(float* to, const float* from, ptrdiff_t count) {
    if (from) return copy(to, from, count);
    for (ptrdiff_t k = 0; k < count; ++k) to[k] = 0.0f;
}

// Replaces v by 1 + e^-v, the reciprocal of its sigmoid. For |v| <= 43 the relative error of e^v is below 1.2e-6. Beyond,
// v is clamped, where the sigmoid is 0 or 1 to 2e-19. 2^f on [-1/2, 1/2] is a minimax polynomial, relative error 9.1e-8.
template <int N>
SLIMLSTM_INLINE void inverse_sigmoids(F (&v)[N]) {
    F whole[N], sum[N];
    SLIMLSTM_UNROLL(n, N) v[n] = Simd::at_most(62.0f, Simd::at_least(-62.0f, Simd::mul(v[n], Simd::all(-1.44269504f))));
    SLIMLSTM_UNROLL(n, N) whole[n] = Simd::round(v[n]);
    SLIMLSTM_UNROLL(n, N) v[n] = Simd::sub(v[n], whole[n]);
    SLIMLSTM_UNROLL(n, N) sum[n] = Simd::fma(Simd::all(0.00132647261f), v[n], Simd::all(0.00967151299f));
    SLIMLSTM_UNROLL(n, N) sum[n] = Simd::fma(sum[n], v[n], Simd::all(0.0555073358f));
    SLIMLSTM_UNROLL(n, N) sum[n] = Simd::fma(sum[n], v[n], Simd::all(0.240222424f));
    SLIMLSTM_UNROLL(n, N) sum[n] = Simd::fma(sum[n], v[n], Simd::all(0.693147004f));
    SLIMLSTM_UNROLL(n, N) sum[n] = Simd::fma(sum[n], v[n], Simd::all(1.0f));
    SLIMLSTM_UNROLL(n, N) v[n] = Simd::add(Simd::all(1.0f), Simd::times_power_of_two(sum[n], whole[n]));
}

// Replaces v by p such that tanh v = p / q, relative error 3.2e-7. The fraction lets callers share one division. p / v and
// q are polynomials in v^2, a minimax fit on [-9, 9] with relative error 2.1e-8; beyond, tanh is 1 in float32.
template <int N>
SLIMLSTM_INLINE void tanh_fractions(F (&v)[N], F (&q)[N]) {
    F y[N], p[N];
    SLIMLSTM_UNROLL(n, N) v[n] = Simd::at_most(9.0f, Simd::at_least(-9.0f, v[n]));
    SLIMLSTM_UNROLL(n, N) y[n] = Simd::mul(v[n], v[n]);
    SLIMLSTM_UNROLL(n, N) {
        p[n] = Simd::fma(Simd::all(1.33546998e-08f), y[n], Simd::all(2.06091566e-05f));
        q[n] = Simd::fma(Simd::all(7.77658738e-07f), y[n], Simd::all(0.000328564426f));
    }
    SLIMLSTM_UNROLL(n, N) {
        p[n] = Simd::fma(p[n], y[n], Simd::all(0.00349559490f));
        q[n] = Simd::fma(q[n], y[n], Simd::all(0.0258770105f));
    }
    SLIMLSTM_UNROLL(n, N) {
        p[n] = Simd::fma(p[n], y[n], Simd::all(0.133810322f));
        q[n] = Simd::fma(q[n], y[n], Simd::all(0.467143478f));
    }
    SLIMLSTM_UNROLL(n, N) {
        p[n] = Simd::fma(p[n], y[n], Simd::all(0.99999998f));
        q[n] = Simd::fma(q[n], y[n], Simd::all(1.0f));
    }
    SLIMLSTM_UNROLL(n, N) v[n] = Simd::mul(p[n], v[n]);
}

// Clamps v to [-bound, bound]; NaN stays NaN.
SLIMLSTM_INLINE F clipped(F v, float bound) { return Simd::at_most(bound, Simd::at_least(-bound, v)); }

// One step of N vectors of cells: c = clip(σ(f) c + σ(i) tanh(g)), h = σ(o) tanh(c). ``sigmoids`` holds all i, then all f,
// then all o. Replaces g by h.
template <int N>
SLIMLSTM_INLINE void cells(F (&sigmoids)[3 * N], F (&g)[N], F (&c)[N], float clip) {
    F q[N], p[N];
    tanh_fractions<N>(g, q);
    inverse_sigmoids<3 * N>(sigmoids);
    SLIMLSTM_UNROLL(n, N) q[n] = Simd::reciprocal(Simd::mul(q[n], sigmoids[n]));
    SLIMLSTM_UNROLL(n, N) sigmoids[n] = Simd::reciprocal(sigmoids[N + n]);
    SLIMLSTM_UNROLL(n, N) g[n] = Simd::mul(g[n], q[n]);
    SLIMLSTM_UNROLL(n, N) c[n] = clipped(Simd::fma(c[n], sigmoids[n], g[n]), clip);
    SLIMLSTM_UNROLL(n, N) p[n] = c[n];
    tanh_fractions<N>(p, q);
    SLIMLSTM_UNROLL(n, N) q[n] = Simd::reciprocal(Simd::mul(q[n], sigmoids[2 * N + n]));
    SLIMLSTM_UNROLL(n, N) g[n] = Simd::mul(p[n], q[n]);
}

// The largest magnitude of inputs [0, count); NaN if one is not finite.
inline float largest_magnitude(const float* from, ptrdiff_t count) {
    const ptrdiff_t whole = count / L * L;
    const int32_t no_sign = 0x7FFFFFFF;
    I magnitudes = Simd::no_words();  // as integers: floats without a sign order like their bits
    for (ptrdiff_t k = 0; k < whole; k += L)
        magnitudes = Simd::max_words(magnitudes, Simd::and_words(Simd::load_words(from + k), Simd::all_words(no_sign)));
    int32_t largest = Simd::largest_word(magnitudes);
    for (ptrdiff_t k = whole; k < count; ++k) {
        int32_t magnitude = bits_of(from[k]) & no_sign;
        largest = magnitude > largest ? magnitude : largest;
    }
    float bound;
    __builtin_memcpy(&bound, &largest, sizeof bound);
    return largest >= 0x7F800000 ? __builtin_nanf("") : bound;
}

// After adding this, the lowest bits of a float are the number rounded to an integer.
constexpr float magic = 12582912.0f;

// The remainder of a rounded input is counted in this many parts of one integer.
constexpr float parts_of_one = 254.0f;

// Rounds inputs [0, count), of magnitude up to ``bound``, to int8. With ``Remainder`` it rounds the difference between the
// inputs and ``integers``, the result of the first rounding. Returns 128 times the sum, which wraps if an input is not
// finite.
template <bool Remainder>
inline int32_t round_to_int8(const float* from, ptrdiff_t count, float bound, int8_t* to, const int8_t* integers) {
    // For a smaller bound the inverse would be infinite, and the inputs are negligible.
    const float inverse = bound < 1e-36f ? 0.0f : 127.0f / bound;
    const ptrdiff_t whole = count / L * L;
    I sums = Simd::no_words();
    for (ptrdiff_t k = 0; k < whole; k += L) {
        F input = Simd::load(from + k), shifted = Simd::fma(input, Simd::all(inverse), Simd::all(magic));
        if constexpr (Remainder) {
            F remainder = Simd::sub(Simd::mul(input, Simd::all(inverse)), Simd::sub(shifted, Simd::all(magic)));
            shifted = Simd::fma(remainder, Simd::all(parts_of_one), Simd::all(magic));
        }
        Simd::store_bytes(to + k, Simd::as_words(shifted));
        sums = Simd::add_words(sums, Simd::as_words(shifted));
    }
    uint32_t sum = static_cast<uint32_t>(Simd::sum_of_words(sums));
    for (ptrdiff_t k = whole; k < count; ++k) {
        // The remainder is computed from ``integers``: compilers may or may not fuse this multiply-add as above.
        float shifted = Remainder ? (from[k] * inverse - static_cast<float>(integers[k])) * parts_of_one + magic
                                  : from[k] * inverse + magic;
        to[k] = static_cast<int8_t>(bits_of(shifted));
        sum += static_cast<uint32_t>(bits_of(shifted));
    }
    return static_cast<int32_t>(128u * (sum - static_cast<uint32_t>(count) * static_cast<uint32_t>(bits_of(magic))));
}

}  // namespace
