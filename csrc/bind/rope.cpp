// The rotary family (attention.h): checks what memory safety asks for, fills the params by name, launches on
// the caller's stream. What the arguments mean to each other is checked in dscoder.ops; outputs come in
// allocated. Heads, rows and tokens may lie apart in what is read.
#include <pybind11/stl.h>

#include <array>

#include "attention/attention.h"
#include "bind/tensor.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

// Tables of angles, and who turns by which.
struct AnglesRead {
    const float *cos, *sin;
    const int64_t* positions;
    int64_t num_positions;
};

AnglesRead read_angles(Call& call, py::handle cos, py::handle sin, py::handle positions, int64_t num_tokens,
                       int64_t width) {
    const auto cos_Lf = call.read<2>("cos", cos, kFloat32, {kAnySize, width / 2});
    const auto sin_Lf = call.read<2>("sin", sin, kFloat32, cos_Lf.shape);
    const auto positions_T = call.read<1>("positions", positions, kInt64, {num_tokens});
    return {cos_Lf.as<const float>(), sin_Lf.as<const float>(), positions_T.as<const int64_t>(),
            cos_Lf.shape[0]};
}

void rope_forward(py::handle q, py::handle k, py::handle cos, py::handle sin, py::handle positions,
                  py::handle q_out, py::handle k_out, bool interleaved, bool inverse) {
    Call call("rope");
    const FloatType type = call.float_type_of("q", q);
    const auto q_THr = call.read_strided<3>("q", q, dtype_of(type));
    const auto [num_tokens, num_q_heads, width] = q_THr.shape;
    const auto k_TGr = call.read_strided<3>("k", k, dtype_of(type), {num_tokens, kAnySize, width});
    const auto q_out_THr = call.read<3>("q_out", q_out, dtype_of(type), q_THr.shape);
    const auto k_out_TGr = call.read<3>("k_out", k_out, dtype_of(type), k_TGr.shape);
    const AnglesRead angles = read_angles(call, cos, sin, positions, num_tokens, width);
    const RopeParams params{.q = q_THr.data,
                            .k = k_TGr.data,
                            .q_out = q_out_THr.data,
                            .k_out = k_out_TGr.data,
                            .cos = angles.cos,
                            .sin = angles.sin,
                            .positions = angles.positions,
                            .q_token_stride = q_THr.strides[0],
                            .q_head_stride = q_THr.strides[1],
                            .k_token_stride = k_TGr.strides[0],
                            .k_head_stride = k_TGr.strides[1],
                            .num_tokens = num_tokens,
                            .num_positions = angles.num_positions,
                            .num_q_heads = static_cast<int>(num_q_heads),
                            .num_k_heads = static_cast<int>(k_TGr.shape[1]),
                            .width = static_cast<int>(width),
                            .interleaved = interleaved,
                            .inverse = inverse,
                            .dtype = type};
    call.launch([&](cudaStream_t stream) { launch_rope(params, stream); });
}

// What latent_rope, its gradient and latent_append read of the latent, the norm's weight and the heads.
struct LatentRead {
    FloatType type;
    StridedArray<2> latent;
    const void* weight;
    bool is_weight_float32;
    int64_t num_tokens;
    int num_heads, nope_width, rope_width, latent_width;
};

// The norm's weight in the type of the latent, or in float32.
LatentRead read_latent(Call& call, const char* op, FloatType type, py::handle latent, py::handle weight,
                       const std::array<int64_t, 3>& query_shape) {
    const auto [num_tokens, num_heads, head_width] = query_shape;
    const auto latent_Td = call.read_strided<2>("latent", latent, dtype_of(type), {num_tokens, kAnySize});
    const FloatType weight_type = call.float_type_of("weight", weight);
    const auto weight_C =
        call.read<1>("weight", weight, dtype_of(weight_type == FloatType::kFloat32 ? weight_type : type));
    const int64_t latent_width = weight_C.shape[0], rope_width = latent_Td.shape[1] - latent_width;
    DSC_CHECK(latent_width > 0, op, ": weight must have at least 1 element, got 0");
    DSC_CHECK(rope_width >= 0 and rope_width <= head_width, op,
              ": latent must be as wide as weight and at most ", head_width, " more, got ",
              latent_Td.shape[1], " and ", latent_width);
    return {.type = type,
            .latent = latent_Td,
            .weight = weight_C.data,
            .is_weight_float32 = weight_type == FloatType::kFloat32,
            .num_tokens = num_tokens,
            .num_heads = static_cast<int>(num_heads),
            .nope_width = static_cast<int>(head_width - rope_width),
            .rope_width = static_cast<int>(rope_width),
            .latent_width = static_cast<int>(latent_width)};
}

// The fields that the params of both directions and of the append have in common.
template <typename Params>
void fill_latent(Params& params, const LatentRead& read, const AnglesRead& angles) {
    params.latent = read.latent.data;
    params.weight = read.weight;
    params.cos = angles.cos;
    params.sin = angles.sin;
    params.positions = angles.positions;
    params.latent_token_stride = read.latent.strides[0];
    params.num_tokens = read.num_tokens;
    params.num_positions = angles.num_positions;
    params.num_heads = read.num_heads;
    params.nope_width = read.nope_width;
    params.rope_width = read.rope_width;
    params.latent_width = read.latent_width;
    params.is_weight_float32 = read.is_weight_float32;
    params.dtype = read.type;
}

using Angles3 = std::array<py::object, 3>;  // cos, sin, positions

