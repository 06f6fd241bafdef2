// Tokens in expert order (moe.h), in three launches that overlap, without a sort and without the host.
//
// Which rows: a counting sort whose order does not depend on the schedule. The flat choices are cut into
// chunks. One launch counts the experts of each chunk; the next one adds up, per expert, the counts of all
// chunks (a scan over them gives the offsets) and of those before its own, and ranks its chunk: warps take
// neighbouring segments, count them, and then walk along theirs 32 choices at a time, where the lanes that
// chose one expert find each other by a match. Up to kMinChunk choices one block does it all, and the first
// launch is left out.
//
// The copy: a token's row is read once and written K times, 1 + K rows of traffic where a gather by row has
// 2 K. Rows are written past the cache: T * K of them are seldom read again before others have pushed them
// out.
#include <algorithm>

#include "core/check.h"
#include "core/warp.h"
#include "moe/moe_rows.h"

namespace dsc {
namespace {

constexpr int kMapThreads = kMoeMaxExperts;  // a thread owns an expert
constexpr int kMapWarps = kMapThreads / kWarpSize;
constexpr int64_t kMinChunk = 1024;  // choices: 64 a warp
constexpr int64_t kMaxChunks = 128;  // about one an SM, and few enough to add up
constexpr int kWordsPerThread = 2;
constexpr int kNoExpert = -1;

// ---- device ----

__device__ __forceinline__ bool is_expert(int expert, int num_experts) {
    return static_cast<uint32_t>(expert) < static_cast<uint32_t>(num_experts);
}

// Counts every `step`-th choice from `begin` on, several loads in flight.
__device__ __forceinline__ void count_choices(const MoePermuteMapsParams& p, int64_t begin, int64_t end,
                                              int step, int* count) {
    constexpr int kInFlight = 4;
    for (int64_t first = begin; first < end; first += kInFlight * step) {
        int expert[kInFlight];
        DSC_UNROLL
        for (int j = 0; j < kInFlight; ++j) {
            const int64_t choice = first + j * step;
            expert[j] = choice < end ? p.idx[choice] : kNoExpert;
        }
        DSC_UNROLL
        for (int j = 0; j < kInFlight; ++j) {
            if (is_expert(expert[j], p.num_experts)) atomicAdd(&count[expert[j]], 1);
        }
    }
}

__global__ void __launch_bounds__(kMapThreads)
    moe_permute_count_kernel(const MoePermuteMapsParams p, int64_t chunk) {
    DSC_SHARED(int[kMoeMaxExperts], count);
    const int own = threadIdx.x;  // the thread's expert
    count[own] = 0;
    __syncthreads();

    const int64_t begin = blockIdx.x * chunk, end = min(begin + chunk, p.num_choices);
    wait_for_previous_kernel();
    count_choices(p, begin + threadIdx.x, end, kMapThreads, count);
    let_next_kernel_start();
    __syncthreads();
    if (own < p.num_experts) p.counts[static_cast<int64_t>(blockIdx.x) * p.num_experts + own] = count[own];
}

struct ExpertCount {
    int before, total;  // choices of the expert: in the chunks before this one, in all
};

__device__ __forceinline__ ExpertCount add_up_chunks(const int32_t* counts, int num_experts, int expert) {
    constexpr int kInFlight = 16;
    const int num_chunks = gridDim.x, own_chunk = blockIdx.x;
    ExpertCount sum{0, 0};
    for (int first = 0; first < num_chunks; first += kInFlight) {
        int count[kInFlight];  // past the last chunk the last one again, so that no load is conditional
        DSC_UNROLL
        for (int j = 0; j < kInFlight; ++j) {
            count[j] = counts[min(first + j, num_chunks - 1) * num_experts + expert];
        }
        DSC_UNROLL
        for (int j = 0; j < kInFlight; ++j) {
            sum.total += first + j < num_chunks ? count[j] : 0;
            sum.before += first + j < own_chunk ? count[j] : 0;
        }
    }
    return sum;
}

// The sum of `value` over the threads up to and with this one. All threads of the block arrive.
__device__ __forceinline__ int inclusive_sum(int value) {
    DSC_SHARED(int[kMapWarps], warp_total);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    DSC_UNROLL
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int below = __shfl_up_sync(kAllLanes, value, offset);
        if (lane >= offset) value += below;
    }
    if (lane == kWarpSize - 1) warp_total[warp] = value;
    __syncthreads();
    return value + __reduce_add_sync(kAllLanes, lane < warp ? warp_total[lane] : 0);
}

// Gives the choices of one warp's segment their rows, in order. next_row: per expert, the row of the
// segment's next choice of it.
__device__ __forceinline__ void place_segment(const MoePermuteMapsParams& p, int64_t begin, int64_t end,
                                              int* next_row) {
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t lanes_below = (1u << lane) - 1;
    for (int64_t first = begin; first < end; first += kWarpSize) {
        const int64_t choice = first + lane;
        const int seen = choice < end ? p.idx[choice] : kNoExpert;
        const bool is_kept = is_expert(seen, p.num_experts);
        const int expert = is_kept ? seen : kNoExpert;
        const uint32_t same = __match_any_sync(kAllLanes, expert);
        const int row = is_kept ? next_row[expert] + __popc(same & lanes_below) : kNoRow;
        __syncwarp();  // all lanes have read what one of them moves on
        if (is_kept and (same & lanes_below) == 0) next_row[expert] += __popc(same);
        __syncwarp();
        if (choice < end) p.row[choice] = row;
        if (is_kept) p.token[row] = static_cast<int32_t>(choice) / p.num_topk;
    }
}

__global__ void __launch_bounds__(kMapThreads)
    moe_permute_place_kernel(const MoePermuteMapsParams p, int64_t chunk) {
    DSC_SHARED(int[kMapWarps][kMoeMaxExperts], next_row);  // before that: choices of the warp
    DSC_SHARED(int, num_used);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int own = threadIdx.x;  // the thread's expert
    DSC_UNROLL
    for (int w = 0; w < kMapWarps; ++w) next_row[w][own] = 0;
    __syncthreads();

    // Each warp counts its segment.
    const int64_t segment = chunk / kMapWarps;
    const int64_t begin = blockIdx.x * chunk + warp * segment;
    const int64_t end = min(begin + segment, p.num_choices);
    wait_for_previous_kernel();
    count_choices(p, begin + lane, end, kWarpSize, next_row[warp]);
    __syncthreads();

    // Where each expert's rows end, and where those of this chunk and of each of its warps begin.
    int num_own_chunk = 0;
    DSC_UNROLL
    for (int w = 0; w < kMapWarps; ++w) num_own_chunk += next_row[w][own];
    ExpertCount count{0, num_own_chunk};
    if (gridDim.x > 1 and own < p.num_experts) count = add_up_chunks(p.counts, p.num_experts, own);
    const int offset = inclusive_sum(count.total);
    if (blockIdx.x == 0 and own < p.num_experts) p.offsets[own] = offset;
    if (own == kMapThreads - 1) num_used = offset;
    int row = offset - count.total + count.before;
    DSC_UNROLL
    for (int w = 0; w < kMapWarps; ++w) {
        const int num_own_warp = next_row[w][own];
        next_row[w][own] = row;
        row += num_own_warp;
    }
    let_next_kernel_start();
    __syncthreads();
    const int64_t first_unused = num_used + int64_t{blockIdx.x} * kMapThreads + own;
    const int64_t num_threads = int64_t{gridDim.x} * kMapThreads;
    for (int64_t unused = first_unused; unused < p.num_choices; unused += num_threads) p.token[unused] = 0;
    place_segment(p, begin, end, next_row[warp]);
}

template <int kMaxTopk>
__global__ void __launch_bounds__(kRowMaxColumns)
    moe_permute_kernel(const MoePermuteParams p, const RowTiles tiles) {
    const int64_t token = static_cast<int64_t>(blockIdx.x / tiles.num_tiles) * tiles.tokens + threadIdx.y;
    const int64_t first_word =
        static_cast<int64_t>(blockIdx.x % tiles.num_tiles) * tiles.columns * kWordsPerThread + threadIdx.x;
    const int64_t end_word = min(first_word + int64_t{tiles.columns} * kWordsPerThread, tiles.num_words);
    wait_for_previous_kernel();
    if (token >= p.num_tokens) return;

    const int64_t num_rows = p.num_tokens * p.num_topk;
    const Word* const source = static_cast<const Word*>(p.x) + token * tiles.num_words;
    Word words[kWordsPerThread];
    DSC_UNROLL
    for (int j = 0; j < kWordsPerThread; ++j) {
        const int64_t word = first_word + j * tiles.columns;
        if (word < end_word) words[j] = source[word];
    }
    int row[kMaxTopk];
    load_rows(p.maps.row, token, p.num_topk, num_rows, row);
    const int64_t num_used = num_used_rows(p.maps.offsets, p.maps.num_experts);
    let_next_kernel_start();

    Word* const rows = static_cast<Word*>(p.rows);
    DSC_UNROLL
    for (int k = 0; k < kMaxTopk; ++k) {
        if (row[k] == kNoRow) continue;
        Word* const target = rows + row[k] * tiles.num_words;
        DSC_UNROLL
        for (int j = 0; j < kWordsPerThread; ++j) {
            const int64_t word = first_word + j * tiles.columns;
            if (word < end_word) __stcs(target + word, words[j]);
        }
    }
    for (int64_t unused = num_used + token; unused < num_rows; unused += p.num_tokens) {
        zero_words(rows + unused * tiles.num_words, first_word, end_word, tiles.columns);
    }
}

// ---- host ----

// Choices a block: as many chunks as there are SMs to take them, none too small to be worth a block. A
// multiple of kMinChunk, so that every warp's segment is one of 32.
int64_t chunk_size(int64_t num_choices) {
    const int64_t num_chunks = std::min(ceil_div(num_choices, kMinChunk), kMaxChunks);
    if (num_chunks <= 1) return kMinChunk;
    return ceil_div(ceil_div(num_choices, num_chunks), kMinChunk) * kMinChunk;
}

}  // namespace

