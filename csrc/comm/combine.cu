// Rows back to their tokens: each into the return slot of its source, which adds up what came from the ranks,
// in rank order, in float32, rounded once. The same bits whatever the order of arrival.
#include "comm/combine.cuh"

#include "core/dtype.h"

namespace dsc {

void launch_combine_send(const CommLaunch<CombineSendParams>& launch, const CommSettings& settings,
                         cudaStream_t stream) {
    const int num_launched = launch.group.num_launched;
    const CommPlan plan = plan_comm("combine_send", settings, num_launched, 1);
    if (plan.by_bulk) return launch_combine_send_sm90(launch, plan.num_blocks, stream);
    dsc::launch(comm::combine_send_kernel<WordMover>, comm_grid(plan.num_blocks, num_launched, 1),
                dim3(kCommThreads), WordMover::kSharedBytes, stream, launch);
}

void launch_combine_receive(const CommLaunch<CombineReceiveParams>& launch, FloatType dtype,
                            const CommSettings& settings, cudaStream_t stream) {
    const int num_launched = launch.group.num_launched;
    const CommPlan plan = plan_comm("combine_receive", {.num_blocks = settings.num_blocks}, num_launched, 1);
    with_float_type(dtype, [&]<typename T>() {
        dsc::launch(comm::combine_receive_kernel<T>, comm_grid(plan.num_blocks, num_launched, 1),
                    dim3(kCommThreads), 0, stream, launch);
    });
}

void launch_combine_together(const CombineTogether& launch, FloatType dtype, const CommSettings& settings,
                             cudaStream_t stream) {
    const int num_launched = launch.group.num_launched;
    const CommPlan plan = plan_comm("combine_together", settings, num_launched, 2);
    if (plan.by_bulk) return launch_combine_together_sm90(launch, dtype, plan.num_blocks, stream);
    with_float_type(dtype, [&]<typename T>() {
        launch_cooperative(comm::combine_together_kernel<T, WordMover>,
                           comm_grid(plan.num_blocks, num_launched, 2), dim3(kCommThreads),
                           WordMover::kSharedBytes, stream, launch);
    });
}

}  // namespace dsc
