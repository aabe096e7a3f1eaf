#include "simd_avx512.h"

#include "recurrence.h"
#include "training.h"

const slimlstm::Kernel slimlstm::kernel_avx512_vnni = {
    "avx512_vnni", L, workspace, run, digest, train_forward, train_backward, train_forward_all, train_backward_all};
