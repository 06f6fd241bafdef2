// How latent decoding is dealt out: which part of the grid reads which blocks of which sequence. Pure
// functions of the lengths, the same on the host and in the plan kernel (mla_decode_plan.cu).
//
// Sequence b has n_b blocks of kDecodeBlock rows and costs kSequenceCost + n_b, also when it is empty: its
// zeros must be written. All sequences lie behind each other on a line of U units; part p has the units from
// p * U / parts to (p + 1) * U / parts. The unit where a part begins becomes a position (sequence, block),
// moved back to a multiple of kFewestBlocks, and on to the next sequence if fewer blocks would remain, so
// that no piece of a shared sequence is shorter. Positions ascend with the parts, and part p owns all that
// lies from its position up to the next part's: every block is owned once, WHATEVER the lengths are by then.
// So a plan made for other lengths gives the same results, only less evenly dealt out.
//
// A plan is int32 [parts + 1 + B, 2]: rows 0 .. parts are the positions, the last one (B, 0); row
// parts + 1 + b is (first part, last part) that own something of sequence b. A part may own nothing. The
// owner of a whole sequence writes its result. A shared sequence leaves a partial result in a slot of each
// part that has blocks of it: slot 2 p + 1 if they begin at block 0 (part p goes on into others after it),
// else slot 2 p.
#pragma once

#include <cstdint>

#include "core/check.h"
#include "core/host_device.h"

namespace dsc {

// The widths of latent attention that the kernels are made for (DeepSeek-V2, arXiv 2405.04434,
// section 3.1.2): a row of the cache is the normed latent, then the rotated key that all heads share.
constexpr int kLatentWidth = 512;
constexpr int kRopeWidth = 64;
constexpr int kCacheWidth = kLatentWidth + kRopeWidth;

constexpr int kDecodeRows = 64;   // of queries (a token's head each) in a tile
constexpr int kDecodeBlock = 64;  // rows of the cache in a block
constexpr int kSequenceCost = 2;  // in blocks: queries come in, sums go out, copies start anew
constexpr int kFewestBlocks = 2;  // of a piece: below, its partial result weighs as much as what it reads

// Whether kAuto may choose the kernel of sm_90a: once a GPU has run it.
constexpr bool kMlaDecodeSm90IsProven = false;

// Parts that keep a device busy once: the tiles of a part run side by side and share its pages through L2.
constexpr int mla_decode_num_parts(int64_t num_rows, int num_sms) {
    const int64_t num_tiles = (num_rows + kDecodeRows - 1) / kDecodeRows;
    if (num_tiles <= 1) return num_sms > 1 ? num_sms : 1;
    return num_sms > num_tiles ? static_cast<int>(num_sms / num_tiles) : 1;
}

// ---- the line ----

// Rows of the cache that a sequence has; what seq_lens holds may be anything.
DSC_HOST_DEVICE constexpr int decode_length(int seq_len, int64_t most_rows) {
    if (seq_len < 0) return 0;
    return seq_len < most_rows ? seq_len : static_cast<int>(most_rows);
}

// Without an overflow for lengths up to 2^31 - 1.
DSC_HOST_DEVICE constexpr int num_decode_blocks(int length) {
    return length / kDecodeBlock + (length % kDecodeBlock != 0 ? 1 : 0);
}

DSC_HOST_DEVICE constexpr int64_t decode_cost(int num_blocks) {
    return int64_t{kSequenceCost} + num_blocks;
}

// Where a part begins.
struct DecodePosition {
    int sequence, block;

