// The recurrence of one direction of a layer, written once for all instruction sets. Each instruction set includes its
// ``Simd`` and then this file. Everything is in an unnamed namespace, so that the linker cannot substitute code for one
// instruction set by another's.
//
// The hidden units form ceil(H / L) groups, which a team divides among its members. Each member computes the gates, cells
// and outputs of its own groups, so that one barrier a step suffices:
//     hh dense     the next step needs all of h: a barrier after each step, h in two buffers
//     hh = U V     V h is a sum over hidden units: each member sums its own units, a barrier, each member adds all parts
//     projection   hr m is a sum of the same kind, after which each member has all of h
#pragma once

#include "products.h"

namespace {

using slimlstm::Task;
using slimlstm::Team;
using slimlstm::Weights;

// Adds the bias, if any, to products, clips them to a finite bound, and stores them in rows ``stride`` floats apart.
struct Write {
    float* to;
    ptrdiff_t stride;
    const float* bias;
    float bound = __builtin_inff();

    static constexpr int panels = 1;

    template <int P, int W, int M>
    SLIMLSTM_INLINE void operator()(ptrdiff_t vector, ptrdiff_t row, F (&sums)[P * M][W]) const {
        SLIMLSTM_UNROLL(m, M)
            SLIMLSTM_UNROLL(w, W) {
                ptrdiff_t at = (vector + w) * L;
                F sum = sums[m][w];
                if (bias) sum = Simd::add(sum, Simd::load(bias + at));
                if (bound < __builtin_inff()) sum = clipped(sum, bound);
                Simd::store(to + (row + m) * stride + at, sum);
            }
    }
};

// Computes new cells and h from the recurrent products of a panel while these are still in registers.
struct Cells {
    const float* gates;  // W_ih x + b, row by row
    float *c, *h;        // [rows, stride]
    float* output;       // null if h is to be projected
    ptrdiff_t gates_stride, c_stride, h_stride, output_stride, hidden_size;
    float clip;

    static constexpr int panels = cells_at_once;

    template <int P, int W, int M>
    SLIMLSTM_INLINE void operator()(ptrdiff_t vector, ptrdiff_t row, F (&sums)[P * M][W]) const {
        if constexpr (W == panel_vectors) {
            constexpr int N = smaller(P * M, cells_at_once), left = P * M % N;
            SLIMLSTM_UNROLL(k, P * M / N) several<N, M>(vector, row, k * N, sums);
            if constexpr (left > 0) several<left, M>(vector, row, P * M - left, sums);
        }
    }

