// Fill-in-the-middle at document level: which documents are rearranged, in which order, and where they are
// cut.
//
// Two cuts are drawn independently and uniformly over all places where a cut may stand, both ends of the text
// included, and sorted (Bavarian et al., arXiv 2207.14255, section 3; DeepSeek-Coder, arXiv 2401.14196,
// section 3.1.2, "randomly dividing the text into three parts"). So any part may be empty.
#include <algorithm>
#include <cstring>

#include "text/text.h"

namespace dsc {
namespace {

// SplitMix64 (Steele, Lea and Flood 2014): a good stream from any starting state, so one can start per
// document.
class Random {
  public:
    Random(uint64_t seed, uint64_t key) : state_(mixed(mixed(seed) ^ key)) {}

    uint64_t next() { return mixed(state_ += kStep); }

    // Uniform in [0, 1).
    double unit() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

    // Uniform in [0, bound), without bias: draws in the incomplete last stretch are thrown away (Lemire
    // 2019).
    uint64_t below(uint64_t bound) {
        const uint64_t threshold = (0 - bound) % bound;
        while (true) {
            const auto product = static_cast<unsigned __int128>(next()) * bound;
            if (static_cast<uint64_t>(product) >= threshold) return static_cast<uint64_t>(product >> 64);
        }
    }

  private:
    static constexpr uint64_t kStep = 0x9E3779B97F4A7C15;

    static uint64_t mixed(uint64_t x) {
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
        return x ^ (x >> 31);
    }

    uint64_t state_;
};

// Code points of UTF-8: the bytes that do not continue one (10xxxxxx), eight at a time.
int64_t count_characters(std::string_view utf8) {
    constexpr uint64_t kOnes = 0x0101010101010101;
    int64_t num_continuations = 0;
    size_t i = 0;
    for (; i + 8 <= utf8.size(); i += 8) {
        uint64_t bytes;
        std::memcpy(&bytes, utf8.data() + i, 8);
        const uint64_t flags = (bytes >> 7) & ~(bytes >> 6) & kOnes;  // one bit a byte
        num_continuations += static_cast<int64_t>((flags * kOnes) >> 56);
    }
    for (; i < utf8.size(); ++i) num_continuations += (utf8[i] & 0xC0) == 0x80;
    return static_cast<int64_t>(utf8.size()) - num_continuations;
}

// The byte after the n-th newline, n >= 1; the end of the text when there are fewer.
size_t after_newline(std::string_view utf8, uint64_t n) {
    size_t end = 0;
    for (; n > 0 and end < utf8.size(); --n) {
        const void* newline = std::memchr(utf8.data() + end, '\n', utf8.size() - end);
        if (newline == nullptr) return utf8.size();
        end = static_cast<size_t>(static_cast<const char*>(newline) - utf8.data()) + 1;
    }
    return end;
}

bool holds_any(std::string_view utf8, const std::vector<std::string>& needles) {
    return std::any_of(needles.begin(), needles.end(), [utf8](const std::string& needle) {
        return utf8.find(needle) != std::string_view::npos;
    });
}

// A place between two lines, or an end of the text, as a number of characters.
int64_t draw_line_cut(std::string_view utf8, uint64_t num_places, Random& random) {
    return count_characters(utf8.substr(0, after_newline(utf8, random.below(num_places))));
}

}  // namespace

FimCut cut_document(std::string_view utf8, uint64_t key, const FimParams& params) {
    Random random(params.seed, key);
    // Drawn before the text is looked at, so that a higher rate only adds documents to those of a lower one.
    const bool is_drawn = random.unit() < params.rate;
    const FimOrder order = random.unit() < params.spm_share ? FimOrder::kSpm : FimOrder::kPsm;
    if (not is_drawn or utf8.empty()) return {FimOrder::kPlain, 0, 0};
    if (holds_any(utf8, params.sentinels)) return {FimOrder::kSentinel, 0, 0};

    int64_t first, second;
    if (params.cut_at_lines) {
        // Place 0 is the start, place n the end of line n.
        const auto num_newlines = static_cast<uint64_t>(std::count(utf8.begin(), utf8.end(), '\n'));
        const uint64_t num_places = 1 + num_newlines + (utf8.back() != '\n');
        first = draw_line_cut(utf8, num_places, random);
        second = draw_line_cut(utf8, num_places, random);
    } else {
        const auto num_places = static_cast<uint64_t>(count_characters(utf8)) + 1;
        first = static_cast<int64_t>(random.below(num_places));
        second = static_cast<int64_t>(random.below(num_places));
    }
    return {order, std::min(first, second), std::max(first, second)};
}

}  // namespace dsc
