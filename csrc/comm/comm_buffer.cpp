#include "comm/comm_buffer.h"

#include <atomic>
#include <cstring>
#include <new>

#include "core/check.h"

namespace dsc {
namespace {

constexpr const char* kOp = "CommBuffer";

#ifdef DSC_HOST_EXECUTOR

constexpr std::align_val_t kAlignment{256};

// As the GPU's, whose slots nobody has written yet: control words zero, every float elsewhere a NaN.
std::shared_ptr<void> allocate(int64_t num_bytes, int) {
    void* const memory = ::operator new(static_cast<size_t>(num_bytes), kAlignment);
    std::memset(memory, 0x7f, static_cast<size_t>(num_bytes));
    std::memset(memory, 0, sizeof(CommControl));
    return {memory, [](void* at) { ::operator delete(at, kAlignment); }};
}

std::shared_ptr<void> allocate_status(int) {
    return std::make_shared<CommStatus>();
}

void reach(int, int) {}

void set_word(uint32_t* at, uint32_t value, int) {
    std::atomic_ref(*at).store(value, std::memory_order_release);
}

std::string export_handle(void*, int) {
    throw std::runtime_error(concat(kOp, ": handle: memory of the host executor is for this process alone"));
}

std::shared_ptr<void> import_handle(const std::string&, int) {
    throw std::runtime_error(concat(kOp, ": open: the host executor cannot reach another process's memory"));
}

#else

void check(cudaError_t status, const char* step) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(concat(kOp, ": ", step, ": ", cudaGetErrorString(status)));
}

class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(previous_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int previous_ = 0;
};

// Whole pages of 2 MiB: what is exported then shares its page with nothing else.
std::shared_ptr<void> allocate(int64_t num_wanted, int device) {
    constexpr int64_t kPage = int64_t{2} << 20;
    const int64_t num_bytes = (num_wanted + kPage - 1) / kPage * kPage;
    const OnDevice guard(device);
    void* memory = nullptr;
    check(cudaMalloc(&memory, static_cast<size_t>(num_bytes)), "cudaMalloc");
    std::shared_ptr<void> owner(memory, [](void* at) { cudaFree(at); });
    check(cudaMemset(memory, 0, static_cast<size_t>(num_bytes)), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // before a peer is told where it is
    return owner;
}

// Mapped at the same address on the device (unified addressing).
std::shared_ptr<void> allocate_status(int device) {
    const OnDevice guard(device);
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, sizeof(CommStatus), cudaHostAllocMapped | cudaHostAllocPortable),
          "cudaHostAlloc");
    std::memset(memory, 0, sizeof(CommStatus));
    return {memory, [](void* at) { cudaFreeHost(at); }};
}

void reach(int device, int peer_device) {
    if (device == peer_device) return;
    const OnDevice guard(device);
    const cudaError_t status = cudaDeviceEnablePeerAccess(peer_device, 0);
    if (status == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();
        return;
    }
    check(status, "cudaDeviceEnablePeerAccess");
}