int moe_permute_num_counts(int64_t num_choices) {
    const int64_t num_chunks = ceil_div(num_choices, chunk_size(num_choices));
    return num_chunks > 1 ? static_cast<int>(num_chunks) : 0;
}

void launch_moe_permute_maps(const MoePermuteMapsParams& p, cudaStream_t stream) {
    DSC_CHECK(p.num_experts <= kMoeMaxExperts, "moe_permute: num_experts must be <= ", kMoeMaxExperts,
              ", got ", p.num_experts);
    DSC_CHECK(p.num_choices <= INT32_MAX, "moe_permute: idx must have at most ", INT32_MAX, " elements, got ",
              p.num_choices);
    const int64_t chunk = chunk_size(p.num_choices);
    const int num_counts = moe_permute_num_counts(p.num_choices);
    if (num_counts > 0) {
        launch_overlapped(moe_permute_count_kernel, dim3(num_counts), dim3(kMapThreads), 0, stream, p, chunk);
    }
    const dim3 grid(num_counts > 0 ? num_counts : 1);
    launch_overlapped(moe_permute_place_kernel, grid, dim3(kMapThreads), 0, stream, p, chunk);
}

void launch_moe_permute(const MoePermuteParams& p, cudaStream_t stream) {
    check_limits("moe_permute", "x", p);
    check_aligned("moe_permute", "x", p.x);
    check_aligned("moe_permute", "rows", p.rows);
    launch_moe_permute_maps(p.maps, stream);
    if (p.num_tokens == 0 or p.num_topk == 0 or p.width == 0) return;
    const RowTiles tiles = plan_row_tiles(words_of_row(p), kWordsPerThread, 1);
    with_max_topk(p.num_topk, [&]<int kMaxTopk>() {
        launch_overlapped(moe_permute_kernel<kMaxTopk>, tiles.grid(p.num_tokens, tiles.num_tiles),
                          tiles.block(), 0, stream, p, tiles);
    });
}

}  // namespace dsc
