// What is done to numbers one by one, for several vectors at a time: a single chain of operations waits for itself most of
// the time. Included, like recurrence.h, by each instruction set after its ``Simd``.
#pragma once

#include <cstddef>
#include <cstdint>

namespace {

constexpr ptrdiff_t L = Simd::lanes;
using F = Simd::F;
using I = Simd::I;

#define SLIMLSTM_INLINE inline __attribute__((always_inline))
#define SLIMLSTM_UNROLL _Pragma("GCC unroll 16")
#define SLIMLSTM_EACH SLIMLSTM_UNROLL for (int n = 0; n < N; ++n)

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

// One over a sigmoid: v becomes 1 + e^-v. For |v| <= 43 the relative error of e^v is below 1.2e-6; beyond, the value is that
// at the bound, where a sigmoid is 0 or 1 to 2e-19. 2^f is a polynomial on [-1/2, 1/2] fitted to the smallest relative
// error, 9.1e-8.
template <int N>
SLIMLSTM_INLINE void inverse_sigmoids(F (&v)[N]) {
    F whole[N], sum[N];
    SLIMLSTM_EACH v[n] = Simd::at_most(62.0f, Simd::at_least(-62.0f, Simd::mul(v[n], Simd::all(-1.44269504f))));
    SLIMLSTM_EACH whole[n] = Simd::round(v[n]);
    SLIMLSTM_EACH v[n] = Simd::sub(v[n], whole[n]);
    SLIMLSTM_EACH sum[n] = Simd::fma(Simd::all(0.00132647261f), v[n], Simd::all(0.00967151299f));
    SLIMLSTM_EACH sum[n] = Simd::fma(sum[n], v[n], Simd::all(0.0555073358f));
    SLIMLSTM_EACH sum[n] = Simd::fma(sum[n], v[n], Simd::all(0.240222424f));
    SLIMLSTM_EACH sum[n] = Simd::fma(sum[n], v[n], Simd::all(0.693147004f));
    SLIMLSTM_EACH sum[n] = Simd::fma(sum[n], v[n], Simd::all(1.0f));
    SLIMLSTM_EACH v[n] = Simd::add(Simd::all(1.0f), Simd::times_power_of_two(sum[n], whole[n]));
}

// tanh v = p / q with relative error 3.2e-7; a fraction, so that it can share a division; v becomes p. The quotient of
// polynomials in v^2 is fitted to the smallest relative error on [-9, 9], 2.1e-8; beyond, tanh is 1 in float32.
template <int N>
SLIMLSTM_INLINE void tanh_fractions(F (&v)[N], F (&q)[N]) {
    F y[N], p[N];
    SLIMLSTM_EACH v[n] = Simd::at_most(9.0f, Simd::at_least(-9.0f, v[n]));
    SLIMLSTM_EACH y[n] = Simd::mul(v[n], v[n]);
    SLIMLSTM_EACH {
        p[n] = Simd::fma(Simd::all(1.33546998e-08f), y[n], Simd::all(2.06091566e-05f));
        q[n] = Simd::fma(Simd::all(7.77658738e-07f), y[n], Simd::all(0.000328564426f));
    }
    SLIMLSTM_EACH {
        p[n] = Simd::fma(p[n], y[n], Simd::all(0.00349559490f));
        q[n] = Simd::fma(q[n], y[n], Simd::all(0.0258770105f));
    }
    SLIMLSTM_EACH {
        p[n] = Simd::fma(p[n], y[n], Simd::all(0.133810322f));
        q[n] = Simd::fma(q[n], y[n], Simd::all(0.467143478f));
    }
    SLIMLSTM_EACH {
        p[n] = Simd::fma(p[n], y[n], Simd::all(0.99999998f));
        q[n] = Simd::fma(q[n], y[n], Simd::all(1.0f));
    }
    SLIMLSTM_EACH v[n] = Simd::mul(p[n], v[n]);
}

// v within ``bound`` on either side of zero; what is not a number stays so.
SLIMLSTM_INLINE F clipped(F v, float bound) { return Simd::at_most(bound, Simd::at_least(-bound, v)); }

// One step of L cells each: c = clip(σ(f) c + σ(i) tanh(g)), h = σ(o) tanh(c). ``sigmoids`` are all i, all f and all o; g
// becomes h.
template <int N>
SLIMLSTM_INLINE void cells(F (&sigmoids)[3 * N], F (&g)[N], F (&c)[N], float clip) {
    F q[N], p[N];
    tanh_fractions<N>(g, q);
    inverse_sigmoids<3 * N>(sigmoids);
    SLIMLSTM_EACH q[n] = Simd::reciprocal(Simd::mul(q[n], sigmoids[n]));
    SLIMLSTM_EACH sigmoids[n] = Simd::reciprocal(sigmoids[N + n]);
    SLIMLSTM_EACH g[n] = Simd::mul(g[n], q[n]);
    SLIMLSTM_EACH c[n] = clipped(Simd::fma(c[n], sigmoids[n], g[n]), clip);
    SLIMLSTM_EACH p[n] = c[n];
    tanh_fractions<N>(p, q);
    SLIMLSTM_EACH q[n] = Simd::reciprocal(Simd::mul(q[n], sigmoids[2 * N + n]));
    SLIMLSTM_EACH g[n] = Simd::mul(p[n], q[n]);
}

// The largest magnitude of inputs [0, count), NaN where one is not finite.
inline float largest_magnitude(const float* from, ptrdiff_t count) {
    const ptrdiff_t whole = count / L * L;
    const int32_t no_sign = 0x7FFFFFFF;
    I magnitudes = Simd::no_words();  // which order as their bits do
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

// Of the sum of a number and this the lowest bits are the rounded integer.
constexpr float magic = 12582912.0f;

// int8 inputs are integers times a scale, and finer ones these plus so many parts of one.
constexpr float parts_of_one = 254.0f;

// Rounds inputs [0, count) of a largest magnitude to int8; or, given the integers that this made, what they left over to parts
// of one. Returns 128 times the sum, which wraps where an input is not finite.
template <bool Rests>
inline int32_t round_to_int8(const float* from, ptrdiff_t count, float bound, int8_t* to, const int8_t* integers) {
    // Below, the inverse would be infinite; all inputs are zero for what they are multiplied with.
    const float inverse = bound < 1e-36f ? 0.0f : 127.0f / bound;
    const ptrdiff_t whole = count / L * L;
    I sums = Simd::no_words();
    for (ptrdiff_t k = 0; k < whole; k += L) {
        F input = Simd::load(from + k), shifted = Simd::fma(input, Simd::all(inverse), Simd::all(magic));
        if constexpr (Rests) {
            F rest = Simd::sub(Simd::mul(input, Simd::all(inverse)), Simd::sub(shifted, Simd::all(magic)));
            shifted = Simd::fma(rest, Simd::all(parts_of_one), Simd::all(magic));
        }
        Simd::store_bytes(to + k, Simd::as_words(shifted));
        sums = Simd::add_words(sums, Simd::as_words(shifted));
    }
    uint32_t sum = static_cast<uint32_t>(Simd::sum_of_words(sums));
    for (ptrdiff_t k = whole; k < count; ++k) {
        // Not as above: compilers may round a product that is added to something, or not.
        float shifted = Rests ? (from[k] * inverse - static_cast<float>(integers[k])) * parts_of_one + magic
                              : from[k] * inverse + magic;
        to[k] = static_cast<int8_t>(bits_of(shifted));
        sum += static_cast<uint32_t>(bits_of(shifted));
    }
    return static_cast<int32_t>(128u * (sum - static_cast<uint32_t>(count) * static_cast<uint32_t>(bits_of(magic))));
}

}  // namespace
