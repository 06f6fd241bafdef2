// Tokens between the ranks of one node, over memory that every rank can write: the family's contents page.
//
//   rank s (source)                                     rank r (destination)
//   expert_routes    slot_TR, count_R
//   dispatch_send    rows, indices, floats  ------->    buffer: dispatch slots [source s][position]
//                    arrived[dispatch][s] = epoch, count
//                                                       dispatch_receive  -> x_SD, idx_SK, weight_SK, count_R
//                    freed[dispatch][r] = epoch  <---   (experts work on x_SD and make y_SD)
//   buffer: return slots [rank r][position]  <-------   combine_send      rows, floats
//                                                       arrived[combine][r] = epoch, count
//   combine_receive  out_TD = sum over r
//                    freed[combine][s] = epoch  ---->
//
// A token goes once to a rank, however many of its experts live there. Its slot at rank r is its position
// among this source's tokens for r, in token order: nothing about the order depends on timing. The slots are
// sized for the worst case (a source's max_tokens tokens all go to r), so no rank waits for a size and the
// host for nothing. The backward pass uses the same kernels: spreading gradients along a known slot_TR is
// dispatch_send without indices, summing them at the source is combine.
//
// ---- one rank's buffer (comm_layout.h) ----
//
//   control words | dispatch rows [R, max_tokens], floats [R, max_tokens, K] | return rows, floats
//                 | dispatch idx [R, max_tokens, K]
//
// Peers write into it, its owner reads. Both ways have slots of their own, so that a combine may be under way
// while the next dispatch is, in whatever order the streams run them.
//
// ---- the protocol ----
//
// Each way (dispatch, combine) counts its launches: epoch 1, 2, ... The counters lie in the buffer, not in
// the parameters, so a captured CUDA graph replays. All ranks launch the same steps of a way in the same
// order, and one rank's launches of a step are ordered by their stream (or by events).
//
//   sender, epoch e:    wait until freed[way][r] in its own buffer shows e - 1, for every r;
//                       write all rows into its slots at the peers;
//                       the last block to end writes (e, count) into arrived[way][own rank] at every r.
//   receiver, epoch e:  wait until arrived[way][s] in its own buffer shows e, for every s;
//                       the same word tells how many rows there are;
//                       copy them out (dispatch) or add them up (combine);
//                       the last block to end writes e into freed[way][own rank] at every s.
//
// A flag is one 64-bit word, epoch above count, so that no count is read with another epoch. Every rank tells
// every rank, itself and those it has nothing for too, so all epochs move alike. Both waits poll the waiter's
// own memory.
//
// Why a slot is never overwritten before it is read: s writes its slots at r in epoch e + 1 only after
// freed[way][r] showed e, which r wrote after its last block had read all of epoch e. Why none is read before
// it is written: r reads after arrived[way][s] showed e, which s wrote after its last block had written all
// rows. Why nothing waits in a circle: a sender of epoch e waits for receivers of e - 1, a receiver of e for
// senders of e; each stream runs send before receive, so the order of all steps is a line.
//
// Within one launch no block waits for another block of the same rank: the last one to end is found by
// counting. So a real rank's kernel needs no cooperative launch, and one that starts late only costs time.
// Where sends and receives of several ranks share a grid (launch_dispatch_together), receivers wait for
// blocks of their own grid, and the launch is cooperative.
//
// ---- the order of memory ----
//
// Rows are written weakly; what orders them is the flag. PTX: st.release.sys makes all that happened before
// it in causality order visible to whoever reads the flag with ld.acquire.sys, and causality order is
// transitive: rows written by any thread of a block come before its barrier (bar.sync), that before the
// thread that counts the block as done (atom.add.acq_rel.sys), that before the last block's thread, which
// sees all counts and releases. The counting is at system scope as well, though the blocks share a device: it
// costs nothing here, and then no step of the chain has a narrower scope than the peer that reads. On sm_90a
// rows move by the copy engine, an asynchronous proxy. cp.async.bulk.wait_group 0 waits until the writes are
// made, and a completed bulk copy is followed by an implicit proxy fence: from there on the thread's order
// holds for them. In the other direction a thread that has acquired a flag, or met one that has, says
// fence.proxy.async before it starts a bulk copy, so that the copy reads (or overwrites) after the acquire.
// What peers write is read by plain loads or bulk loads, never through the read-only path (ld.global.nc),
// which may serve stale lines.
//
// ---- when a peer does not come ----
//
// Each wait is bounded by CommGroup::timeout_ns. When it ends, the block records rank, peer, phase, expected
// and seen once, in memory the host can read at any time; fills its share of the outputs with NaN (indices
// with -1, counts with 0) and ends; no flag is released for a step of which a block failed. Every later
// launch of the rank does the same at once. Nothing traps and nothing hangs; peers run into their own
// timeouts and name this rank.
#pragma once

#include "comm/comm_layout.h"
#include "core/device.h"
#include "core/dtype.h"

