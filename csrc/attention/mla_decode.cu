// Latent decoding over a paged cache (attention.h): the kernel of the device's generation over the plan's
// parts, then the one that adds up what parts share. The two follow each other, and the plan's kernel ahead
// of them, without the host in between.
#include <bit>

#include "attention/mla_decode_combine.cuh"
#include "attention/mla_decode_sm80.cuh"
#include "attention/mla_decode_sm90.h"
#include "core/check.h"
#include "core/launch.h"

namespace dsc {
namespace {

struct DecodeDevice {
    int shared_per_block;  // bytes
    bool is_sm90;
};

// The host executor is an A100.
DecodeDevice current_decode_device() {
#ifdef DSC_HOST_EXECUTOR
    return {.shared_per_block = 163 * 1024, .is_sm90 = false};
#else
    const int device = current_device();
    return {.shared_per_block = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device),
            .is_sm90 = device_attribute<cudaDevAttrComputeCapabilityMajor>(device) == 9};
#endif
}

template <typename T>
void launch_sm80(const MlaDecodeParams& p, const DecodeDevice& device, cudaStream_t stream) {
    const DecodeSm80Plan plan = plan_decode_sm80(int64_t{p.num_new} * p.num_heads, device.shared_per_block);
    const dim3 grid(static_cast<unsigned>(plan.num_tiles), static_cast<unsigned>(p.num_parts));
    const int page_shift = std::countr_zero(static_cast<unsigned>(p.page_size));
    const auto launch_tile = [&](auto kernel) {
        launch_overlapped(kernel, grid, dim3(kDecodeSm80Threads), static_cast<size_t>(plan.shared_bytes),
                          stream, p, plan.num_stages, page_shift);
    };
    if (plan.tile_rows == 16) return launch_tile(decode::mla_decode_sm80_kernel<decode::Tile<T, 16>>);
    if (plan.tile_rows == 32) return launch_tile(decode::mla_decode_sm80_kernel<decode::Tile<T, 32>>);
    launch_tile(decode::mla_decode_sm80_kernel<decode::Tile<T, 64>>);
}

template <typename T>
void launch_combine(const MlaDecodeParams& p, cudaStream_t stream) {
    const int num_row_blocks = ceil_div(p.num_new * p.num_heads, combine::kBlockRows);
    const dim3 grid(static_cast<unsigned>(num_row_blocks), static_cast<unsigned>(p.num_parts));
    launch_overlapped(combine::mla_decode_combine_kernel<T>, grid, dim3(combine::kNumThreads), 0, stream, p);
}

template <typename Function>
void with_half_type(FloatType type, const Function& function) {
    if (type == FloatType::kBfloat16) return function.template operator()<__nv_bfloat16>();
    function.template operator()<__half>();
}

}  // namespace

void launch_mla_decode(const MlaDecodeParams& p, DecodeArch arch, cudaStream_t stream) {
    constexpr int kMostParts = 65535;  // blocks that a grid may have in y
    DSC_CHECK(p.page_size == 16 or p.page_size == 32 or p.page_size == 64 or p.page_size == 128,
              "mla_decode: pages must have 16, 32, 64 or 128 rows, got ", p.page_size);
    DSC_CHECK(p.num_parts >= 1 and p.num_parts <= kMostParts, "mla_decode: a plan has 1 to ", kMostParts,
              " parts, got ", p.num_parts);
    if (p.num_sequences == 0 or p.num_new == 0) return;
    const DecodeDevice device = current_decode_device();
    const bool can_sm90 = device.is_sm90 and has_mla_decode_sm90();
    const bool wants_sm90 =
        arch != DecodeArch::kSm80 and (arch != DecodeArch::kAuto or kMlaDecodeSm90IsProven);
    DSC_CHECK(can_sm90 or not wants_sm90 or arch == DecodeArch::kAuto,
              "mla_decode: arch sm90 needs compute capability 9.0 and a build with kernels for it");
    with_half_type(p.dtype, [&]<typename T>() {
        if (wants_sm90 and can_sm90) {
            launch_mla_decode_sm90(p, stream, arch == DecodeArch::kAuto ? DecodeArch::kSm90 : arch);
        } else {
            launch_sm80<T>(p, device, stream);
        }
        if (p.num_parts > 1) launch_combine<T>(p, stream);
    });
}

}  // namespace dsc
