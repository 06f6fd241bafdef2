// The exchange of tokens between ranks: buffers, and a launch for each step of comm/comm.h. Checks what
// memory safety asks for, fills the params by name, launches on the caller's stream. Every launch takes lists
// with an entry for each rank in it: one on a real rank, several where ranks share a card (or the host
// executor).
#include "comm/comm.h"

#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "bind/tensor.h"
#include "comm/comm_buffer.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

using Buffers = std::vector<CommBuffer*>;
using Tensors = std::vector<py::object>;
using MaybeTensors = std::optional<Tensors>;
using RowBegins = std::optional<std::vector<std::vector<int64_t>>>;

// ---- what a launch's ranks have in common ----

void check_length(const char* op, const char* name, size_t length, size_t wanted) {
    DSC_CHECK(length == wanted, op, ": ", name, " must have an entry for each of the ", wanted,
              " buffers, got ", length);
}

void check_buffer(const char* op, const CommBuffer& buffer) {
    DSC_CHECK(not buffer.is_closed(), op, ": the buffer of rank ", buffer.rank(), " is closed");
    const std::optional<int> missing = buffer.missing_peer();
    DSC_CHECK(not missing, op, ": the buffer of rank ", buffer.rank(), " is not connected to rank ",
              *missing);
}

CommGroup group_of(const char* op, const Buffers& buffers) {
    DSC_CHECK(not buffers.empty() and buffers.size() <= kCommMaxRanks, op, ": buffers must have 1 to ",
              kCommMaxRanks, " entries, got ", buffers.size());
    uint32_t seen = 0;
    for (const CommBuffer* const buffer : buffers) {
        DSC_CHECK_TYPE(buffer != nullptr, op, ": buffers must be CommBuffers, got None");
        check_buffer(op, *buffer);
        DSC_CHECK((seen >> buffer->rank() & 1) == 0, op, ": rank ", buffer->rank(),
                  " occurs twice in buffers");
        seen |= 1u << buffer->rank();
        DSC_CHECK(buffer->place().buffers[buffers[0]->rank()] == buffers[0]->address(), op,
                  ": the buffers of ranks ", buffers[0]->rank(), " and ", buffer->rank(),
                  " are not of one group");
    }
    const CommShape& shape = buffers[0]->shape();
    return {.layout = comm_layout(shape),
            .shape = shape,
            .row_bytes = shape.row_bytes,
            .timeout_ns = static_cast<uint64_t>(buffers[0]->options().timeout * 1e9),
            .num_launched = static_cast<int>(buffers.size())};
}

void check_rows(const char* op, const char* name, const void* rows, int64_t row_bytes, int64_t most) {
    DSC_CHECK(row_bytes > 0 and row_bytes % kCommRowGranule == 0, op, ": a row of ", name,
              " must be a positive multiple of ", kCommRowGranule, " bytes, got ", row_bytes);
    DSC_CHECK(row_bytes <= most, op, ": a row of ", name, " must have at most ", most,
              " bytes, which the buffer was made for, got ", row_bytes);
    const auto past = reinterpret_cast<uintptr_t>(rows) % kCommRowGranule;
    DSC_CHECK(past == 0, op, ": ", name, " must begin on a boundary of ", kCommRowGranule, " bytes, got one ",
              past, " bytes past it");
}

// Reads the tensors of one launch: `Call` checks each, this the relations to the buffers.
class Reader {
  public:
    Reader(const char* op, const Buffers& buffers)
        : call(op), op_(op), buffers_(buffers), group_(group_of(op, buffers)) {}

    // Rows of the launch's dtype and width, which the first tensor decides.
    void* rows(const char* name, py::handle tensor, int64_t num_rows) {
        const FloatType type = call.float_type_of(name, tensor);
        DSC_CHECK_TYPE(not dtype_ or *dtype_ == type, op_, ": ", name, " must be ", name_of(*dtype_),
                       " like the other rows of the launch, got ", name_of(type));
        dtype_ = type;
        const auto array = call.read<2>(name, tensor, dtype_of(type), {num_rows, width_});
        const int64_t row_bytes = array.shape[1] * size_of(type);
        check_rows(op_, name, array.data, row_bytes, group_.shape.row_bytes);
        width_ = array.shape[1];
        group_.row_bytes = row_bytes;
        return array.data;
    }

