// The interface of the kernels, one for each instruction set. Names follow slimlstm/ops/weights.py; L is the number of
// float lanes in a vector of the instruction set. All types here are plain data, so that translation units compiled for
// different instruction sets share no inline function.
#pragma once

#include <cstddef>
#include <cstdint>

namespace slimlstm {

// Number format of packed weights. In int8 every row of weights has its own scale. int4 holds the same integers as int8, as
// codes from -7 to 7 times one multiplier for a group of inputs. The inputs of both are rounded to int8 at run time, also
// with one scale a row; where that error could show in the gates, the remainder is rounded to int8 and multiplied as well.
// Sums are accumulated in float32, or in int32 for int8 and int4.
enum class Storage : int { float32, bfloat16, int8, int4 };

// Inputs that share a multiplier in int4.
constexpr ptrdiff_t group_inputs = 64;

// Packed W [outputs, inputs]. Each lane of a vector holds one row, and four vectors form a panel; the last panel may have
// fewer. A panel stores one 32-bit word per lane for each input (float32), pair of inputs (bfloat16), four inputs (int8) or
// eight inputs (int4). Lanes without a row and inputs that pad the last word, or the last group of int4, are zero. In
// matrices that compute gates, a panel holds L hidden units by the four gates i, f, g, o. int8 weights are stored unsigned,
// plus 128, as the dot-product instruction needs; int4 codes plus 8, the first four of a word in the lower halves of its
// bytes and the other four in the upper halves.
struct Panels {
    const float* data = nullptr;    // 32-bit words of any format
    const float* scales = nullptr;  // int8 and int4: [vectors * L]
    // int4 only: one multiplier a lane for each group of inputs in each panel; up to 127
    const uint8_t* multipliers = nullptr;
    // int8 and int4: the largest row norm of the map from these inputs to the gates. The map is this matrix, or U V if this
    // matrix is V. The norm bounds how far rounded inputs can move a gate. 0 if the inputs never need the remainder.
    float gain = 0;
    ptrdiff_t vectors = 0;
    ptrdiff_t inputs = 0;
    ptrdiff_t words = 0;  // per lane
    Storage storage = Storage::float32;
};

// One direction of a layer. For a factored matrix, ``ih`` or ``hh`` holds U, and ``ih_v`` or ``hh_v`` holds V.
struct Weights {
    Panels ih_v, ih, hh_v, hh, hr;
    const float* bias = nullptr;  // bias_ih + bias_hh, in the gate order of a panel
    ptrdiff_t input_size = 0, hidden_size = 0, output_size = 0;
    float cell_clip = 0, proj_clip = 0;  // bounds of c and of the projection; infinite: no clipping
};

// The sequences [first_row, last_row) of a batch, in one direction of a layer.
struct Task {
    const Weights* weights;
    const float* x;  // [rows of all steps, input_size], rows ``x_stride`` floats apart
    ptrdiff_t x_stride;
    const int64_t* sizes;  // sequences at each step, never growing; null: ``batch`` at every step
    ptrdiff_t steps, batch, rows;
    ptrdiff_t first_row, last_row;
    const float *h0, *c0;  // [batch, output_size], [batch, hidden_size]; null: zeros
    float* output;         // [rows, ...], rows ``output_stride`` floats apart
    ptrdiff_t output_stride;
    float *h, *c;  // last states, shaped like h0 and c0
    bool* too_coarse;  // set where inputs that are rounded to int8 with remainders could still move a gate
    bool reverse;
};

// The threads that share one task, and their barrier.
struct Team {
    int size;
    void (*barrier)(void* self);
    void* self;
};

// One step of a batch in training, without its products: [rows, hidden] and gates [rows, 4 hidden] in the order i, f, g, o.
// With ``is_half``, results of products are bfloat16, and so are the numbers that products will read.
struct ForwardStep {
    ptrdiff_t rows, hidden;
    bool is_half;
    const void *gates, *recurrent;  // the summands of the gates; ``recurrent`` may be null
    const float* c_before;
    float* activations;  // [rows, 4 hidden]; may be ``gates``
    float *c, *h;
    uint16_t* h_half;  // null without ``is_half``
};

struct BackwardStep {
    ptrdiff_t rows, hidden;
    bool is_half;
    const float *activations, *c_before, *c;
    const float* d_output;  // null: zero
    const void* d_h;        // from the step after, null: zero
    float* d_c;             // gradient of c from later steps, replaced by the gradient of c_before
    void* d_gates;
};

// A small matrix that multiplies rows from the right: y[n] = sum of x[k] * data[k * input_stride + n * output_stride].
struct SmallMatrix {
    const float* data;
    ptrdiff_t inputs, outputs, input_stride, output_stride;
};

// All steps of one direction in training, with small float32 matrices: one, or the factors in the order of their use.
// Gates and activations [steps, batch, 4 hidden], states [steps + 1, batch, hidden] in the order of memory.
struct Passes {
    ptrdiff_t steps, batch, hidden;
    bool reverse;
    int factors;
    SmallMatrix matrices[2];
    float* workspace;  // for the matrices with rows padded to whole vectors, and two rows of results for each sequence
};

struct ForwardPass {
    Passes sizes;
    bool from_zero;      // whether the first h is zero
    float* activations;  // holds the gates without the recurrent part at first
    float *c, *h;
};

struct BackwardPass {
    Passes sizes;
    const float *activations, *c;
    const float* d_output;  // [steps, batch, hidden], null: zero
    float* d_c;             // gradient of the last c, replaced by the gradient of the first c
    float* d_h0;            // null: not wanted
    float* d_gates;
};

struct Kernel {
    const char* name;
    ptrdiff_t lanes;
    // The number of floats that ``run`` needs, 64-byte aligned and shared by the team.
    size_t (*workspace)(const Task&, int team_size);
    void (*run)(const Task&, float* workspace, const Team&, int member);
    // A hash of the values, continued from the hash of the values before them.
    uint64_t (*digest)(const float* values, ptrdiff_t count, uint64_t so_far);
    void (*train_forward)(const ForwardStep&);
    void (*train_backward)(const BackwardStep&);
    void (*train_forward_all)(const ForwardPass&);
    void (*train_backward_all)(const BackwardPass&);
};

extern const Kernel kernel_portable;
#ifdef SLIMLSTM_X86
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;
extern const Kernel kernel_avx512_vnni;
#endif

}  // namespace slimlstm
