// The recurrence of one direction of a layer, written once for every instruction set: each includes its ``Simd`` and
// then this file. Everything is in an unnamed namespace, so that the linker cannot put code for one instruction set in
// the place of another's.
//
// G = ceil(H / L) groups of hidden units. A team shares the groups out among its members; a member computes the gates,
// the cells and the outputs of its own groups, so that one barrier a step is enough:
//     hh dense     all of h has to be there before the next step: a barrier after each step, h in two buffers
//     hh = U V     V h is a sum over hidden units: each member adds up its own, a barrier, everybody adds the parts
//     projection   hr m is such a sum likewise, after which everybody has all of h
#pragma once

#include "elementwise.h"
#include "kernel.h"

namespace {

using slimlstm::Panels;
using slimlstm::Storage;
using slimlstm::Task;
using slimlstm::Team;
using slimlstm::Weights;

constexpr ptrdiff_t panel_vectors = 4;
// One cell waits for its own numbers most of the time.
constexpr int cells_at_once = 2;

SLIMLSTM_INLINE constexpr ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
SLIMLSTM_INLINE ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
SLIMLSTM_INLINE ptrdiff_t ceiling(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

// ---- weights and inputs of each storage ----

// What products are taken with: inputs by row, int8 four to a word, and what makes numbers of their sums.
struct Words {
    const float* const* rows;
    const float* scales;       // of the rows
    const int32_t* offsets;    // 128 times the sum of a row, which weights without a sign add
    ptrdiff_t from, to;        // which words of weights count
    ptrdiff_t rests = 0;       // how many words after those of a row are those of what rounding left over; 0: there are none
    const int32_t* rest_offsets = nullptr;
};

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

// Not with the processor's instruction for it: where that was measured it does half as many products a second as this, and
// it would round the inputs.
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

// With what rounding the inputs to int8 left over, from the same reading of the weights.
struct FineInt8 {
    static constexpr int max_rows = Simd::max_rows > 1 ? Simd::max_rows / 2 : 1;
    struct Sum {
        I whole, rest;
    };
    using Input = Sum;
    static Sum zero() { return Sum{Simd::no_words(), Simd::no_words()}; }
    static Sum add(const Sum& a, const Sum& b) {
        return Sum{Simd::add_words(a.whole, b.whole), Simd::add_words(a.rest, b.rest)};
    }
    static Input input(const float* row, ptrdiff_t word, ptrdiff_t rests) {
        return Input{Simd::all_words(bits_of(row[word])), Simd::all_words(bits_of(row[word + rests]))};
    }
    static Sum multiply_add(const float* weights, const Input& input, const Sum& sum) {
        I words = Simd::load_words(weights);
        return Sum{Simd::dot_int8(words, input.whole, sum.whole), Simd::dot_int8(words, input.rest, sum.rest)};
    }
    static F value(const Sum& sum, const Words& a, ptrdiff_t row, const float* scales) {
        F whole = Simd::to_float(Simd::subtract_words(sum.whole, Simd::all_words(a.offsets[row])));
        F rest = Simd::to_float(Simd::subtract_words(sum.rest, Simd::all_words(a.rest_offsets[row])));
        F number = Simd::fma(rest, Simd::all(1.0f / parts_of_one), whole);
        return Simd::mul(number, Simd::mul(Simd::load(scales), Simd::all(a.scales[row])));
    }
};

// ---- products ----

// sums[m][w] = the products of the words of row a[m] that count with the W vectors of a panel.
template <class Kept, int W, int M>
SLIMLSTM_INLINE void products(const float* panel, const Words& a, ptrdiff_t row, typename Kept::Sum (&sums)[M][W]) {
    // A sum that waits for itself takes one multiply-add per latency; eight at a time hide it.
    constexpr int S = W * M >= 8 ? 1 : W * M >= 4 ? 2 : W * M >= 2 ? 4 : 8;
    typename Kept::Sum parts[S][M][W];
    SLIMLSTM_UNROLL for (int s = 0; s < S; ++s)
        SLIMLSTM_UNROLL for (int m = 0; m < M; ++m)
            SLIMLSTM_UNROLL for (int w = 0; w < W; ++w) parts[s][m][w] = Kept::zero();
    const float* rows[M];
    SLIMLSTM_UNROLL for (int m = 0; m < M; ++m) rows[m] = a.rows[row + m];
    panel += a.from * W * L;
    ptrdiff_t k = a.from;
    for (; k + S <= a.to; k += S, panel += S * W * L)
        SLIMLSTM_UNROLL for (int s = 0; s < S; ++s)
            SLIMLSTM_UNROLL for (int m = 0; m < M; ++m) {
                typename Kept::Input input = Kept::input(rows[m], k + s, a.rests);
                SLIMLSTM_UNROLL for (int w = 0; w < W; ++w)
                    parts[s][m][w] = Kept::multiply_add(panel + (s * W + w) * L, input, parts[s][m][w]);
            }
    for (; k < a.to; ++k, panel += W * L)
        SLIMLSTM_UNROLL for (int m = 0; m < M; ++m) {
            typename Kept::Input input = Kept::input(rows[m], k, a.rests);
            SLIMLSTM_UNROLL for (int w = 0; w < W; ++w)
                parts[0][m][w] = Kept::multiply_add(panel + w * L, input, parts[0][m][w]);
        }
    SLIMLSTM_UNROLL for (int m = 0; m < M; ++m)
        SLIMLSTM_UNROLL for (int w = 0; w < W; ++w) {
            sums[m][w] = parts[0][m][w];
            SLIMLSTM_UNROLL for (int s = 1; s < S; ++s) sums[m][w] = Kept::add(sums[m][w], parts[s][m][w]);
        }
}

// The products of P panels with M rows.
template <class Kept, int P, int W, int M, class Take>
void block(const Panels& matrix, ptrdiff_t vector, const Words& a, ptrdiff_t row, const Take& take) {
    F values[P * M][W];
    SLIMLSTM_UNROLL for (int p = 0; p < P; ++p) {
        typename Kept::Sum sums[M][W];
        ptrdiff_t first = vector + p * W;
        products<Kept, W, M>(matrix.data + first * L * matrix.words, a, row, sums);
        SLIMLSTM_UNROLL for (int m = 0; m < M; ++m)
            SLIMLSTM_UNROLL for (int w = 0; w < W; ++w)
                values[p * M + m][w] = Kept::value(sums[m][w], a, row + m, matrix.scales + (first + w) * L);
    }
    take.template operator()<P, W, M>(vector, row, values);
}

template <class Kept, int W, int M, class Take>
SLIMLSTM_INLINE void block_of(int m, const Panels& matrix, ptrdiff_t vector, const Words& a, ptrdiff_t row,
                              const Take& take) {
    if constexpr (M > 1)
        if (m < M) return block_of<Kept, W, M - 1>(m, matrix, vector, a, row, take);
    block<Kept, 1, W, M>(matrix, vector, a, row, take);
}

template <class Kept, int W, class Take>
void panel_by_rows(const Panels& matrix, ptrdiff_t vector, const Words& a, ptrdiff_t count, const Take& take) {
    for (ptrdiff_t row = 0, left = count; left > 0;) {
        // Blocks as equal as can be: 7 rows are 4 and 3, not 6 and 1.
        ptrdiff_t m = ceiling(left, ceiling(left, Kept::max_rows));
        block_of<Kept, W, Kept::max_rows>(static_cast<int>(m), matrix, vector, a, row, take);
        row += m, left -= m;
    }
}

template <class Kept, class Take>
void multiply_as(const Panels& matrix, ptrdiff_t first, ptrdiff_t last, const Words& a, ptrdiff_t count, const Take& take) {
    ptrdiff_t v = first;
    if constexpr (Take::panels > 1)
        for (ptrdiff_t step = Take::panels * panel_vectors; count == 1 && v + step <= last; v += step)
            block<Kept, Take::panels, panel_vectors, 1>(matrix, v, a, 0, take);
    for (; v < last; v += panel_vectors) switch (matrix.vectors - v) {
            case 1: panel_by_rows<Kept, 1>(matrix, v, a, count, take); break;
            case 2: panel_by_rows<Kept, 2>(matrix, v, a, count, take); break;
            case 3: panel_by_rows<Kept, 3>(matrix, v, a, count, take); break;
            default: panel_by_rows<Kept, 4>(matrix, v, a, count, take); break;
        }
}

// Where inputs are put that cannot be used as they are.
struct Scratch {
    float* words;
    const float** rows;
    float* scales;
    int32_t *offsets, *rest_offsets;
};

// Rounding to multiples of a scale moves a gate by scale * gain / sqrt(12) in the mean square; more than a thirty-second
// could be seen, as sigmoid and tanh are steepest over a few units.
constexpr float largest_rounding = 0.108253175f;

// What a product is taken of: rows of floats, and which inputs of them count; ``from`` begins a word of any storage.
struct Operand {
    const float* const* rows;
    ptrdiff_t count;
    ptrdiff_t from, to;
    Scratch scratch;

    Words as_they_are() const { return Words{rows, nullptr, nullptr, from, to}; }

    // By twos, the last of an odd number with a zero.
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

    // All rows as integers; what that left over after them, if one is too coarse for the gain of a matrix.
    Words in_int8(float gain) const {
        ptrdiff_t begin = from / 4, end = larger(begin, ceiling(to, 4)), width = end - begin;
        Words words{scratch.rows, scratch.scales, scratch.offsets, begin, end};
        for (ptrdiff_t row = 0; row < count; ++row) {
            float* integers = scratch.words + row * width;
            float bound = largest_magnitude(rows[row] + from, to - from);
            scratch.scales[row] = bound / 127.0f;
            scratch.offsets[row] = rounded_row<false>(row, bound, integers, width, nullptr);
            scratch.rows[row] = integers - begin;
            if (is_coarse(row, gain)) words.rests = count * width;
        }
        if (words.rests == 0) return words;
        words.rest_offsets = scratch.rest_offsets;
        for (ptrdiff_t row = 0; row < count; ++row) {
            float* rests = scratch.words + words.rests + row * width;
            if (is_coarse(row, gain)) {
                float bound = largest_magnitude(rows[row] + from, to - from);
                scratch.rest_offsets[row] = rounded_row<true>(row, bound, rests, width, scratch.words + row * width);
            } else {
                // None, so that what becomes of a row does not depend on those beside it.
                copy_or_clear(rests, nullptr, width);
                scratch.rest_offsets[row] = 0;
            }
        }
        return words;
    }

    bool is_coarse(ptrdiff_t row, float gain) const { return scratch.scales[row] * gain > largest_rounding; }

    template <bool Rests>
    int32_t rounded_row(ptrdiff_t row, float bound, float* words, ptrdiff_t width, const float* integers) const {
        if (width > 0) words[width - 1] = 0.0f;
        return round_to_int8<Rests>(rows[row] + from, to - from, bound, reinterpret_cast<int8_t*>(words),
                                    reinterpret_cast<const int8_t*>(integers));
    }
};

// Gives ``take`` the products of ``a`` with the vectors [first, last) of a matrix; ``first`` begins a panel.
template <class Take>
void multiply(const Panels& matrix, ptrdiff_t first, ptrdiff_t last, const Operand& a, const Take& take) {
    switch (matrix.storage) {
        case Storage::float32:
            return multiply_as<Float32>(matrix, first, last, a.as_they_are(), a.count, take);
        case Storage::bfloat16:
            return multiply_as<BFloat16>(matrix, first, last, a.in_pairs(), a.count, take);
        case Storage::int8: {
            Words words = a.in_int8(matrix.gain);
            if (words.rests) return multiply_as<FineInt8>(matrix, first, last, words, a.count, take);
            return multiply_as<Int8>(matrix, first, last, words, a.count, take);
        }
    }
}

// Writes products to rows ``stride`` apart, plus a bias where there is one, within a bound where that is finite.
struct Write {
    float* to;
    ptrdiff_t stride;
    const float* bias;
    float bound = __builtin_inff();

    static constexpr int panels = 1;

    template <int P, int W, int M>
    SLIMLSTM_INLINE void operator()(ptrdiff_t vector, ptrdiff_t row, F (&sums)[P * M][W]) const {
        SLIMLSTM_UNROLL for (int m = 0; m < M; ++m)
            SLIMLSTM_UNROLL for (int w = 0; w < W; ++w) {
                ptrdiff_t at = (vector + w) * L;
                F sum = sums[m][w];
                if (bias) sum = Simd::add(sum, Simd::load(bias + at));
                if (bound < __builtin_inff()) sum = clipped(sum, bound);
                Simd::store(to + (row + m) * stride + at, sum);
            }
    }
};

// Turns the recurrent products of a panel into new cells and new h, without their ever being stored.
struct Cells {
    const float* gates;  // those of the input, row by row
    float *c, *h;        // [rows, stride]
    float* output;       // null where h is projected first
    ptrdiff_t gates_stride, c_stride, h_stride, output_stride, hidden_size;
    float clip;

    static constexpr int panels = cells_at_once;

    template <int P, int W, int M>
    SLIMLSTM_INLINE void operator()(ptrdiff_t vector, ptrdiff_t row, F (&sums)[P * M][W]) const {
        if constexpr (W == panel_vectors) {
            constexpr int N = smaller(P * M, cells_at_once), rest = P * M % N;
            SLIMLSTM_UNROLL for (int at = 0; at + N <= P * M; at += N) several<N, M>(vector, row, at, sums);
            if constexpr (rest > 0) several<rest, M>(vector, row, P * M - rest, sums);
        }
    }

    // The cells [first, first + N) of a block, of whose every panel there are M.
    template <int N, int M, int All>
    SLIMLSTM_INLINE void several(ptrdiff_t vector, ptrdiff_t first_row, int first, F (&sums)[All][panel_vectors]) const {
        F sigmoids[3 * N], g[N], state[N];
        SLIMLSTM_EACH {
            const F(&sum)[panel_vectors] = sums[first + n];
            ptrdiff_t row = first_row + (first + n) % M, panel = vector / panel_vectors + (first + n) / M;
            const float* gate = gates + row * gates_stride + panel * panel_vectors * L;
            sigmoids[n] = Simd::add(sum[0], Simd::load(gate));
            sigmoids[N + n] = Simd::add(sum[1], Simd::load(gate + L));
            g[n] = Simd::add(sum[2], Simd::load(gate + 2 * L));
            sigmoids[2 * N + n] = Simd::add(sum[3], Simd::load(gate + 3 * L));
            state[n] = Simd::load(c + row * c_stride + panel * L);
        }
        cells<N>(sigmoids, g, state, clip);
        SLIMLSTM_EACH {
            ptrdiff_t row = first_row + (first + n) % M, unit = (vector / panel_vectors + (first + n) / M) * L;
            Simd::store(c + row * c_stride + unit, state[n]);
            Simd::store(h + row * h_stride + unit, g[n]);
            if (!output) continue;
            float* out = output + row * output_stride + unit;
            if (hidden_size - unit >= L)
                Simd::store(out, g[n]);
            else
                Simd::store_first(out, g[n], hidden_size - unit);
        }
    }
};

// ---- workspace ----

// A distance between rows of so many floats. Rows a multiple of 4096 bytes apart share a few sets of the cache, and the
// processor takes a load from one for dependent on a store to another.
SLIMLSTM_INLINE ptrdiff_t spaced(ptrdiff_t floats) { return floats ? ceiling(floats, 16) * 16 + 16 : 0; }

// How a workspace is laid out; with base null, only how large it is.
struct Buffers {
    ptrdiff_t chunk;          // rows of input whose gates are held at once
    ptrdiff_t units;          // those of the last group included that do not exist
    ptrdiff_t gates_stride, thin_stride, unit_stride, z_stride, h_stride, part_stride;
    float* gates;             // [chunk, gates_stride]
    float* thin;              // [chunk, thin_stride]: V x
    float* c;                 // [batch, unit_stride]
    float* h[2];              // [batch, h_stride]; with a projection, every member has its own
    float* m;                 // [batch, unit_stride]: what is projected
    float* z;                 // [batch, z_stride], every member its own: V h
    float* parts[2];          // [team, batch, part_stride]: partial sums, of even and odd steps
    const float** rows;       // [chunk], every member its own
    Scratch scratch;          // of every member its own
    size_t size;              // in floats

    Buffers(const Task& task, float* base, int team, int member) {
        const Weights& w = *task.weights;
        ptrdiff_t batch = task.last_row - task.first_row;
        units = ceiling(w.hidden_size, L) * L;
        // About a megabyte of gates, but enough rows to make the reading of the input weights worth it.
        chunk = larger(batch, smaller(task.steps * batch, larger(48, (1 << 18) / (4 * units))));
        gates_stride = spaced(4 * units);
        thin_stride = spaced(w.ih_v.vectors * L);
        unit_stride = spaced(units);
        z_stride = spaced(w.hh_v.vectors * L);
        h_stride = spaced(ceiling(w.output_size, L) * L);
        const bool projected = w.hr.data, factored = w.hh_v.data;
        part_stride = projected ? h_stride : z_stride;
        size_t used = 0;
        auto take = [&](ptrdiff_t count, int copies, int which) {
            size_t rounded = static_cast<size_t>(ceiling(count, 16) * 16);
            float* begin = base ? base + used + rounded * static_cast<size_t>(which) : nullptr;
            used += rounded * static_cast<size_t>(copies);
            return begin;
        };
        gates = take(chunk * gates_stride, 1, 0);
        thin = take(chunk * thin_stride, 1, 0);
        c = take(batch * unit_stride, 1, 0);
        h[0] = h[1] = projected ? take(batch * h_stride, team, member) : take(batch * h_stride, 1, 0);
        if (!projected && !factored) h[1] = take(batch * h_stride, 1, 0);
        m = projected ? take(batch * unit_stride, 1, 0) : nullptr;
        z = take(batch * z_stride, team, member);
        for (float*& part : parts) part = team > 1 ? take(team * batch * part_stride, 1, 0) : nullptr;
        constexpr size_t pointer = sizeof(float*);
        constexpr ptrdiff_t floats = pointer / sizeof(float);
        rows = reinterpret_cast<const float**>(take(chunk * floats, team, member));
        ptrdiff_t words = 0;
        const Panels* matrices[] = {&w.ih_v, &w.ih, &w.hh_v, &w.hh, &w.hr};
        for (const Panels* matrix : matrices)
            if (matrix->storage != Storage::float32)
                words = larger(words, matrix->storage == Storage::int8 ? 2 * ceiling(matrix->inputs, 4) : matrix->inputs + 1);
        scratch.words = take(chunk * words, team, member);
        scratch.rows = reinterpret_cast<const float**>(take(words ? chunk * floats : 0, team, member));
        scratch.scales = take(words ? chunk : 0, team, member);
        scratch.offsets = reinterpret_cast<int32_t*>(take(words ? chunk : 0, team, member));
        scratch.rest_offsets = reinterpret_cast<int32_t*>(take(words ? chunk : 0, team, member));
        size = used;
    }
};

// ---- the loop over time ----

// One member's share of a task.
struct Run {
    const Task& task;
    const Weights& w;
    const Team& team;
    const int member;
    Buffers b;
    const ptrdiff_t batch;
    ptrdiff_t first_unit, last_unit;  // the member's own
    ptrdiff_t before = 0;             // sequences in the last step
    int read = 0, parity = 0;

    Run(const Task& task, float* workspace, const Team& team, int member)
        : task(task), w(*task.weights), team(team), member(member), b(task, workspace, team.size, member),
          batch(task.last_row - task.first_row) {
        ptrdiff_t groups = b.units / L;
        first_unit = groups * member / team.size * L;
        last_unit = groups * (member + 1) / team.size * L;
    }

    void wait() const {
        if (team.size > 1) team.barrier(team.self);
    }

    ptrdiff_t size_at(ptrdiff_t step) const { return task.sizes ? task.sizes[step] : task.batch; }

    // How many of this task's own sequences there are at a step of the input.
    ptrdiff_t active_at(ptrdiff_t step) const {
        return larger(0, smaller(size_at(step), task.last_row) - task.first_row);
    }

    void run() {
        ptrdiff_t begin = task.reverse ? task.rows : 0;  // the first row of the next step
        for (ptrdiff_t done = 0; done < task.steps;) {
            ptrdiff_t rows = 0, end = done, row = begin;
            for (; end < task.steps; ++end) {
                ptrdiff_t step = task.reverse ? task.steps - 1 - end : end;
                ptrdiff_t active = active_at(step), size = size_at(step);
                if (rows + active > b.chunk) break;
                if (task.reverse) row -= size;
                for (ptrdiff_t k = 0; k < active; ++k)
                    b.rows[rows + k] = task.x + (row + task.first_row + k) * task.x_stride;
                if (!task.reverse) row += size;
                rows += active;
            }
            input_gates(rows);
            for (ptrdiff_t at = 0; done < end; ++done) {
                ptrdiff_t step = task.reverse ? task.steps - 1 - done : done;
                ptrdiff_t active = active_at(step), size = size_at(step);
                if (task.reverse) begin -= size;
                bool last = done + 1 == task.steps;
                ptrdiff_t after = last ? 0 : active_at(task.reverse ? step - 1 : step + 1);
                enter(active);
                advance(active, b.gates + at * b.gates_stride, task.output + (begin + task.first_row) * task.output_stride);
                leave(smaller(after, active), active);
                if (!task.reverse) begin += size;
                at += active;
            }
        }
    }

    // W_ih x + b for the rows of a chunk: the member's own gates.
    void input_gates(ptrdiff_t rows) {
        Operand a{b.rows, rows, 0, w.input_size, b.scratch};
        if (w.ih_v.data) {
            ptrdiff_t from = rows * member / team.size, to = rows * (member + 1) / team.size;
            Operand own{b.rows + from, to - from, 0, w.input_size, b.scratch};
            multiply(w.ih_v, 0, w.ih_v.vectors, own, Write{b.thin + from * b.thin_stride, b.thin_stride, nullptr});
            wait();
            a = rows_of(b.thin, b.thin_stride, rows, w.ih.inputs);
        }
        multiply(w.ih, first_unit / L * 4, last_unit / L * 4, a, Write{b.gates, b.gates_stride, w.bias});
    }

    Operand rows_of(const float* first, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t inputs) {
        for (ptrdiff_t k = 0; k < count; ++k) b.rows[k] = first + k * stride;
        return Operand{b.rows, count, 0, inputs, b.scratch};
    }

    // Gives the sequences that begin at this step their first states.
    void enter(ptrdiff_t active) {
        if (active <= before) {
            before = active;
            return;
        }
        for (ptrdiff_t k = before; k < active; ++k) {
            ptrdiff_t row = task.first_row + k, own = smaller(last_unit, w.hidden_size) - first_unit;
            float *c = b.c + k * b.unit_stride, *h = b.h[read] + k * b.h_stride;
            copy_or_clear(c + first_unit, task.c0 ? task.c0 + row * w.hidden_size + first_unit : nullptr, own);
            copy_or_clear(c + first_unit + own, nullptr, last_unit - first_unit - own);
            const float* h0 = task.h0 ? task.h0 + row * w.output_size : nullptr;
            if (w.hr.data)
                copy_or_clear(h, h0, w.output_size);
            else
                copy_or_clear(h + first_unit, h0 ? h0 + first_unit : nullptr, own);
        }
        before = active;
        // Of a dense hh everybody reads all of h.
        if (!w.hh_v.data && !w.hr.data) wait();
    }

    // Hands over the last states of the sequences [from, to).
    void leave(ptrdiff_t from, ptrdiff_t to) {
        for (ptrdiff_t k = from; k < to; ++k) {
            ptrdiff_t row = task.first_row + k, own = smaller(last_unit, w.hidden_size) - first_unit;
            copy(task.c + row * w.hidden_size + first_unit, b.c + k * b.unit_stride + first_unit, own);
            const float* h = b.h[read] + k * b.h_stride;
            float* to_h = task.h + row * w.output_size;
            if (!w.hr.data)
                copy(to_h + first_unit, h + first_unit, own);
            else if (member == 0)
                copy(to_h, h, w.output_size);
        }
    }

    // One step of the sequences [0, active).
    void advance(ptrdiff_t active, const float* gates, float* output) {
        const bool projected = w.hr.data;
        Operand state = w.hh_v.data ? thin_state(active) : rows_of(b.h[read], b.h_stride, active, w.output_size);
        int write = read ^ 1;
        float* to = projected ? b.m : b.h[write];
        ptrdiff_t stride = projected ? b.unit_stride : b.h_stride;
        multiply(w.hh, first_unit / L * 4, last_unit / L * 4, state,
                 Cells{gates, b.c, to, projected ? nullptr : output, b.gates_stride, b.unit_stride, stride, task.output_stride,
                       w.hidden_size, w.cell_clip});
        if (projected)
            project(active, output);
        else
            read = write;
        if (!projected && !w.hh_v.data) wait();
    }

    // V h.
    Operand thin_state(ptrdiff_t active) {
        if (w.hr.data) {
            multiply(w.hh_v, 0, w.hh_v.vectors, rows_of(b.h[0], b.h_stride, active, w.output_size),
                     Write{b.z, b.z_stride, nullptr});
        } else {
            Operand own = rows_of(b.h[0], b.h_stride, active, w.hidden_size);
            sum_over_members(w.hh_v, own, b.z, b.z_stride, __builtin_inff());
        }
        return rows_of(b.z, b.z_stride, active, w.hh.inputs);
    }

    void project(ptrdiff_t active, float* output) {
        Operand own = rows_of(b.m, b.unit_stride, active, w.hidden_size);
        sum_over_members(w.hr, own, b.h[0], b.h_stride, w.proj_clip);
        if (member != 0) return;
        for (ptrdiff_t k = 0; k < active; ++k)
            copy(output + k * task.output_stride, b.h[0] + k * b.h_stride, w.output_size);
    }

    // matrix · a within ``bound``, where each member has computed its own hidden units of ``a``.
    void sum_over_members(const Panels& matrix, Operand a, float* to, ptrdiff_t stride, float bound) {
        a.from = first_unit;
        a.to = smaller(last_unit, w.hidden_size);
        if (team.size == 1) return multiply(matrix, 0, matrix.vectors, a, Write{to, stride, nullptr, bound});
        ptrdiff_t size = batch * b.part_stride;
        float* parts = b.parts[parity];
        parity ^= 1;
        multiply(matrix, 0, matrix.vectors, a, Write{parts + member * size, b.part_stride, nullptr});
        wait();
        for (ptrdiff_t k = 0; k < a.count; ++k)
            for (ptrdiff_t at = 0; at < matrix.vectors * L; at += L) {
                const float* part = parts + k * b.part_stride + at;
                F sum = Simd::load(part);
                for (int other = 1; other < team.size; ++other) sum = Simd::add(sum, Simd::load(part + other * size));
                Simd::store(to + k * stride + at, clipped(sum, bound));
            }
    }
};

size_t workspace(const Task& task, int team_size) { return Buffers(task, nullptr, team_size, 0).size; }

void run(const Task& task, float* workspace, const Team& team, int member) {
    Run(task, workspace, team, member).run();
}

// Of every lane two running sums, the second of the first, so that the order of values counts.
uint64_t digest(const float* values, ptrdiff_t count, uint64_t so_far) {
    constexpr int vectors = 4;
    I sums[vectors], sums_of_sums[vectors];
    SLIMLSTM_UNROLL for (int v = 0; v < vectors; ++v) sums[v] = sums_of_sums[v] = Simd::no_words();
    ptrdiff_t k = 0;
    for (; k + vectors * L <= count; k += vectors * L)
        SLIMLSTM_UNROLL for (int v = 0; v < vectors; ++v) {
            sums[v] = Simd::add_words(sums[v], Simd::load_words(values + k + v * L));
            sums_of_sums[v] = Simd::add_words(sums_of_sums[v], sums[v]);
        }
    auto mix = [&](uint32_t word) { so_far = (so_far ^ word) * 0x9E3779B97F4A7C15u; };
    for (; k < count; ++k) mix(static_cast<uint32_t>(bits_of(values[k])));
    for (int v = 0; v < vectors; ++v) {
            uint32_t words[2 * L];
            __builtin_memcpy(words, &sums[v], sizeof(I));
            __builtin_memcpy(words + L, &sums_of_sums[v], sizeof(I));
            for (uint32_t word : words) mix(word);
        }
    return so_far;
}

}  // namespace
