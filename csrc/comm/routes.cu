// Which ranks a token goes to, and its slot there: its position among the tokens that go to that rank, in
// token order. The same numbers whatever the order of threads.
//
// One block a rank of the launch: each warp takes a stretch of tokens. It notes which ranks each token goes
// to (a bit each) and counts; the warps' counts become where their tokens begin; then each warp gives slots,
// by ballots. Every index is read once, by loads that wait for nothing: 4096 tokens are four rounds of a
// warp.
#include <algorithm>

#include "comm/comm.h"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.h"

namespace dsc {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;

struct Stretch {
    int begin, end;  // tokens; begin is a multiple of kWarpSize
};

// ---- device ----

__device__ __forceinline__ Stretch own_stretch(int num_tokens) {
    const int warp = threadIdx.x / kWarpSize;
    const int length = ceil_div(ceil_div(num_tokens, kNumWarps), kWarpSize) * kWarpSize;
    return {min(warp * length, num_tokens), min((warp + 1) * length, num_tokens)};
}

// A bit for each rank that has an expert of the token.
__device__ __forceinline__ uint32_t ranks_of(const ExpertRoutesParams& p, int64_t token) {
    uint32_t ranks = 0;
    DSC_NO_UNROLL
    for (int first = 0; first < p.num_topk; first += 4) {
        int expert[4];
        DSC_UNROLL
        for (int i = 0; i < 4; ++i) {
            expert[i] = first + i < p.num_topk ? p.idx[token * p.num_topk + first + i] : -1;
        }
        DSC_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int rank = expert[i] < 0 ? p.num_ranks : expert[i] / p.num_local_experts;
            if (rank < p.num_ranks) ranks |= 1u << rank;
        }
    }
    return ranks;
}

// Lane r ends with how many tokens of the stretch go to rank r; `kept` with the ranks of each token.
__device__ __forceinline__ int count_stretch(const ExpertRoutesParams& p, const Stretch& own, uint8_t* kept) {
    const int lane = threadIdx.x % kWarpSize;
    int count = 0;
    for (int first = own.begin; first < own.end; first += kWarpSize) {
        const int token = first + lane;
        const uint32_t ranks = token < own.end ? ranks_of(p, token) : 0;
        if (token < own.end) kept[token] = static_cast<uint8_t>(ranks);
        DSC_UNROLL
        for (int r = 0; r < kCommMaxRanks; ++r) {
            const int num_here = __popc(__ballot_sync(kAllLanes, ranks >> r & 1));
            if (lane == r) count += num_here;
        }
    }
    return count;
}

// Lane r begins with the slot that the stretch's next token for rank r gets.
__device__ __forceinline__ void place_stretch(const ExpertRoutesParams& p, const Stretch& own,
                                              const uint8_t* kept, int next) {
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t lanes_below = (1u << lane) - 1;
    for (int first = own.begin; first < own.end; first += kWarpSize) {
        const int token = first + lane;
        const uint32_t ranks = token < own.end ? kept[token] : 0;
        for (int r = 0; r < p.num_ranks; ++r) {
            const bool goes = ranks >> r & 1;
            const uint32_t goers = __ballot_sync(kAllLanes, goes);
            const int begin = __shfl_sync(kAllLanes, next, r);
            const int slot = goes ? begin + __popc(goers & lanes_below) : -1;
            if (token < own.end) p.slot[int64_t{token} * p.num_ranks + r] = slot;
            if (lane == r) next += __popc(goers);
        }
    }
}

__global__ void __launch_bounds__(kNumThreads)
    expert_routes_kernel(const __grid_constant__ ExpertRoutesLaunch launch) {
    DSC_SHARED(int[kNumWarps][kCommMaxRanks], num_goers);
    DSC_SHARED_DYNAMIC(uint8_t, kept);
    const ExpertRoutesParams& p = launch.params[blockIdx.x];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const Stretch own = own_stretch(p.num_tokens);
    const int count = count_stretch(p, own, kept);
    if (lane < kCommMaxRanks) num_goers[warp][lane] = count;
    __syncthreads();
    int before = 0, all = 0;
    if (lane < kCommMaxRanks) {
        for (int w = 0; w < kNumWarps; ++w) {
            before += w < warp ? num_goers[w][lane] : 0;
            all += num_goers[w][lane];
        }
    }
    if (warp == 0 and lane < p.num_ranks) p.count[lane] = all;
    place_stretch(p, own, kept, before);
}

}  // namespace

// ---- host ----

void launch_expert_routes(const ExpertRoutesLaunch& launch, cudaStream_t stream) {
    int most_tokens = 0;
    for (int i = 0; i < launch.num_launched; ++i) {
        most_tokens = std::max(most_tokens, launch.params[i].num_tokens);
    }
    dsc::launch(expert_routes_kernel, dim3(static_cast<unsigned>(launch.num_launched)), dim3(kNumThreads),
                static_cast<size_t>(most_tokens), stream, launch);
}

}  // namespace dsc
