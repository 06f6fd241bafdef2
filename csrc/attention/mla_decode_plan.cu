// The plan of a decoding step, made on the device where the lengths are (mla_decode_plan.h): one block, a
// thread for each sequence and for each part. The same bits as fill_mla_decode_plan.
#include "attention/attention.h"
#include "core/block_sum.cuh"
#include "core/check.h"
#include "core/launch.h"
#include "core/overlap.h"

namespace dsc {
namespace {

constexpr int kNumThreads = 256;  // sequences of a chunk
constexpr int kNumWarps = kNumThreads / kWarpSize;

// ---- device ----

struct Chunk {
    int64_t start[kNumThreads];  // first unit of each sequence
    int num_blocks[kNumThreads];
    int64_t warp_sums[kNumWarps];
};

// The last sequence of the chunk that starts at `unit` or before.
__device__ __forceinline__ int find_sequence(const Chunk& chunk, int num_sequences, int64_t unit) {
    int low = 0, high = num_sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (chunk.start[middle] <= unit) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

__device__ __forceinline__ void write_row(int32_t* plan, int row, int first, int second) {
    reinterpret_cast<int2*>(plan)[row] = make_int2(first, second);
}

__global__ void __launch_bounds__(kNumThreads) mla_decode_plan_kernel(const MlaDecodePlanParams p) {
    DSC_SHARED(Chunk, chunk);
    const int thread = threadIdx.x;
    const auto blocks_of = [&](int sequence) {
        return num_decode_blocks(decode_length(p.seq_lens[sequence], p.most_rows));
    };
    wait_for_previous_kernel();

    // Units of the sequences behind the first chunk.
    int64_t num_units = 0;
    if (p.num_sequences > kNumThreads) {
        int64_t own = 0;
        for (int b = kNumThreads + thread; b < p.num_sequences; b += kNumThreads) {
            own += decode_cost(blocks_of(b));
        }
        num_units = sum_over_block(own, chunk.warp_sums).all;
    }
    let_next_kernel_start();

    // Chunk by chunk: the owners of each sequence, and where the parts begin that begin in it.
    int64_t base = 0;
    for (int first = 0; first < p.num_sequences; first += kNumThreads) {
        const int sequence = first + thread, num_here = min(kNumThreads, p.num_sequences - first);
        const int num_blocks = thread < num_here ? blocks_of(sequence) : 0;
        const BlockSum units =
            sum_over_block(thread < num_here ? decode_cost(num_blocks) : 0, chunk.warp_sums);
        if (first == 0) num_units += units.all;
        const int64_t start = base + units.before;
        chunk.start[thread] = start;
        chunk.num_blocks[thread] = num_blocks;
        if (thread < num_here) {
            const DecodeOwners owners = decode_owners(start, num_blocks, p.num_parts, num_units);
            write_row(p.plan, p.num_parts + 1 + sequence, owners.first, owners.last);
        }
        __syncthreads();
        for (int part = thread; part < p.num_parts; part += kNumThreads) {
            const int64_t unit = first_decode_unit(part, p.num_parts, num_units);
            if (unit < base or unit >= base + units.all) continue;
            const int found = find_sequence(chunk, num_here, unit);
            const DecodePosition at =
                decode_position(first + found, chunk.num_blocks[found], unit - chunk.start[found]);
            write_row(p.plan, part, at.sequence, at.block);
        }
        __syncthreads();  // the chunk may be written again
        base += units.all;
    }
    // Parts that begin behind all sequences.
    for (int part = thread; part <= p.num_parts; part += kNumThreads) {
        if (part == p.num_parts or p.num_sequences == 0) write_row(p.plan, part, p.num_sequences, 0);
    }
}

// ---- host ----

}  // namespace

void launch_mla_decode_plan(const MlaDecodePlanParams& p, cudaStream_t stream) {
    DSC_CHECK(p.num_parts > 0, "mla_decode_plan: num_parts must be positive, got ", p.num_parts);
    launch_overlapped(mla_decode_plan_kernel, dim3(1), dim3(kNumThreads), 0, stream, p);
}

}  // namespace dsc