namespace dsc {

// What a rank was waiting for when it gave up: with the peer, the place of one flag.
enum class CommPhase : int32_t {
    kDispatchFree,     // dispatch_send: for the peer to free its slots; epochs
    kDispatchArrival,  // dispatch_receive: for the peer's rows; epochs
    kDispatchCount,    // dispatch_receive: more rows came than there is room for; the room, the rows
    kCombineFree,      // combine_send; epochs
    kCombineArrival,   // combine_receive; epochs
    kCombineCount,     // combine_receive: other rows came back than went out; rows
};

// In host memory that the device writes.
struct CommStatus {
    uint32_t is_written;  // 1 when the rest is there
    int32_t rank, peer;
    CommPhase phase;
    uint64_t expected, seen;
};

// How rows move: 16-byte loads and stores, or the copy engine of sm_90 (kAuto: where there is one).
enum class CommCopy { kAuto, kWords, kBulk };

// What the ranks of one launch have in common.
struct CommGroup {
    CommLayout layout;
    CommShape shape;
    int64_t row_bytes;  // of this launch's rows, at most shape.row_bytes, a multiple of 16
    uint64_t timeout_ns;
    int num_launched;  // ranks in this launch: blockIdx.y
};

// One rank's view.
struct CommPlace {
    char* buffers[kCommMaxRanks];  // of all ranks, its own too, as this device reaches them
    CommStatus* status;
    int rank;
};

struct CommSettings {
    CommCopy copy = CommCopy::kAuto;
    int num_blocks = 0;  // a rank; 0: comm_num_blocks
};

template <typename Params>
struct CommLaunch {
    CommGroup group;
    CommPlace places[kCommMaxRanks];
    Params params[kCommMaxRanks];
};

// ---- routes ----

struct ExpertRoutesParams {
    const int32_t* idx;  // [T, K] experts of all ranks; others than 0 <= idx < E choose none
    int32_t* slot;   // [T, R] the token's position among those that go to r, -1 where none of its experts is
    int32_t* count;  // [R]
    int num_tokens, num_topk, num_ranks;
    int num_local_experts;  // E / R: expert e lives on rank e / num_local_experts
};

struct ExpertRoutesLaunch {
    ExpertRoutesParams params[kCommMaxRanks];
    int num_launched;
};

void launch_expert_routes(const ExpertRoutesLaunch& launch, cudaStream_t stream);

// ---- dispatch ----

struct DispatchSendParams {
    const void* x;         // [T, row_bytes]
    const int32_t* slot;   // [T, R]
    const int32_t* count;  // [R]
    const int32_t* idx;    // [T, K], or null
    const float* weight;   // [T, K], or null
    int num_tokens;
};

struct DispatchReceiveParams {
    void* x;         // [S, row_bytes]; rows that nothing came for stay as they are
    int32_t* count;  // [R] rows that came from each source
    int32_t* idx;    // [S, K], or null: local experts, -1 for those of other ranks and in unused rows
    float* weight;   // [S, K], or null: 0 in unused rows
    // Position i of source s is row row_begin[s] + i; [s + 1] ends its room. Sized for the worst case,
    // row_begin[s] is s * max_tokens; exactly, the counts' sums.
    int32_t row_begin[kCommMaxRanks + 1];
    int num_local_experts;
};

// Until all rows have come, without taking them: how many each source has sent.
struct DispatchCountsParams {
    int32_t* count;  // [R]
};

void launch_dispatch_send(const CommLaunch<DispatchSendParams>& launch, const CommSettings& settings,
                          cudaStream_t stream);
void launch_dispatch_counts(const CommLaunch<DispatchCountsParams>& launch, cudaStream_t stream);
void launch_dispatch_receive(const CommLaunch<DispatchReceiveParams>& launch, const CommSettings& settings,
                             cudaStream_t stream);

// ---- combine ----

struct CombineSendParams {
    const void* y;                         // [S, row_bytes]
    const int32_t* count;                  // [R] as dispatch_receive told
    const float* weight;                   // [S, K], or null
    int32_t row_begin[kCommMaxRanks + 1];  // as in DispatchReceiveParams
};

struct CombineReceiveParams {
    void* out;             // [T, D]
    float* weight;         // [T, K], or null
    const int32_t* slot;   // [T, R] as expert_routes told
    const int32_t* count;  // [R] likewise
    int num_tokens;
};

void launch_combine_send(const CommLaunch<CombineSendParams>& launch, const CommSettings& settings,
                         cudaStream_t stream);
void launch_combine_receive(const CommLaunch<CombineReceiveParams>& launch, FloatType dtype,
                            const CommSettings& settings, cudaStream_t stream);

// ---- all ranks of a card in one grid ----
// Sends and receives at once, truly interleaved: ranks of one process that share a card.

template <typename SendParams, typename ReceiveParams>
struct CommTogether {
    CommGroup group;
    CommPlace places[kCommMaxRanks];
    SendParams sends[kCommMaxRanks];
    ReceiveParams receives[kCommMaxRanks];
};
using DispatchTogether = CommTogether<DispatchSendParams, DispatchReceiveParams>;
using CombineTogether = CommTogether<CombineSendParams, CombineReceiveParams>;

void launch_dispatch_together(const DispatchTogether& launch, const CommSettings& settings,
                              cudaStream_t stream);
void launch_combine_together(const CombineTogether& launch, FloatType dtype, const CommSettings& settings,
                             cudaStream_t stream);

}  // namespace dsc
