// The plan of prefill attention, made on the device where cu_seqlens are (mla_prefill_plan.h): one block
// sorts all tiles by the class of their cost. The same bits as fill_prefill_plan.
//
// A stable counting sort: each warp takes a stretch of the tiles in their order and counts its classes; a
// class's tiles of one warp lie behind those of the warps before it; then each warp puts its tiles there.
#include "attention/mla_prefill.h"
#include "core/block_sum.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/overlap.h"

namespace dsc {
namespace {

constexpr int kNumThreads = 512;
constexpr int kNumWarps = kNumThreads / kWarpSize;
static_assert(kNumThreads == kPrefillClasses, "a thread for each class");

// ---- device ----

struct Sorting {
    int place[kNumWarps][kPrefillClasses];  // how many tiles of a class, then where the next one goes
    int64_t warp_sums[kNumWarps];
};

__device__ __forceinline__ PrefillSequence sequence_at(const MlaPrefillPlanParams& p, int sequence) {
    return prefill_sequence(p.cu_seqlens_q, p.cu_seqlens_k, sequence, p.num_queries, p.num_keys);
}

// Writes how many tiles lie ahead of each sequence, no more than `most`, and returns how many there are.
__device__ __forceinline__ int count_tiles(const MlaPrefillPlanParams& p, int64_t most, int* starts,
                                           int64_t (&warp_sums)[kNumWarps]) {
    int64_t base = 0;
    for (int first = 0; first < p.num_sequences; first += kNumThreads) {
        const int sequence = first + static_cast<int>(threadIdx.x);
        const bool is_there = sequence < p.num_sequences;
        const int num_here = is_there ? num_prefill_tiles(sequence_at(p, sequence), p.tiling) : 0;
        const BlockSum sums = sum_over_block(num_here, warp_sums);
        if (is_there) starts[sequence] = static_cast<int>(min(base + sums.before, most));
        base += sums.all;
    }
    __syncthreads();  // all starts are to be seen
    return static_cast<int>(min(base, most));
}

// The last sequence that starts at tile `index` or before.
__device__ __forceinline__ int find_sequence(const int* starts, int num_sequences, int index) {
    int low = 0, high = num_sequences - 1;
    while (low < high) {
        const int middle = low + (high - low + 1) / 2;
        if (starts[middle] <= index) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// visit(tile, class, lanes) for the warp's tiles in order, a tile a lane: which lanes have one of that class.
// Lanes without a tile have class -1.
template <typename Visit>
__device__ __forceinline__ void visit_tiles(const MlaPrefillPlanParams& p, const int* starts, int num_tiles,
                                            const Visit& visit) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t stretch = ceil_div(num_tiles, kNumThreads) * int64_t{kWarpSize};
    const int64_t end = min((warp + 1) * stretch, int64_t{num_tiles});
    for (int64_t first = warp * stretch; first < end; first += kWarpSize) {
        PrefillTile tile{0, 0};
        int cost_class = -1;
        if (first + lane < end) {
            const int index = static_cast<int>(first) + lane;
            tile.sequence = find_sequence(starts, p.num_sequences, index);
            tile.block = index - starts[tile.sequence];
            cost_class = prefill_class(prefill_cost(sequence_at(p, tile.sequence), tile.block, p.tiling));
        }
        visit(tile, cost_class, __match_any_sync(kAllLanes, cost_class));
    }
}

__global__ void __launch_bounds__(kNumThreads)
    mla_prefill_plan_kernel(const MlaPrefillPlanParams p, const int64_t most) {
    DSC_SHARED(Sorting, sorting);
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    int2* const tiles = reinterpret_cast<int2*>(p.plan) + 1;
    int* const starts = p.plan + 2 * (1 + most);
    int (&place)[kPrefillClasses] = sorting.place[warp];
    for (int i = lane; i < kPrefillClasses; i += kWarpSize) place[i] = 0;
    wait_for_previous_kernel();
    const int num_tiles = count_tiles(p, most, starts, sorting.warp_sums);
    if (thread == 0) tiles[-1] = make_int2(num_tiles, 0);

    visit_tiles(p, starts, num_tiles, [&](const PrefillTile&, int cost_class, uint32_t lanes) {
        if (cost_class >= 0 and lane == __ffs(lanes) - 1) place[cost_class] += __popc(lanes);
        __syncwarp();
    });
    __syncthreads();

    // Counts become places: the class with the most work first, in a class the first warp's tiles.
    const int own_class = kPrefillClasses - 1 - thread;
    int num_own = 0;
    DSC_UNROLL
    for (int i = 0; i < kNumWarps; ++i) num_own += sorting.place[i][own_class];
    int next = static_cast<int>(sum_over_block(num_own, sorting.warp_sums).before);
    DSC_UNROLL
    for (int i = 0; i < kNumWarps; ++i) {
        const int num_here = sorting.place[i][own_class];
        sorting.place[i][own_class] = next;
        next += num_here;
    }
    __syncthreads();
    let_next_kernel_start();

    visit_tiles(p, starts, num_tiles, [&](const PrefillTile& tile, int cost_class, uint32_t lanes) {
        const int num_before = __popc(lanes & ((1u << lane) - 1));
        if (cost_class >= 0) tiles[place[cost_class] + num_before] = make_int2(tile.sequence, tile.block);
        __syncwarp();
        if (cost_class >= 0 and num_before == 0) place[cost_class] += __popc(lanes);
        __syncwarp();
    });
}

}  // namespace

// ---- host ----

void launch_mla_prefill_plan(const MlaPrefillPlanParams& p, cudaStream_t stream) {
    const bool has_queries = p.tiling.side == PrefillSide::kQueries;
    const int64_t most =
        most_prefill_tiles(has_queries ? p.num_queries : p.num_keys, p.num_sequences, p.tiling.tile_rows);
    DSC_CHECK(most <= std::numeric_limits<int>::max(), "mla_prefill: too many tiles to be numbered, ", most);
    launch_overlapped(mla_prefill_plan_kernel, dim3(1), dim3(kNumThreads), 0, stream, p, most);
}

}  // namespace dsc
