// A layer packed for one kernel, and the division of a call among threads.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"
#include "pool.h"

namespace slimlstm {

// A float32 matrix that the caller owns: element (i, j) is data[i * row_stride + j * column_stride].
struct Source {
    const float* data = nullptr;
    ptrdiff_t rows = 0, columns = 0, row_stride = 0, column_stride = 0;

    const float* at(ptrdiff_t row, ptrdiff_t column) const { return data + row * row_stride + column * column_stride; }
};

// The weights of one direction as PyTorch stores them; absent weights have null data.
struct Sources {
    Source ih_v, ih, hh_v, hh, bias_ih, bias_hh, hr;
    Storage ih_storage = Storage::float32, hh_storage = Storage::float32;  // hr has the storage of hh
    float cell_clip = 0, proj_clip = 0;                                    // infinite: no clipping
    // The gains of Panels, for int8 and int4.
    float ih_v_gain = 0, ih_gain = 0, hh_v_gain = 0, hh_gain = 0;
};

// 64-byte aligned floats, not initialised.
class Floats {
  public:
    Floats() = default;
    explicit Floats(size_t count);
    float* get() const { return data_.get(); }
    size_t size() const { return size_; }

  private:
    struct Free {
        void operator()(float* data) const { std::free(data); }
    };
    std::unique_ptr<float, Free> data_;
    size_t size_ = 0;
};

// The inputs and outputs of a call, contiguous; shapes as in slimlstm/ops/weights.py.
struct Call {
    const float* x;
    const int64_t* sizes;
    ptrdiff_t steps, batch, rows;
    const float *h0, *c0;
    float *output, *h, *c;
    bool* too_coarse;  // as in Task
};

class Layer {
  public:
    // ``isa`` is one of kernel_names().
    Layer(const std::string& isa, const std::vector<Sources>& directions);

    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;

    // Whether the weights are unchanged since they were packed. Reads all of them.
    bool is_current() const;

    // Uses up to ``threads`` threads, fewer where that is faster. A negative number, for tests, makes each direction use
    // exactly that many threads.
    void run(const Call& call, int threads) const;

    // Whether the last hidden states of a call that ran are finite.
    bool is_finite(const Call& call) const;

    // The estimated time of a call on one thread: ``rows`` rows in all, ``batch`` at a step.
    double nanoseconds(ptrdiff_t rows, ptrdiff_t batch) const;

    // The bytes of all packed matrices, without the scales of rows.
    size_t bytes() const;

  private:
    // The division of a call among ``threads`` threads, ``each`` of them for one direction. With ``by_rows`` a thread takes
    // a part of the batch, otherwise the whole batch and a part of the hidden units.
    struct Shares {
        int threads, each;
        bool by_rows;
    };
    Task task(const Call& call, ptrdiff_t direction) const;
    Shares share_out(const Call& call, int threads) const;
    void run_together(const Call& call, const Shares& shares, Crew& crew) const;

    struct Direction {
        Weights weights;
        std::vector<Floats> memory;
        std::vector<Source> sources;
        std::vector<uint64_t> digests;
    };
    const Kernel* kernel_;
    std::vector<Direction> directions_;
};

// The kernel with this name; throws std::invalid_argument if this machine cannot run it.
const Kernel* kernel_named(const std::string& name);

// The kernels that this machine can run, fastest first.
std::vector<std::string> kernel_names();

}  // namespace slimlstm