    DSC_HOST_DEVICE constexpr bool operator==(const DecodePosition& other) const {
        return sequence == other.sequence and block == other.block;
    }
};

DSC_HOST_DEVICE constexpr int64_t first_decode_unit(int part, int num_parts, int64_t num_units) {
    return part * num_units / num_parts;
}

// The position of a unit of sequence `sequence`, `unit` units after that sequence's first.
DSC_HOST_DEVICE constexpr DecodePosition decode_position(int sequence, int num_blocks, int64_t unit) {
    const int64_t block = (unit > kSequenceCost ? unit - kSequenceCost : 0) / kFewestBlocks * kFewestBlocks;
    if (block == 0) return {sequence, 0};
    if (num_blocks - block < kFewestBlocks) return {sequence + 1, 0};
    return {sequence, static_cast<int>(block)};
}

// First and last part that own something of a sequence whose first unit is `start`: the last one that begins
// at its block 0 or before, and the last one that begins ahead of the next sequence.
struct DecodeOwners {
    int first, last;
};

DSC_HOST_DEVICE constexpr DecodeOwners decode_owners(int64_t start, int num_blocks, int num_parts,
                                                     int64_t num_units) {
    const int num_whole = num_blocks / kFewestBlocks * kFewestBlocks;
    const int64_t end = start + decode_cost(num_blocks);
    // From which unit on a part begins behind block 0, and behind the sequence.
    const int64_t behind_first = num_whole > 0 ? start + kSequenceCost + kFewestBlocks : end;
    const int64_t behind_last = num_whole > 0 ? start + kSequenceCost + num_whole : end;
    // first_decode_unit(p) < unit just for p < unit * parts / U, rounded up.
    return {static_cast<int>((behind_first * num_parts + num_units - 1) / num_units) - 1,
            static_cast<int>((behind_last * num_parts + num_units - 1) / num_units) - 1};
}

// ---- reading a plan ----

// A row of a plan, whatever it holds.
DSC_HOST_DEVICE constexpr DecodePosition decode_position_of(int sequence, int block, int num_sequences) {
    return {sequence < 0 ? 0 : sequence < num_sequences ? sequence : num_sequences, block < 0 ? 0 : block};
}

// Whether a part that ends at `end`, and begins at the sequence or before, owns something of it.
DSC_HOST_DEVICE constexpr bool decode_part_owns(int sequence, const DecodePosition& end) {
    return sequence < end.sequence or (sequence == end.sequence and end.block > 0);
}

// What one part owns of one sequence, with the length that the sequence has by now.
struct DecodePiece {
    int sequence;
    int begin, end;  // blocks; none if begin >= end
    int length;      // rows of the whole sequence
    bool is_whole;   // the part alone owns the sequence

