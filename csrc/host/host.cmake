# The kernels compiled for the CPU, twice: build target host_plain, and host_sanitized with AddressSanitizer and
# UndefinedBehaviorSanitizer. Each leaves in <build>/plain or <build>/sanitized: libdsc_host, the executor; _C_host,
# the kernels and their bindings; _host_kernels, the kernels that test the executor itself.

if(DSCODER_HAS_CUDA)
    message(FATAL_ERROR "DSCODER_HOST_EXECUTOR=ON compiles the .cu files as C++: it needs DSCODER_CUDA=off")
endif()

# Tensor maps and wgmma are beyond the executor, so *_sm90.cu stay with nvcc; plain bulk copies, which comm's are made
# of, it plays.
set(host_kernels ${DSCODER_KERNELS})
list(FILTER host_kernels EXCLUDE REGEX "csrc/(gemm|attention)/.*_sm90\\.cu$")
set(host_test_kernels tests/csrc/kernels.cu tests/csrc/ptx_kernels.cu tests/csrc/bulk_kernels.cu
    tests/csrc/faults.cu)
set_source_files_properties(${host_kernels} ${host_test_kernels} PROPERTIES LANGUAGE CXX)

# The bindings are compiled once, for both.
function(dscoder_host_bindings target)
    add_library(${target} OBJECT EXCLUDE_FROM_ALL ${ARGN})
    target_link_libraries(${target} PRIVATE pybind11::module)
    target_include_directories(${target} PRIVATE csrc)
    target_compile_definitions(${target} PRIVATE DSC_HOST_EXECUTOR)
    target_compile_options(${target} PRIVATE -Wall -Wextra -O1)
endfunction()
dscoder_host_bindings(host_bindings ${DSCODER_KERNEL_BINDINGS} ${DSCODER_BINDINGS})
target_compile_definitions(host_bindings PRIVATE ${DSCODER_MODULE_DEFINITIONS} DSC_MODULE=_C_host)
dscoder_host_bindings(host_test_bindings tests/csrc/module.cpp csrc/bind/tensor.cpp csrc/bind/device.cpp)

function(dscoder_host_variant name)
    set(executor host_executor_${name})
    add_library(${executor} SHARED EXCLUDE_FROM_ALL
        csrc/host/bulk.cpp csrc/host/copies.cpp csrc/host/executor.cpp csrc/host/fiber.cpp csrc/host/grid.cpp
        csrc/host/report.cpp)
    set_target_properties(${executor} PROPERTIES OUTPUT_NAME dsc_host CXX_VISIBILITY_PRESET default)
    target_include_directories(${executor} PUBLIC csrc)
    target_compile_definitions(${executor} PUBLIC DSC_HOST_EXECUTOR)
    # Device code aliases at will, and keeps its assertions.
    target_compile_options(${executor} PUBLIC -Wall -Wextra -fno-strict-aliasing -UNDEBUG ${ARGN})
    target_link_options(${executor} PUBLIC ${ARGN})

    pybind11_add_module(host_ops_${name} NO_EXTRAS EXCLUDE_FROM_ALL
        ${host_kernels} $<TARGET_OBJECTS:host_bindings>)
    set_target_properties(host_ops_${name} PROPERTIES OUTPUT_NAME _C_host)
    pybind11_add_module(host_tests_${name} NO_EXTRAS EXCLUDE_FROM_ALL
        ${host_test_kernels} $<TARGET_OBJECTS:host_test_bindings>)
    set_target_properties(host_tests_${name} PROPERTIES OUTPUT_NAME _host_kernels)
    target_link_libraries(host_ops_${name} PRIVATE ${executor})
    target_link_libraries(host_tests_${name} PRIVATE ${executor})
    set_target_properties(${executor} host_ops_${name} host_tests_${name} PROPERTIES
        LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/${name})
    add_custom_target(host_${name} DEPENDS host_ops_${name} host_tests_${name})
endfunction()
dscoder_host_variant(plain)
dscoder_host_variant(sanitized -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g
    -fno-omit-frame-pointer)
