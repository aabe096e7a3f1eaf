// Four lanes with the vector extensions of GCC and Clang: SSE on x86, NEON on ARM, other instructions elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

struct Simd {
    static constexpr ptrdiff_t lanes = 4;
    static constexpr int max_rows = 2;
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(16)));  // unsigned, so that overflow and shifts are defined

    static F zero() { return F{}; }
    static F all(float value) { return F{value, value, value, value}; }
    static F load(const float* from) {
        F v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(float* to, F v) { std::memcpy(to, &v, sizeof v); }
    static void store_first(float* to, F v, ptrdiff_t count) {
        for (ptrdiff_t lane = 0; lane < count; ++lane) to[lane] = v[lane];
    }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    // Comparisons with NaN are false, so that both return a NaN in ``v``.
    static F at_most(float limit, F v) { return all(limit) < v ? all(limit) : v; }
    static F at_least(float limit, F v) { return all(limit) > v ? all(limit) : v; }
    // Adding 1.5 * 2^23 moves the fraction out of the significand.
    static F round(F v) {
        const F magic = all(12582912.0f);
        return (v + magic) - magic;
    }
    static F times_power_of_two(F v, F exponent) {
        I bits = (__builtin_convertvector(exponent, I) + 127) << 23;
        F power;
        std::memcpy(&power, &bits, sizeof power);
        return v * power;
    }
    static F reciprocal(F v) { return 1.0f / v; }

    static I no_words() { return I{}; }
    static I load_words(const void* from) {
        I v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static I all_words(int value) { return I{value, value, value, value}; }
    static F to_float(I v) { return __builtin_convertvector(v, F); }
    static I add_words(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<U>(a) + reinterpret_cast<U>(b)); }
    static I subtract_words(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<U>(a) - reinterpret_cast<U>(b)); }
    template <int bits>
    static I rotate_words(I a) {
        U words = reinterpret_cast<U>(a);
        return reinterpret_cast<I>((words << bits) | (words >> (32 - bits)));
    }
    static I and_words(I a, I b) { return a & b; }
    static I max_words(I a, I b) { return a > b ? a : b; }
    static int largest_word(I v) {
        int largest = v[0];
        for (ptrdiff_t lane = 1; lane < lanes; ++lane) largest = v[lane] > largest ? v[lane] : largest;
        return largest;
    }
    static int sum_of_words(I v) {
        I pairs = add_words(v, I{v[2], v[3], v[0], v[1]});
        return add_words(pairs, I{pairs[1], pairs[0], pairs[3], pairs[2]})[0];
    }
    static I as_words(F v) {
        I words;
        std::memcpy(&words, &v, sizeof words);
        return words;
    }
    // Stores the lowest byte of each word.
    static void store_bytes(int8_t* to, I words) {
        for (ptrdiff_t lane = 0; lane < lanes; ++lane) to[lane] = static_cast<int8_t>(words[lane]);
    }

    static F as_floats(I words) {
        F v;
        std::memcpy(&v, &words, sizeof v);
        return v;
    }

    // Convert the bfloat16 in the lower or upper half of each word to float32.
    static F low_halves(I words) { return as_floats(up(words, 16)); }
    static F high_halves(I words) { return as_floats(words & all_words(static_cast<int>(0xFFFF0000u))); }

    // Adds to each word of ``sum`` the dot product of four unsigned weights and four signed inputs.
    static I dot_int8(I weights, I inputs, I sum) {
        sum += (weights & 255) * (up(inputs, 24) >> 24) + ((weights >> 8) & 255) * (up(inputs, 16) >> 24);
        return sum + ((weights >> 16) & 255) * (up(inputs, 8) >> 24) + ((weights >> 24) & 255) * (inputs >> 24);
    }

    // Products with int4 weights; see products.h.
    static constexpr ptrdiff_t rows_to_widen = PTRDIFF_MAX;
    static constexpr ptrdiff_t offsets_of_group = 1;
    static I load_multipliers(const uint8_t* from) { return I{from[0], from[1], from[2], from[3]}; }
    struct AnyRows {
        using Sum = I;
        static Sum begin(const float* offsets) {
            int32_t offset;
            std::memcpy(&offset, offsets, sizeof offset);
            return all_words(offset);
        }
        static I low(I words) { return words & all_words(0x0F0F0F0F); }
        static I high(I words) { return low(words >> 4); }
        static void add_low(I codes, I input, Sum& sum) { sum = dot_int8(codes, input, sum); }
        static void add_high(I codes, I input, Sum& sum) { sum = dot_int8(codes, input, sum); }
        static I finish(Sum group, I multipliers, I sum) { return add_words(sum, group * multipliers); }
    };
    template <int>
    using Group = AnyRows;

    static void offset_group(const float* inputs, float* to) {
        int8_t integers[64];
        std::memcpy(integers, inputs, sizeof integers);
        int32_t sum = 0;
        for (int8_t integer : integers) sum += integer;
        sum *= -8;
        std::memcpy(to, &sum, sizeof sum);
    }

  private:
    static I up(I words, int bits) {
        return reinterpret_cast<I>(reinterpret_cast<U>(words) << static_cast<uint32_t>(bits));
    }
};

}  // namespace
