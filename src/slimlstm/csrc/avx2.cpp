#include "simd_avx2.h"

#include "recurrence.h"

const slimlstm::Kernel slimlstm::kernel_avx2 = {"avx2", L, workspace, run};
