// AVX-512: sixteen lanes, thirty-two registers; with VNNI if the compiler targets it.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

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
};

}  // namespace
