#include "simd_portable.h"

#include "recurrence.h"
#include "training.h"

const slimlstm::Kernel slimlstm::kernel_portable = {
    "portable", L, workspace, run, digest, train_forward, train_backward, train_forward_all, train_backward_all};
