// What gemv and gemm share: the arguments of a product, their checks, and the launch.
#pragma once

#include "checks.cuh"
#include "reduce.cuh"
#include "schedule.cuh"

namespace kb {

// y [tokens, n] = x [tokens, k] times the weights of `tiles`.
struct Product {
    const kb_tiles &tiles;
    const void *x;
    void *y;
    int tokens;
    void *workspace;
    int64_t bytes;
    void *stream;
};

// The group of a position that is a multiple of 16, without a division: both it and the group's size are counted in
// 16s, and the quotient of b by size is the high word of b * ceil(2^32 / size), which is exact while b * size < 2^32.
// LARGEST_K sees to that. One group a row has the reciprocal 0. Padding belongs to the last group.
struct Groups {
    uint32_t reciprocal;
    int last;

    explicit KB_HOST_DEVICE Groups(const kb_tiles &tiles)
        : reciprocal(tiles.groups == 1 ? 0 : static_cast<uint32_t>(ceil_div(int64_t(1) << 32, tiles.group_size / 16))),
          last(tiles.groups - 1) {}

    __device__ __forceinline__ int of(int position) const {
        const int group = static_cast<int>(__umulhi(static_cast<uint32_t>(position) / 16, reciprocal));
        return group < last ? group : last;
    }
};

constexpr int LARGEST_K = 1 << 20;
constexpr int GEMV_TOKENS = 8, GEMM_TOKENS = 64;  // at most

inline int check_tokens(int tokens, int most) {
    if (tokens >= 1 && tokens <= most) return KB_OK;
    return refuse(KB_TOKENS, "%d tokens: 1 to %d are allowed", tokens, most);
}

inline int check_device() {
    if (processors() > 0) return KB_OK;
    return refuse(KB_DEVICE, "no GPU that CUDA can use: a product needs one");
}

// All but the layer itself, which is checked before the schedule is made.
inline int check_product(const Product &product, Schedule schedule) {
    if (product.tiles.k > LARGEST_K)
        return refuse(KB_SIZE, "k is %d: products take up to %d", product.tiles.k, LARGEST_K);
    KB_TRY(check_array("x", product.x));
    KB_TRY(check_array("y", product.y));
    const int64_t needed = partial_bytes(schedule, product.tokens, product.tiles.n);
    if (product.bytes < needed)
        return refuse(KB_WORKSPACE, "the workspace has %lld bytes: %lld are needed",
                      static_cast<long long>(product.bytes), static_cast<long long>(needed));
    if (needed) KB_TRY(check_array("workspace", product.workspace));
    return KB_OK;
}

// A product's kernel: the layer, x, y, where partial sums go, and the number of tokens.
template <class T>
using Kernel = void (*)(kb_tiles, Groups, const T *, T *, float *, int);

// The kernel, and where inputs are split the second one, which adds the splits up.
template <class T>
int launch_product(const char *name, Kernel<T> kernel, size_t shared_bytes, const Product &product, Schedule schedule) {
    const int64_t count = int64_t(product.tokens) * product.tiles.n;
    const T *x = static_cast<const T *>(product.x);
    T *y = static_cast<T *>(product.y);
    float *partial = static_cast<float *>(product.workspace);
    int error = kb_launch(kernel, dim3(schedule.blocks, schedule.splits), THREADS, shared_bytes, product.stream,
                          product.tiles, Groups(product.tiles), x, y, partial, product.tokens);
    if (!error && schedule.splits > 1) {
        const dim3 blocks(static_cast<unsigned>(ceil_div(count, ADDERS)));
        error = kb_launch(add_splits<T>, blocks, ADDERS, 0, product.stream, partial, y, count, schedule.splits);
    }
    return launched(name, error);
}

}  // namespace kb
