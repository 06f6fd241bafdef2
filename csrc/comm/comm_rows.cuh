// A warp moves rows: from one place each to one place or several (a token to all ranks of its experts), by
// 16-byte loads and stores or by the copy engine of sm_90.
//
// What to move is a `Rows` of four functions, of which all lanes of the warp call the last two:
//     const char* source(int row)          any lane, for rows ahead too
//     void enter(int row)                  before the row's targets are asked for
//     void for_targets(visit)              visit(char* target) for each place the row goes to
#pragma once

#include "core/bulk_sm90.cuh"
#include "core/vec.h"
#include "core/warp.h"

namespace dsc {

struct RowRange {
    int first, step, end;
};

// 16 bytes a lane, kInFlight of them loaded before the first is stored: 4 KiB of a row under way in a warp.
struct WordMover {
    static constexpr int kInFlight = 8;
    static constexpr int kSharedBytes = 0;

    __device__ __forceinline__ explicit WordMover(char*) {}

    template <typename Rows>
    __device__ __forceinline__ void move(Rows& rows, const RowRange& range, int64_t row_bytes) {
        const int lane = threadIdx.x % kWarpSize;
        const int num_words = static_cast<int>(row_bytes / kWordBytes);
        DSC_NO_UNROLL
        for (int row = range.first; row < range.end; row += range.step) {
            rows.enter(row);
            const Word* const source = reinterpret_cast<const Word*>(rows.source(row));
            DSC_NO_UNROLL
            for (int first = lane; first - lane < num_words; first += kInFlight * kWarpSize) {
                Word words[kInFlight];
                DSC_UNROLL
                for (int i = 0; i < kInFlight; ++i) {
                    const int word = first + i * kWarpSize;
                    if (word < num_words) words[i] = source[word];
                }
                rows.for_targets([&](char* target) {
                    Word* const to = reinterpret_cast<Word*>(target);
                    DSC_UNROLL
                    for (int i = 0; i < kInFlight; ++i) {
                        const int word = first + i * kWarpSize;
                        if (word < num_words) to[word] = words[i];
                    }
                });
            }
        }
    }

    __device__ __forceinline__ void finish() {}
};

// A chunk of a row, by its first byte.
struct RowChunk {
    int row;
    int64_t at;
};

// Chunks of a row through a ring in shared memory, of which the first lane starts all copies: so many loads
// ahead, so many stores still reading. The ring lives as long as the kernel: its barriers' phases go on.
struct BulkMover {
    static constexpr int kChunkBytes = 2048;
    static constexpr int kStages = 6, kStored = 3, kAhead = kStages - kStored;
    static constexpr int kWarps = 8;
    static constexpr int kRingBytes = kStages * kChunkBytes;
    static constexpr int kSharedBytes = kWarps * (kRingBytes + 128);

    char* ring;
    BulkBarrier* barriers;
    int load_stage = 0, store_stage = 0;
    uint32_t parity = 0;  // of the stage that is stored next

    // All threads of the block arrive.
    __device__ __forceinline__ explicit BulkMover(char* shared) {
        const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        ring = shared + warp * kRingBytes;
        barriers = reinterpret_cast<BulkBarrier*>(shared + kWarps * kRingBytes + warp * 128);
        if (lane < kStages) init_bulk_barrier(barriers + lane);
        __syncthreads();
    }

    template <typename Rows>
    __device__ __forceinline__ void load_next(const Rows& rows, const RowRange& range, int64_t row_bytes,
                                              RowChunk& next) {
        if (next.row >= range.end) return;
        const auto num_bytes = static_cast<uint32_t>(min(row_bytes - next.at, int64_t{kChunkBytes}));
        start_bulk_load(ring + load_stage * kChunkBytes, rows.source(next.row) + next.at, num_bytes,
                        barriers + load_stage);
        load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
        next.at += kChunkBytes;
        if (next.at >= row_bytes) next = {next.row + range.step, 0};
    }

    template <typename Rows>
    __device__ __forceinline__ void move(Rows& rows, const RowRange& range, int64_t row_bytes) {
        const bool is_first_lane = threadIdx.x % kWarpSize == 0;
        RowChunk next{range.first, 0};
        if (is_first_lane) {
            order_before_bulk_copies();
            for (int i = 0; i < kAhead; ++i) load_next(rows, range, row_bytes, next);
        }
        DSC_NO_UNROLL
        for (int row = range.first; row < range.end; row += range.step) {
            rows.enter(row);
            DSC_NO_UNROLL
            for (int64_t at = 0; at < row_bytes; at += kChunkBytes) {
                const auto num_bytes = static_cast<uint32_t>(min(row_bytes - at, int64_t{kChunkBytes}));
                char* const stage = ring + store_stage * kChunkBytes;
                if (is_first_lane) wait_bulk_load(barriers + store_stage, parity);
                rows.for_targets([&](char* target) {
                    if (is_first_lane) start_bulk_store(target + at, stage, num_bytes);
                });
                if (is_first_lane) {
                    commit_bulk_stores();
                    wait_bulk_reads<kStored>();  // the stage that is loaded next has been read
                    load_next(rows, range, row_bytes, next);
                }
                store_stage = store_stage + 1 == kStages ? 0 : store_stage + 1;
                if (store_stage == 0) parity ^= 1;
            }
        }
    }

    // All stores are made, to be told of.
    __device__ __forceinline__ void finish() {
        if (threadIdx.x % kWarpSize == 0) wait_bulk_stores();
    }
};

}  // namespace dsc
