// Routing one token: what the kernels of moe_gate share. moe.h states the order of experts; moe_gate.cu says
// where the maths is from.
//
// A token lies on a row of kLanes lanes, lane l holding the kPerLane consecutive experts from l * kPerLane,
// so that the lowest lane with the best key also has the smallest index: ties cost one ballot. Logits are
// read once, and stay in registers as keys, unsigned integers in the order of the logits, of which 0 is "not
// to be chosen". When groups are dropped, the experts that remain are first moved together through shared
// memory: the K rounds of selection, most of the work, then run on dense rows of candidates. DeepSeek-V2's
// 160 experts in 8 groups are 8 lanes of one group each and 60 candidates, 8 a lane; a warp takes four tokens
// at once.
#pragma once

#include "core/check.h"
#include "core/launch.h"
#include "core/math.h"
#include "core/overlap.h"
#include "core/warp.h"
#include "moe/moe.h"

namespace dsc::gate {

constexpr int kNumThreads = 128;
constexpr uint32_t kNoKey = 0;
constexpr uint32_t kSignBit = 0x80000000u;

// Which groups there are to choose from.
enum class Groups {
    kAllKept,  // none is dropped: groups do not matter
    kPerLane,  // each lane holds one group: E / G = kPerLane, G = kLanes
    kAny
};

// How a token lies on its lanes. kCandidates: experts a lane may choose from, once groups are dropped.
template <int kLanes_, int kPerLane_, int kCandidates_, Groups kGroups_>
struct Layout {
    static constexpr int kLanes = kLanes_;
    static constexpr int kPerLane = kPerLane_;
    static constexpr int kCandidates = kCandidates_;
    static constexpr Groups kGroups = kGroups_;
    static constexpr bool kIsExact = kLanes < kWarpSize;  // E = kLanes * kPerLane, rows 16-byte aligned
    static constexpr int kTokensPerBlock = kNumThreads / kLanes;
    static constexpr int kSlots = ceil_div(kMoeMaxTopk, kLanes);  // results a lane keeps
};
using Experts64 = Layout<8, 8, 8, Groups::kAllKept>;
using Experts160 = Layout<8, 20, 8, Groups::kPerLane>;
template <int kPerLane, Groups kGroups>
using AnyExperts = Layout<kWarpSize, kPerLane, kPerLane, kGroups>;

// ---- device ----

// A logit as an unsigned integer in the same order, above kNoKey. Adding 0 turns -0 into +0, and any NaN into
// the canonical one, 0x7fffffff, whose key is the largest.
__device__ __forceinline__ uint32_t key_of(float logit) {
    const int bits = __float_as_int(__fadd_rn(logit, 0.0f));
    return static_cast<uint32_t>(bits ^ (bits >> 31 | static_cast<int>(kSignBit)));
}

__device__ __forceinline__ float logit_of(uint32_t key) {
    return __uint_as_float(key & kSignBit ? key ^ kSignBit : ~key);
}

// The lane's logits; an expert past the end gets -inf.
template <typename L>
__device__ __forceinline__ void load_logits(const float* row, int num_experts, int lane,
                                            float (&logit)[L::kPerLane]) {
    const int first = lane * L::kPerLane;
    if constexpr (L::kIsExact) {
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; j += 4) {
            const float4 four = *reinterpret_cast<const float4*>(row + first + j);
            logit[j] = four.x;
            logit[j + 1] = four.y;
            logit[j + 2] = four.z;
            logit[j + 3] = four.w;
        }
    } else {
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; ++j) {
            logit[j] = first + j < num_experts ? row[first + j] : -INFINITY;
        }
    }
}

struct Best {
    uint32_t key;
    int slot;  // among the lane's
};

// The largest key, the smallest slot of equal ones: a tree whose right side wins only by being larger.
template <int kNumKeys>
__device__ __forceinline__ Best best_of(const uint32_t (&keys)[kNumKeys]) {
    Best node[kNumKeys];
    DSC_UNROLL
    for (int j = 0; j < kNumKeys; ++j) node[j] = {keys[j], j};
    DSC_UNROLL
    for (int step = 1; step < kNumKeys; step *= 2) {
        DSC_UNROLL
        for (int j = 0; j + step < kNumKeys; j += 2 * step) {
            if (node[j + step].key > node[j].key) node[j] = node[j + step];
        }
    }
    return node[0];
}

// exp(logit - largest) in place of the logits; its sum over the row.
template <typename L>
__device__ __forceinline__ float sum_of_exp(float (&logit)[L::kPerLane], float largest) {
    float sum = 0.0f;
    DSC_UNROLL
    for (int j = 0; j < L::kPerLane; ++j) {
        logit[j] = exp_fast(logit[j] - largest);
        sum += logit[j];
    }
    return row_sum<L::kLanes>(sum);
}

