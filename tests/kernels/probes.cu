// Kernels and functions that only the tests call: the emulator held against what it did not write, and kernels that are
// wrong on purpose, which it must show. Compiled by g++ with the kernels' folder on the include path.

#include <cmath>

#include "mma.cuh"
#include "products.cuh"
#include "reduce.cuh"

using namespace kb;

// ---- one instruction for a warp -------------------------------------------------------------------------------------

template <class T>
__global__ void one_product(const uint32_t *a, const uint32_t *b, float *d) {
    uint32_t left[4], right[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i], sums[i] = d[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; ++i) right[i] = b[threadIdx.x * 2 + i];
    multiply_add<T>(sums, left, right);
    for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = sums[i];
}

__global__ void shuffles(const int *in, int *out) {
    const int value = in[threadIdx.x];
    out[threadIdx.x] = __shfl_xor_sync(everyone, value, 5);
    out[32 + threadIdx.x] = __shfl_down_sync(everyone, value, 4);
    out[64 + threadIdx.x] = __shfl_sync(everyone, value, (threadIdx.x * 7 + 3) % 32);
    out[96 + threadIdx.x] = static_cast<int>(quad_sum(static_cast<float>(value)));
}

// ---- right and wrong on purpose -------------------------------------------------------------------------------------

// y[i] = x[n - 1 - i] through shared memory: right, and without the barrier between writing and reading.
template <bool BARRIER>
__global__ void reverse(const float *x, float *y) {
    float *here = shared<float>();
    here[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncthreads();
    y[threadIdx.x] = here[blockDim.x - 1 - threadIdx.x];
}

// Each thread sums 8 rows of 4 numbers that pass through a ring of three buffers, its neighbour having fetched them:
// right with LEFT = 1 copies under way and a barrier; wrong with 2, or without the barrier that guards the buffer that
// is refilled.
template <int LEFT, bool BARRIER>
__global__ void ring(const float *x, float *y) {
    constexpr int ROUNDS = 8, DEPTH = 3;
    float *stages = shared<float>();  // [DEPTH, threads, 4]
    const int threads = blockDim.x, me = threadIdx.x, neighbour = (me + 33) % threads;
    const auto fetch = [&](int round) {
        if (round < ROUNDS) copy_async(stages + (round % DEPTH * threads + me) * 4, x + (round * threads + me) * 4, 16);
        copy_commit();
    };
    for (int round = 0; round < DEPTH - 1; ++round) fetch(round);
    float sum = 0;
    for (int round = 0; round < ROUNDS; ++round) {
        copy_wait<LEFT>();
        if (BARRIER || round == 0) __syncthreads();
        fetch(round + DEPTH - 1);
        for (int i = 0; i < 4; ++i) sum += stages[(round % DEPTH * threads + neighbour) * 4 + i];
    }
    y[me] = sum;
}

__global__ void half_a_barrier(float *) {
    if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_collectives(float *) {
    if (threadIdx.x % 2)
        __syncwarp();
    else
        __shfl_xor_sync(everyone, 1, 1);
}

__global__ void leaves_early(float *y) {
    if (threadIdx.x == 7) return;
    y[0] = static_cast<float>(__shfl_xor_sync(everyone, 1, 1));
}

__global__ void crooked(float *y) { y[0] = static_cast<float>(load_again(reinterpret_cast<const char *>(y) + 8).x); }

__global__ void beyond_shared(float *y) { y[0] = shared<float>()[threadIdx.x + 1]; }

#define PROBE extern "C" __attribute__((visibility("default")))

PROBE int probe_product(int bfloat, const uint32_t *a, const uint32_t *b, float *d) {
    return bfloat ? kb_launch(one_product<Bfloat>, 1, 32, 0, nullptr, a, b, d)
                  : kb_launch(one_product<Half>, 1, 32, 0, nullptr, a, b, d);
}

PROBE int probe_shuffles(const int *in, int *out) { return kb_launch(shuffles, 1, 32, 0, nullptr, in, out); }

PROBE int probe_reverse(int barrier, int threads, const float *x, float *y) {
    return kb_launch(barrier ? reverse<true> : reverse<false>, 1, threads, threads * sizeof(float), nullptr, x, y);
}

PROBE int probe_ring(int which, const float *x, float *y) {
    const auto kernel = which == 0 ? ring<1, true> : which == 1 ? ring<2, true> : ring<1, false>;
    return kb_launch(kernel, 1, 64, 3 * 64 * 16, nullptr, x, y);
}

PROBE int probe_fault(int which, float *y) {
    void (*const kernels[])(float *) = {half_a_barrier, two_collectives, leaves_early, crooked, beyond_shared};
    return kb_launch(kernels[which], 1, which == 0 ? 64 : 32, 128, nullptr, y);
}

// ---- schedules ------------------------------------------------------------------------------------------------------

// How often each chunk is taken: taken [rows, chunks] is counted up. Returns the number of splits.
PROBE int probe_schedule(int gemm, int64_t n, int64_t k, int processors, int *taken) {
    const Schedule schedule = gemm ? gemm_schedule(n, k, processors) : gemv_schedule(n, k, processors);
    const int rows = static_cast<int>(ceil_div(n, ROWS)), chunks = static_cast<int>(ceil_div(k, COLUMNS));
    for (int block = 0; block < schedule.blocks; ++block) {
        for (int split = 0; split < schedule.splits; ++split) {
            const Range range = share(chunks, schedule.splits, split);
            for (int warp = 0; warp < WARPS; ++warp) {
                if (gemm) {
                    const int row = gemm_row(block, warp);
                    for (int chunk = range.begin; row < rows && chunk < range.end; ++chunk)
                        ++taken[row * chunks + chunk];
                } else {
                    for (int turn = 0; gemv_chunk(range, warp, turn) < range.end; ++turn)
                        ++taken[block * chunks + gemv_chunk(range, warp, turn)];
                }
            }
        }
    }
    return schedule.splits;
}

// The first position (a multiple of 16) below the padded k whose group is wrong, or -1.
PROBE int probe_groups(int k, int group_size) {
    kb_tiles tiles = {};
    tiles.k = k, tiles.group_size = group_size, tiles.groups = k / group_size;
    const Groups groups(tiles);
    for (int position = 0; position < (k + 63) / 64 * 64; position += 16)
        if (groups.of(position) != (position < k ? position / group_size : tiles.groups - 1)) return position;
    return -1;
}
