#include "simd_portable.h"

#include "recurrence.h"

const slimlstm::Kernel slimlstm::kernel_portable = {"portable", L, workspace, run};
