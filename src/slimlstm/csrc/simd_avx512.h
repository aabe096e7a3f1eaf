// AVX-512: sixteen lanes, thirty-two registers; with VNNI if the compiler targets it.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace {

struct Simd {
    static constexpr ptrdiff_t lanes = 16;
    static constexpr int max_rows = 6;  // 24 sums, 4 weights, the remaining registers for inputs
    using F = __m512;
    using I = __m512i;

    static F zero() { return _mm512_setzero_ps(); }
    static F all(float value) { return _mm512_set1_ps(value); }
    static F load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, F v) { _mm512_storeu_ps(to, v); }
    static void store_first(float* to, F v, ptrdiff_t count) {
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), v);
    }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    // Both return a NaN in ``v``, because it is the second operand.
    static F at_most(float limit, F v) { return _mm512_min_ps(all(limit), v); }
    static F at_least(float limit, F v) { return _mm512_max_ps(all(limit), v); }
    static F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F times_power_of_two(F v, F exponent) { return _mm512_scalef_ps(v, exponent); }
    static F reciprocal(F v) {
        F guess = _mm512_rcp14_ps(v);
        return _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(v, guess, all(1.0f)), guess);
    }

    static I no_words() { return _mm512_setzero_si512(); }
    static I load_words(const void* from) { return _mm512_loadu_si512(from); }
    static I all_words(int value) { return _mm512_set1_epi32(value); }
    static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static I add_words(I a, I b) { return _mm512_add_epi32(a, b); }
    static I subtract_words(I a, I b) { return _mm512_sub_epi32(a, b); }
    template <int bits>
    static I rotate_words(I a) {
        return _mm512_rol_epi32(a, bits);
    }
    static I and_words(I a, I b) { return _mm512_and_si512(a, b); }
    static I max_words(I a, I b) { return _mm512_max_epi32(a, b); }
    static int largest_word(I v) { return _mm512_reduce_max_epi32(v); }
    // _mm512_reduce_add_epi32 adds signed integers, whose overflow is undefined.
    static int sum_of_words(I v) {
        __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
        __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        quarter = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4E));
        return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xB1)));
    }
    static I as_words(F v) { return _mm512_castps_si512(v); }
    // Stores the lowest byte of each word.
    static void store_bytes(int8_t* to, I words) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(words));
    }

    // Convert the bfloat16 in the lower or upper half of each word to float32.
    static F low_halves(I words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
    static F high_halves(I words) {
        return _mm512_castsi512_ps(_mm512_and_si512(words, all_words(static_cast<int>(0xFFFF0000u))));
    }

    // Adds to each word of ``sum`` the dot product of four unsigned weights and four signed inputs.
    static I dot_int8(I weights, I inputs, I sum) {
#ifdef __AVX512VNNI__
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
        return sum;
#else
        I even = _mm512_madd_epi16(_mm512_and_si512(weights, _mm512_set1_epi16(255)),
                                   _mm512_srai_epi16(_mm512_slli_epi16(inputs, 8), 8));
        I odd = _mm512_madd_epi16(_mm512_srli_epi16(weights, 8), _mm512_srai_epi16(inputs, 8));
        return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
    }

    // Products with int4 weights; see products.h.
    static I load_multipliers(const uint8_t* from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static I low_codes(I words) { return _mm512_and_si512(words, all_words(0x0F0F0F0F)); }
    static I high_codes(I words) { return low_codes(_mm512_srli_epi16(words, 4)); }

#ifdef __AVX512VNNI__
    static constexpr ptrdiff_t rows_to_widen = 25;
    static constexpr ptrdiff_t offsets_of_group = 3;
    // Upper codes stay in place, 16 times as large, until the end of the group. Sums of half a group fit 16 bits.
    struct FewRows {
        struct Sum {
            I low, high;
        };
        static Sum begin(const float* offsets) {
            return Sum{_mm512_castps_si512(all(offsets[0])), _mm512_castps_si512(all(offsets[1]))};
        }
        static I low(I words) { return low_codes(words); }
        static I high(I words) { return _mm512_and_si512(words, all_words(static_cast<int>(0xF0F0F0F0u))); }
        static void add_low(I codes, I input, Sum& sum) { sum.low = dot_int8(codes, input, sum.low); }
        static void add_high(I codes, I input, Sum& sum) { sum.high = dot_int8(codes, input, sum.high); }
        static I finish(const Sum& group, I multipliers, I sum) {
            I high = _mm512_srai_epi32(group.high, 4);
            asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(group.low), "v"(multipliers));
            asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(high), "v"(multipliers));
            return sum;
        }
    };
    // Needs half the registers.
    struct ManyRows {
        using Sum = I;
        static Sum begin(const float* offsets) { return _mm512_castps_si512(all(offsets[2])); }
        static I low(I words) { return low_codes(words); }
        static I high(I words) { return high_codes(words); }
        static void add_low(I codes, I input, Sum& sum) { sum = dot_int8(codes, input, sum); }
        static void add_high(I codes, I input, Sum& sum) { sum = dot_int8(codes, input, sum); }
        static I finish(Sum group, I multipliers, I sum) {
            return _mm512_add_epi32(sum, _mm512_mullo_epi32(group, multipliers));
        }
    };
    template <int M>
    using Group = std::conditional_t<(M < 3), FewRows, ManyRows>;

    static void offset_group(const float* inputs, float* to) {
        I sums = dot_int8(_mm512_set1_epi8(1), load_words(inputs), no_words());
        __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
        __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        quarter = _mm_add_epi32(quarter, _mm_unpackhi_epi64(quarter, quarter));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_mullo_epi32(quarter, _mm_setr_epi32(-8, -128, 0, 0)));
        quarter = _mm_add_epi32(quarter, _mm_srli_epi64(quarter, 32));
        _mm_store_ss(to + 2, _mm_castsi128_ps(_mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), quarter), 3)));
    }

    // Stores int8 weights, plus 128, of words of eight codes.
    static void widen_codes(I words, I multipliers, void* even, void* odd) {
        const I twice = _mm512_or_si512(multipliers, _mm512_slli_epi32(multipliers, 16));
        const I offset = _mm512_sub_epi16(_mm512_set1_epi16(128), _mm512_slli_epi16(twice, 3));
        const I lower = _mm512_set1_epi16(255);
        const I offsets = _mm512_or_si512(_mm512_and_si512(offset, lower), _mm512_slli_epi16(offset, 8));
        auto widened = [&](I codes) {
            I low = _mm512_mullo_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x0F)), twice);
            I high = _mm512_mullo_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x0F00)), twice);
            return _mm512_add_epi8(_mm512_or_si512(_mm512_and_si512(low, lower), high), offsets);
        };
        _mm512_storeu_si512(even, widened(words));
        _mm512_storeu_si512(odd, widened(_mm512_srli_epi16(words, 4)));
    }