// What the lanes of one token tell each other when groups are dropped.
template <typename L>
struct GroupScratch {
    static constexpr int kMaxGroups = L::kLanes * (L::kGroups == Groups::kPerLane ? 1 : L::kPerLane);
    alignas(16) uint32_t candidate_key[L::kLanes * L::kCandidates];
    uint32_t group_key[kMaxGroups];  // the largest of the group
    int group_place[kMaxGroups];     // among the kept groups, in order; kDropped
    int kept_group[kMaxGroups];      // the group at each place
};
constexpr int kDropped = -1;

template <typename L>
__device__ __forceinline__ void score_groups(const uint32_t (&keys)[L::kPerLane], int num_groups,
                                             int group_width, int lane, GroupScratch<L>& scratch) {
    if constexpr (L::kGroups == Groups::kPerLane) {
        scratch.group_key[lane] = best_of(keys).key;
    } else {
        for (int g = lane; g < num_groups; g += L::kLanes) scratch.group_key[g] = kNoKey;
        __syncwarp();
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; ++j) {
            const int group = (lane * L::kPerLane + j) / group_width;
            if (keys[j] != kNoKey) atomicMax(&scratch.group_key[group], keys[j]);
        }
    }
    __syncwarp();
}

// A group is kept when fewer than num_kept groups rank above it.
template <typename L>
__device__ __forceinline__ void place_groups(int num_groups, int num_kept, int lane,
                                             GroupScratch<L>& scratch) {
    int num_placed = 0;
    for (int first = 0; first < num_groups; first += L::kLanes) {
        const int g = first + lane;
        const uint32_t key = g < num_groups ? scratch.group_key[g] : kNoKey;
        int rank = 0;
        for (int other = 0; other < num_groups; ++other) {
            const uint32_t other_key = scratch.group_key[other];
            rank += other_key > key or (other_key == key and other < g);
        }
        const bool is_kept = g < num_groups and rank < num_kept;
        const uint32_t kept = row_ballot<L::kLanes>(is_kept);
        const int place = num_placed + __popc(kept & ((1u << lane) - 1));
        if (is_kept) scratch.kept_group[place] = g;
        if (g < num_groups) scratch.group_place[g] = is_kept ? place : kDropped;
        num_placed += __popc(kept);
    }
    __syncwarp();
}

// Moves the keys of the kept groups together, in the order of their experts.
template <typename L>
__device__ __forceinline__ void gather_candidates(const uint32_t (&keys)[L::kPerLane], int group_width,
                                                  int lane, GroupScratch<L>& scratch) {
    if constexpr (L::kGroups == Groups::kPerLane) {
        const int place = scratch.group_place[lane];
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; ++j) {
            if (place != kDropped) scratch.candidate_key[place * L::kPerLane + j] = keys[j];
        }
    } else {
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; ++j) {
            const int expert = lane * L::kPerLane + j;
            const int group = expert / group_width;
            const int place = keys[j] != kNoKey ? scratch.group_place[group] : kDropped;
            if (place != kDropped) scratch.candidate_key[expert + (place - group) * group_width] = keys[j];
        }
    }
    __syncwarp();
}

// Drops the groups that are not kept; each lane then chooses among its share of the candidates that remain.
template <typename L>
__device__ __forceinline__ void drop_groups(const MoeGateParams& p, const uint32_t (&keys)[L::kPerLane],
                                            int lane, GroupScratch<L>& scratch,
                                            uint32_t (&candidates)[L::kCandidates]) {
    constexpr bool kIsPerLane = L::kGroups == Groups::kPerLane;
    const int num_groups = kIsPerLane ? L::kLanes : p.num_groups;
    const int group_width = kIsPerLane ? L::kPerLane : p.num_experts / p.num_groups;
    score_groups<L>(keys, num_groups, group_width, lane, scratch);
    place_groups<L>(num_groups, p.num_groups_kept, lane, scratch);
    gather_candidates<L>(keys, group_width, lane, scratch);
    const int num_candidates = p.num_groups_kept * group_width;
    DSC_UNROLL
    for (int j = 0; j < L::kCandidates; ++j) {
        const int candidate = lane * L::kCandidates + j;
        const uint32_t key = scratch.candidate_key[candidate];
        candidates[j] = candidate < num_candidates ? key : kNoKey;
    }
}

// K rounds: the row's best candidate is kept by lane k % kLanes, and taken out of the race.
template <typename L>
__device__ __forceinline__ void choose(uint32_t (&candidates)[L::kCandidates], int num_topk, int lane,
                                       Best (&chosen)[L::kSlots]) {
    for (int k = 0; k < num_topk; ++k) {
        const Best mine = best_of(candidates);
        const uint32_t top = row_max<L::kLanes>(mine.key);
        const int winner = __ffs(row_ballot<L::kLanes>(mine.key == top)) - 1;
        const int candidate = row_broadcast<L::kLanes>(lane * L::kCandidates + mine.slot, winner);
        DSC_UNROLL
        for (int i = 0; i < L::kSlots; ++i) {
            if (k == lane + i * L::kLanes) chosen[i] = {top, candidate};
        }
        const int taken = lane == winner ? mine.slot : -1;
        DSC_UNROLL
        for (int j = 0; j < L::kCandidates; ++j) {
            if (j == taken) candidates[j] = kNoKey;
        }
    }
}

