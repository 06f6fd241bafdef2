// What a block of latent decoding on sm_80 keeps in shared memory, and what it copies there: the queries of a
// piece, and rows of the cache through a ring of stages of 32 that runs on from one piece into the next.
//
// A row of 576 is nine lines of 128 bytes, in which 16-byte chunk c of row r lies at c ^ (r % 8): the eight
// rows of every ldmatrix are in different banks, transposed or not.
#pragma once

#include "attention/mla_decode_pieces.cuh"
#include "core/ptx_sm80.cuh"
#include "core/vec.h"
#include "core/warp.h"

namespace dsc::decode {

constexpr int kNumThreads = kDecodeSm80Threads;
constexpr int kStageRows = kDecodeSm80StageRows;
constexpr int kChunk = 8;                           // elements of 16 bytes
constexpr int kLineChunks = 8, kLineElements = 64;  // of 128 bytes
constexpr int kNumLines = kCacheWidth / kLineElements;
constexpr int kStageElements = kStageRows * kCacheWidth;
constexpr int kWarpColumns = kLatentWidth / (kNumThreads / kWarpSize);  // of the values: a line of a row
static_assert(kWarpColumns == kLineElements and kNumThreads == kStageRows * kLineChunks);

// How a tile of queries is shared by a block's warps and lanes.
template <typename T_, int kRows_>
struct Tile {
    using T = T_;
    static constexpr int kRows = kRows_, kFixedBytes = decode_sm80_fixed_bytes(kRows);
    // Scores: warps over rows, over the stage's keys, over the depth.
    static constexpr int kWarpsM = decode_sm80_warps_m(kRows), kWarpsN = 2;
    static constexpr int kDepthParts = decode_sm80_depth_parts(kRows);
    static constexpr int kScoreFragments = kRows / kWarpsM / 16;
    static constexpr int kLineSteps =
        kLineElements / 16 / kDepthParts;  // of a line's four products, in a part
    // Weights: lanes that share a row, and the keys of each, which lie in vectors.
    static constexpr int kLanes = kNumThreads / kRows;
    static constexpr int kKeys = kStageRows / kLanes;
    static constexpr int kVector = kKeys < 4 ? kKeys : 4, kVectors = kKeys / kVector;
    // Values: all rows, 64 columns a warp.
    static constexpr int kFragments = kRows / 16;
    static_assert(kWarpsM * kWarpsN * kDepthParts * kWarpSize == kNumThreads and kLanes <= kWarpSize);
};

// The sums of a thread: fragment (i, j) is rows 16 i and columns 8 j of the warp's.
template <typename S>
using Sums = float[S::kFragments][kWarpColumns / 8][4];

// The block's shared memory; as many bytes as decode_sm80_fixed_bytes and the stages take.
template <typename S>
struct Memory {
    using T = typename S::T;
    T* query;        // [kRows][576], swizzled
    float* scores;   // [kDepthParts][kRows][32], swizzled; part 0 becomes weights [kRows][64], swizzled
    float* factor;   // [kRows], by which a stage changes the sums
    float* inverse;  // [kRows], by which the finished sums are multiplied
    T* ring;         // [stages][32][576], swizzled

    __device__ __forceinline__ explicit Memory(unsigned char* bytes) {
        query = reinterpret_cast<T*>(bytes);
        scores = reinterpret_cast<float*>(query + S::kRows * kCacheWidth);
        factor = scores + S::kDepthParts * S::kRows * kStageRows;
        inverse = factor + S::kRows;
        ring = reinterpret_cast<T*>(bytes + S::kFixedBytes);
    }

