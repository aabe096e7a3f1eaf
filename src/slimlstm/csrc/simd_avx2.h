// AVX2 with FMA: eight lanes, sixteen registers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {

struct Simd {
    static constexpr ptrdiff_t lanes = 8;
    static constexpr int max_rows = 3;  // 12 sums, 3 inputs and one register for weights
    using F = __m256;
    using I = __m256i;

    static F zero() { return _mm256_setzero_ps(); }
    static F all(float value) { return _mm256_set1_ps(value); }
    static F load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, F v) { _mm256_storeu_ps(to, v); }
    static void store_first(float* to, F v, ptrdiff_t count) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_maskstore_ps(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane), v);
    }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    // Both return a NaN in ``v``, because it is the second operand.
    static F at_most(float limit, F v) { return _mm256_min_ps(all(limit), v); }
    static F at_least(float limit, F v) { return _mm256_max_ps(all(limit), v); }
    static F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F times_power_of_two(F v, F exponent) {
        __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(v, _mm256_castsi256_ps(bits));
    }
    static F reciprocal(F v) { return _mm256_div_ps(all(1.0f), v); }

    static I no_words() { return _mm256_setzero_si256(); }
    static I load_words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
    static I all_words(int value) { return _mm256_set1_epi32(value); }
    static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
    static I add_words(I a, I b) { return _mm256_add_epi32(a, b); }
    static I subtract_words(I a, I b) { return _mm256_sub_epi32(a, b); }
    template <int bits>
    static I rotate_words(I a) {
        return _mm256_or_si256(_mm256_slli_epi32(a, bits), _mm256_srli_epi32(a, 32 - bits));
    }
    static I and_words(I a, I b) { return _mm256_and_si256(a, b); }
    static I max_words(I a, I b) { return _mm256_max_epi32(a, b); }
    static int largest_word(I v) {
        __m128i half = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
        return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
    }
    static int sum_of_words(I v) {
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
        return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
    }
    static I as_words(F v) { return _mm256_castps_si256(v); }
    // Stores the lowest byte of each word.
    static void store_bytes(int8_t* to, I words) {
        const __m128i lowest = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(words), lowest);
        __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256(words, 1), lowest);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(low, high));
    }

    // Convert the bfloat16 in the lower or upper half of each word to float32.
    static F low_halves(I words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
    static F high_halves(I words) {
        return _mm256_castsi256_ps(_mm256_and_si256(words, all_words(static_cast<int>(0xFFFF0000u))));
    }

    // Adds to each word of ``sum`` the dot product of four unsigned weights and four signed inputs.
    static I dot_int8(I weights, I inputs, I sum) {
        I even = _mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(255)),
                                   _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8));
        I odd = _mm256_madd_epi16(_mm256_srli_epi16(weights, 8), _mm256_srai_epi16(inputs, 8));
        return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
    }

    // Products with int4 weights; see products.h.
    static constexpr ptrdiff_t rows_to_widen = PTRDIFF_MAX;
    static constexpr ptrdiff_t offsets_of_group = 1;
    static I load_multipliers(const uint8_t* from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    }
    // Sums in 16 bits, one of the first two inputs of every word and one of the last two; with their offset they fit.
    struct AnyRows {
        using Sum = I;
        static Sum begin(const float* offsets) { return _mm256_castps_si256(all(offsets[0])); }
        static I low(I words) { return _mm256_and_si256(words, all_words(0x0F0F0F0F)); }
        static I high(I words) { return low(_mm256_srli_epi16(words, 4)); }
        static void add_low(I codes, I input, Sum& sum) {
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, input));
        }
        static void add_high(I codes, I input, Sum& sum) { add_low(codes, input, sum); }
        static I finish(Sum group, I multipliers, I sum) {
            I both = _mm256_or_si256(multipliers, _mm256_slli_epi32(multipliers, 16));
            return _mm256_add_epi32(sum, _mm256_madd_epi16(group, both));
        }
    };
    template <int>
    using Group = AnyRows;

    static void offset_group(const float* inputs, float* to) {
        const I ones = _mm256_set1_epi8(1);
        I sums = _mm256_add_epi16(_mm256_maddubs_epi16(ones, load_words(inputs)),
                                  _mm256_maddubs_epi16(ones, load_words(inputs + lanes)));
        __m128i quarter = _mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        quarter = _mm_add_epi16(quarter, _mm_unpackhi_epi64(quarter, quarter));
        quarter = _mm_add_epi16(quarter, _mm_srli_epi64(quarter, 32));
        quarter = _mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(quarter, 3));
        _mm_store_ss(to, _mm_castsi128_ps(quarter));
    }
};

}  // namespace
