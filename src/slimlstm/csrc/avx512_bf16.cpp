#include "simd_avx512.h"

#include "recurrence.h"

const slimlstm::Kernel slimlstm::kernel_avx512_bf16 = {"avx512_bf16", L, workspace, run};