    int num_tokens(const char* name, py::handle slot) {
        const int64_t tokens = call.read<2>(name, slot, kInt32, {kAnySize, group_.shape.num_ranks}).shape[0];
        DSC_CHECK(tokens <= group_.shape.max_tokens, op_, ": at most ", group_.shape.max_tokens,
                  " tokens fit the buffer, got ", tokens);
        return static_cast<int>(tokens);
    }
    int32_t* slots(py::handle slot) {
        return call.read<2>("slot", slot, kInt32, {kAnySize, group_.shape.num_ranks}).as<int32_t>();
    }
    int32_t* counts(py::handle count) {
        return call.read<1>("count", count, kInt32, {group_.shape.num_ranks}).as<int32_t>();
    }
    template <typename T>
    T* topk(const char* name, const MaybeTensors& tensors, size_t i, int64_t num_rows) {
        if (not tensors) return nullptr;
        constexpr dlpack::DataType kDtype = std::is_same_v<T, float> ? kFloat32 : kInt32;
        const int64_t num_topk = group_.shape.num_topk;
        DSC_CHECK(num_topk > 0, op_, ": ", name, " needs a buffer made for num_topk > 0");
        return call.read<2>(name, (*tensors)[i], kDtype, {num_rows, num_topk}).template as<T>();
    }

    // run(launch, settings, stream), with what all ranks share filled in.
    template <typename Launch, typename Run>
    void launch(Launch& launch, const Run& run) {
        launch.group = group_;
        for (size_t i = 0; i < buffers_.size(); ++i) launch.places[i] = buffers_[i]->place();
        const CommBufferOptions& options = buffers_[0]->options();
        DSC_CHECK(kKernelDevice == dlpack::kCpu or call.device_idx() == options.device, op_,
                  ": the buffers are on cuda:", options.device, ", the tensors on cuda:", call.device_idx());
        call.launch([&](cudaStream_t stream) { run(launch, options.settings, stream); });
    }

    const CommGroup& group() const { return group_; }
    FloatType dtype() const { return dtype_.value(); }

    Call call;

  private:
    const char* const op_;
    const Buffers& buffers_;
    CommGroup group_;
    std::optional<FloatType> dtype_;
    int64_t width_ = kAnySize;
};

// Where each source's rows begin; returns how many rows there are.
int64_t read_row_begin(const char* op, const CommShape& shape, const RowBegins& given, size_t i,
                       int32_t (&row_begin)[kCommMaxRanks + 1]) {
    const auto num_ranks = static_cast<size_t>(shape.num_ranks);
    for (size_t r = 0; r <= num_ranks; ++r) row_begin[r] = static_cast<int32_t>(r * shape.max_tokens);
    if (not given) return row_begin[num_ranks];
    const std::vector<int64_t>& begins = (*given)[i];
    DSC_CHECK(begins.size() == num_ranks + 1, op, ": row_begin must have ", num_ranks + 1,
              " numbers, the last one the number of rows, got ", begins.size());
    DSC_CHECK(begins[0] == 0, op, ": row_begin must begin with 0, got ", begins[0]);
    const int64_t most = int64_t{kCommMaxRanks} * kCommMaxTokens;
    for (size_t r = 0; r < num_ranks; ++r) {
        DSC_CHECK(begins[r] <= begins[r + 1] and begins[r + 1] <= most, op,
                  ": row_begin must not fall, nor pass ", most, ", got ", begins[r], " and then ",
                  begins[r + 1]);
    }
    for (size_t r = 0; r <= num_ranks; ++r) row_begin[r] = static_cast<int32_t>(begins[r]);
    return begins[num_ranks];
}

template <typename Values>
void check_optional(const char* op, const char* name, const std::optional<Values>& values, size_t wanted) {
    if (values) check_length(op, name, values->size(), wanted);
}

// ---- routes ----

