// From a checkpoint's layout to tiles, once, when a model is loaded.
//
// A thread makes one lane's words of one chunk, field by field: it is the plainest way to read any layout in any order,
// and neighbouring fields are in the first-level cache. Warps of a block take chunks that lie beside each other along
// the outputs, as the stored words do. What is written is 16 bytes a lane, neighbours beside each other.

#include "checks.cuh"
#include "stored.cuh"
#include "tiles.cuh"

namespace kb {

constexpr int PREPARE_WARPS = 8;
constexpr int SCALE_THREADS = 256;

// The integer at `row` and `position`, or what padding holds (tiles.cuh); 0 where perm names no input.
template <int BITS>
__device__ int prepared(const kb_stored &s, const int32_t *perm, int row, int position) {
    if (row >= s.n) return 0;
    if (position >= s.k) {
        const int zero = zero_point<BITS>(s, row, s.groups - 1), largest = (1 << BITS) - 1;
        return zero < largest ? zero : largest;
    }
    const int input = perm ? perm[position] : position;
    return input >= 0 && input < s.k ? integer<BITS>(s, row, input) : 0;
}

template <int BITS>
__global__ void prepare_tiles(kb_stored s, const int32_t *perm, kb_tiles tiles) {
    const int lane = threadIdx.x % LANES;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * PREPARE_WARPS + threadIdx.x / LANES, j = blockIdx.y;
    if (i >= chunk_rows(tiles)) return;
    Vector made[VECTORS<BITS>] = {};
    KB_UNROLL for (int t = 0; t < FRAGMENTS; t++)
        KB_UNROLL for (int r = 0; r < 4; r++)
            KB_UNROLL for (int later = 0; later < 2; later++) {
                const int row = static_cast<int>(i) * ROWS + row_of(lane, r);
                const int position = static_cast<int>(j) * COLUMNS + input_of(lane, t, r) + later;
                const Slot slot = slot_of<BITS>(t, r, later);
                made[slot.vector].word[slot.word] |= static_cast<uint32_t>(prepared<BITS>(s, perm, row, position))
                                                     << slot.shift;
            }
    KB_UNROLL for (int v = 0; v < VECTORS<BITS>; v++)
        static_cast<Vector *>(tiles.tiles)[vector_at(tiles, i, j, v, lane)] = made[v];
}

// Scales and zero points of one group for SCALE_THREADS outputs. A group is sound if each of its positions has an
// input, and g_idx agrees; otherwise its weights would be some other group's, so its scales become NaN.
template <class T, int BITS>
__global__ void prepare_scales(kb_stored s, const int32_t *perm, kb_tiles tiles) {
    int *broken = shared<int>();
    const int group = blockIdx.x, output = blockIdx.y * SCALE_THREADS + threadIdx.x;
    if (threadIdx.x == 0) *broken = 0;
    __syncthreads();
    for (int p = threadIdx.x; p < s.group_size; p += SCALE_THREADS) {
        const int position = group * s.group_size + p, input = perm ? perm[position] : position;
        if (input < 0 || input >= s.k || (s.g_idx && s.g_idx[input] != group)) *broken = 1;
    }
    __syncthreads();
    if (output >= chunk_rows(tiles) * ROWS) return;
    const int64_t place = scale_at(tiles, output, group);
    T kept = narrow<T>(0.0f);
    int zero = 0;
    if (output < s.n) {
        kept = *broken ? narrow<T>(NOT_A_NUMBER) : scale<T>(s, output, group);
        zero = zero_point<BITS>(s, output, group);
    }
    static_cast<T *>(tiles.scales)[place] = kept;
    tiles.zeros[place] = static_cast<int16_t>(zero);
}

template <int BITS> int prepare(const kb_stored &s, const int32_t *perm, const kb_tiles &out, void *stream) {
    const unsigned rows = static_cast<unsigned>(chunk_rows(out)), columns = static_cast<unsigned>(chunk_columns(out));
    const dim3 chunks(static_cast<unsigned>(ceil_div(rows, PREPARE_WARPS)), columns);
    KB_TRY(launched("prepare_tiles",
                    kb_launch(prepare_tiles<BITS>, chunks, PREPARE_WARPS * LANES, 0, stream, s, perm, out)));
    const dim3 groups(static_cast<unsigned>(s.groups), static_cast<unsigned>(ceil_div(rows * ROWS, SCALE_THREADS)));
    const auto kernel = s.dtype == KB_FLOAT16 ? prepare_scales<Half, BITS> : prepare_scales<Bfloat, BITS>;
    return launched("prepare_scales", kb_launch(kernel, groups, SCALE_THREADS, sizeof(int), stream, s, perm, out));
}

}  // namespace kb

int kb_prepare(const kb_stored *stored, const int32_t *perm, const kb_tiles *out, void *stream) {
    using namespace kb;
    KB_TRY(kb_check_stored(stored, 1 << 4 | 1 << 8));
    KB_TRY(kb_check_tiles(out));
    if (perm) KB_TRY(check_array("perm", perm));
    if (stored->n != out->n || stored->k != out->k || stored->groups != out->groups)
        return refuse(KB_SIZE, "tiles of n, k, groups %d, %d, %d for a layer of %d, %d, %d: the same is needed", out->n,
                      out->k, out->groups, stored->n, stored->k, stored->groups);
    if (stored->bits != out->bits)
        return refuse(KB_BITS, "tiles of %d bits for a layer of %d: the same is needed", out->bits, stored->bits);
    if (stored->dtype != out->dtype)
        return refuse(KB_DTYPE, "tiles of dtype %d for scales of dtype %d: the same is needed", out->dtype,
                      stored->dtype);
    return stored->bits == 4 ? prepare<4>(*stored, perm, *out, stream) : prepare<8>(*stored, perm, *out, stream);
}
