// Products of inputs with the packed weights of each storage. Each instruction set includes this file after its ``Simd``.
#pragma once

#include <cstdint>
#include <type_traits>

#include "elementwise.h"
#include "kernel.h"

namespace {

using slimlstm::Panels;
using slimlstm::Storage;

constexpr ptrdiff_t panel_vectors = 4;
// Two cells hide each other's latency.
constexpr int cells_at_once = 2;

SLIMLSTM_INLINE constexpr ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
SLIMLSTM_INLINE ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
SLIMLSTM_INLINE ptrdiff_t ceiling(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

// Rows of inputs in the format of a storage, four int8 inputs to a word, with the numbers that rescale int8 sums.
struct Words {
    const float* const* rows;
    const float* scales;       // of each row
    const int32_t* offsets;    // 128 times the sum of each row, which the unsigned weights add to every product
    ptrdiff_t from, to;        // the range of words to multiply
    ptrdiff_t remainders = 0;  // distance in words from a row to the row of its remainders; 0: no remainders
    const int32_t* remainder_offsets = nullptr;
};

// Each storage is a struct that multiplies packed weights and inputs in its format; ``value`` turns a sum into floats.

struct Float32 {
    static constexpr int max_rows = Simd::max_rows;
    using Sum = F;
    using Input = F;
    static Sum zero() { return Simd::zero(); }
    static Sum add(Sum a, Sum b) { return Simd::add(a, b); }
    static Input input(const float* row, ptrdiff_t word, ptrdiff_t) { return Simd::all(row[word]); }
    static Sum multiply_add(const float* weights, Input input, Sum sum) {
        return Simd::fma(input, Simd::load(weights), sum);
    }
    static F value(Sum sum, const Words&, ptrdiff_t, const float*) { return sum; }
};

// Converts bfloat16 to float32 and multiplies. The processor's bfloat16 instruction reached half this speed where it was
// measured, and rounds the inputs.
struct BFloat16 {
    static constexpr int max_rows = Simd::max_rows;
    using Sum = F;
    struct Input {
        F even, odd;
    };
    static Sum zero() { return Simd::zero(); }
    static Sum add(Sum a, Sum b) { return Simd::add(a, b); }
    static Input input(const float* row, ptrdiff_t word, ptrdiff_t) {
        return Input{Simd::all(row[2 * word]), Simd::all(row[2 * word + 1])};
    }
    static Sum multiply_add(const float* weights, const Input& input, Sum sum) {
        I words = Simd::load_words(weights);
        return Simd::fma(input.odd, Simd::high_halves(words), Simd::fma(input.even, Simd::low_halves(words), sum));
    }
    static F value(Sum sum, const Words&, ptrdiff_t, const float*) { return sum; }
};

struct Int8 {
    static constexpr int max_rows = Simd::max_rows;
    using Sum = I;
    using Input = I;
    static Sum zero() { return Simd::no_words(); }
    static Sum add(Sum a, Sum b) { return Simd::add_words(a, b); }
    static Input input(const float* row, ptrdiff_t word, ptrdiff_t) { return Simd::all_words(bits_of(row[word])); }
    static Sum multiply_add(const float* weights, Input input, Sum sum) {
        return Simd::dot_int8(Simd::load_words(weights), input, sum);
    }
    static F value(Sum sum, const Words& a, ptrdiff_t row, const float* scales) {
        F number = Simd::to_float(Simd::subtract_words(sum, Simd::all_words(a.offsets[row])));
        return Simd::mul(number, Simd::mul(Simd::load(scales), Simd::all(a.scales[row])));
    }
};

// Multiplies rounded inputs and their remainders by int8 weights that are read once: fifteen-bit inputs.
struct FineInt8 {
    static constexpr int max_rows = Simd::max_rows > 1 ? Simd::max_rows / 2 : 1;
    struct Sum {
        I whole, remainder;
    };
    using Input = Sum;
    static Sum zero() { return Sum{Simd::no_words(), Simd::no_words()}; }
    static Sum add(const Sum& a, const Sum& b) {
        return Sum{Simd::add_words(a.whole, b.whole), Simd::add_words(a.remainder, b.remainder)};
    }
    static Input input(const float* row, ptrdiff_t word, ptrdiff_t remainders) {
        return Input{Simd::all_words(bits_of(row[word])), Simd::all_words(bits_of(row[word + remainders]))};
    }
    static Sum multiply_add(const float* weights, const Input& input, const Sum& sum) {
        I words = Simd::load_words(weights);
        return Sum{Simd::dot_int8(words, input.whole, sum.whole), Simd::dot_int8(words, input.remainder, sum.remainder)};
    }
    static F value(const Sum& sum, const Words& a, ptrdiff_t row, const float* scales) {
        F whole = Simd::to_float(Simd::subtract_words(sum.whole, Simd::all_words(a.offsets[row])));
        F remainder = Simd::to_float(Simd::subtract_words(sum.remainder, Simd::all_words(a.remainder_offsets[row])));
        F number = Simd::fma(remainder, Simd::all(1.0f / parts_of_one), whole);
        return Simd::mul(number, Simd::mul(Simd::load(scales), Simd::all(a.scales[row])));
    }
};

// Sums with int4 weights equal the sums with the same weights in int8 exactly. A ``Simd`` says how to multiply a group:
//     low, high           the unsigned codes of a word that belong to its first and its last four inputs
//     begin               a sum that begins with an offset: codes are stored plus 8, which adds 8 times the inputs' sum
//     add_low, add_high   add products
//     finish              multiplies the sum of a group and adds it to the sum of a row
//     offset_group        the offsets, which follow from the group's inputs
//     rows_to_widen       where inputs have so many rows, it is faster to widen a panel to int8 first
struct Int4 : Int8 {};

struct FineInt4 : FineInt8 {};

constexpr ptrdiff_t group_words = slimlstm::group_inputs / 4;
static_assert(group_words == 16, "offset_group adds up so many words");
// A group of rounded inputs, with the offsets of its sums.
constexpr ptrdiff_t group_stride = group_words + Simd::offsets_of_group;

// The number of independent sums for each of ``sums`` results. One multiply-add must wait for the previous one in its sum;
// eight sums in flight hide that latency.
constexpr int partial_sums(int sums) {
    if (sums >= 8) return 1;
    if (sums >= 4) return 2;
    return sums >= 2 ? 4 : 8;
}

// Computes sums[m][w], the products of row m of ``a`` with vector w of a panel.
template <class Format, int W, int M>
SLIMLSTM_INLINE void products(const float* panel, const Words& a, ptrdiff_t row, typename Format::Sum (&sums)[M][W]) {
    constexpr int S = partial_sums(W * M);
    typename Format::Sum parts[S][M][W];
    SLIMLSTM_UNROLL(s, S)
        SLIMLSTM_UNROLL(m, M)
            SLIMLSTM_UNROLL(w, W) parts[s][m][w] = Format::zero();
    const float* rows[M];
    SLIMLSTM_UNROLL(m, M) rows[m] = a.rows[row + m];
    panel += a.from * W * L;
    ptrdiff_t k = a.from;
    for (; k + S <= a.to; k += S, panel += S * W * L)
        SLIMLSTM_UNROLL(s, S)
            SLIMLSTM_UNROLL(m, M) {
                typename Format::Input input = Format::input(rows[m], k + s, a.remainders);
                SLIMLSTM_UNROLL(w, W) parts[s][m][w] = Format::multiply_add(panel + (s * W + w) * L, input, parts[s][m][w]);
            }
    for (; k < a.to; ++k, panel += W * L)
        SLIMLSTM_UNROLL(m, M) {
            typename Format::Input input = Format::input(rows[m], k, a.remainders);
            SLIMLSTM_UNROLL(w, W) parts[0][m][w] = Format::multiply_add(panel + w * L, input, parts[0][m][w]);
        }
    SLIMLSTM_UNROLL(m, M)
        SLIMLSTM_UNROLL(w, W) {
            sums[m][w] = parts[0][m][w];
            SLIMLSTM_UNROLL(s, S - 1) sums[m][w] = Format::add(sums[m][w], parts[s + 1][m][w]);
        }
}

// Computes sums[m][w], the products of row m of ``a``, or of its remainders, with vector w of a panel in int4.
template <int W, int M>
SLIMLSTM_INLINE void group_products(const Panels& matrix, ptrdiff_t first, const Words& a, ptrdiff_t row,
                                    ptrdiff_t remainders, I (&sums)[M][W]) {
    using Group = Simd::Group<M>;
    ptrdiff_t from = a.from / group_words, to = a.to / group_words, half = group_words / 2;
    const float* codes = matrix.data + first * L * matrix.words + from * half * W * L;
    const uint8_t* multipliers = matrix.multipliers + first * L * (matrix.words / half) + from * W * L;
    const float *inputs[M], *offsets[M];
    SLIMLSTM_UNROLL(m, M) {
        inputs[m] = a.rows[row + m] + remainders + a.from;
        offsets[m] = a.rows[row + m] + remainders + a.to;
        SLIMLSTM_UNROLL(w, W) sums[m][w] = Simd::no_words();
    }
    for (ptrdiff_t group = from; group < to; ++group) {
        typename Group::Sum parts[M][W];
        SLIMLSTM_UNROLL(m, M)
            SLIMLSTM_UNROLL(w, W) parts[m][w] = Group::begin(offsets[m]);
        SLIMLSTM_UNROLL(k, group_words / 2) {
            I words[W];
            SLIMLSTM_UNROLL(w, W) words[w] = Group::low(Simd::load_words(codes + (k * W + w) * L));
            SLIMLSTM_UNROLL(m, M) {
                I input = Simd::all_words(bits_of(inputs[m][2 * k]));
                SLIMLSTM_UNROLL(w, W) Group::add_low(words[w], input, parts[m][w]);
            }
            SLIMLSTM_UNROLL(w, W) words[w] = Group::high(Simd::load_words(codes + (k * W + w) * L));
            SLIMLSTM_UNROLL(m, M) {
                I input = Simd::all_words(bits_of(inputs[m][2 * k + 1]));
                SLIMLSTM_UNROLL(w, W) Group::add_high(words[w], input, parts[m][w]);
            }
        }
        SLIMLSTM_UNROLL(w, W) {
            I multiplier = Simd::load_multipliers(multipliers + w * L);
            SLIMLSTM_UNROLL(m, M) sums[m][w] = Group::finish(parts[m][w], multiplier, sums[m][w]);
        }
        codes += half * W * L, multipliers += W * L;
        SLIMLSTM_UNROLL(m, M) inputs[m] += group_words, offsets[m] += Simd::offsets_of_group;
    }
}

// Computes sums[m][w] in any storage.
template <class Format, int W, int M>
SLIMLSTM_INLINE void products_of(const Panels& matrix, ptrdiff_t first, const Words& a, ptrdiff_t row,
                                 typename Format::Sum (&sums)[M][W]) {
    if constexpr (std::is_same_v<Format, Int4>) {
        group_products<W, M>(matrix, first, a, row, 0, sums);
    } else if constexpr (std::is_same_v<Format, FineInt4>) {
        I whole[M][W], remainder[M][W];
        group_products<W, M>(matrix, first, a, row, 0, whole);
        group_products<W, M>(matrix, first, a, row, a.remainders, remainder);
        SLIMLSTM_UNROLL(m, M)
            SLIMLSTM_UNROLL(w, W) sums[m][w] = FineInt8::Sum{whole[m][w], remainder[m][w]};
    } else {
        products<Format, W, M>(matrix.data + first * L * matrix.words, a, row, sums);
    }
}

// Multiplies P panels by M rows and passes the results to ``take``.
template <class Format, int P, int W, int M, class Take>
void block(const Panels& matrix, ptrdiff_t vector, const Words& a, ptrdiff_t row, const Take& take) {
    F values[P * M][W];
    SLIMLSTM_UNROLL(p, P) {
        typename Format::Sum sums[M][W];
        ptrdiff_t first = vector + p * W;
        products_of<Format, W, M>(matrix, first, a, row, sums);
        SLIMLSTM_UNROLL(m, M)
            SLIMLSTM_UNROLL(w, W)
                values[p * M + m][w] = Format::value(sums[m][w], a, row + m, matrix.scales + (first + w) * L);
    }
    take.template operator()<P, W, M>(vector, row, values);
}

template <class Format, int W, int M, class Take>
SLIMLSTM_INLINE void block_of(int m, const Panels& matrix, ptrdiff_t vector, const Words& a, ptrdiff_t row,
                              const Take& take) {
    if constexpr (M > 1)
        if (m < M) return block_of<Format, W, M - 1>(m, matrix, vector, a, row, take);
    block<Format, 1, W, M>(matrix, vector, a, row, take);
}

template <class Format, int W, class Take>
void panel_by_rows(const Panels& matrix, ptrdiff_t vector, const Words& a, ptrdiff_t count, const Take& take) {
    for (ptrdiff_t row = 0, left = count; left > 0;) {
        // Use blocks of nearly equal size: 7 rows become 4 and 3, not 6 and 1.
        ptrdiff_t m = ceiling(left, ceiling(left, Format::max_rows));
        block_of<Format, W, Format::max_rows>(static_cast<int>(m), matrix, vector, a, row, take);
        row += m, left -= m;
    }
}

template <class Format, class Take>
void multiply_as(const Panels& matrix, ptrdiff_t first, ptrdiff_t last, const Words& a, ptrdiff_t count, const Take& take) {
    ptrdiff_t v = first;
    if constexpr (Take::panels > 1)
        for (ptrdiff_t step = Take::panels * panel_vectors; count == 1 && v + step <= last; v += step)
            block<Format, Take::panels, panel_vectors, 1>(matrix, v, a, 0, take);
    for (; v < last; v += panel_vectors) {
        switch (matrix.vectors - v) {
            case 1: panel_by_rows<Format, 1>(matrix, v, a, count, take); break;
            case 2: panel_by_rows<Format, 2>(matrix, v, a, count, take); break;
            case 3: panel_by_rows<Format, 3>(matrix, v, a, count, take); break;
            default: panel_by_rows<Format, 4>(matrix, v, a, count, take); break;
        }
    }
}

// Memory for inputs that have to be converted; with the same members as Words.
struct Scratch {
    float* words;
    const float** rows;
    float* scales;
    int32_t *offsets, *remainder_offsets;
    float* panel;  // a panel of int8 weights
    bool* too_coarse;
};

// Rounding inputs to multiples of a scale moves a gate by scale * gain / sqrt(12) in the root mean square. This limit on
// scale * gain keeps that below 1/32, small against the few units over which sigmoid and tanh rise.
constexpr float largest_rounding = 0.108253175f;

// The inputs [from, to) of rows of floats; ``from`` is a multiple of four, so that it begins a word in every storage.
struct Operand {
    const float* const* rows;
    ptrdiff_t count;
    ptrdiff_t from, to;
    Scratch scratch;

    Words as_they_are() const { return Words{rows, nullptr, nullptr, from, to}; }

    // Pairs of inputs; an odd number is padded with a zero.
    Words in_pairs() const {
        Words words{rows, nullptr, nullptr, from / 2, larger(from / 2, ceiling(to, 2))};
        if (to % 2 == 0) return words;
        for (ptrdiff_t row = 0; row < count; ++row) {
            float* padded = scratch.words + row * (to + 1 - from);
            copy(padded, rows[row] + from, to - from);
            padded[to - from] = 0.0f;
            scratch.rows[row] = padded - from;
        }
        words.rows = scratch.rows;
        return words;
    }

    // Rounded to int8, followed by the remainders if rounding alone is too coarse for one of the rows. If ``grouped``, rows
    // hold whole groups, padded with zeros, and then the offsets of the groups, so that sums need no other offset.
    Words in_int8(float gain, bool grouped) const {
        ptrdiff_t unit = grouped ? group_words : 1, begin = from / 4 / unit * unit;
        ptrdiff_t end = larger(begin, ceiling(to, 4 * unit) * unit), width = end - begin;
        ptrdiff_t stride = grouped ? width / unit * group_stride : width;
        Words words{scratch.rows, scratch.scales, scratch.offsets, begin, end};
        for (ptrdiff_t row = 0; row < count; ++row) {
            float* integers = scratch.words + row * stride;
            float bound = largest_magnitude(rows[row] + from, to - from);
            scratch.scales[row] = bound / 127.0f;
            scratch.offsets[row] = round_row<false>(row, bound, integers, begin, width, grouped, nullptr);
            scratch.rows[row] = integers - begin;
            if (is_coarse(row, gain)) words.remainders = count * stride;
        }
        if (words.remainders == 0) return words;
        words.remainder_offsets = scratch.remainder_offsets;
        for (ptrdiff_t row = 0; row < count; ++row) {
            float* remainders = scratch.words + words.remainders + row * stride;
            if (is_coarse(row, gain)) {
                if (is_coarse(row, gain / parts_of_one)) __atomic_store_n(scratch.too_coarse, true, __ATOMIC_RELAXED);
                float bound = largest_magnitude(rows[row] + from, to - from);
                const float* integers = scratch.words + row * stride;
                scratch.remainder_offsets[row] = round_row<true>(row, bound, remainders, begin, width, grouped, integers);
            } else {
                // Zero remainders, so that the result of a row does not depend on the rows beside it.
                copy_or_clear(remainders, nullptr, stride);
                scratch.remainder_offsets[row] = 0;
            }
        }
        return words;
    }

    bool is_coarse(ptrdiff_t row, float gain) const { return scratch.scales[row] * gain > largest_rounding; }

    // Rounds a row to ``width`` words, of which the first is word ``begin`` of the row; returns the offset of its sums.
    template <bool Remainder>
    int32_t round_row(ptrdiff_t row, float bound, float* words, ptrdiff_t begin, ptrdiff_t width, bool grouped,
                      const float* integers) const {
        ptrdiff_t padded = grouped ? group_words : 1, before = from - 4 * begin;
        if (width > 0) copy_or_clear(words + width - padded, nullptr, padded);
        if (before > 0) copy_or_clear(words, nullptr, padded);
        const int8_t* rounded = integers ? reinterpret_cast<const int8_t*>(integers) + before : nullptr;
        int32_t offset = round_to_int8<Remainder>(rows[row] + from, to - from, bound,
                                                  reinterpret_cast<int8_t*>(words) + before, rounded);
        if (!grouped) return offset;
        for (ptrdiff_t k = 0; k < width / group_words; ++k)
            Simd::offset_group(words + k * group_words, words + width + k * Simd::offsets_of_group);
        return 0;
    }
};

template <class Take>
void multiply_int8(const Panels& matrix, ptrdiff_t first, ptrdiff_t last, const Words& words, ptrdiff_t count,
                   const Take& take) {
    if (words.remainders) return multiply_as<FineInt8>(matrix, first, last, words, count, take);
    return multiply_as<Int8>(matrix, first, last, words, count, take);
}

// Widens W vectors of int4 weights, a panel that begins with vector ``first``, to int8.
template <class Isa, int W>
void widen(const Panels& matrix, ptrdiff_t first, ptrdiff_t from, ptrdiff_t to, float* panel) {
    constexpr ptrdiff_t half = group_words / 2;
    const float* codes = matrix.data + first * L * matrix.words;
    const uint8_t* multipliers = matrix.multipliers + first * L * (matrix.words / half);
    for (ptrdiff_t group = from / group_words; group < ceiling(to, group_words); ++group)
        SLIMLSTM_UNROLL(w, W) {
            I multiplier = Isa::load_multipliers(multipliers + (group * W + w) * L);
            for (ptrdiff_t k = group * half; k < (group + 1) * half; ++k)
                Isa::widen_codes(Isa::load_words(codes + (k * W + w) * L), multiplier, panel + (2 * k * W + w) * L,
                                 panel + ((2 * k + 1) * W + w) * L);
        }
}

// Multiplies int4 weights by inputs of many rows: widens the weights to int8, panel by panel.
template <class Take>
void multiply_widened(const Panels& matrix, ptrdiff_t first, ptrdiff_t last, const Operand& a, const Take& take) {
    Words words = a.in_int8(matrix.gain, false);
    Panels widened = matrix;
    widened.storage = Storage::int8, widened.words = 2 * matrix.words;
    for (ptrdiff_t v = first; v < last; v += panel_vectors) {
        switch (matrix.vectors - v) {
            case 1: widen<Simd, 1>(matrix, v, words.from, words.to, a.scratch.panel); break;
            case 2: widen<Simd, 2>(matrix, v, words.from, words.to, a.scratch.panel); break;
            case 3: widen<Simd, 3>(matrix, v, words.from, words.to, a.scratch.panel); break;
            default: widen<Simd, 4>(matrix, v, words.from, words.to, a.scratch.panel); break;
        }
        widened.data = a.scratch.panel - v * L * widened.words;
        multiply_int8(widened, v, smaller(last, v + panel_vectors), words, a.count, take);
    }
}

// Multiplies ``a`` by the vectors [first, last) of a matrix and passes the results to ``take``; ``first`` begins a panel.
template <class Take>
void multiply(const Panels& matrix, ptrdiff_t first, ptrdiff_t last, const Operand& a, const Take& take) {
    switch (matrix.storage) {
        case Storage::float32: return multiply_as<Float32>(matrix, first, last, a.as_they_are(), a.count, take);
        case Storage::bfloat16: return multiply_as<BFloat16>(matrix, first, last, a.in_pairs(), a.count, take);
        case Storage::int8: return multiply_int8(matrix, first, last, a.in_int8(matrix.gain, false), a.count, take);
        case Storage::int4: {
            if constexpr (Simd::rows_to_widen < PTRDIFF_MAX)
                if (a.count >= Simd::rows_to_widen) return multiply_widened(matrix, first, last, a, take);
            Words words = a.in_int8(matrix.gain, true);
            if (words.remainders) return multiply_as<FineInt4>(matrix, first, last, words, a.count, take);
            return multiply_as<Int4>(matrix, first, last, words, a.count, take);
        }
    }
}

}  // namespace