void expert_routes(const Tensors& idx, const Tensors& slot, const Tensors& count, int num_experts) {
    constexpr const char* kOp = "expert_routes";
    DSC_CHECK(not idx.empty() and idx.size() <= kCommMaxRanks, kOp, ": idx must have 1 to ", kCommMaxRanks,
              " entries, got ", idx.size());
    DSC_CHECK(slot.size() == idx.size() and count.size() == idx.size(), kOp,
              ": slot and count must have as many entries as idx, ", idx.size(), ", got ", slot.size(),
              " and ", count.size());
    Call call(kOp);
    ExpertRoutesLaunch launch{};
    launch.num_launched = static_cast<int>(idx.size());
    for (size_t i = 0; i < idx.size(); ++i) {
        const auto idx_TK = call.read<2>("idx", idx[i], kInt32);
        const auto [num_tokens, num_topk] = idx_TK.shape;
        DSC_CHECK(num_tokens <= kCommMaxTokens, kOp, ": idx must have at most ", kCommMaxTokens,
                  " rows, got ", num_tokens);
        const auto slot_TR = call.read<2>("slot", slot[i], kInt32, {num_tokens, kAnySize});
        const int64_t num_ranks = slot_TR.shape[1];
        DSC_CHECK(num_ranks >= 1 and num_ranks <= kCommMaxRanks, kOp, ": slot must have 1 to ", kCommMaxRanks,
                  " columns, got ", num_ranks);
        DSC_CHECK(num_experts > 0 and num_experts % num_ranks == 0, kOp,
                  ": num_experts must be a positive multiple of the ", num_ranks, " ranks, got ",
                  num_experts);
        launch.params[i] = {.idx = idx_TK.as<const int32_t>(),
                            .slot = slot_TR.as<int32_t>(),
                            .count = call.read<1>("count", count[i], kInt32, {num_ranks}).as<int32_t>(),
                            .num_tokens = static_cast<int>(num_tokens),
                            .num_topk = static_cast<int>(num_topk),
                            .num_ranks = static_cast<int>(num_ranks),
                            .num_local_experts = static_cast<int>(num_experts / num_ranks)};
    }
    call.launch([&](cudaStream_t stream) { launch_expert_routes(launch, stream); });
}

// ---- dispatch ----

struct DispatchSent {
    const Tensors &x, &slot, &count;
    const MaybeTensors &idx, &weight;
};

void read_sent(const char* op, Reader& reader, const DispatchSent& sent, DispatchSendParams* params) {
    const size_t num_launched = reader.group().num_launched;
    check_length(op, "x", sent.x.size(), num_launched);
    check_length(op, "slot", sent.slot.size(), num_launched);
    check_length(op, "count", sent.count.size(), num_launched);
    check_optional(op, "idx", sent.idx, num_launched);
    check_optional(op, "weight", sent.weight, num_launched);
    for (size_t i = 0; i < num_launched; ++i) {
        const int num_tokens = reader.num_tokens("slot", sent.slot[i]);
        params[i] = {.x = reader.rows("x", sent.x[i], num_tokens),
                     .slot = reader.slots(sent.slot[i]),
                     .count = reader.counts(sent.count[i]),
                     .idx = reader.topk<const int32_t>("idx", sent.idx, i, num_tokens),
                     .weight = reader.topk<float>("weight", sent.weight, i, num_tokens),
                     .num_tokens = num_tokens};
    }
}

struct DispatchReceived {
    const Tensors &x, &count;
    const MaybeTensors &idx, &weight;
    const RowBegins& row_begin;
    int num_local_experts;
};

void read_received(const char* op, Reader& reader, const DispatchReceived& received,
                   DispatchReceiveParams* params) {
    const size_t num_launched = reader.group().num_launched;
    check_length(op, "x", received.x.size(), num_launched);
    check_length(op, "count", received.count.size(), num_launched);
    check_optional(op, "idx", received.idx, num_launched);
    check_optional(op, "weight", received.weight, num_launched);
    check_optional(op, "row_begin", received.row_begin, num_launched);
    DSC_CHECK(not received.idx or received.num_local_experts > 0, op,
              ": idx needs num_local_experts > 0, got ", received.num_local_experts);
    const int most = std::numeric_limits<int>::max() / kCommMaxRanks;
    DSC_CHECK(received.num_local_experts <= most, op, ": num_local_experts must be at most ", most, ", got ",
              received.num_local_experts);
    for (size_t i = 0; i < num_launched; ++i) {
        DispatchReceiveParams& rank = params[i];
        const int64_t num_rows =
            read_row_begin(op, reader.group().shape, received.row_begin, i, rank.row_begin);
        rank.x = reader.rows("x", received.x[i], num_rows);
        rank.count = reader.counts(received.count[i]);
        rank.idx = reader.topk<int32_t>("idx", received.idx, i, num_rows);
        rank.weight = reader.topk<float>("weight", received.weight, i, num_rows);
        rank.num_local_experts = received.num_local_experts;
    }
}

