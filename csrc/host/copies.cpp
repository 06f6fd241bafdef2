#include "host/copies.h"

#include <algorithm>
#include <cstring>

namespace dsc::host {

void Copies::start(void* target, const void* source, bool is_valid) {
    for (size_t i = 0; i < kNumBytes; ++i) static_cast<unsigned char*>(target)[i] = i % 2 == 0 ? 0xff : 0x7f;
    pending_.push_back({target, is_valid ? source : nullptr, num_groups_});
}

void Copies::land_all_but(int num_groups) {
    const int first_pending = num_groups_ - num_groups;
    const auto is_due = [&](const Copy& copy) { return copy.group < first_pending; };
    for (const auto& [target, source, group] : pending_) {
        if (group >= first_pending) continue;
        if (source != nullptr) {
            std::memcpy(target, source, kNumBytes);
        } else {
            std::memset(target, 0, kNumBytes);
        }
    }
    pending_.erase(std::remove_if(pending_.begin(), pending_.end(), is_due), pending_.end());
}

void Copies::clear() {
    pending_.clear();
    num_groups_ = 0;
}

}  // namespace dsc::host