void latent_rope_forward(py::handle query, py::handle latent, py::handle weight, const Angles3& angles,
                         py::handle query_out, py::handle row_out, py::handle scale_out, float eps) {
    constexpr const char* kOp = "latent_rope";
    Call call(kOp);
    const FloatType type = call.float_type_of("query", query);
    const auto query_THd = call.read_strided<3>("query", query, dtype_of(type), 2);
    const LatentRead read = read_latent(call, kOp, type, latent, weight, query_THd.shape);
    const auto& [cos, sin, positions] = angles;
    LatentRopeParams params{};
    fill_latent(params, read, read_angles(call, cos, sin, positions, read.num_tokens, read.rope_width));
    params.query = query_THd.data;
    params.query_token_stride = query_THd.strides[0];
    params.query_out = call.read<3>("query_out", query_out, dtype_of(type), query_THd.shape).data;
    params.row_out = call.read<2>("row_out", row_out, dtype_of(type), read.latent.shape).data;
    params.scale_out = call.read<1>("scale_out", scale_out, kFloat32, {read.num_tokens}).as<float>();
    params.eps = eps;
    call.launch([&](cudaStream_t stream) { launch_latent_rope(params, stream); });
}

void latent_rope_backward(const std::array<py::object, 2>& grads, py::handle latent, py::handle weight,
                          py::handle scale, const Angles3& angles, py::handle grad_query_out,
                          py::handle grad_latent, const std::array<py::object, 2>& grad_weight) {
    constexpr const char* kOp = "latent_rope backward";
    Call call(kOp);
    const auto& [grad_query, grad_row] = grads;
    const FloatType type = call.float_type_of("grad_query", grad_query);
    const auto grad_query_THd = call.read<3>("grad_query", grad_query, dtype_of(type));
    const LatentRead read = read_latent(call, kOp, type, latent, weight, grad_query_THd.shape);
    const auto& [cos, sin, positions] = angles;
    const auto& [grad_weight_C, partial] = grad_weight;
    const std::array<int64_t, 1> weight_shape{read.latent_width};
    const int64_t num_partials = latent_rope_num_partials(read.num_tokens);
    LatentRopeBackwardParams params{};
    fill_latent(params, read, read_angles(call, cos, sin, positions, read.num_tokens, read.rope_width));
    params.grad_query = grad_query_THd.data;
    params.grad_row = call.read<2>("grad_row", grad_row, dtype_of(type), read.latent.shape).data;
    params.scale = call.read<1>("scale", scale, kFloat32, {read.num_tokens}).as<const float>();
    params.grad_query_out =
        call.read<3>("grad_query_out", grad_query_out, dtype_of(type), grad_query_THd.shape).data;
    params.grad_latent = call.read<2>("grad_latent", grad_latent, dtype_of(type), read.latent.shape).data;
    params.grad_weight = call.read<1>("grad_weight", grad_weight_C, kFloat32, weight_shape).as<float>();
    params.partial_weight =
        call.read<2>("partial_weight", partial, kFloat32, {num_partials, read.latent_width}).as<float>();
    params.num_partials = static_cast<int>(num_partials);
    call.launch([&](cudaStream_t stream) { launch_latent_rope_backward(params, stream); });
}

void latent_append_forward(py::handle query, py::handle latent, py::handle weight, const Angles3& angles,
                           py::handle slots, py::handle cache, py::handle query_out, float eps) {
    constexpr const char* kOp = "latent_append";
    Call call(kOp);
    const FloatType type = call.float_type_of("query", query);
    const auto query_THd = call.read_strided<3>("query", query, dtype_of(type), 2);
    const LatentRead read = read_latent(call, kOp, type, latent, weight, query_THd.shape);
    const auto& [cos, sin, positions] = angles;
    const int64_t width = read.latent.shape[1];
    LatentAppendParams params{};
    fill_latent(params, read, read_angles(call, cos, sin, positions, read.num_tokens, read.rope_width));
    const auto cache_PLd = call.read<3>("cache", cache, dtype_of(type), {kAnySize, kAnySize, width});
    params.query = query_THd.data;
    params.query_token_stride = query_THd.strides[0];
    params.query_out =
        call.read<3>("query_out", query_out, dtype_of(type), {read.num_tokens, read.num_heads, width}).data;
    params.cache = cache_PLd.data;
    params.num_slots = cache_PLd.shape[0] * cache_PLd.shape[1];
    params.slots = call.read<1>("slots", slots, kInt64, {read.num_tokens}).as<const int64_t>();
    params.eps = eps;
    call.launch([&](cudaStream_t stream) { launch_latent_append(params, stream); });
}

}  // namespace
}  // namespace bind

void register_rope(py::module_& module) {
    module.def("rope_forward", bind::rope_forward, py::arg("q"), py::arg("k"), py::arg("cos"), py::arg("sin"),
               py::arg("positions"), py::arg("q_out"), py::arg("k_out"), py::arg("interleaved"),
               py::arg("inverse"));
    module.def("latent_rope_num_partials", latent_rope_num_partials, py::arg("num_tokens"));
    module.def("latent_rope_forward", bind::latent_rope_forward, py::arg("query"), py::arg("latent"),
               py::arg("weight"), py::arg("angles"), py::arg("query_out"), py::arg("row_out"),
               py::arg("scale_out"), py::arg("eps"));
    module.def("latent_rope_backward", bind::latent_rope_backward, py::arg("grads"), py::arg("latent"),
               py::arg("weight"), py::arg("scale"), py::arg("angles"), py::arg("grad_query_out"),
               py::arg("grad_latent"), py::arg("grad_weight"));
    module.def("latent_append_forward", bind::latent_append_forward, py::arg("query"), py::arg("latent"),
               py::arg("weight"), py::arg("angles"), py::arg("slots"), py::arg("cache"), py::arg("query_out"),
               py::arg("eps"));
}

}  // namespace dsc
