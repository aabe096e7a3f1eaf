#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace slimlstm {
namespace {

constexpr ptrdiff_t panel_vectors = 4;

// The row of a matrix that a lane holds; -1 for a lane without a row.
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

uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value)) return 0x7FC0;
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Whether every element of a row is an integer times ``scale``.
bool fits(const Source& source, ptrdiff_t row, float scale) {
    for (ptrdiff_t k = 0; k < source.columns; ++k) {
        float value = *source.at(row, k);
        if (std::nearbyint(value / scale) * scale != value) return false;
    }
    return true;
}

// The scale of a row. If all elements are integers up to 127 times some scale, that scale: the largest element is then one
// of these integers times the scale. Otherwise the largest magnitude, divided by 127; NaN if an element is not finite.
float scale_of(const Source& source, ptrdiff_t row) {
    float bound = 0;
    for (ptrdiff_t k = 0; k < source.columns; ++k) {
        float value = std::fabs(*source.at(row, k));
        if (!std::isfinite(value)) return NAN;
        bound = std::max(bound, value);
    }
    for (int code = 127; code > 0 && bound / code >= std::numeric_limits<float>::min(); --code)
        if (fits(source, row, bound / code)) return bound / code;
    return bound / 127;
}

uint8_t to_uint8(float value, float scale) {
    return static_cast<uint8_t>(128 + (scale > 0 ? std::lrint(value / scale) : 0));
}

// Writes the word of weights of a row that begins at input ``k``; zeros if ``row`` is -1.
void write_word(const Source& source, ptrdiff_t row, ptrdiff_t k, Storage storage, float scale, float* to) {
    auto value = [&](ptrdiff_t at) { return row < 0 || at >= source.columns ? 0.0f : *source.at(row, at); };
    if (storage == Storage::float32) {
        *to = value(k);
    } else if (storage == Storage::bfloat16) {
        uint16_t halves[2] = {to_bfloat16(value(k)), to_bfloat16(value(k + 1))};
        std::memcpy(to, halves, sizeof halves);
    } else {
        uint8_t bytes[4];
        for (ptrdiff_t part = 0; part < 4; ++part) bytes[part] = to_uint8(value(k + part), scale);
        std::memcpy(to, bytes, sizeof bytes);
    }
}

ptrdiff_t inputs_per_word(Storage storage) {
    switch (storage) {
        case Storage::float32: return 1;
        case Storage::bfloat16: return 2;
        default: return 4;
    }
}

ptrdiff_t groups_of(ptrdiff_t inputs) { return (inputs + group_inputs - 1) / group_inputs; }

// The codes of one row, padded to whole groups, with a multiplier for each group.
struct Codes {
    std::vector<int> codes;
    std::vector<uint8_t> multipliers;
};

// Whether every integer of a row of int8 is a multiplier of its group times a code from -7 to 7. The largest multiplier
// that divides a group is their greatest common divisor.
bool find_codes(const Source& source, ptrdiff_t row, float scale, Codes& found) {
    found.codes.assign(found.codes.size(), 0);
    if (!std::isfinite(scale)) return false;
    for (ptrdiff_t k = 0; k < source.columns; ++k)
        found.codes[static_cast<size_t>(k)] = to_uint8(*source.at(row, k), scale) - 128;
    for (size_t group = 0; group < found.multipliers.size(); ++group) {
        int *codes = &found.codes[group * group_inputs], largest = 0, divisor = 0;
        for (ptrdiff_t k = 0; k < group_inputs; ++k) {
            largest = std::max(largest, std::abs(codes[k]));
            divisor = std::gcd(divisor, codes[k]);
        }
        found.multipliers[group] = static_cast<uint8_t>(divisor);
        if (divisor == 0) continue;
        if (largest > 7 * divisor) return false;
        for (ptrdiff_t k = 0; k < group_inputs; ++k) codes[k] /= divisor;
    }
    return true;
}

