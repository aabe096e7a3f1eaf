#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace slimlstm {
namespace {

constexpr ptrdiff_t group = Blocks::group;

// Fractions of a group's largest magnitude that the highest code may represent, as in slimlstm/methods/low_bit.py.
constexpr float clips[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f, 0.65f, 0.6f};

// Rounds to the nearest integer, ties to even, and clamps. The sum has no fraction bits left, so that it rounds by itself.
inline float nearest(float value, float largest) {
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23
    return (std::min(std::max(value, -largest), largest) + shift) - shift;
}

float squared_error(const float* weights, float scale, float largest) {
    constexpr ptrdiff_t lanes = 16;
    float sums[lanes] = {};
    float divisor = scale > 0 ? scale : 1.0f;
    for (ptrdiff_t first = 0; first < group; first += lanes)
        for (ptrdiff_t lane = 0; lane < lanes; ++lane) {
            float weight = weights[first + lane];
            float difference = nearest(weight / divisor, largest) * scale - weight;
            sums[lane] += difference * difference;
        }
    float sum = 0;
    for (float part : sums) sum += part;
    return sum;
}

// The scale whose rounding to nearest has the smallest squared error.
float best_scale(const double* wanted, float base, int bits) {
    float weights[group], top = 0;
    for (ptrdiff_t k = 0; k < group; ++k) {
        weights[k] = static_cast<float>(wanted[k]);
        top = std::max(top, std::fabs(weights[k]));
    }
    auto largest = static_cast<float>((1 << (bits - 1)) - 1);
    float steps = std::floor(127.0f / largest);
    float needed = top / largest / (base > 0 ? base : 1.0f);
    float best = base, lowest = std::numeric_limits<float>::infinity();
    for (float clip : clips) {
        // Rounded up without clipping, so that the largest weight fits.
        float step = clip == 1.0f ? std::ceil(needed) : std::nearbyint(clip * needed);
        float scale = std::min(std::max(step, 1.0f), steps) * base;
        float error = squared_error(weights, scale, largest);
        if (error < lowest) {
            best = scale;
            lowest = error;
        }
    }
    return best;
}

}  // namespace

void round_blocks(const Blocks& blocks) {
    auto largest = static_cast<float>((1 << (blocks.bits - 1)) - 1);
    for (ptrdiff_t row = 0; row < blocks.count * blocks.rows; ++row) {
        double* work = blocks.work + row * group;
        const double* factor = blocks.factor + row / blocks.rows * group * group;
        float scale = best_scale(work, blocks.base[row], blocks.bits);
        float divisor = scale > 0 ? scale : 1.0f;
        for (ptrdiff_t column = 0; column < group; ++column) {
            const double* weights = factor + column * group;
            double rounded = nearest(static_cast<float>(work[column]) / divisor, largest) * scale;
            double error = (work[column] - rounded) / weights[column];
            blocks.rounded[row * group + column] = rounded;
            blocks.errors[row * group + column] = error;
            for (ptrdiff_t later = column + 1; later < group; ++later) work[later] -= error * weights[later];
        }
    }
}

}  // namespace slimlstm
