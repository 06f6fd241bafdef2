// The text family: what the data pipeline does to every document, in plain C++ (no CUDA, no Python).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dsc {

// ---- fill-in-the-middle (fim.cpp) ----

enum class FimOrder : uint8_t {
    kPlain = 0,     // not drawn: the text as it is
    kPsm = 1,       // prefix, suffix, middle
    kSpm = 2,       // suffix, prefix, middle
    kSentinel = 3,  // drawn, but the text holds a sentinel string: left as it is
};

struct FimParams {
    double rate;                         // share of documents that are drawn
    double spm_share;                    // of those, the share in suffix-prefix-middle order
    bool cut_at_lines;                   // cut before a line only; otherwise between any two characters
    uint64_t seed;                       // of the run; each document has its own stream of random numbers
    std::vector<std::string> sentinels;  // UTF-8
};

struct FimCut {
    FimOrder order;
    int64_t begin, end;  // the middle, in characters (code points); both 0 when nothing is rearranged
};

// `key` identifies the document: the result depends on nothing but the text, the key and the params.
FimCut cut_document(std::string_view utf8, uint64_t key, const FimParams& params);

// ---- packing (pack.cpp) ----

constexpr int64_t kMaxWindow = int64_t{1} << 24;

// Pieces grouped by window, in the order they stand in it: window w holds pieces [begin[w], begin[w + 1]).
struct PackPlan {
    std::vector<int64_t> document;  // [pieces]
    std::vector<int64_t> start;     // [pieces] first token of the document that the piece holds
    std::vector<int64_t> length;    // [pieces]
    std::vector<int64_t> begin;     // [windows + 1]
};

// 0 < window <= kMaxWindow and lengths >= 0 are the caller's to check.
PackPlan pack_best_fit(std::span<const int64_t> lengths, int64_t window);

}  // namespace dsc
