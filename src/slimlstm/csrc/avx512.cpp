#include "simd_avx512.h"

#include "recurrence.h"

const slimlstm::Kernel slimlstm::kernel_avx512 = {"avx512", L, workspace, run};
