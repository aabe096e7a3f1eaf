// Python bindings of the kernel. Weights arrive as arrays through DLPack, without copies. Calls take plain addresses,
// because converting six tensors to arrays costs more than a short call itself. The callers check their arguments.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "layer.h"
#include "rounding.h"

namespace nb = nanobind;
using namespace slimlstm;

namespace {

using Array = nb::ndarray<const float, nb::device::cpu>;
using MaybeArray = std::optional<Array>;

// Calls of fewer nanoseconds keep the interpreter's lock: releasing it would cost more than it gains.
constexpr double worth_unlocking = 2e4;

Source source_of(const MaybeArray& array) {
    if (!array) return {};
    Source source{array->data(), static_cast<ptrdiff_t>(array->shape(0)), 1, array->stride(0), array->stride(0)};
    if (array->ndim() == 2) {
        source.columns = static_cast<ptrdiff_t>(array->shape(1));
        source.column_stride = array->stride(1);
    }
    return source;
}

Storage storage_of(const std::string& name) {
    if (name == "float32") return Storage::float32;
    if (name == "bfloat16") return Storage::bfloat16;
    if (name == "int8") return Storage::int8;
    if (name == "int4") return Storage::int4;
    throw nb::value_error("unknown storage; use float32, bfloat16, int8 or int4");
}

// Each direction has seven arrays, in the order of Sources; two storages, of ih and hh; two clips, of cells and
// projections; and four gains, of V and of U (or the dense matrix), for ih and then for hh.
void make(Layer* layer, const std::string& isa, const std::vector<std::vector<MaybeArray>>& directions,
          const std::vector<std::string>& storages, const std::vector<float>& clips, const std::vector<float>& gains) {
    std::vector<Sources> sources;
    if (storages.size() != 2 * directions.size()) throw nb::value_error("a direction has two storages");
    if (clips.size() != 2 * directions.size()) throw nb::value_error("a direction has two bounds");
    if (gains.size() != 4 * directions.size()) throw nb::value_error("a direction has four gains");
    for (const auto& arrays : directions) {
        if (arrays.size() != 7) throw nb::value_error("a direction has seven arrays, None where one is absent");
        sources.push_back({source_of(arrays[0]), source_of(arrays[1]), source_of(arrays[2]), source_of(arrays[3]),
                           source_of(arrays[4]), source_of(arrays[5]), source_of(arrays[6]),
                           storage_of(storages[2 * sources.size()]), storage_of(storages[2 * sources.size() + 1]),
                           clips[2 * sources.size()], clips[2 * sources.size() + 1], gains[4 * sources.size()],
                           gains[4 * sources.size() + 1], gains[4 * sources.size() + 2], gains[4 * sources.size() + 3]});
    }
    new (layer) Layer(isa, sources);
}

// Checks the sizes of packed sequences: longest first, and every row belongs to a step.
void check_sizes(const Call& call) {
    ptrdiff_t rows = 0, last = call.batch;
    for (ptrdiff_t step = 0; step < call.steps; ++step) {
        ptrdiff_t size = call.sizes[step];
        if (size < 1 || size > last || (step == 0 && size != call.batch))
            throw nb::value_error("batch_sizes must begin with the number of sequences and never grow or reach zero");
        rows += last = size;
    }
    if (rows != call.rows) throw nb::value_error("batch_sizes do not add up to the rows of the input");
}

constexpr int stale = 0, done = 1, in_doubt = 2;

int run(const Layer& layer, uintptr_t x, uintptr_t sizes, ptrdiff_t steps, ptrdiff_t batch, ptrdiff_t rows, uintptr_t h0,
         uintptr_t c0, uintptr_t output, uintptr_t h, uintptr_t c, bool thoroughly, int threads) {
    bool too_coarse = false;
    Call call{reinterpret_cast<const float*>(x),
              reinterpret_cast<const int64_t*>(sizes),
              steps,
              batch,
              rows,
              reinterpret_cast<const float*>(h0),
              reinterpret_cast<const float*>(c0),
              reinterpret_cast<float*>(output),
              reinterpret_cast<float*>(h),
              reinterpret_cast<float*>(c),
              &too_coarse};
    if (call.sizes) check_sizes(call);
    std::optional<nb::gil_scoped_release> unlocked;
    if (layer.nanoseconds(rows, batch) >= worth_unlocking) unlocked.emplace();
    if (thoroughly && !layer.is_current()) return stale;
    layer.run(call, threads);
    return layer.is_finite(call) && !too_coarse ? done : in_doubt;
}

// The elementwise part of training steps, in one instruction set.
struct Cells {
    explicit Cells(const std::string& isa) : kernel(kernel_named(isa)) {}
    const Kernel* kernel;
};

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void forward(const Cells& cells, ptrdiff_t rows, ptrdiff_t hidden, bool is_half, uintptr_t gates, uintptr_t recurrent,
             uintptr_t c_before, uintptr_t activations, uintptr_t c, uintptr_t h, uintptr_t h_half) {
    cells.kernel->train_forward({rows, hidden, is_half, at<void>(gates), at<void>(recurrent), at<float>(c_before),
                                 at<float>(activations), at<float>(c), at<float>(h), at<uint16_t>(h_half)});
}

void backward(const Cells& cells, ptrdiff_t rows, ptrdiff_t hidden, bool is_half, uintptr_t activations,
              uintptr_t c_before, uintptr_t c, uintptr_t d_output, uintptr_t d_h, uintptr_t d_c, uintptr_t d_gates) {
    cells.kernel->train_backward({rows, hidden, is_half, at<float>(activations), at<float>(c_before), at<float>(c),
                                  at<float>(d_output), at<void>(d_h), at<float>(d_c), at<void>(d_gates)});
}

using Matrix = std::tuple<uintptr_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t>;

Passes passes(const Cells& cells, ptrdiff_t steps, ptrdiff_t batch, ptrdiff_t hidden, bool reverse,
              const std::vector<Matrix>& factors, Floats& memory) {
    if (factors.empty() || factors.size() > 2) throw nb::value_error("a product takes one or two matrices");
    Passes sizes{steps, batch, hidden, reverse, static_cast<int>(factors.size()), {}, nullptr};
    ptrdiff_t lanes = cells.kernel->lanes, floats = batch * hidden;
    for (size_t k = 0; k < factors.size(); ++k) {
        auto [data, inputs, outputs, input_stride, output_stride] = factors[k];
        sizes.matrices[k] = {at<float>(data), inputs, outputs, input_stride, output_stride};
        floats += (inputs + batch) * ((outputs + lanes - 1) / lanes * lanes);
    }
    memory = Floats(static_cast<size_t>(floats));
    sizes.workspace = memory.get();
    return sizes;
}

void forward_all(const Cells& cells, ptrdiff_t steps, ptrdiff_t batch, ptrdiff_t hidden, bool reverse, bool from_zero,
                 const std::vector<Matrix>& factors, uintptr_t activations, uintptr_t c, uintptr_t h) {
    nb::gil_scoped_release unlocked;
    Floats memory;
    Passes sizes = passes(cells, steps, batch, hidden, reverse, factors, memory);
    cells.kernel->train_forward_all({sizes, from_zero, at<float>(activations), at<float>(c), at<float>(h)});
}

void backward_all(const Cells& cells, ptrdiff_t steps, ptrdiff_t batch, ptrdiff_t hidden, bool reverse,
                  const std::vector<Matrix>& factors, uintptr_t activations, uintptr_t c, uintptr_t d_output,
                  uintptr_t d_c, uintptr_t d_h0, uintptr_t d_gates) {
    nb::gil_scoped_release unlocked;
    Floats memory;
    Passes sizes = passes(cells, steps, batch, hidden, reverse, factors, memory);
    cells.kernel->train_backward_all({sizes, at<float>(activations), at<float>(c), at<float>(d_output), at<float>(d_c),
                                      at<float>(d_h0), at<float>(d_gates)});
}

void round_at(ptrdiff_t count, ptrdiff_t rows, int bits, uintptr_t work, uintptr_t factor, uintptr_t base,
              uintptr_t errors, uintptr_t rounded) {
    nb::gil_scoped_release unlocked;
    round_blocks({count, rows, bits, at<double>(work), at<double>(factor), at<float>(base), at<double>(errors),
                  at<double>(rounded)});
}

}  // namespace

