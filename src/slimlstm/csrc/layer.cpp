#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "pack.h"

namespace slimlstm {
namespace {

constexpr size_t alignment = 64;
constexpr double wake_up = 2e4;  // nanoseconds to wake a thread, measured

std::vector<const Kernel*> kernels() {
    std::vector<const Kernel*> found;
#ifdef SLIMLSTM_X86
    __builtin_cpu_init();
    bool avx512 = false;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        avx512 = true;
    if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&kernel_avx512_vnni);
    if (avx512) found.push_back(&kernel_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kernel_avx2);
#endif
    found.push_back(&kernel_portable);
    return found;
}

// Memory of this thread, which grows to the largest request and is reused.
float* workspace(size_t floats) {
    thread_local Floats memory;
    if (memory.size() < floats) {
        memory = Floats();
        memory = Floats(floats);
    }
    return memory.get();
}

uint64_t digest(const Kernel& kernel, const Source& source) {
    if (source.column_stride == 1 && source.row_stride == source.columns)
        return kernel.digest(source.data, source.rows * source.columns, 0);
    uint64_t so_far = 0;
    for (ptrdiff_t row = 0; row < source.rows; ++row) {
        if (source.column_stride == 1)
            so_far = kernel.digest(source.at(row, 0), source.columns, so_far);
        else
            for (ptrdiff_t column = 0; column < source.columns; ++column)
                so_far = kernel.digest(source.at(row, column), 1, so_far);
    }
    return so_far;
}

}  // namespace

Floats::Floats(size_t count)
    : data_(static_cast<float*>(std::aligned_alloc(alignment, (count * sizeof(float) / alignment + 1) * alignment))),
      size_(count) {
    if (!data_) throw std::bad_alloc();
}

const Kernel* kernel_named(const std::string& name) {
    for (const Kernel* kernel : kernels())
        if (name == kernel->name) return kernel;
    throw std::invalid_argument("no kernel is called " + name);
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const Kernel* kernel : kernels()) names.push_back(kernel->name);
    return names;
}

Layer::Layer(const std::string& isa, const std::vector<Sources>& directions) : kernel_(kernel_named(isa)) {
    for (const Sources& from : directions) {
        directions_.emplace_back();
        Direction& to = directions_.back();
        Weights& weights = to.weights;
        weights.hidden_size = from.hh.rows / 4;
        weights.input_size = from.ih_v.data ? from.ih_v.columns : from.ih.columns;
        weights.output_size = from.hh_v.data ? from.hh_v.columns : from.hh.columns;
        weights.cell_clip = from.cell_clip, weights.proj_clip = from.proj_clip;
        ptrdiff_t hidden = weights.hidden_size, lanes = kernel_->lanes;
        if (from.ih_v.data) weights.ih_v = pack(from.ih_v, from.ih_storage, 0, lanes, to.memory);
        if (from.hh_v.data) weights.hh_v = pack(from.hh_v, from.hh_storage, 0, lanes, to.memory);
        if (from.hr.data) weights.hr = pack(from.hr, from.hh_storage, 0, lanes, to.memory);
        weights.ih = pack(from.ih, from.ih_storage, hidden, lanes, to.memory);
        weights.hh = pack(from.hh, from.hh_storage, hidden, lanes, to.memory);
        weights.ih_v.gain = from.ih_v_gain, weights.ih.gain = from.ih_gain;
        weights.hh_v.gain = from.hh_v_gain, weights.hh.gain = from.hh_gain;
        weights.bias = pack_bias(from.bias_ih, from.bias_hh, hidden, lanes, to.memory);
        for (const Source& source : {from.ih_v, from.ih, from.hh_v, from.hh, from.bias_ih, from.bias_hh, from.hr}) {
            if (!source.data) continue;
            to.sources.push_back(source);
            to.digests.push_back(digest(*kernel_, source));
        }
    }
}

bool Layer::is_current() const {
    for (const Direction& direction : directions_)
        for (size_t k = 0; k < direction.sources.size(); ++k)
            if (digest(*kernel_, direction.sources[k]) != direction.digests[k]) return false;
    return true;
}

double Layer::nanoseconds(ptrdiff_t rows, ptrdiff_t batch) const {
    // Measured nanoseconds: of a multiply-add in each storage, for one sequence and for several, which share the reading of
    // the weights; and of the activations of a hidden unit. int4 counts as int8, although it can be faster.
    constexpr double of_one[] = {0.035, 0.022, 0.0095, 0.0095}, of_several[] = {0.019, 0.019, 0.0055, 0.0055};
    constexpr double of_unit = 1.5;
    double each = 0;
    for (const Direction& direction : directions_) {
        const Weights& w = direction.weights;
        for (const Panels* panels : {&w.ih_v, &w.ih, &w.hh_v, &w.hh, &w.hr})
            each += static_cast<double>(panels->vectors * kernel_->lanes * panels->inputs) *
                    (batch >= 4 ? of_several : of_one)[static_cast<int>(panels->storage)];
        each += static_cast<double>(w.hidden_size) * of_unit;
    }
    return each * static_cast<double>(rows);
}

