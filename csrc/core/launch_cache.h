// What launches ask of the driver, asked once. The answers hold as long as the process lives; any number of
// threads and devices may ask.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace dsc {

// A value >= 0 for each device.
class DeviceValues {
  public:
    // ask() tells the value, or throws; threads that come first together may all ask, and hear the same.
    template <typename Ask>
    int get(int device, const Ask& ask) {
        const auto slot = static_cast<size_t>(device);
        if (slot >= known_.size()) return ask();
        int value = known_[slot].load(std::memory_order_relaxed) - 1;
        if (value < 0) {
            value = ask();
            known_[slot].store(value + 1, std::memory_order_relaxed);
        }
        return value;
    }

  private:
    std::array<std::atomic<int>, 64> known_{};  // 1 more than the value; 0: not asked for
};

// The dynamic shared memory that each kernel may have on each device.
class SharedLimits {
  public:
    // Calls set() unless the kernel may have as many bytes. A limit never falls: a launch of another thread
    // may rest on it.
    template <typename Set>
    void raise(const void* kernel, int device, size_t num_bytes, const Set& set) {
        const std::lock_guard lock(mutex_);
        size_t& limit = limits_[{kernel, device}];
        if (num_bytes <= limit) return;
        set();
        limit = num_bytes;
    }

  private:
    std::mutex mutex_;
    std::map<std::pair<const void*, int>, size_t> limits_;
};

}  // namespace dsc
