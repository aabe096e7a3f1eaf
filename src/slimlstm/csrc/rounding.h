// Rounding of weights to a grid of few bits, with feedback; slimlstm/methods/feedback.py describes the method.
#pragma once

#include <cstddef>

namespace slimlstm {

// Blocks of weights, each with one group of columns that share scales.
struct Blocks {
    // The number of weights in a row that share a scale.
    static constexpr ptrdiff_t group = 64;

    ptrdiff_t count;
    ptrdiff_t rows;
    int bits;
    // Weights [count, rows, group]; overwritten.
    double* work;
    // Upper factors [count, group, group] of the inverse moments.
    const double* factor;
    // The numbers [count, rows] whose multiples are the scales of a row.
    const float* base;
    // Results [count, rows, group]: errors over the factor's diagonal, and weights on the grid.
    double* errors;
    double* rounded;
};

// Chooses a scale for every row of every block, then rounds column by column and corrects the columns that follow.
void round_blocks(const Blocks& blocks);

}  // namespace slimlstm
