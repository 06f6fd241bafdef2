// What the executor says when a launch fails: threads, places, and who waits where.
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "host/grid.h"

namespace dsc::host {
namespace {

std::string to_text(const uint3& idx) {
    return concat("(", idx.x, ",", idx.y, ",", idx.z, ")");
}

// Threads that wait for the same thing, by the first of them.
struct Group {
    const Thread* first;
    int num_threads;
};

}  // namespace

std::string to_hex(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

std::string to_text(const Thread& thread) {
    return concat("thread ", to_text(thread.idx), " of block ", to_text(thread.block->idx));
}

std::string to_text(const Wait& wait) {
    const std::string mask = wait.mask == 0 ? "" : concat(" (mask ", to_hex(wait.mask), ")");
    return concat(wait.what, mask, " at ", wait.where.file_name(), ":", wait.where.line(), " in ",
                  wait.where.function_name());
}

bool is_same(const Wait& a, const Wait& b) {
    return a.mask == b.mask and a.where.line() == b.where.line() and a.where.column() == b.where.column() and
           (a.what == b.what or std::strcmp(a.what, b.what) == 0) and
           (a.where.file_name() == b.where.file_name() or
            std::strcmp(a.where.file_name(), b.where.file_name()) == 0);
}

std::string Grid::waiting() const {
    std::vector<Group> groups;
    for (const auto& block : alive_) {
        for (const Thread& thread : block->threads) {
            if (not thread.is_waiting) continue;
            bool is_known = false;
            for (Group& group : groups) {
                if (not is_same(group.first->wait, thread.wait)) continue;
                ++group.num_threads;
                is_known = true;
                break;
            }
            if (not is_known) groups.push_back({&thread, 1});
        }
    }
    std::string text;
    for (const auto& [first, num_threads] : groups) {
        text += concat("\n  ", num_threads, " threads (first: ", to_text(*first), ") wait at ",
                       to_text(first->wait));
    }
    return text;
}

}  // namespace dsc::host