#else
    static constexpr ptrdiff_t rows_to_widen = PTRDIFF_MAX;
    static constexpr ptrdiff_t offsets_of_group = 1;
    // Sums in 16 bits, one of the first two inputs of every word and one of the last two; with their offset they fit.
    struct AnyRows {
        using Sum = I;
        static Sum begin(const float* offsets) { return _mm512_castps_si512(all(offsets[0])); }
        static I low(I words) { return low_codes(words); }
        static I high(I words) { return high_codes(words); }
        static void add_low(I codes, I input, Sum& sum) {
            sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, input));
        }
        static void add_high(I codes, I input, Sum& sum) { add_low(codes, input, sum); }
        static I finish(Sum group, I multipliers, I sum) {
            I both = _mm512_or_si512(multipliers, _mm512_slli_epi32(multipliers, 16));
            return _mm512_add_epi32(sum, _mm512_madd_epi16(group, both));
        }
    };
    template <int>
    using Group = AnyRows;

    static void offset_group(const float* inputs, float* to) {
        I sums = _mm512_maddubs_epi16(_mm512_set1_epi8(1), load_words(inputs));
        __m256i half = _mm256_add_epi16(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
        __m128i quarter = _mm_add_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        quarter = _mm_add_epi16(quarter, _mm_unpackhi_epi64(quarter, quarter));
        quarter = _mm_add_epi16(quarter, _mm_srli_epi64(quarter, 32));
        quarter = _mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(quarter, 3));
        _mm_store_ss(to, _mm_castsi128_ps(quarter));
    }
#endif
};

}  // namespace