void dispatch_send(const Buffers& buffers, const Tensors& x, const Tensors& slot, const Tensors& count,
                   const MaybeTensors& idx, const MaybeTensors& weight) {
    constexpr const char* kOp = "dispatch_send";
    Reader reader(kOp, buffers);
    CommLaunch<DispatchSendParams> launch{};
    read_sent(kOp, reader, {x, slot, count, idx, weight}, launch.params);
    reader.launch(launch, launch_dispatch_send);
}

void dispatch_counts(const Buffers& buffers, const Tensors& count) {
    constexpr const char* kOp = "dispatch_counts";
    Reader reader(kOp, buffers);
    check_length(kOp, "count", count.size(), buffers.size());
    CommLaunch<DispatchCountsParams> launch{};
    for (size_t i = 0; i < buffers.size(); ++i) launch.params[i].count = reader.counts(count[i]);
    reader.launch(launch, [](const auto& filled, const CommSettings&, cudaStream_t stream) {
        launch_dispatch_counts(filled, stream);
    });
}

void dispatch_receive(const Buffers& buffers, const Tensors& x, const Tensors& count, const MaybeTensors& idx,
                      const MaybeTensors& weight, const RowBegins& row_begin, int num_local_experts) {
    constexpr const char* kOp = "dispatch_receive";
    Reader reader(kOp, buffers);
    CommLaunch<DispatchReceiveParams> launch{};
    read_received(kOp, reader, {x, count, idx, weight, row_begin, num_local_experts}, launch.params);
    reader.launch(launch, launch_dispatch_receive);
}

using DispatchSentTuple = std::tuple<Tensors, Tensors, Tensors, MaybeTensors, MaybeTensors>;
using DispatchReceivedTuple = std::tuple<Tensors, Tensors, MaybeTensors, MaybeTensors, RowBegins, int>;

void dispatch_together(const Buffers& buffers, const DispatchSentTuple& sent,
                       const DispatchReceivedTuple& received) {
    constexpr const char* kOp = "dispatch_together";
    Reader reader(kOp, buffers);
    DispatchTogether launch{};
    const auto& [x, slot, count, idx, weight] = sent;
    read_sent(kOp, reader, {x, slot, count, idx, weight}, launch.sends);
    const auto& [rows, counts, experts, weights, row_begin, num_local_experts] = received;
    read_received(kOp, reader, {rows, counts, experts, weights, row_begin, num_local_experts},
                  launch.receives);
    reader.launch(launch, launch_dispatch_together);
}

// ---- combine ----

struct CombineSent {
    const Tensors &y, &count;
    const MaybeTensors& weight;
    const RowBegins& row_begin;
};

void read_sent(const char* op, Reader& reader, const CombineSent& sent, CombineSendParams* params) {
    const size_t num_launched = reader.group().num_launched;
    check_length(op, "y", sent.y.size(), num_launched);
    check_length(op, "count", sent.count.size(), num_launched);
    check_optional(op, "weight", sent.weight, num_launched);
    check_optional(op, "row_begin", sent.row_begin, num_launched);
    for (size_t i = 0; i < num_launched; ++i) {
        CombineSendParams& rank = params[i];
        const int64_t num_rows = read_row_begin(op, reader.group().shape, sent.row_begin, i, rank.row_begin);
        rank.y = reader.rows("y", sent.y[i], num_rows);
        rank.count = reader.counts(sent.count[i]);
        rank.weight = reader.topk<float>("weight", sent.weight, i, num_rows);
    }
}

struct CombineReceived {
    const Tensors &out, &slot, &count;
    const MaybeTensors& weight;
};

