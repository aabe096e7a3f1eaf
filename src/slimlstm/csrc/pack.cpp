#include "pack.h"

#include <algorithm>

namespace slimlstm {
namespace {

constexpr ptrdiff_t panel_vectors = 4;

// The row of a matrix that a lane holds, or -1.
ptrdiff_t row_of(ptrdiff_t vector, ptrdiff_t lane, ptrdiff_t rows, ptrdiff_t hidden, ptrdiff_t lanes) {
    if (hidden == 0) {
        ptrdiff_t row = vector * lanes + lane;
        return row < rows ? row : -1;
    }
    ptrdiff_t unit = vector / panel_vectors * lanes + lane;
    return unit < hidden ? vector % panel_vectors * hidden + unit : -1;
}

ptrdiff_t vectors_of(ptrdiff_t rows, ptrdiff_t hidden, ptrdiff_t lanes) {
    return hidden ? (hidden + lanes - 1) / lanes * panel_vectors : (rows + lanes - 1) / lanes;
}

}  // namespace

Panels pack(const Source& source, ptrdiff_t hidden, ptrdiff_t lanes, std::vector<Floats>& memory) {
    Panels panels;
    panels.vectors = vectors_of(source.rows, hidden, lanes);
    panels.inputs = source.columns;
    memory.emplace_back(static_cast<size_t>(panels.vectors * lanes * panels.inputs));
    float* data = memory.back().get();
    panels.data = data;
    for (ptrdiff_t vector = 0; vector < panels.vectors; ++vector) {
        ptrdiff_t first = vector / panel_vectors * panel_vectors;
        ptrdiff_t width = std::min(panel_vectors, panels.vectors - first) * lanes;
        float* panel = data + first * lanes * panels.inputs + (vector - first) * lanes;
        for (ptrdiff_t lane = 0; lane < lanes; ++lane) {
            ptrdiff_t row = row_of(vector, lane, source.rows, hidden, lanes);
            for (ptrdiff_t k = 0; k < panels.inputs; ++k) panel[k * width + lane] = row < 0 ? 0.0f : *source.at(row, k);
        }
    }
    return panels;
}

const float* pack_bias(const Source& one, const Source& other, ptrdiff_t hidden, ptrdiff_t lanes,
                       std::vector<Floats>& memory) {
    if (!one.data && !other.data) return nullptr;
    ptrdiff_t vectors = vectors_of(0, hidden, lanes);
    memory.emplace_back(static_cast<size_t>(vectors * lanes));
    float* bias = memory.back().get();
    for (ptrdiff_t at = 0; at < vectors * lanes; ++at) {
        ptrdiff_t row = row_of(at / lanes, at % lanes, 0, hidden, lanes);
        bias[at] = 0.0f;
        for (const Source* source : {&one, &other})
            if (row >= 0 && source->data) bias[at] += *source->at(row, 0);
    }
    return bias;
}

}  // namespace slimlstm
