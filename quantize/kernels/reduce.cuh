// Sums whose order is fixed, so that the same input gives the same bits: no atomics.
#pragma once

#include "numbers.cuh"
#include "simt.h"
#include "tiles.cuh"

namespace kb {

// Over the four lanes of a quad (l / 4 equal); every lane gets the sum.
__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(everyone, value, 1);
    return value + __shfl_xor_sync(everyone, value, 2);
}

// A finished sum goes to y, the sum of one split to its place in partial [splits, count], where count is tokens * n.
template <class T>
__device__ __forceinline__ void put(float sum, int64_t at, int64_t count, T *y, float *partial) {
    if (gridDim.y == 1) {
        y[at] = narrow<T>(sum);
    } else {
        partial[blockIdx.y * count + at] = sum;
    }
}

constexpr int ADDERS = 256;  // threads of a block, an output each

// y [count] = the sum over the splits of partial [splits, count], first to last, rounded once.
template <class T>
__global__ void __launch_bounds__(ADDERS) add_splits(const float *partial, T *y, int64_t count, int splits) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float sum = partial[at];
    for (int split = 1; split < splits; ++split) sum += partial[split * count + at];
    y[at] = narrow<T>(sum);
}

}  // namespace kb
