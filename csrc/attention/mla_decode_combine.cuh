// Adds up the partial results of the sequences that several parts share: out = sum over pieces of
// exp(lse_i - lse) out_i, lse = log of the sum of exp(lse_i).
//
// A block for each part and pair of query rows. It has something to do if the part is the first owner of a
// shared sequence, of which a part has one at most; so there are few blocks however many sequences there are.
// Four warps share a row's pieces. Pieces without rows were never written, and are not used.
#pragma once

#include <limits>

#include "attention/mla_decode_pieces.cuh"
#include "core/math.h"
#include "core/overlap.h"
#include "core/vec.h"
#include "core/warp.h"

namespace dsc::combine {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBlockRows = 2, kRowWarps = 4;
constexpr int kNumThreads = kBlockRows * kRowWarps * kWarpSize;
constexpr int kBatch = 4;  // pieces of which a warp has loads in flight
constexpr int kLaneVectors = kLatentWidth / 4 / kWarpSize;

// Sums of a lane: columns 4 * (lane + 32 * v) and on.
using Columns = float4[kLaneVectors];

// A row of a shared sequence.
struct SharedRow {
    const MlaDecodeParams& p;
    int sequence, length;
    int first_part, num_parts;  // its owners
    int row;                    // of its queries

    // The slot of owner i's piece, or -1 if it has no rows.
    __device__ __forceinline__ int slot(int i) const {
        const int part = first_part + i;
        const DecodePiece piece =
            decode_piece(sequence, length, decode::position_at(p, part), decode::position_at(p, part + 1));
        return piece.is_empty() ? -1 : piece.slot(part);
    }
    // Of a slot, in rows of all partial results.
    __device__ __forceinline__ int64_t at(int slot) const {
        return int64_t{slot} * decode::num_query_rows(p) + row;
    }
    __device__ __forceinline__ float lse(int slot) const {
        return slot < 0 ? -kInfinity : p.partial_lse[at(slot)];
    }
};

// The log-sum-exp over all pieces, in every lane of the warp.
__device__ __forceinline__ float combined_lse(const SharedRow& row) {
    const int lane = threadIdx.x % kWarpSize;
    float largest = -kInfinity, sum = 0.0f;
    for (int first = 0; first < row.num_parts; first += kWarpSize) {
        const float own = first + lane < row.num_parts ? row.lse(row.slot(first + lane)) : -kInfinity;
        const float before = largest;
        largest = max(largest, row_max<kWarpSize>(own));
        const float base = largest == -kInfinity ? 0.0f : largest;  // max passes NaN over, the sum keeps it
        sum = sum * exp_fast(before - base) + row_sum<kWarpSize>(exp_fast(own - base));
    }
    return sum == 0.0f ? -kInfinity : largest + logf(sum);
}

// Weighted sums of the pieces that this warp takes, every fourth.
__device__ __forceinline__ void add_pieces(const SharedRow& row, float lse, Columns& sums) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kRowWarps;
    for (int first = 0; first < row.num_parts; first += kWarpSize * kRowWarps) {
        const int own = first + lane * kRowWarps + warp;
        const int slot = own < row.num_parts ? row.slot(own) : -1;
        const float own_lse = row.lse(slot);
        const float weight = own_lse == -kInfinity ? 0.0f : exp_fast(own_lse - lse);
        const int num_lanes = min(kWarpSize, ceil_div(row.num_parts - first - warp, kRowWarps));
        for (int i = 0; i < num_lanes; i += kBatch) {
            float weights[kBatch];
            float4 values[kBatch][kLaneVectors];
            DSC_UNROLL
            for (int n = 0; n < kBatch; ++n) {
                const int source = min(i + n, num_lanes - 1);
                weights[n] = __shfl_sync(kAllLanes, i + n < num_lanes ? weight : 0.0f, source);
                const int its_slot = max(__shfl_sync(kAllLanes, slot, source), 0);
                const auto* const piece =
                    reinterpret_cast<const float4*>(row.p.partial_out + row.at(its_slot) * kLatentWidth);
                DSC_UNROLL
                for (int v = 0; v < kLaneVectors; ++v) values[n][v] = piece[lane + v * kWarpSize];
            }
            DSC_UNROLL
            for (int n = 0; n < kBatch; ++n) {
                if (weights[n] == 0.0f) continue;  // what lies there may never have been written
                DSC_UNROLL
                for (int v = 0; v < kLaneVectors; ++v) {
                    sums[v].x += weights[n] * values[n][v].x;
                    sums[v].y += weights[n] * values[n][v].y;
                    sums[v].z += weights[n] * values[n][v].z;
                    sums[v].w += weights[n] * values[n][v].w;
                }
            }
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads) mla_decode_combine_kernel(const MlaDecodeParams p) {
    DSC_SHARED(float4[kBlockRows][kRowWarps][kLatentWidth / 4], warp_sums);
    const int part = blockIdx.y, lane = threadIdx.x % kWarpSize;
    const int in_block = threadIdx.x / (kRowWarps * kWarpSize), warp = threadIdx.x / kWarpSize % kRowWarps;
    const int query_row = blockIdx.x * kBlockRows + in_block;
    wait_for_previous_kernel();
    let_next_kernel_start();
    // The sequence that the part's end cuts, if its owners begin with the part.
    const int sequence = decode::position_at(p, part + 1).sequence;
    if (sequence >= p.num_sequences) return;
    const int2 owners = reinterpret_cast<const int2*>(p.plan)[p.num_parts + 1 + sequence];
    if (owners.x != part or owners.y <= part) return;

    const bool has_row = query_row < decode::num_query_rows(p);
    if (has_row) {
        const SharedRow row{p,
                            sequence,
                            decode::length_of(p, sequence),
                            part,
                            min(owners.y, p.num_parts - 1) - part + 1,
                            query_row};
        const float lse = combined_lse(row);
        Columns sums = {};
        add_pieces(row, lse, sums);
        DSC_UNROLL
        for (int v = 0; v < kLaneVectors; ++v) warp_sums[in_block][warp][lane + v * kWarpSize] = sums[v];
        if (warp == 0 and lane == 0) {
            p.lse[int64_t{sequence} * decode::num_query_rows(p) + query_row] = lse;
        }
    }
    __syncthreads();
    if (not has_row) return;
    // Four columns a thread.
    const int column = warp * kWarpSize + lane;
    float4 sum = warp_sums[in_block][0][column];
    DSC_UNROLL
    for (int i = 1; i < kRowWarps; ++i) {
        const float4 more = warp_sums[in_block][i][column];
        sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    const int64_t first = (int64_t{sequence} * decode::num_query_rows(p) + query_row) * (kLatentWidth / 4);
    reinterpret_cast<uint2*>(p.out)[first + column] =
        make_uint2(rounded_pair<T>(sum.x, sum.y), rounded_pair<T>(sum.z, sum.w));
}

}  // namespace dsc::combine
