// Best-fit decreasing packing of documents into windows of equal size.
//
// The longest piece is placed first, each into the open window with the least room that still takes it (Ding
// et al., "Fewer truncations improve language modeling", arXiv 2404.10830). Nothing that fits in a window is
// cut; a longer document gives whole windows and one rest, which is packed like a short document. Sorting is
// by counting and the window is found in a bitmap of capacities, so the time is O(pieces * log_64(window)).
#include <bit>

#include "text/text.h"

namespace dsc {
namespace {

// A set of integers in [0, limit]: bit i of a word says whether i is in it, and a word of the level above
// says which words are not zero.
class BitmapSet {
  public:
    explicit BitmapSet(int64_t limit) {
        int64_t num_bits = limit + 1;
        do {
            num_bits = (num_bits + kBits - 1) / kBits;
            levels_.emplace_back(num_bits, 0);
        } while (num_bits > 1);
    }

    void insert(int64_t value) {
        for (auto& words : levels_) {
            words[value / kBits] |= uint64_t{1} << (value % kBits);
            value /= kBits;
        }
    }

    void erase(int64_t value) {
        for (auto& words : levels_) {
            words[value / kBits] &= ~(uint64_t{1} << (value % kBits));
            if (words[value / kBits] != 0) return;
            value /= kBits;
        }
    }

    // The smallest member >= value, or -1.
    int64_t at_least(int64_t value) const {
        // Climb until some word holds a member that is large enough.
        size_t level = 0;
        for (; level < levels_.size(); ++level) {
            const auto& words = levels_[level];
            const int64_t word = value / kBits;
            const uint64_t bits = word < std::ssize(words) ? words[word] >> (value % kBits) : 0;
            if (bits != 0) {
                value += std::countr_zero(bits);
                break;
            }
            value = word + 1;
        }
        if (level == levels_.size()) return -1;
        // Descend to its smallest member.
        for (; level > 0; --level) value = value * kBits + std::countr_zero(levels_[level - 1][value]);
        return value;
    }

  private:
    static constexpr int64_t kBits = 64;
    std::vector<std::vector<uint64_t>> levels_;
};

// The windows that have room left, by how much; of equal ones the last opened or filled is taken.
class OpenWindows {
  public:
    explicit OpenWindows(int64_t size) : rooms_(size), top_(size + 1, kNone), below_() {}

    // Gives the window for a piece and keeps what room is left; `next_window` is opened if no other takes it.
    int64_t place(int64_t length, int64_t next_window, int64_t size) {
        int64_t room = rooms_.at_least(length);
        int64_t window = next_window;
        if (room >= 0) {
            window = top_[room];
            top_[room] = below_[window];
            if (top_[room] == kNone) rooms_.erase(room);
        } else {
            room = size;
            below_.push_back(kNone);
        }
        keep(window, room - length);
        return window;
    }

  private:
    static constexpr int64_t kNone = -1;

    void keep(int64_t window, int64_t room) {
        if (room == 0) return;
        if (top_[room] == kNone) rooms_.insert(room);
        below_[window] = top_[room];
        top_[room] = window;
    }

    BitmapSet rooms_;             // every room that some open window has
    std::vector<int64_t> top_;    // [room] a window with that room
    std::vector<int64_t> below_;  // [window] the next one with the same room
};

// The documents by the rest they leave after whole windows, longest first; equal ones keep their order.
std::vector<int64_t> longest_rest_first(std::span<const int64_t> lengths, int64_t window) {
    std::vector<int64_t> first(window + 1, 0);  // [rest] where documents with that rest begin
    for (const int64_t length : lengths) ++first[length % window];
    int64_t num_before = 0;
    for (int64_t rest = window - 1; rest > 0; --rest) {
        const int64_t num_here = first[rest];
        first[rest] = num_before;
        num_before += num_here;
    }
    std::vector<int64_t> order(num_before);
    for (int64_t document = 0; document < std::ssize(lengths); ++document) {
        const int64_t rest = lengths[document] % window;
        if (rest > 0) order[first[rest]++] = document;
    }
    return order;
}

}  // namespace

PackPlan pack_best_fit(std::span<const int64_t> lengths, int64_t window) {
    int64_t num_whole = 0;
    for (const int64_t length : lengths) num_whole += length / window;

    // Where each rest goes. Windows are counted from 0 here; in the plan they follow the whole ones.
    const std::vector<int64_t> order = longest_rest_first(lengths, window);
    std::vector<int64_t> window_of(order.size());
    std::vector<int64_t> num_pieces;  // [window]
    OpenWindows open(window);
    for (size_t i = 0; i < order.size(); ++i) {
        const int64_t next_window = std::ssize(num_pieces);
        window_of[i] = open.place(lengths[order[i]] % window, next_window, window);
        if (window_of[i] == next_window) num_pieces.push_back(0);
        ++num_pieces[window_of[i]];
    }

    const size_t total = num_whole + order.size();
    PackPlan plan{std::vector<int64_t>(total), std::vector<int64_t>(total), std::vector<int64_t>(total), {}};
    plan.begin.reserve(num_whole + num_pieces.size() + 1);

    // Whole windows first, in document order.
    int64_t piece = 0;
    for (int64_t document = 0; document < std::ssize(lengths); ++document) {
        for (int64_t start = 0; start + window <= lengths[document]; start += window, ++piece) {
            plan.begin.push_back(piece);
            plan.document[piece] = document;
            plan.start[piece] = start;
            plan.length[piece] = window;
        }
    }
    // Then the rests, grouped by window in the order they were placed.
    for (int64_t& count : num_pieces) {
        plan.begin.push_back(piece);
        piece += count;
        count = plan.begin.back();
    }
    plan.begin.push_back(piece);
    for (size_t i = 0; i < order.size(); ++i) {
        const int64_t slot = num_pieces[window_of[i]]++;
        const int64_t length = lengths[order[i]];
        plan.document[slot] = order[i];
        plan.start[slot] = length - length % window;
        plan.length[slot] = length % window;
    }
    return plan;
}

}  // namespace dsc
