// One rank's buffer (comm_layout.h), and how its peers' are reached: memory of this process, or of another
// one by a handle (cudaIpc). Memory of its own, by cudaMalloc: allocators that map memory piece by piece
// cannot export it.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>

#include "comm/comm.h"

namespace dsc {

struct CommBufferOptions {
    CommSettings settings;
    double timeout = 600.0;  // seconds that a wait may last
    int device = 0;
};

class CommBuffer {
  public:
    CommBuffer(int rank, const CommShape& shape, const CommBufferOptions& options);
    ~CommBuffer();
    CommBuffer(const CommBuffer&) = delete;
    CommBuffer& operator=(const CommBuffer&) = delete;

    // For a peer in another process, on a device that can reach this one.
    std::string handle();
    void open(int peer, const std::string& handle);
    // A peer in this process; its memory lives as long as this buffer uses it.
    void connect(const CommBuffer& peer);
    // Ends every wait of this rank's kernels at once, those under way too, as if it had lasted too long;
    // nothing is recorded.
    void fail();
    // Lets go of the peers' memory, not of its own. Peers may have that mapped still: it is to be closed when
    // each of them has let go.
    void disconnect();
    // Lets go of its own memory too. What was recorded in the status stays readable.
    void close();

    bool is_closed() const { return memory_ == nullptr; }
    int rank() const { return rank_; }
    const CommShape& shape() const { return shape_; }
    const CommBufferOptions& options() const { return options_; }
    int64_t num_bytes() const { return comm_layout(shape_).num_bytes; }
    void* address() const { return memory_.get(); }
    std::optional<int> missing_peer() const;  // the first that is not connected
    CommPlace place() const;
    std::optional<CommStatus> status() const;  // without waiting for the device

  private:
    using Memory = std::shared_ptr<void>;

    const int rank_;
    const CommShape shape_;
    const CommBufferOptions options_;
    Memory memory_;
    Memory status_;
    std::array<Memory, kCommMaxRanks> peers_;
    bool is_exported_ = false;  // another process may have the memory mapped
};

}  // namespace dsc
