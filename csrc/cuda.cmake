# Decides whether kernels are built, and builds them: DSCODER_HAS_CUDA, and the library dscoder_kernels.

set(DSCODER_MIN_NVCC 12.3)  # the first with every sm_90a instruction the kernels use
set(DSCODER_WITHOUT_CUDA "or set DSCODER_CUDA=off to build without kernels")

# What a kernel's call says in a build without kernels.
string(CONCAT DSCODER_ABSENT_HINT "this dscoder was built without CUDA kernels. To build them, put nvcc >= ${DSCODER_MIN_NVCC} "
    "(the CUDA toolkit) into PATH and run in dscoder's source tree: DSCODER_CUDA=on pip install --force-reinstall --no-deps .")

set(DSCODER_HAS_CUDA OFF)
string(TOLOWER "${DSCODER_CUDA}" DSCODER_CUDA)
if(NOT DSCODER_CUDA MATCHES "^(auto|on|off)$")
    message(FATAL_ERROR "DSCODER_CUDA must be auto, on or off, got '${DSCODER_CUDA}'")
endif()
if(DSCODER_CUDA STREQUAL "off")
    message(STATUS "dscoder: building without kernels (DSCODER_CUDA=off)")
    return()
endif()

# The architectures asked for, as a list.
macro(dscoder_read_archs)
    string(REGEX REPLACE "[, ]+" ";" DSCODER_CUDA_ARCHS "${DSCODER_CUDA_ARCHS}")
    foreach(arch IN LISTS DSCODER_CUDA_ARCHS)
        if(NOT arch MATCHES "^(8[0-9]|90a)$")
            message(FATAL_ERROR "DSCODER_CUDA_ARCHS may hold 80 to 89 and 90a, got '${arch}'")
        endif()
    endforeach()
    list(JOIN DSCODER_CUDA_ARCHS " " archs)
endmacro()

# Nowhere but where the user points: what is built must not depend on what lies about.
find_program(nvcc NAMES "$ENV{CUDACXX}" nvcc NO_CACHE NO_DEFAULT_PATH
    HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" PATHS ENV PATH)
include(csrc/kernel_objects.cmake)
if(DSCODER_KERNEL_OBJECTS)
    dscoder_read_archs()
    dscoder_link_objects("${DSCODER_KERNEL_OBJECTS}" "${nvcc}" "${archs}")
    set(DSCODER_HAS_CUDA ON)
    message(STATUS "dscoder: linking kernels for ${DSCODER_CUDA_ARCHS} compiled by nvcc ${DSCODER_NVCC_VERSION} in ${objects}")
    return()
endif()
if(NOT nvcc)
    if(DSCODER_CUDA STREQUAL "on")
        message(FATAL_ERROR "DSCODER_CUDA=on, but there is no nvcc: not in PATH, CUDACXX or CUDA_HOME. "
            "Install the CUDA toolkit (>= ${DSCODER_MIN_NVCC}), ${DSCODER_WITHOUT_CUDA}.")
    endif()
    message(STATUS "dscoder: building without kernels (no nvcc found)")
    return()
endif()

execute_process(COMMAND ${nvcc} --version
    OUTPUT_VARIABLE nvcc_output ERROR_VARIABLE nvcc_output RESULT_VARIABLE nvcc_status)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${nvcc_output}")
set(DSCODER_NVCC_VERSION "${CMAKE_MATCH_1}")
if(NOT nvcc_status EQUAL 0 OR NOT DSCODER_NVCC_VERSION)
    message(FATAL_ERROR "${nvcc} does not work: '${nvcc} --version' ended with '${nvcc_status}' and said "
        "'${nvcc_output}'. Repair the CUDA toolkit, ${DSCODER_WITHOUT_CUDA}.")
endif()
if(DSCODER_NVCC_VERSION VERSION_LESS DSCODER_MIN_NVCC)
    message(FATAL_ERROR "${nvcc} is of CUDA ${DSCODER_NVCC_VERSION}, the kernels need "
        ">= ${DSCODER_MIN_NVCC}. Install a newer CUDA toolkit, ${DSCODER_WITHOUT_CUDA}.")
endif()

dscoder_read_archs()
set(DSCODER_HAS_CUDA ON)
message(STATUS "dscoder: building kernels for ${DSCODER_CUDA_ARCHS} with ${nvcc} ${DSCODER_NVCC_VERSION}")
set(CMAKE_CUDA_COMPILER ${nvcc})
set(CMAKE_CUDA_ARCHITECTURES OFF)  # each file names its own below
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# The families that stand on CuTe need its headers; while a build has none of their kernels, nothing is looked for.
set(cutlass_kernels ${DSCODER_KERNELS})
list(FILTER cutlass_kernels INCLUDE REGEX "^csrc/(gemm|attention)/")
if(cutlass_kernels)
    include(third_party/cutlass.cmake)
endif()

# The static runtime finds the driver when it is first used: the extension imports on a machine without one.
add_library(dscoder_kernels STATIC ${DSCODER_KERNELS})
target_include_directories(dscoder_kernels PUBLIC csrc)
target_link_libraries(dscoder_kernels PUBLIC CUDA::cudart_static)
if(cutlass_kernels)
    target_link_libraries(dscoder_kernels PRIVATE cutlass)
endif()
target_compile_options(dscoder_kernels PRIVATE -Xcompiler=-Wall,-Wextra --Werror=cross-execution-space-call)
target_compile_definitions(dscoder_kernels PUBLIC
    DSC_CUDA_ARCHS="${archs}" DSC_CUDA_VERSION="${CUDAToolkit_VERSION}")

foreach(kernel IN LISTS DSCODER_KERNELS)
    set(flags "")
    foreach(arch IN LISTS DSCODER_CUDA_ARCHS)
        string(SUBSTRING ${arch} 0 1 generation)
        if(NOT kernel MATCHES "_sm[89]0\\.cu$" OR kernel MATCHES "_sm${generation}0\\.cu$")
            list(APPEND flags "-gencode=arch=compute_${arch},code=sm_${arch}")
        endif()
    endforeach()
    if(NOT flags)  # none of its generation was asked for: an object with nothing for the device
        set(flags "-DDSC_NO_DEVICE_CODE")
    endif()
    set_source_files_properties(${kernel} PROPERTIES COMPILE_OPTIONS "${flags}")
endforeach()

dscoder_add_stamp("${CUDAToolkit_VERSION}" "${archs}")
