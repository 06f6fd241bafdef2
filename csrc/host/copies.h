// A thread's asynchronous copies (cp.async): started, grouped, landed when the thread waits for them.
#pragma once

#include <cstddef>
#include <vector>

namespace dsc::host {

class Copies {
  public:
    static constexpr size_t kNumBytes = 16;

    // The target holds NaNs until the copy lands, so that reading it early, or still, shows.
    void start(void* target, const void* source, bool is_valid);
    void commit() { ++num_groups_; }
    void land_all_but(int num_groups);  // the newest stay under way
    void clear();

  private:
    struct Copy {
        void* target;
        const void* source;  // null: zeros
        int group;
    };
    std::vector<Copy> pending_;
    int num_groups_ = 0;  // committed
};

}  // namespace dsc::host
