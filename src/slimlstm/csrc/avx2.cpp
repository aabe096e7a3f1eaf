#include "simd_avx2.h"

#include "recurrence.h"
#include "training.h"

const slimlstm::Kernel slimlstm::kernel_avx2 = {
    "avx2", L, workspace, run, digest, train_forward, train_backward, train_forward_all, train_backward_all};
