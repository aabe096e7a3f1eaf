// What the kernels, one per instruction set, are given. Names as in slimlstm/ops/weights.py; L is the number of float
// lanes of the instruction set's vectors. Everything here is plain data, so that translation units compiled for
// different instruction sets share no inline function.
#pragma once

#include <cstddef>
#include <cstdint>

namespace slimlstm {

// How weights are kept. Of int8 every row has a scale of its own; what they are multiplied with is rounded likewise, every
// row of it by a scale of its own, as it comes; where that could be seen in the gates, what is left over is rounded to
// int8 and multiplied, too. Sums are float32, of int8 int32.
enum class Storage : int { float32, bfloat16, int8 };

// W [outputs, inputs], its rows dealt out to vectors of L lanes and its vectors to panels of four (the last panel takes
// what is left). A panel holds, for every input in turn, the weights of its outputs side by side; of bfloat16 for every two
// inputs in turn, and of int8 for every four, so that a lane of one step is always a word of 32 bits. Lanes without a row
// are zero, and so are inputs that fill up the last word. For the matrices that make gates, a panel is L hidden units by
// the four gates i, f, g, o. int8 weights are kept plus 128, without a sign, as the instruction for them wants.
struct Panels {
    const float* data = nullptr;  // words of 32 bits, whatever they hold
    const float* scales = nullptr;  // of int8: [vectors * L]
    // Of int8, the largest norm of a row of all that lies between these inputs and the gates: of W, or for V of U V. 0 where
    // inputs need never be finer.
    float gain = 0;
    ptrdiff_t vectors = 0;
    ptrdiff_t inputs = 0;
    ptrdiff_t words = 0;  // those of a lane
    Storage storage = Storage::float32;
};

// One direction of a layer. A matrix that is kept as factors is U in ``ih`` or ``hh``, and V in ``ih_v`` or ``hh_v``.
struct Weights {
    Panels ih_v, ih, hh_v, hh, hr;
    const float* bias = nullptr;  // bias_ih + bias_hh, ordered as the gates of a panel
    ptrdiff_t input_size = 0, hidden_size = 0, output_size = 0;
    float cell_clip = 0, proj_clip = 0;  // bounds of c and of what hr gives; infinite where there is none
};

// The sequences [first_row, last_row) of one direction of a layer over a whole batch.
struct Task {
    const Weights* weights;
    const float* x;           // [rows of all steps, input_size], ``x_stride`` floats from row to row
    ptrdiff_t x_stride;
    const int64_t* sizes;     // the number of sequences at each step, never growing; null: ``batch`` at every step
    ptrdiff_t steps, batch, rows;
    ptrdiff_t first_row, last_row;
    const float *h0, *c0;     // [batch, output_size], [batch, hidden_size]; null: zeros
    float* output;            // [rows, ...], ``output_stride`` floats from row to row
    ptrdiff_t output_stride;
    float *h, *c;             // the last states, as the first
    bool reverse;
};

// The threads that share one task, and where they wait for each other.
struct Team {
    int size;
    void (*barrier)(void* self);
    void* self;
};

struct Kernel {
    const char* name;
    ptrdiff_t lanes;
    // How many floats ``run`` needs, 64-byte aligned and shared by the team.
    size_t (*workspace)(const Task&, int team_size);
    void (*run)(const Task&, float* workspace, const Team&, int member);
    // A number that values and those before them make, and others hardly ever do.
    uint64_t (*digest)(const float* values, ptrdiff_t count, uint64_t so_far);
};

extern const Kernel kernel_portable;
#ifdef SLIMLSTM_X86
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;
extern const Kernel kernel_avx512_vnni;
#endif

}  // namespace slimlstm