NB_MODULE(_kernel, module) {
    // Layers in module-level variables, or held by torch.jit.trace, outlive the interpreter's shutdown. That is harmless.
    nb::set_leak_warnings(false);
    module.def("names", &kernel_names, "Return the kernels that this machine can run, fastest first.");
    module.def("round_blocks", &round_at, "Round blocks of weights with feedback, on contiguous memory at the given addresses.");
    nb::class_<Cells>(module, "Cells", "The elementwise part of training steps.")
        .def(nb::init<const std::string&>())
        .def("forward", &forward, "One step forward, on contiguous memory at the given addresses.")
        .def("backward", &backward, "One step backward, on contiguous memory at the given addresses.")
        .def("forward_all", &forward_all, "All steps forward, with small float32 matrices.")
        .def("backward_all", &backward_all, "All steps backward, with small float32 matrices.");
    nb::class_<Layer>(module, "Layer", "Packed weights of one layer.")
        .def("__init__", &make)
        .def("bytes", &Layer::bytes, "Return the bytes of all packed matrices, without the scales of rows.")
        .def("run", &run,
             "Run the layer on contiguous float32 memory at the given addresses. Return 0, without running it, if the weights "
             "are to be compared with the packed ones and differ; else 1, or 2 if the last hidden states are not finite or "
             "rounded inputs are too coarse.");
}