// Packs a matrix in int4; returns whether it can be held exactly.
bool pack_codes(const Source& source, ptrdiff_t hidden, ptrdiff_t lanes, Panels& panels, std::vector<Floats>& memory) {
    ptrdiff_t groups = groups_of(source.columns), words = panels.words = groups * group_inputs / 8;
    Floats data(static_cast<size_t>(panels.vectors * lanes * words)), scales(static_cast<size_t>(panels.vectors * lanes));
    Floats multipliers(static_cast<size_t>(panels.vectors * lanes * groups + 3) / 4);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(multipliers.get());
    Codes none{std::vector<int>(static_cast<size_t>(groups * group_inputs)),
               std::vector<uint8_t>(static_cast<size_t>(groups))};
    Codes found = none;
    for (ptrdiff_t vector = 0; vector < panels.vectors; ++vector) {
        ptrdiff_t first = vector / panel_vectors * panel_vectors;
        ptrdiff_t width = std::min(panel_vectors, panels.vectors - first) * lanes;
        for (ptrdiff_t lane = 0; lane < lanes; ++lane) {
            ptrdiff_t row = row_of(vector, lane, source.rows, hidden, lanes), at = (vector - first) * lanes + lane;
            float scale = row >= 0 ? scale_of(source, row) : 0.0f;
            scales.get()[vector * lanes + lane] = scale;
            if (row >= 0 && !find_codes(source, row, scale, found)) return false;
            const Codes& of_row = row >= 0 ? found : none;
            for (ptrdiff_t group = 0; group < groups; ++group)
                bytes[first * lanes * groups + group * width + at] = of_row.multipliers[static_cast<size_t>(group)];
            for (ptrdiff_t word = 0; word < words; ++word) {
                const int* codes = &of_row.codes[static_cast<size_t>(8 * word)];
                uint8_t halves[4];
                for (ptrdiff_t k = 0; k < 4; ++k)
                    halves[k] = static_cast<uint8_t>((codes[k] + 8) | (codes[k + 4] + 8) << 4);
                std::memcpy(data.get() + first * lanes * words + word * width + at, halves, sizeof halves);
            }
        }
    }
    panels.data = data.get(), panels.scales = scales.get(), panels.multipliers = bytes;
    for (Floats* one : {&data, &scales, &multipliers}) memory.push_back(std::move(*one));
    return true;
}

}  // namespace

Panels pack(const Source& source, Storage storage, ptrdiff_t hidden, ptrdiff_t lanes, std::vector<Floats>& memory) {
    Panels panels;
    panels.storage = storage;
    panels.vectors = vectors_of(source.rows, hidden, lanes);
    panels.inputs = source.columns;
    if (storage == Storage::int4) {
        bool is_smaller = groups_of(source.columns) * group_inputs < 2 * source.columns;
        if (is_smaller && pack_codes(source, hidden, lanes, panels, memory)) return panels;
        panels.storage = storage = Storage::int8;
    }
    ptrdiff_t per_word = inputs_per_word(storage);
    ptrdiff_t words = panels.words = (source.columns + per_word - 1) / per_word;
    memory.emplace_back(static_cast<size_t>(panels.vectors * lanes * words));
    float* data = memory.back().get();
    memory.emplace_back(static_cast<size_t>(storage == Storage::int8 ? panels.vectors * lanes : 0));
    float* scales = memory.back().get();
    panels.data = data, panels.scales = scales;
    for (ptrdiff_t vector = 0; vector < panels.vectors; ++vector) {
        ptrdiff_t first = vector / panel_vectors * panel_vectors;
        ptrdiff_t width = std::min(panel_vectors, panels.vectors - first) * lanes;
        float* panel = data + first * lanes * words + (vector - first) * lanes;
        for (ptrdiff_t lane = 0; lane < lanes; ++lane) {
            ptrdiff_t row = row_of(vector, lane, source.rows, hidden, lanes);
            float scale = storage == Storage::int8 && row >= 0 ? scale_of(source, row) : 0.0f;
            if (storage == Storage::int8) scales[vector * lanes + lane] = scale;
            for (ptrdiff_t word = 0; word < words; ++word)
                write_word(source, row, word * per_word, storage, scale, panel + word * width + lane);
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
