// One source, two machines: nvcc compiles the kernels for a GPU, g++ compiles the same files and *runs* them.
//
// On the host each CUDA thread of a block is a fiber (ucontext), blocks run one after the other, and whatever lets CUDA
// threads meet (__syncthreads, __syncwarp, shuffles, mma) is a rendezvous: a fiber waits there until its warp or
// block has arrived. The machine is made to be unkind, so that a wrong kernel gives a wrong result here too:
//   - shared memory is a fresh allocation of exactly the size asked for, filled with NaN patterns, for each block;
//   - cp.async ruins its target when it is issued and fills it when it is waited for: a missing wait shows, and so does
//     a copy into a buffer that is still read;
//   - a warp runs as far ahead of the others as it can, and kb_simt_set chooses the order of threads (forwards,
//     backwards, shuffled): a missing __syncthreads shows;
//   - threads of a warp at two different collectives, a collective that some never reach, a misaligned access of 16
//     bytes: the launch returns an error, and stderr says which thread stood where.
// What it does not show: timing, occupancy, bank conflicts, and the order in which a tensor core adds.
//
// Rules for kernels: shared memory is dynamic (kb::shared<T>()), blocks are one-dimensional and a multiple of 32
// threads, collectives take the full mask, and inline PTX lives in a small wrapper beside its host version (here, or in
// numbers.cuh).
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define KB_UNROLL _Pragma("unroll")
#else
#include "simt_host.h"
#define KB_UNROLL
#endif

namespace kb {

constexpr unsigned everyone = 0xffffffffu;  // the mask of all lanes

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ T *shared() {
#if defined(__CUDACC__)
    extern __shared__ __align__(16) unsigned char kb_shared_bytes[];
    return reinterpret_cast<T *>(kb_shared_bytes);
#else
    return reinterpret_cast<T *>(simt::block->shared_begin);
#endif
}

// ---- 16 bytes of read-only memory -----------------------------------------------------------------------------

// Read once (weights): past L1, so that what is reused (activations, scales) stays there.
__device__ __forceinline__ uint4 load_once(const void *address) {
#if defined(__CUDACC__)
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
#else
    return *static_cast<const uint4 *>(simt::aligned(address, 16));
#endif
}

// Read again soon (activations): through L1.
__device__ __forceinline__ uint4 load_again(const void *address) {
#if defined(__CUDACC__)
    return __ldg(static_cast<const uint4 *>(address));
#else
    return *static_cast<const uint4 *>(simt::aligned(address, 16));
#endif
}

// ---- asynchronous copies, sm_80 and up ------------------------------------------------------------------------

// 16 bytes of shared memory from `bytes` (0..16) bytes of global memory, the rest zero. With 0 nothing is read.
__device__ __forceinline__ void copy_async(void *to_shared, const void *from_global, int bytes) {
#if defined(__CUDACC__)
#if __CUDA_ARCH__ >= 800
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from_global), "r"(bytes) : "memory");
#endif
#else
    simt::copy_issue(to_shared, from_global, bytes);
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
#if defined(__CUDACC__)
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
#else
    simt::copy_commit();
#endif
}

// Waits until at most `left` of this thread's youngest groups are still under way. Other threads' copies are seen only
// after a __syncthreads that follows *their* wait.
template <int left>
__device__ __forceinline__ void copy_wait() {
#if defined(__CUDACC__)
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
#else
    simt::copy_wait(left);
#endif
}

// ---- the device -----------------------------------------------------------------------------------------------

// Streaming multiprocessors of the current device; 0 where it cannot be asked.
inline int processors() {
#if defined(__CUDACC__)
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
    return count;
#else
    return simt::processors;
#endif
}

// Compute capability of the current device times ten (89: Ada); 0 where it cannot be asked.
inline int architecture() {
#if defined(__CUDACC__)
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return 0;
    return 10 * major + minor;
#else
    return simt::architecture;
#endif
}

}  // namespace kb

// Starts a kernel on `stream` (a cudaStream_t; ignored on the host, where the call returns when the kernel has ended),
// with at most the 48 KiB of shared memory that every card gives a block unasked.
// Returns 0, or the error: a cudaError_t, or on the host 1 with the reason on stderr.
template <class... Wanted, class... Given>
int kb_launch(void (*kernel)(Wanted...), dim3 grid, int threads, size_t shared_bytes, void *stream, Given... given) {
#if defined(__CUDACC__)
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(Wanted(given)...);
    return int(cudaGetLastError());
#else
    (void)stream;
    return kb::simt::run(grid, unsigned(threads), shared_bytes, [&] { kernel(Wanted(given)...); });
#endif
}
