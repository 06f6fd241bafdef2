// Where everything lies in one rank's buffer, and how many blocks work on it: pure functions of plain
// numbers, for kernels, bindings and tests alike. What the parts are for is said in comm.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/host_device.h"

namespace dsc {

constexpr int kCommMaxRanks = 8;        // one node
constexpr int kCommMaxTopk = 16;        // indices and floats that travel with a row
constexpr int kCommMaxTokens = 131072;  // that one rank sends at once
constexpr int kCommRowGranule = 16;     // bytes

enum class CommWay { kDispatch, kCombine };
enum class CommRole { kSend, kReceive };

// Flags and counters at the start of a buffer. Who writes what: `arrived` and `freed` are written by peers,
// one writer a word, at system scope; the rest by this rank alone.
struct CommControl {
    uint64_t arrived[2][kCommMaxRanks];  // [way][source]: epoch << 32 | rows in its slots
    uint64_t freed[2][kCommMaxRanks];    // [way][destination]: epoch << 32, once it has read our rows
    uint32_t epoch[2][2];                // [way][role]: launches that are over
    uint32_t num_done[2][2];             // [way][role]: blocks of the launch under way that are through
    uint32_t is_failed;                  // a wait of this rank has ended; never reset
};

struct CommShape {
    int num_ranks, max_tokens, num_topk;
    int64_t row_bytes;
};

// Byte offsets into a buffer, the control words being at 0.
struct CommLayout {
    int64_t rows[2];    // [way]: [R, max_tokens, row_bytes]
    int64_t floats[2];  // [way]: [R, max_tokens, K]
    int64_t idx;        // of dispatch alone: [R, max_tokens, K]
    int64_t num_bytes;
};

DSC_HOST_DEVICE constexpr int64_t comm_round_up(int64_t num_bytes) {
    constexpr int64_t kAlignment = 256;
    return (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

constexpr CommLayout comm_layout(const CommShape& shape) {
    const int64_t num_slots = int64_t{shape.num_ranks} * shape.max_tokens;
    const int64_t row_part = comm_round_up(num_slots * shape.row_bytes);
    const int64_t topk_part = comm_round_up(num_slots * shape.num_topk * 4);
    CommLayout layout{};
    int64_t end = comm_round_up(sizeof(CommControl));
    for (int way = 0; way < 2; ++way) {
        layout.rows[way] = end;
        end += row_part;
        layout.floats[way] = end;
        end += topk_part;
    }
    layout.idx = end;
    layout.num_bytes = end + topk_part;
    return layout;
}

// Blocks a rank, when `num_launched` ranks send, or receive, or (num_roles 2) do both in one launch.
//
// One rank: its peers are on other devices, so what matters is to keep the links busy and to leave the other
// SMs to the products that run beside. 24 blocks hold 24 * 8 warps * 3 chunks of 2 KiB, 1.1 MiB under way,
// which is twice what a link of 450 GB/s needs at 1 us a trip; and a sending and a receiving kernel together
// stay under half of any card's SMs that the kernels exist for (132, 108). Several ranks on one card: all
// blocks of the grid must be resident at once where sends and receives share it, and every SM should have
// work. The kernels are built for two blocks an SM (registers and shared memory), so 2 * num_sms blocks are;
// ranks and roles share them.
constexpr int comm_num_blocks(int num_sms, int num_launched, int num_roles) {
    constexpr int kMostAlone = 24, kPerSm = 2;
    if (num_launched == 1 and num_roles == 1) return std::clamp(num_sms / kPerSm, 1, kMostAlone);
    return std::max(1, kPerSm * num_sms / (num_launched * num_roles));
}

}  // namespace dsc
