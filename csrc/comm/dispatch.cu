// Tokens to the ranks of their experts: once each, into fixed slots in the peers' memory (comm.h has the
// protocol; facts on the design: DeepEP V2's fixed slots and copy-out, without its rings and without atomics
// for slots, so that the order is the tokens'). A token's row is read once and written to every rank it goes
// to.
#include "comm/dispatch.cuh"

namespace dsc {
namespace {

using comm::DispatchReceiveStep;

// Waits as the receiver does, and takes nothing.
__global__ void __launch_bounds__(kWarpSize)
    dispatch_counts_kernel(const __grid_constant__ CommLaunch<DispatchCountsParams> launch) {
    DSC_SHARED(int[kCommMaxRanks], counts);
    const CommGroup& group = launch.group;
    const DispatchReceiveStep step(group, launch.places[blockIdx.y]);
    const bool is_there = wait_for_rows(step, counts, [&](int) { return group.shape.max_tokens; });
    const int peer = threadIdx.x;
    if (peer < group.shape.num_ranks) launch.params[blockIdx.y].count[peer] = is_there ? counts[peer] : 0;
}

}  // namespace

// ---- host ----

void launch_dispatch_send(const CommLaunch<DispatchSendParams>& launch, const CommSettings& settings,
                          cudaStream_t stream) {
    const int num_launched = launch.group.num_launched;
    const CommPlan plan = plan_comm("dispatch_send", settings, num_launched, 1);
    if (plan.by_bulk) return launch_dispatch_send_sm90(launch, plan.num_blocks, stream);
    dsc::launch(comm::dispatch_send_kernel<WordMover>, comm_grid(plan.num_blocks, num_launched, 1),
                dim3(kCommThreads), WordMover::kSharedBytes, stream, launch);
}

void launch_dispatch_counts(const CommLaunch<DispatchCountsParams>& launch, cudaStream_t stream) {
    dsc::launch(dispatch_counts_kernel, comm_grid(1, launch.group.num_launched, 1), dim3(kWarpSize), 0,
                stream, launch);
}

void launch_dispatch_receive(const CommLaunch<DispatchReceiveParams>& launch, const CommSettings& settings,
                             cudaStream_t stream) {
    const int num_launched = launch.group.num_launched;
    const CommPlan plan = plan_comm("dispatch_receive", settings, num_launched, 1);
    if (plan.by_bulk) return launch_dispatch_receive_sm90(launch, plan.num_blocks, stream);
    dsc::launch(comm::dispatch_receive_kernel<WordMover>, comm_grid(plan.num_blocks, num_launched, 1),
                dim3(kCommThreads), WordMover::kSharedBytes, stream, launch);
}

void launch_dispatch_together(const DispatchTogether& launch, const CommSettings& settings,
                              cudaStream_t stream) {
    const int num_launched = launch.group.num_launched;
    const CommPlan plan = plan_comm("dispatch_together", settings, num_launched, 2);
    if (plan.by_bulk) return launch_dispatch_together_sm90(launch, plan.num_blocks, stream);
    launch_cooperative(comm::dispatch_together_kernel<WordMover>, comm_grid(plan.num_blocks, num_launched, 2),
                       dim3(kCommThreads), WordMover::kSharedBytes, stream, launch);
}

}  // namespace dsc