// Beside kernels that wait: the copy engine needs none of their multiprocessors, and the stream follows no
// other.
void set_word(uint32_t* at, uint32_t value, int device) {
    const OnDevice guard(device);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    cudaError_t status = cudaMemcpyAsync(at, &value, sizeof(value), cudaMemcpyHostToDevice, stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    check(status, "cudaMemcpyAsync");
}

std::string export_handle(void* memory, int device) {
    const OnDevice guard(device);
    cudaIpcMemHandle_t handle;
    check(cudaIpcGetMemHandle(&handle, memory), "cudaIpcGetMemHandle");
    return {reinterpret_cast<const char*>(&handle), sizeof(handle)};
}

// In the context that opened it. A deleter must not throw, and at the end of the process every call fails.
void close_handle(void* memory, int device) {
    int previous = 0;
    if (cudaGetDevice(&previous) != cudaSuccess or cudaSetDevice(device) != cudaSuccess) return;
    cudaIpcCloseMemHandle(memory);
    cudaSetDevice(previous);
}

std::shared_ptr<void> import_handle(const std::string& bytes, int device) {
    cudaIpcMemHandle_t handle;
    DSC_CHECK(bytes.size() == sizeof(handle), kOp, ": open: a handle has ", sizeof(handle), " bytes, got ",
              bytes.size());
    std::memcpy(&handle, bytes.data(), sizeof(handle));
    const OnDevice guard(device);
    void* memory = nullptr;
    check(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    return {memory, [device](void* at) { close_handle(at, device); }};
}

#endif

void check_peer(int peer, int rank, const CommShape& shape) {
    DSC_CHECK(peer >= 0 and peer < shape.num_ranks and peer != rank, kOp, ": peer must be a rank below ",
              shape.num_ranks, " other than ", rank, ", got ", peer);
}

const CommShape& checked(int rank, const CommShape& shape, const CommBufferOptions& options) {
    DSC_CHECK(shape.num_ranks >= 1 and shape.num_ranks <= kCommMaxRanks, kOp, ": num_ranks must be 1 to ",
              kCommMaxRanks, ", got ", shape.num_ranks);
    DSC_CHECK(rank >= 0 and rank < shape.num_ranks, kOp, ": rank must be 0 to ", shape.num_ranks - 1,
              ", got ", rank);
    DSC_CHECK(shape.max_tokens >= 1 and shape.max_tokens <= kCommMaxTokens, kOp, ": max_tokens must be 1 to ",
              kCommMaxTokens, ", got ", shape.max_tokens);
    DSC_CHECK(shape.row_bytes > 0 and shape.row_bytes % kCommRowGranule == 0, kOp,
              ": row_bytes must be a positive multiple of ", kCommRowGranule, ", got ", shape.row_bytes);
    DSC_CHECK(shape.num_topk >= 0 and shape.num_topk <= kCommMaxTopk, kOp, ": num_topk must be 0 to ",
              kCommMaxTopk, ", got ", shape.num_topk);
    DSC_CHECK(options.timeout > 0.0 and options.timeout <= 1e9, kOp,
              ": timeout must be above 0 s, at most 1e9 s, got ", options.timeout);
    DSC_CHECK(options.settings.num_blocks >= 0, kOp, ": num_blocks must be >= 0, got ",
              options.settings.num_blocks);
    return shape;
}

}  // namespace

CommBuffer::CommBuffer(int rank, const CommShape& shape, const CommBufferOptions& options)
    : rank_(rank), shape_(checked(rank, shape, options)), options_(options) {
    memory_ = allocate(num_bytes(), options.device);
    status_ = allocate_status(options.device);
    peers_[rank] = memory_;
}

// Without a close nobody has said that the peers have let go. Memory that is freed while a peer has it mapped
// may become somebody else's under that peer's kernels, so what was exported is then left to the end of the
// process.
CommBuffer::~CommBuffer() {
    if (is_exported_ and not is_closed()) new Memory(memory_);
}

std::string CommBuffer::handle() {
    DSC_CHECK(not is_closed(), kOp, ": handle: the buffer is closed");
    std::string handle = export_handle(memory_.get(), options_.device);
    is_exported_ = true;
    return handle;
}

void CommBuffer::open(int peer, const std::string& handle) {
    DSC_CHECK(not is_closed(), kOp, ": open: the buffer is closed");
    check_peer(peer, rank_, shape_);
    DSC_CHECK(peers_[peer] == nullptr, kOp, ": open: peer ", peer, " is connected already");
    peers_[peer] = import_handle(handle, options_.device);
}

void CommBuffer::connect(const CommBuffer& peer) {
    DSC_CHECK(not is_closed() and not peer.is_closed(), kOp, ": connect: a buffer is closed");
    check_peer(peer.rank_, rank_, shape_);
    const bool is_alike = peer.num_bytes() == num_bytes() and peer.shape_.num_ranks == shape_.num_ranks and
                          peer.shape_.max_tokens == shape_.max_tokens and
                          peer.shape_.num_topk == shape_.num_topk and
                          peer.shape_.row_bytes == shape_.row_bytes;
    DSC_CHECK(is_alike, kOp, ": connect: the buffers of ranks ", rank_, " and ", peer.rank_,
              " differ in shape");
    DSC_CHECK(peers_[peer.rank_] == nullptr, kOp, ": connect: peer ", peer.rank_, " is connected already");
    reach(options_.device, peer.options_.device);
    peers_[peer.rank_] = peer.memory_;
}

void CommBuffer::fail() {
    DSC_CHECK(not is_closed(), kOp, ": fail: the buffer is closed");
    set_word(&static_cast<CommControl*>(memory_.get())->is_failed, 1, options_.device);
}

void CommBuffer::disconnect() {
    for (int peer = 0; peer < kCommMaxRanks; ++peer) {
        if (peer != rank_) peers_[peer].reset();
    }
}

void CommBuffer::close() {
    disconnect();
    peers_[rank_].reset();
    memory_.reset();
}

std::optional<int> CommBuffer::missing_peer() const {
    for (int peer = 0; peer < shape_.num_ranks; ++peer) {
        if (peers_[peer] == nullptr) return peer;
    }
    return std::nullopt;
}

CommPlace CommBuffer::place() const {
    CommPlace place{};
    for (int peer = 0; peer < kCommMaxRanks; ++peer)
        place.buffers[peer] = static_cast<char*>(peers_[peer].get());
    place.status = static_cast<CommStatus*>(status_.get());
    place.rank = rank_;
    return place;
}

std::optional<CommStatus> CommBuffer::status() const {
    auto* const status = static_cast<CommStatus*>(status_.get());
    if (std::atomic_ref(status->is_written).load(std::memory_order_acquire) == 0) return std::nullopt;
    return *status;
}

}  // namespace dsc
