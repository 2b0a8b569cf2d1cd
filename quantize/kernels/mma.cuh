// The tensor cores' product, mma.sync.m16n8k16, sm_80 and up.
//
// d[16, 8] += a[16, 16] b[16, 8] in float32, by the 32 lanes of a warp together. Of lane l, with g = l / 4 and c = l %
// 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"; each register of a and b is two neighbours in k, the lower half
// first):
//
//     a[0] = (row g, k 2c)    a[1] = (row g + 8, k 2c)    a[2] = (row g, k 2c + 8)    a[3] = (row g + 8, k 2c + 8)
//     b[0] = (k 2c, column g)     b[1] = (k 2c + 8, column g)
//     d[0], d[1] = (row g, columns 2c, 2c + 1)    d[2], d[3] = (row g + 8, the same columns)
//
// Here rows are outputs and columns are tokens: y^T = W x^T, so that one to eight tokens cost one product, and the
// weights, which are many, are the large side. tiles.cuh says which inputs the k slots are.
#pragma once

#include "numbers.cuh"
#include "simt.h"

namespace kb {

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if !defined(__CUDACC__)
#define KB_MMA(type) simt::mma("mma " type, type[0] == 'b' ? simt::bfloat16_value : simt::float16_value, d, a, b)
#elif __CUDA_ARCH__ >= 800
#define KB_MMA(type)                                                                               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "  \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define KB_MMA(type) (void)d, (void)a, (void)b  // never run: kb_gemm asks for the architecture first
#endif

template <>
__device__ __forceinline__ void multiply_add<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KB_MMA("f16");
}

template <>
__device__ __forceinline__ void multiply_add<Bfloat>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KB_MMA("bf16");
}

#undef KB_MMA

}  // namespace kb