    DSC_HOST_DEVICE constexpr bool is_empty() const { return begin >= end; }
    // Rows of the cache, from first_row() up to end_row().
    DSC_HOST_DEVICE constexpr int first_row() const { return begin * kDecodeBlock; }
    DSC_HOST_DEVICE constexpr int end_row() const {
        return end < num_decode_blocks(length) ? end * kDecodeBlock : length;
    }
    // Of a shared sequence's partial result.
    DSC_HOST_DEVICE constexpr int slot(int part) const { return 2 * part + (begin == 0 ? 1 : 0); }
};

// The piece of `sequence` in a part that owns all from `begin` up to `end`. Whatever a plan holds, its blocks
// are the sequence's.
DSC_HOST_DEVICE constexpr DecodePiece decode_piece(int sequence, int length, const DecodePosition& begin,
                                                   const DecodePosition& end) {
    const int num_blocks = num_decode_blocks(length);
    const bool begins_here = sequence == begin.sequence and begin.block > 0;
    const bool ends_here = sequence >= end.sequence;
    const int first = begins_here ? begin.block : 0;
    const int last = ends_here ? end.block : num_blocks;
    return {.sequence = sequence,
            .begin = first,
            .end = last < num_blocks ? last : num_blocks,
            .length = length,
            .is_whole = not begins_here and not ends_here};
}

// ---- a whole plan ----

// rows[parts + 1 + B]: pairs, for lengths [B] that may be anything. `Rows` is an array of arrays of two.
template <typename Lengths, typename Rows>
void fill_mla_decode_plan(const Lengths& seq_lens, int num_sequences, int num_parts, int64_t most_rows,
                          Rows& rows) {
    const auto blocks_of = [&](int b) {
        return num_decode_blocks(decode_length(static_cast<int>(seq_lens[b]), most_rows));
    };
    int64_t num_units = 0;
    for (int b = 0; b < num_sequences; ++b) num_units += decode_cost(blocks_of(b));
    const auto set = [&](int row, int first, int second) {
        rows[row][0] = first;
        rows[row][1] = second;
    };
    int part = 0;
    int64_t start = 0;
    for (int b = 0; b < num_sequences; ++b) {
        const int num_blocks = blocks_of(b);
        const int64_t end = start + decode_cost(num_blocks);
        for (; part < num_parts; ++part) {
            const int64_t unit = first_decode_unit(part, num_parts, num_units);
            if (unit >= end) break;
            const DecodePosition at = decode_position(b, num_blocks, unit - start);
            set(part, at.sequence, at.block);
        }
        const DecodeOwners owners = decode_owners(start, num_blocks, num_parts, num_units);
        set(num_parts + 1 + b, owners.first, owners.last);
        start = end;
    }
    for (; part <= num_parts; ++part) set(part, num_sequences, 0);
}

// ---- the resources of the kernel of sm_80 ----

constexpr int kDecodeSm80Threads = 256;
constexpr int kDecodeSm80StageRows = 32;
constexpr int kDecodeSm80StageBytes = kDecodeSm80StageRows * kCacheWidth * 2;
constexpr int kDecodeSm80FewestStages = 2, kDecodeSm80MostStages = 6;

// In how many parts of the depth a tile's scores are summed, and by how many warps its rows are shared.
constexpr int decode_sm80_warps_m(int num_rows) {
    return num_rows == 64 ? 2 : 1;
}
constexpr int decode_sm80_depth_parts(int num_rows) {
    return num_rows == 64 ? 2 : 4;
}

// Queries, partial scores, and two factors for each row.
constexpr int decode_sm80_fixed_bytes(int num_rows) {
    return num_rows *
           (kCacheWidth * 2 + decode_sm80_depth_parts(num_rows) * kDecodeSm80StageRows * 4 + 2 * 4);
}

struct DecodeSm80Plan {
    int tile_rows;  // 16, 32 or 64
    int num_tiles;  // of a part
    int num_stages;
    int shared_bytes;
};

constexpr int decode_sm80_num_stages(int tile_rows, int most_shared_bytes) {
    const int num_stages = (most_shared_bytes - decode_sm80_fixed_bytes(tile_rows)) / kDecodeSm80StageBytes;
    return num_stages < kDecodeSm80MostStages ? num_stages : kDecodeSm80MostStages;
}

// The smallest tile that holds all rows, or the largest that leaves room for a ring; then as many stages as
// a block may have. Devices of 99 KB a block (8.6, 8.9) have room for the tile of 16 rows alone.
inline DecodeSm80Plan plan_decode_sm80(int64_t num_rows, int most_shared_bytes) {
    int tile_rows = num_rows <= 16 ? 16 : num_rows <= 32 ? 32 : 64;
    while (tile_rows > 16 and
           decode_sm80_num_stages(tile_rows, most_shared_bytes) < kDecodeSm80FewestStages) {
        tile_rows /= 2;
    }
    const int num_stages = decode_sm80_num_stages(tile_rows, most_shared_bytes);
    DSC_CHECK(num_stages >= kDecodeSm80FewestStages, "mla_decode: a block needs ",
              decode_sm80_fixed_bytes(tile_rows) + kDecodeSm80FewestStages * kDecodeSm80StageBytes,
              " bytes of shared memory, the device has ", most_shared_bytes);
    return {.tile_rows = tile_rows,
            .num_tiles = static_cast<int>((num_rows + tile_rows - 1) / tile_rows),
            .num_stages = num_stages,
            .shared_bytes = decode_sm80_fixed_bytes(tile_rows) + num_stages * kDecodeSm80StageBytes};
}

}  // namespace dsc