    // Vectors of four scores of a row at their number with its bits reversed, chunks of eight weights as
    // those of a line.
    __device__ __forceinline__ float* score(int part, int row, int key) const {
        const int mixed = (row & 1) << 2 | (row & 2) | (row >> 2 & 1);
        return scores + (part * S::kRows + row) * kStageRows + ((key / 4) ^ mixed) * 4 + key % 4;
    }
    __device__ __forceinline__ T* weight(int row, int key) const {
        T* const first = reinterpret_cast<T*>(scores + row * kStageRows);
        return first + ((key / kChunk) ^ (row % kLineChunks)) * kChunk + key % kChunk;
    }
};

// Where chunk `chunk` of line 0 lies in a row of 576; the same chunk of line i is i * kLineElements behind.
__device__ __forceinline__ int place(int row, int chunk) {
    return row * kCacheWidth + ((chunk ^ row) % kLineChunks) * kChunk;
}

// ---- copies ----

// The rows of a part's pieces, 32 at a time, in order. A thread copies a chunk of each line of one row, whose
// page it looks up a stage ahead.
template <typename T>
struct RowSource {
    const MlaDecodeParams& p;
    PieceWalk walk;
    int page_shift;
    int row = 0, end_row = 0;  // the next stage's first, and the piece's end
    int page = -1;             // of the thread's row in that stage

    __device__ __forceinline__ RowSource(const MlaDecodeParams& p, const PieceWalk& walk, int page_shift)
        : p(p), walk(walk), page_shift(page_shift) {
        find_rows();
    }

    __device__ __forceinline__ bool has_rows() const { return row < end_row; }

    // The first piece from the walk's on that has rows; then the walk is behind it.
    __device__ __forceinline__ void find_rows() {
        for (; row >= end_row and walk.has_piece(p); ++walk.sequence) {
            const DecodePiece piece = walk.piece(p);
            if (piece.is_empty()) continue;
            row = piece.first_row();
            end_row = piece.end_row();
        }
        fetch();
    }

    __device__ __forceinline__ void fetch() {
        const int own = row + static_cast<int>(threadIdx.x) / kLineChunks;
        page = -1;
        if (own < end_row) page = p.page_table[(walk.sequence - 1) * p.table_stride + (own >> page_shift)];
    }

    __device__ __forceinline__ void start(T* stage) {
        if (not has_rows()) return;
        const int thread = unhoisted(threadIdx.x), own = thread / kLineChunks, chunk = thread % kLineChunks;
        const bool is_valid = page >= 0 and page < p.num_pages;
        const int in_page = (row + own) & ((1 << page_shift) - 1);
        const int64_t first = is_valid ? page * p.page_stride + in_page * kCacheWidth : 0;
        const T* const source = static_cast<const T*>(p.cache) + first + chunk * kChunk;
        T* const target = stage + place(own, chunk);
        DSC_UNROLL
        for (int line = 0; line < kNumLines; ++line) {
            copy_async(target + line * kLineElements, source + line * kLineElements, is_valid);
        }
        row += kStageRows;
        if (row < end_row) {
            fetch();
        } else {
            find_rows();
        }
    }
};

// All but the newest num_stages - 2 groups of copies have landed: the stage to be read has.
__device__ __forceinline__ void wait_for_stage(int num_stages) {
    static_assert(kDecodeSm80FewestStages == 2 and kDecodeSm80MostStages == 6);
    switch (num_stages) {
        case 2:
            return wait_copies<0>();
        case 3:
            return wait_copies<1>();
        case 4:
            return wait_copies<2>();
        case 5:
            return wait_copies<3>();
        default:
            return wait_copies<4>();
    }
}

// The tile's queries, zeros where there are no more. Behind a barrier since they were read last; one follows.
template <typename S>
__device__ __forceinline__ void load_query(const Memory<S>& memory, const MlaDecodeParams& p, int sequence,
                                           int first_row) {
    using T = typename S::T;
    const int num_rows = num_query_rows(p) - first_row, chunk = threadIdx.x % kLineChunks;
    const T* const query =
        static_cast<const T*>(p.q) + (int64_t{sequence} * num_query_rows(p) + first_row) * kCacheWidth;
    for (int row = threadIdx.x / kLineChunks; row < S::kRows; row += kStageRows) {
        const Word* const source = reinterpret_cast<const Word*>(query + int64_t{row} * kCacheWidth);
        Word words[kNumLines];
        DSC_UNROLL
        for (int line = 0; line < kNumLines; ++line) {
            words[line] = make_uint4(0, 0, 0, 0);
            if (row < num_rows) words[line] = source[line * kLineChunks + chunk];
        }
        DSC_UNROLL
        for (int line = 0; line < kNumLines; ++line) {
            *reinterpret_cast<Word*>(memory.query + place(row, chunk) + line * kLineElements) = words[line];
        }
    }
}

}  // namespace dsc::decode
