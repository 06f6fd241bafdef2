// How a launch of this family is cut into blocks, and which way its rows move.
#pragma once

#include "comm/comm.h"
#include "comm/comm_sm90.h"
#include "comm/comm_sync.cuh"
#include "core/check.h"
#include "core/launch.h"

namespace dsc {

constexpr int kCommBlocksPerSm = 2;  // that the kernels are built for: comm_num_blocks counts on them

struct CommPlan {
    int num_blocks;  // a rank and role
    bool by_bulk;
};

inline CommPlan plan_comm(const char* op, const CommSettings& settings, int num_launched, int num_roles) {
#ifdef DSC_HOST_EXECUTOR
    const int num_sms = 4;
    const bool is_sm90 = false, can_sm90 = true;
#else
    const int device = current_device();
    const int num_sms = device_attribute<cudaDevAttrMultiProcessorCount>(device);
    const bool is_sm90 = device_attribute<cudaDevAttrComputeCapabilityMajor>(device) == 9;
    const bool can_sm90 = is_sm90;
#endif
    const bool can_bulk = can_sm90 and has_comm_sm90();
    DSC_CHECK(can_bulk or settings.copy != CommCopy::kBulk, op,
              ": copy bulk needs compute capability 9.0 and a build with kernels for it");
    const bool wants_bulk =
        settings.copy == CommCopy::kBulk or (settings.copy == CommCopy::kAuto and is_sm90);
    const int planned = comm_num_blocks(num_sms, num_launched, num_roles);
    return {settings.num_blocks > 0 ? settings.num_blocks : planned, wants_bulk and can_bulk};
}

inline dim3 comm_grid(int num_blocks, int num_launched, int num_roles) {
    return dim3(static_cast<unsigned>(num_blocks), static_cast<unsigned>(num_launched),
                static_cast<unsigned>(num_roles));
}

}  // namespace dsc