// Each lane's share of the K weights.
template <typename L>
__device__ __forceinline__ void weigh(const MoeGateParams& p, const Best (&chosen)[L::kSlots], float largest,
                                      float sum, int lane, float (&weight)[L::kSlots]) {
    float sum_of_chosen = 0.0f;
    DSC_UNROLL
    for (int i = 0; i < L::kSlots; ++i) {
        const bool is_mine = lane + i * L::kLanes < p.num_topk;
        weight[i] = is_mine ? expf(logit_of(chosen[i].key) - largest) : 0.0f;
        sum_of_chosen += weight[i];
    }
    if (p.renormalize) sum = row_sum<L::kLanes>(sum_of_chosen);
    DSC_UNROLL
    for (int i = 0; i < L::kSlots; ++i) weight[i] = weight[i] / sum * p.scale;
}

// A token that has been routed, as its row of lanes knows it.
template <typename L>
struct Routed {
    Best chosen[L::kSlots];  // lane l: the choices l, l + kLanes, ..., `slot` being the expert
    float largest, sum;      // of the softmax over all experts
};

// Leaves exp(logit - largest) in place of the logits.
template <typename L>
__device__ __forceinline__ Routed<L> route(const MoeGateParams& p, float (&logit)[L::kPerLane], int lane) {
    uint32_t keys[L::kPerLane];
    DSC_UNROLL
    for (int j = 0; j < L::kPerLane; ++j) {
        const bool is_expert = L::kIsExact or lane * L::kPerLane + j < p.num_experts;
        keys[j] = is_expert ? key_of(logit[j]) : kNoKey;
    }

    // Softmax over all experts, before any group is dropped.
    Routed<L> routed{};
    routed.largest = logit_of(row_max<L::kLanes>(best_of(keys).key));
    routed.sum = sum_of_exp<L>(logit, routed.largest);

    if constexpr (L::kGroups == Groups::kAllKept) {
        choose<L>(keys, p.num_topk, lane, routed.chosen);
    } else {
        DSC_SHARED(GroupScratch<L>[L::kTokensPerBlock], scratches);
        GroupScratch<L>& scratch = scratches[threadIdx.x / L::kLanes];
        uint32_t candidates[L::kCandidates];
        drop_groups<L>(p, keys, lane, scratch, candidates);
        choose<L>(candidates, p.num_topk, lane, routed.chosen);
        // From places among the candidates to experts.
        const int group_width = L::kGroups == Groups::kPerLane ? L::kPerLane : p.num_experts / p.num_groups;
        DSC_UNROLL
        for (int i = 0; i < L::kSlots; ++i) {
            const int place = routed.chosen[i].slot / group_width;
            routed.chosen[i].slot += (scratch.kept_group[place] - place) * group_width;
        }
    }
    return routed;
}

// Writes the row's K experts and weights.
template <typename L>
__device__ __forceinline__ void store_choices(const MoeGateParams& p, const Routed<L>& routed, int64_t token,
                                              bool is_token, int lane) {
    float weight[L::kSlots];
    weigh<L>(p, routed.chosen, routed.largest, routed.sum, lane, weight);
    DSC_UNROLL
    for (int i = 0; i < L::kSlots; ++i) {
        const int k = lane + i * L::kLanes;
        if (is_token and k < p.num_topk) {
            p.idx[token * p.num_topk + k] = routed.chosen[i].slot;
            p.weight[token * p.num_topk + k] = weight[i];
        }
    }
}

// ---- host ----

inline bool is_aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(float4) == 0;
}

template <typename Params>
void check_limits(const char* op, const Params& p) {
    DSC_CHECK(p.num_experts <= kMoeMaxExperts, op, ": num_experts must be <= ", kMoeMaxExperts, ", got ",
              p.num_experts);
    DSC_CHECK(p.num_topk <= kMoeMaxTopk, op, ": num_topk must be <= ", kMoeMaxTopk, ", got ", p.num_topk);
}

template <Groups kGroups, typename Function>
void with_any_layout(int num_experts, const Function& function) {
    if (num_experts <= 64) return function.template operator()<AnyExperts<2, kGroups>>();
    if (num_experts <= 256) return function.template operator()<AnyExperts<8, kGroups>>();
    function.template operator()<AnyExperts<kMoeMaxExperts / kWarpSize, kGroups>>();
}

// Calls function.operator()<L>() with the layout that routes these tokens.
template <typename Function>
void with_layout(const MoeGateParams& p, const Function& function) {
    const bool is_fast = is_aligned(p.logits);
    const int num_candidates = p.num_experts / p.num_groups * p.num_groups_kept;
    if (num_candidates == p.num_experts) {
        if (is_fast and p.num_experts == 64) return function.template operator()<Experts64>();
        return with_any_layout<Groups::kAllKept>(p.num_experts, function);
    }
    if (is_fast and p.num_experts == 160 and p.num_groups == 8 and num_candidates <= 64) {
        return function.template operator()<Experts160>();
    }
    with_any_layout<Groups::kAny>(p.num_experts, function);
}

}  // namespace dsc::gate
