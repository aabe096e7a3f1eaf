#include "simd_avx512.h"

#include "recurrence.h"

const slimlstm::Kernel slimlstm::kernel_avx512_vnni = {"avx512_vnni", L, workspace, run};
