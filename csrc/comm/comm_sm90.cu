// dispatch and combine with rows moved by the copy engine of sm_90a. The host executor plays it
// (host/bulk.h).
#include "comm/comm_sm90.h"

#ifdef DSC_NO_DEVICE_CODE

#include <stdexcept>

namespace dsc {
namespace {

[[noreturn]] void refuse() {
    throw std::runtime_error("comm: this build has no kernels for sm_90a");
}

}  // namespace

bool has_comm_sm90() {
    return false;
}
void launch_dispatch_send_sm90(const CommLaunch<DispatchSendParams>&, int, cudaStream_t) {
    refuse();
}
void launch_dispatch_receive_sm90(const CommLaunch<DispatchReceiveParams>&, int, cudaStream_t) {
    refuse();
}
void launch_dispatch_together_sm90(const DispatchTogether&, int, cudaStream_t) {
    refuse();
}
void launch_combine_send_sm90(const CommLaunch<CombineSendParams>&, int, cudaStream_t) {
    refuse();
}
void launch_combine_together_sm90(const CombineTogether&, FloatType, int, cudaStream_t) {
    refuse();
}

}  // namespace dsc

#else

#include "comm/combine.cuh"
#include "comm/dispatch.cuh"
#include "core/dtype.h"

namespace dsc {

static_assert(BulkMover::kWarps == kCommWarps);

bool has_comm_sm90() {
    return true;
}

void launch_dispatch_send_sm90(const CommLaunch<DispatchSendParams>& launch, int num_blocks,
                               cudaStream_t stream) {
    dsc::launch(comm::dispatch_send_kernel<BulkMover>, comm_grid(num_blocks, launch.group.num_launched, 1),
                dim3(kCommThreads), BulkMover::kSharedBytes, stream, launch);
}

void launch_dispatch_receive_sm90(const CommLaunch<DispatchReceiveParams>& launch, int num_blocks,
                                  cudaStream_t stream) {
    dsc::launch(comm::dispatch_receive_kernel<BulkMover>, comm_grid(num_blocks, launch.group.num_launched, 1),
                dim3(kCommThreads), BulkMover::kSharedBytes, stream, launch);
}

void launch_dispatch_together_sm90(const DispatchTogether& launch, int num_blocks, cudaStream_t stream) {
    launch_cooperative(comm::dispatch_together_kernel<BulkMover>,
                       comm_grid(num_blocks, launch.group.num_launched, 2), dim3(kCommThreads),
                       BulkMover::kSharedBytes, stream, launch);
}

void launch_combine_send_sm90(const CommLaunch<CombineSendParams>& launch, int num_blocks,
                              cudaStream_t stream) {
    dsc::launch(comm::combine_send_kernel<BulkMover>, comm_grid(num_blocks, launch.group.num_launched, 1),
                dim3(kCommThreads), BulkMover::kSharedBytes, stream, launch);
}

void launch_combine_together_sm90(const CombineTogether& launch, FloatType dtype, int num_blocks,
                                  cudaStream_t stream) {
    with_float_type(dtype, [&]<typename T>() {
        launch_cooperative(comm::combine_together_kernel<T, BulkMover>,
                           comm_grid(num_blocks, launch.group.num_launched, 2), dim3(kCommThreads),
                           BulkMover::kSharedBytes, stream, launch);
    });
}

}  // namespace dsc

#endif
