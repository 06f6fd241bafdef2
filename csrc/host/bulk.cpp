#include "host/bulk.h"

#include <algorithm>
#include <cstring>

namespace dsc::host {

void BulkCopies::start_load(void* target, const void* source, size_t num_bytes, BulkBarrier* barrier) {
    for (size_t i = 0; i < num_bytes; ++i) static_cast<unsigned char*>(target)[i] = i % 2 == 0 ? 0xff : 0x7f;
    loads_.push_back({target, source, num_bytes, barrier});
}

// The phase under way is number *barrier; its parity is that number's. A phase that is over already is not
// waited for.
bool BulkCopies::wait_load(BulkBarrier* barrier, uint32_t parity) {
    if ((*barrier & 1) != parity) return true;
    const auto load = std::find_if(loads_.begin(), loads_.end(),
                                   [&](const Load& other) { return other.barrier == barrier; });
    if (load == loads_.end()) return false;
    std::memcpy(load->target, load->source, load->num_bytes);
    ++*barrier;
    loads_.erase(load);
    return true;
}

void BulkCopies::start_store(void* target, const void* source, size_t num_bytes) {
    stores_.push_back({target, source, {}, num_bytes, num_groups_, false});
}

void BulkCopies::read(Store& store) {
    if (store.is_read) return;
    const auto* const bytes = static_cast<const unsigned char*>(store.source);
    store.bytes.assign(bytes, bytes + store.num_bytes);
    store.is_read = true;
}

void BulkCopies::read_all_but(int num_groups) {
    for (Store& store : stores_) {
        if (store.group < num_groups_ - num_groups) read(store);
    }
}

// Of the groups committed; what was never put into a group stays.
void BulkCopies::write_all() {
    const auto is_committed = [&](const Store& store) { return store.group < num_groups_; };
    for (Store& store : stores_) {
        if (not is_committed(store)) continue;
        read(store);
        std::memcpy(store.target, store.bytes.data(), store.num_bytes);
    }
    stores_.erase(std::remove_if(stores_.begin(), stores_.end(), is_committed), stores_.end());
}

bool BulkCopies::has_unread() const {
    const auto is_unread = [](const Store& store) { return not store.is_read; };
    return not loads_.empty() or std::any_of(stores_.begin(), stores_.end(), is_unread);
}

void BulkCopies::clear() {
    loads_.clear();
    stores_.clear();
    num_groups_ = 0;
}

}  // namespace dsc::host