void read_received(const char* op, Reader& reader, const CombineReceived& received,
                   CombineReceiveParams* params) {
    const size_t num_launched = reader.group().num_launched;
    check_length(op, "out", received.out.size(), num_launched);
    check_length(op, "slot", received.slot.size(), num_launched);
    check_length(op, "count", received.count.size(), num_launched);
    check_optional(op, "weight", received.weight, num_launched);
    for (size_t i = 0; i < num_launched; ++i) {
        const int num_tokens = reader.num_tokens("slot", received.slot[i]);
        params[i] = {.out = reader.rows("out", received.out[i], num_tokens),
                     .weight = reader.topk<float>("weight", received.weight, i, num_tokens),
                     .slot = reader.slots(received.slot[i]),
                     .count = reader.counts(received.count[i]),
                     .num_tokens = num_tokens};
    }
}

void combine_send(const Buffers& buffers, const Tensors& y, const Tensors& count, const MaybeTensors& weight,
                  const RowBegins& row_begin) {
    constexpr const char* kOp = "combine_send";
    Reader reader(kOp, buffers);
    CommLaunch<CombineSendParams> launch{};
    read_sent(kOp, reader, CombineSent{y, count, weight, row_begin}, launch.params);
    reader.launch(launch, launch_combine_send);
}

void combine_receive(const Buffers& buffers, const Tensors& out, const Tensors& slot, const Tensors& count,
                     const MaybeTensors& weight) {
    constexpr const char* kOp = "combine_receive";
    Reader reader(kOp, buffers);
    CommLaunch<CombineReceiveParams> launch{};
    read_received(kOp, reader, CombineReceived{out, slot, count, weight}, launch.params);
    reader.launch(launch, [&](const auto& filled, const CommSettings& settings, cudaStream_t stream) {
        launch_combine_receive(filled, reader.dtype(), settings, stream);
    });
}

using CombineSentTuple = std::tuple<Tensors, Tensors, MaybeTensors, RowBegins>;
using CombineReceivedTuple = std::tuple<Tensors, Tensors, Tensors, MaybeTensors>;

void combine_together(const Buffers& buffers, const CombineSentTuple& sent,
                      const CombineReceivedTuple& received) {
    constexpr const char* kOp = "combine_together";
    Reader reader(kOp, buffers);
    CombineTogether launch{};
    const auto& [y, counts, weights, row_begin] = sent;
    read_sent(kOp, reader, CombineSent{y, counts, weights, row_begin}, launch.sends);
    const auto& [out, slot, count, weight] = received;
    read_received(kOp, reader, CombineReceived{out, slot, count, weight}, launch.receives);
    reader.launch(launch, [&](const auto& filled, const CommSettings& settings, cudaStream_t stream) {
        launch_combine_together(filled, reader.dtype(), settings, stream);
    });
}

}  // namespace
}  // namespace bind

void register_comm(py::module_& module) {
    const auto none = py::none();
    module.def("expert_routes", bind::expert_routes, py::arg("idx"), py::arg("slot"), py::arg("count"),
               py::arg("num_experts"));
    module.def("dispatch_send", bind::dispatch_send, py::arg("buffers"), py::arg("x"), py::arg("slot"),
               py::arg("count"), py::arg("idx") = none, py::arg("weight") = none);
    module.def("dispatch_counts", bind::dispatch_counts, py::arg("buffers"), py::arg("count"));
    module.def("dispatch_receive", bind::dispatch_receive, py::arg("buffers"), py::arg("x"), py::arg("count"),
               py::arg("idx") = none, py::arg("weight") = none, py::arg("row_begin") = none,
               py::arg("num_local_experts") = 0);
    module.def("dispatch_together", bind::dispatch_together, py::arg("buffers"), py::arg("sent"),
               py::arg("received"));
    module.def("combine_send", bind::combine_send, py::arg("buffers"), py::arg("y"), py::arg("count"),
               py::arg("weight") = none, py::arg("row_begin") = none);
    module.def("combine_receive", bind::combine_receive, py::arg("buffers"), py::arg("out"), py::arg("slot"),
               py::arg("count"), py::arg("weight") = none);
    module.def("combine_together", bind::combine_together, py::arg("buffers"), py::arg("sent"),
               py::arg("received"));
}

}  // namespace dsc
