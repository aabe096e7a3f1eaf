// Measures the peak speed of one thread: multiply-adds a second in each precision, and bytes a second when reading memory
// of each size in the arguments repeatedly. Prints one line each: "float32 5.8e+10", "65536 1.2e+11".
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

using F = Simd::F;
using I = Simd::I;

#define UNROLL(index, count) _Pragma("GCC unroll 16") for (int index = 0; index < (count); ++index)

constexpr int chains = 12;  // enough to hide the latency of a multiply-add, few enough for sixteen registers
constexpr long rounds = 1000000;

static volatile float sink = 0;

// Uses a result, so that the compiler cannot remove its computation.
template <class Vector>
void keep(const Vector& v) {
    float first;
    std::memcpy(&first, &v, sizeof first);
    sink = first;
}

// Returns the calls a second in the best of several runs.
template <class Work>
double rate(const Work& work) {
    double best = 1e9;
    for (int run = 0; run < 9; ++run) {
        auto began = std::chrono::steady_clock::now();
        work();
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        best = seconds < best ? seconds : best;
    }
    return 1 / best;
}

// Returns how often a second step(sum) runs, over independent chains.
template <class Start, class Step>
double steps(const Start& start, const Step& step) {
    return rounds * chains * rate([&] {
               decltype(start(0)) sums[chains];
               UNROLL(k, chains) sums[k] = start(sink);  // volatile, so that the compiler cannot merge equal chains
               for (long round = 0; round < rounds; ++round)
                   UNROLL(k, chains) sums[k] = step(sums[k]);
               UNROLL(k, chains) keep(sums[k]);
           });
}

int main(int count, char** arguments) {
    const F a = Simd::all(sink), b = Simd::all(sink);  // unknown to the compiler
    const I words = Simd::all_words(static_cast<int>(sink));
    double float32 = Simd::lanes * steps(Simd::all, [&](F sum) { return Simd::fma(a, b, sum); }), bfloat16 = float32;
#if defined(__AVX512BF16__)
    bfloat16 = 2 * Simd::lanes * steps(Simd::all, [&](F sum) {
                   asm("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(a));
                   return sum;
               });
#endif
    double int8 = 4 * Simd::lanes * steps(Simd::all_words, [&](I sum) { return Simd::dot_int8(words, words, sum); });
    std::printf("float32 %.4g\nbfloat16 %.4g\nint8 %.4g\n", float32, bfloat16, int8);
    for (int argument = 1; argument < count; ++argument) {
        constexpr size_t line = 64, block = 8 * Simd::lanes;
        size_t floats = (std::strtoul(arguments[argument], nullptr, 10) / sizeof(float) + block - 1) / block * block;
        size_t size = (floats * sizeof(float) + line - 1) / line * line;
        std::unique_ptr<float, void (*)(void*)> memory(static_cast<float*>(std::aligned_alloc(line, size)), std::free);
        for (size_t k = 0; k < floats; ++k) memory.get()[k] = 1.0f;
        const size_t times = (1 << 28) / size + 1;
        double passes = static_cast<double>(times) * rate([&] {
                            F sums[8];
                            for (F& sum : sums) sum = Simd::zero();
                            for (size_t time = 0; time < times; ++time)
                                for (const float* at = memory.get(); at < memory.get() + floats; at += block)
                                    UNROLL(k, 8) sums[k] = Simd::add(sums[k], Simd::load(at + k * Simd::lanes));
                            for (const F& sum : sums) keep(sum);
                        });
        std::printf("%s %.4g\n", arguments[argument], passes * static_cast<double>(floats * sizeof(float)));
    }
}