size_t Layer::bytes() const {
    ptrdiff_t all = 0;
    for (const Direction& direction : directions_) {
        const Weights& w = direction.weights;
        for (const Panels* panels : {&w.ih_v, &w.ih, &w.hh_v, &w.hh, &w.hr}) {
            ptrdiff_t of_lane = panels->words * static_cast<ptrdiff_t>(sizeof(float));
            if (panels->storage == Storage::int4) of_lane += panels->words * 8 / group_inputs;
            all += panels->vectors * kernel_->lanes * of_lane;
        }
    }
    return static_cast<size_t>(all);
}

Task Layer::task(const Call& call, ptrdiff_t index) const {
    const Weights& weights = directions_[static_cast<size_t>(index)].weights;
    ptrdiff_t directions = static_cast<ptrdiff_t>(directions_.size());
    ptrdiff_t hidden = weights.hidden_size, output = weights.output_size;
    Task task{};
    task.weights = &weights;
    task.x = call.x;
    task.x_stride = weights.input_size;
    task.sizes = call.sizes;
    task.steps = call.steps, task.batch = call.batch, task.rows = call.rows;
    task.first_row = 0, task.last_row = call.batch;
    if (call.h0) task.h0 = call.h0 + index * call.batch * output;
    if (call.c0) task.c0 = call.c0 + index * call.batch * hidden;
    task.output = call.output + index * output;
    task.output_stride = directions * output;
    task.h = call.h + index * call.batch * output;
    task.c = call.c + index * call.batch * hidden;
    task.too_coarse = call.too_coarse;
    task.reverse = index == 1;
    return task;
}

void Layer::run(const Call& call, int threads) const {
    int directions = static_cast<int>(directions_.size());
    Shares shares{1, 1, false};
    if (threads < 0) shares = {-threads * directions, -threads, false};
    if (threads > 1) shares = share_out(call, threads);
    if (shares.threads > 1) {
        Crew crew(shares.threads, threads < 0 ? -1 : wake_up + 0.05 * nanoseconds(call.rows, call.batch));
        if (crew.size() < shares.threads) shares = crew.size() > 1 ? share_out(call, crew.size()) : Shares{1, 1, false};
        if (shares.threads > 1) return run_together(call, shares, crew);
    }
    for (size_t index = 0; index < directions_.size(); ++index) {
        Task whole = task(call, static_cast<ptrdiff_t>(index));
        kernel_->run(whole, workspace(kernel_->workspace(whole, 1)), Team{1, nullptr, nullptr}, 0);
    }
}

bool Layer::is_finite(const Call& call) const {
    ptrdiff_t count = static_cast<ptrdiff_t>(directions_.size()) * call.batch * directions_[0].weights.output_size;
    float sum = 0;
    for (ptrdiff_t k = 0; k < count; ++k) sum += call.h[k] * 0.0f;  // NaN if any is infinite or NaN
    return sum == 0;
}

Layer::Shares Layer::share_out(const Call& call, int threads) const {
    constexpr double barrier = 400;  // nanoseconds, measured
    double alone = nanoseconds(call.rows, call.batch);
    int directions = static_cast<int>(directions_.size());
    int each = std::max(1, threads / directions);
    double barriers = each > 1 ? static_cast<double>(call.steps) * barrier : 0;
    // Dividing the batch makes each member read all weights, which is free only while they fit in its processor's cache.
    bool by_rows = call.batch >= 4 * each && bytes() / static_cast<size_t>(directions) < 1 << 19;
    double together = wake_up + alone / (directions * each) + (by_rows ? 0 : barriers);
    if (directions * each < 2 || directions > threads || together > 0.7 * alone) return {1, 1, false};
    return {directions * each, each, by_rows};
}

void Layer::run_together(const Call& call, const Shares& shares, Crew& crew) const {
    struct Job {
        const Kernel* kernel;
        Shares shares;
        std::vector<Task> tasks;  // one for each member, or one for each team
        std::vector<size_t> begins;
        float* memory;
        Barrier barriers[2];
    };
    thread_local Job job;  // thread_local so that its vectors are allocated once
    job.kernel = kernel_, job.shares = shares;
    job.tasks.clear(), job.begins.clear();
    int team = shares.by_rows ? 1 : shares.each;
    size_t floats = 0;
    for (size_t index = 0; index < directions_.size(); ++index) {
        job.barriers[index].expect(team);
        for (ptrdiff_t part = 0; part < shares.each / team; ++part) {
            Task share = task(call, static_cast<ptrdiff_t>(index));
            if (shares.by_rows) {
                share.first_row = call.batch * part / shares.each;
                share.last_row = call.batch * (part + 1) / shares.each;
            }
            job.tasks.push_back(share);
            job.begins.push_back(floats);
            floats += (kernel_->workspace(share, team) + 15) / 16 * 16;
        }
    }
    job.memory = workspace(floats);
    crew.run(
        shares.threads,
        [](void* context, int member) {
            Job& job = *static_cast<Job*>(context);
            int team = job.shares.by_rows ? 1 : job.shares.each;
            size_t index = static_cast<size_t>(member / team);
            auto meet = [](void* barrier) { static_cast<Barrier*>(barrier)->wait(); };
            Team with{team, meet, &job.barriers[static_cast<size_t>(member / job.shares.each)]};
            job.kernel->run(job.tasks[index], job.memory + job.begins[index], with, member % team);
        },
        &job);
}

}  // namespace slimlstm
