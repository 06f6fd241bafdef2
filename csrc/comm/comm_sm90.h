// The kernels whose rows move by the copy engine of sm_90a. In a build without machine code for sm_90a a call
// throws; has_comm_sm90() asks first.
#pragma once

#include "comm/comm.h"

namespace dsc {

bool has_comm_sm90();

void launch_dispatch_send_sm90(const CommLaunch<DispatchSendParams>& launch, int num_blocks,
                               cudaStream_t stream);
void launch_dispatch_receive_sm90(const CommLaunch<DispatchReceiveParams>& launch, int num_blocks,
                                  cudaStream_t stream);
void launch_dispatch_together_sm90(const DispatchTogether& launch, int num_blocks, cudaStream_t stream);
void launch_combine_send_sm90(const CommLaunch<CombineSendParams>& launch, int num_blocks,
                              cudaStream_t stream);
void launch_combine_together_sm90(const CombineTogether& launch, FloatType dtype, int num_blocks,
                                  cudaStream_t stream);

}  // namespace dsc
