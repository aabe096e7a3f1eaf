// Counts the allocations of repeated calls of layers of every kind, with one thread and with several, after a first call
// that may allocate. Prints "calls allocations" for each. Compiled with the kernel's sources; replaces glibc's malloc.
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "layer.h"

static std::atomic<long> allocations{0};

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t size) { return ++allocations, __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return ++allocations, __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return ++allocations, __libc_realloc(old, size); }
void* aligned_alloc(size_t alignment, size_t size) { return ++allocations, __libc_memalign(alignment, size); }
}

using namespace slimlstm;

int main() {
    constexpr ptrdiff_t H = 33, P = 17, R = 5, T = 40, B = 8, calls = 100;
    std::vector<float> values(4 * H * H, 0.01f), x(T * B * H, 0.5f), output(T * B * 2 * H), h(2 * B * H), c(2 * B * H);
    std::vector<int64_t> sizes(T, B);
    auto matrix = [&](ptrdiff_t rows, ptrdiff_t columns) { return Source{values.data(), rows, columns, columns, 1}; };
    for (Storage storage : {Storage::float32, Storage::bfloat16, Storage::int8})
        for (bool factored : {false, true})
            for (bool projected : {false, true}) {
                ptrdiff_t outputs = projected ? P : H;
                Sources one;
                one.ih = matrix(4 * H, factored ? R : H), one.hh = matrix(4 * H, factored ? R : outputs);
                if (factored) one.ih_v = matrix(R, H), one.hh_v = matrix(R, outputs);
                if (projected) one.hr = matrix(P, H);
                one.ih_storage = one.hh_storage = storage;
                Layer layer(kernel_names().front(), {one, one});
                bool too_coarse = false;
                for (int threads : {1, -2}) {
                    Call call{x.data(), sizes.data(), T, B, T * B, nullptr, nullptr, output.data(), h.data(), c.data(), &too_coarse};
                    layer.run(call, threads);
                    long before = allocations;
                    for (int k = 0; k < calls; ++k) {
                        call.steps = 1 + k % T, call.rows = call.steps * B;
                        layer.is_current();
                        layer.run(call, threads);
                    }
                    std::printf("%td %ld\n", calls, allocations - before);
                }
            }
}
