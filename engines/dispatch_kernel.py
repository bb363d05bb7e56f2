"""The kernels that turn policy outputs into values of conditional nodes, compiled by NVRTC to machine code.

Machine code (CUBIN) for the exact architecture, never PTX: a driver refuses PTX of a newer CUDA minor version, while
CUBIN loads across the minor versions of one major. Compiling needs no driver; `cudaGraphSetConditional` stays
unresolved in the CUBIN and is bound by the driver when it loads the module.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from bdtool.errors import BackendError
from engines.dispatch import MAX_BLOCKS
from export.packages import install_command

KERNEL_NAME, LOOKUP_NAME = "bd_dispatch", "bd_lookup"
N_THREADS = MAX_BLOCKS  # of each kernel: each reads what is known of one block, the first then works out the rest

# Declared by hand: including cuda_device_runtime_api.h would need the toolkit's headers and relocatable device code.
# One thread sets all: doing so from several at once is undefined. It would wait for each of its reads in turn, so that
# all threads read beforehand.
SOURCE = """
typedef unsigned long long u64;
extern "C" __device__ void cudaGraphSetConditional(u64 handle, unsigned int value);
struct Handles { u64 h[MAX_BLOCKS]; };

// 0, 1, or 2 where the probability is NaN, which drops
static __device__ unsigned int keep_of(float p, unsigned int forced, float threshold)
{
    if (forced) return forced == 1u;
    return p != p ? 2u : p >= threshold;
}

extern "C" __global__ void bd_dispatch(
    const float* __restrict__ probability,           // [n_blocks], of one image
    const unsigned char* __restrict__ has_shortcut,  // [n_blocks]
    const unsigned char* __restrict__ force,         // [n_blocks], 0 policy, 1 keep, 2 drop; may be null
    int n_blocks, float threshold, int blocks_per_switch,
    unsigned char* __restrict__ kept,                // [n_blocks], out: 0, 1, or 2 where the probability is NaN
    const Handles switches)                          // of n_blocks / blocks_per_switch, rounded up
{
    __shared__ unsigned char keep[MAX_BLOCKS], runs[MAX_BLOCKS];
    for (int k = threadIdx.x; k < n_blocks; k += blockDim.x) {
        keep[k] = keep_of(probability[k], force ? force[k] : 0u, threshold);
        runs[k] = keep[k] == 1u || has_shortcut[k];
        kept[k] = keep[k];
    }
    __syncthreads();
    if (threadIdx.x) return;
    unsigned int side = 0;  // 0: the activation is in buffer A, 1: in B
    for (int first = 0, index = 0; first < n_blocks; first += blocks_per_switch, ++index) {
        unsigned int bits = 0, moves = 0;
        for (int i = 0; i < blocks_per_switch && first + i < n_blocks; ++i) {
            bits |= (keep[first + i] == 1u) << i;
            moves ^= runs[first + i];
        }
        cudaGraphSetConditional(switches.h[index], 2u * bits + side);
        side ^= moves;
    }
}

extern "C" __global__ void bd_lookup(
    const float* __restrict__ probability,           // [n_blocks], of one image
    const unsigned char* __restrict__ force,         // [n_blocks], 0 policy, 1 keep, 2 drop; may be null
    int n_blocks, float threshold,
    const u64* __restrict__ masks,                   // [n_masks][2], ascending; block 0 is the lowest bit
    int n_masks,
    unsigned char* __restrict__ kept,                // [n_blocks], out: 0, 1, or 2 where the probability is NaN
    u64 path)                                        // set to the row of the image's mask, or to n_masks
{
    __shared__ unsigned char keep[MAX_BLOCKS];
    for (int k = threadIdx.x; k < n_blocks; k += blockDim.x) {
        keep[k] = keep_of(probability[k], force ? force[k] : 0u, threshold);
        kept[k] = keep[k];
    }
    __syncthreads();
    if (threadIdx.x) return;
    u64 mask[2] = {0, 0};
    for (int k = 0; k < n_blocks; ++k)
        if (keep[k] == 1u) mask[k / 64] |= 1ull << (k % 64);
    int first = 0, end = n_masks;
    while (first < end) {
        const int middle = (first + end) / 2;
        const u64 low = masks[2 * middle], high = masks[2 * middle + 1];
        if (low < mask[0] || (low == mask[0] && high < mask[1])) first = middle + 1;
        else end = middle;
    }
    const bool found = first < n_masks && masks[2 * first] == mask[0] && masks[2 * first + 1] == mask[1];
    cudaGraphSetConditional(path, found ? first : n_masks);
}
""".replace("MAX_BLOCKS", str(MAX_BLOCKS))


@lru_cache(maxsize=8)  # it takes some tenths of a second, for each graph that decides; what it raises is not kept
def cubin_from_source(source: str, sm: int) -> bytes:
    """Compile CUDA C++ to machine code for compute capability `sm` (89 is 8.9), once; no driver is needed.

    Raises:
        BackendError: NVRTC is not installed, does not know the architecture, or refuses the source (quoted).
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as exc:
        raise BackendError(
            f"compiling GPU kernels needs cuda-bindings and NVRTC ({exc}): {install_command('cuda')}"
        ) from exc
    try:
        return _compile(nvrtc, source, sm)
    except RuntimeError as exc:  # the bindings look for the library at the first call
        raise BackendError(f"NVRTC's library cannot be loaded ({exc}): {install_command('cuda')}") from exc


def _compile(nvrtc: Any, source: str, sm: int) -> bytes:
    known = _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    if sm not in known:
        raise BackendError(f"NVRTC compiles for the compute capabilities {', '.join(map(str, known))}, not for {sm}")
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"bdtool.cu", 0, [], []))
    try:
        options = [f"--gpu-architecture=sm_{sm}".encode(), b"--std=c++17"]
        [status] = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            words = " ".join(log.decode(errors="replace").rstrip("\0").split())
            raise BackendError(f"NVRTC refuses a kernel for compute capability {sm}: {words}")
        cubin: bytes = b" " * _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))  # writes into the bytes, as its documentation says
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC fails: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if values else None