    // Computes the cells [first, first + N) of a block with M rows to each panel.
    template <int N, int M, int All>
    SLIMLSTM_INLINE void several(ptrdiff_t vector, ptrdiff_t first_row, int first, F (&sums)[All][panel_vectors]) const {
        F sigmoids[3 * N], g[N], state[N];
        SLIMLSTM_UNROLL(n, N) {
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
        SLIMLSTM_UNROLL(n, N) {
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

// The distance between rows of ``floats`` floats. Rows a multiple of 4096 bytes apart would share few cache sets, and the
// processor would take loads from one row to depend on stores to another.
SLIMLSTM_INLINE ptrdiff_t spaced(ptrdiff_t floats) { return floats ? ceiling(floats, 16) * 16 + 16 : 0; }

// The layout of a workspace; with a null base, only its size.
struct Buffers {
    ptrdiff_t chunk;  // rows of input whose gates are computed at once
    ptrdiff_t units;  // H rounded up to whole groups
    ptrdiff_t gates_stride, thin_stride, unit_stride, z_stride, h_stride, part_stride;
    float* gates;        // [chunk, gates_stride]
    float* thin;         // [chunk, thin_stride]: V x
    float* c;            // [batch, unit_stride]
    float* h[2];         // [batch, h_stride]; with a projection, one per member
    float* m;            // [batch, unit_stride]: σ(o) tanh(c) before the projection
    float* z;            // [batch, z_stride]: V h, one per member
    float* parts[2];     // [team, batch, part_stride]: partial sums, of even and odd steps
    const float** rows;  // [chunk], one per member
    Scratch scratch;     // one per member
    size_t size;         // in floats

    Buffers(const Task& task, float* base, int team, int member) {
        const Weights& w = *task.weights;
        ptrdiff_t batch = task.last_row - task.first_row;
        units = ceiling(w.hidden_size, L) * L;
        // About a megabyte of gates, but enough rows to amortise reading the input weights.
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
        ptrdiff_t panel = 0;
        for (const Panels* matrix : matrices) {
            ptrdiff_t inputs = matrix->inputs;
            switch (matrix->storage) {
                case Storage::float32: break;
                case Storage::bfloat16: words = larger(words, inputs + 1); break;
                case Storage::int8: words = larger(words, 2 * ceiling(inputs, 4)); break;
                case Storage::int4:
                    words = larger(words, 2 * ceiling(inputs, 4 * group_words) * group_stride);
                    if (chunk >= Simd::rows_to_widen) panel = larger(panel, 2 * matrix->words * panel_vectors * L);
            }
        }
        scratch.words = take(chunk * words, team, member);
        scratch.rows = reinterpret_cast<const float**>(take(words ? chunk * floats : 0, team, member));
        scratch.scales = take(words ? chunk : 0, team, member);
        scratch.offsets = reinterpret_cast<int32_t*>(take(words ? chunk : 0, team, member));
        scratch.remainder_offsets = reinterpret_cast<int32_t*>(take(words ? chunk : 0, team, member));
        scratch.panel = take(panel, team, member);
        scratch.too_coarse = task.too_coarse;
        size = used;
    }
};

// One member's share of a task.
struct Run {
    const Task& task;
    const Weights& w;
    const Team& team;
    const int member;
    Buffers b;
    const ptrdiff_t batch;
    ptrdiff_t first_unit, last_unit;  // this member's units
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

    // The number of this task's sequences that are active at a step of the input.
    ptrdiff_t active_at(ptrdiff_t step) const { return larger(0, smaller(size_at(step), task.last_row) - task.first_row); }

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

    // Computes W_ih x + b for this member's gates and the rows of a chunk.
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

    // Loads the initial states of the sequences that begin at this step.
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
        // With a dense hh each member reads all of h.
        if (!w.hh_v.data && !w.hr.data) wait();
    }

    // Stores the last states of the sequences [from, to), which end here.
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

    // Runs one step of the sequences [0, active).
    void advance(ptrdiff_t active, const float* gates, float* output) {
        const bool projected = w.hr.data;
        Operand state = w.hh_v.data ? thin_state(active) : rows_of(b.h[read], b.h_stride, active, w.output_size);
        int write = read ^ 1;
        float* to = projected ? b.m : b.h[write];
        ptrdiff_t stride = projected ? b.unit_stride : b.h_stride;
        multiply(w.hh, first_unit / L * 4, last_unit / L * 4, state,
                 Cells{gates, b.c, to, projected ? nullptr : output, b.gates_stride, b.unit_stride, stride,
                       task.output_stride, w.hidden_size, w.cell_clip});
        if (projected)
            project(active, output);
        else
            read = write;
        if (!projected && !w.hh_v.data) wait();
    }

    // Computes V h.
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

    // Computes matrix · a, clipped to ``bound``; each member holds its own hidden units of ``a``.
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

void run(const Task& task, float* workspace, const Team& team, int member) { Run(task, workspace, team, member).run(); }

// Keeps two running sums in each lane, of the values and of the first sum, so that the hash depends on the values' order.
// Rotations carry high bits to low places: in plain sums, equal changes of many signs or exponents would cancel.
uint64_t digest(const float* values, ptrdiff_t count, uint64_t so_far) {
    constexpr int vectors = 4;
    I sums[vectors], sums_of_sums[vectors];
    SLIMLSTM_UNROLL(v, vectors) sums[v] = sums_of_sums[v] = Simd::no_words();
    ptrdiff_t k = 0;
    for (; k + vectors * L <= count; k += vectors * L)
        SLIMLSTM_UNROLL(v, vectors) {
            sums[v] = Simd::add_words(Simd::template rotate_words<13>(sums[v]), Simd::load_words(values + k + v * L));
            sums_of_sums[v] = Simd::add_words(Simd::template rotate_words<7>(sums_of_sums[v]), sums[v]);
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
