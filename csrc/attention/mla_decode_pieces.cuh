// A part's pieces of a plan (mla_decode_plan.h), as the decoding kernels walk over them, and where the result
// of each goes.
#pragma once

#include "attention/attention.h"

namespace dsc::decode {

// One part alone owns all, whatever its plan holds: nothing is shared, and there is no scratch.
__device__ __forceinline__ DecodePosition position_at(const MlaDecodeParams& p, int part) {
    if (p.num_parts == 1) return {part == 0 ? 0 : p.num_sequences, 0};
    const int2 row = reinterpret_cast<const int2*>(p.plan)[part];
    return decode_position_of(row.x, row.y, p.num_sequences);
}

__device__ __forceinline__ int length_of(const MlaDecodeParams& p, int sequence) {
    return decode_length(p.seq_lens[sequence], int64_t{p.table_width} * p.page_size);
}

// The sequences of which a part owns something, in order.
struct PieceWalk {
    DecodePosition begin, end;  // of the part
    int sequence;

    __device__ __forceinline__ PieceWalk(const MlaDecodeParams& p, int part)
        : begin(position_at(p, part)), end(position_at(p, part + 1)), sequence(begin.sequence) {}

    __device__ __forceinline__ bool has_piece(const MlaDecodeParams& p) const {
        return sequence < p.num_sequences and decode_part_owns(sequence, end);
    }
    __device__ __forceinline__ DecodePiece piece(const MlaDecodeParams& p) const {
        return decode_piece(sequence, length_of(p, sequence), begin, end);
    }
};

// Rows of queries of a sequence: row s * H + h is head h of new token s.
__device__ __forceinline__ int num_query_rows(const MlaDecodeParams& p) {
    return p.num_new * p.num_heads;
}

// Rows of the cache that a row of queries sees. Rows past the last one see no more than that.
__device__ __forceinline__ int num_seen_rows(const MlaDecodeParams& p, int query_row, int length) {
    return min(length, length - p.num_new + query_row / p.num_heads + 1);
}

// Where query row 0 of a piece's result lies, in rows of all results or of all partial results.
__device__ __forceinline__ int64_t first_result_row(const MlaDecodeParams& p, const DecodePiece& piece,
                                                    int part) {
    return int64_t{piece.is_whole ? piece.sequence : piece.slot(part)} * num_query_rows(p);
}

}  // namespace dsc::decode
