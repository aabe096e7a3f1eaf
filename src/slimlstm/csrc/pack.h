// Packing weights into panels; see Panels in kernel.h.
#pragma once

#include <vector>

#include "layer.h"

namespace slimlstm {

// Rounds a matrix to a storage and packs it for vectors of ``lanes`` lanes. With ``hidden`` > 0 its rows are the gates of
// that many hidden units. A matrix that int4 cannot hold exactly, or would not make smaller, becomes int8.
Panels pack(const Source& source, Storage storage, ptrdiff_t hidden, ptrdiff_t lanes, std::vector<Floats>& memory);

// The sum of the biases that are present, in the order of packed gates; null if neither is.
const float* pack_bias(const Source& one, const Source& other, ptrdiff_t hidden, ptrdiff_t lanes,
                       std::vector<Floats>& memory);

}  // namespace slimlstm
