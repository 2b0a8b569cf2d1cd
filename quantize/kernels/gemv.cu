// y = x W^T for one to eight tokens, straight from the packed weights: all that counts is how fast they stream in.
//
// A block is 16 outputs; its eight warps take turns at the chunks of 64 inputs (schedule.cuh). A lane reads its part of
// up to four chunks, 64 bytes, before it computes: 2 KiB a warp under way, and two or three blocks of eight warps a
// processor make 32 to 48 KiB, where 8 hide the latency of memory. Weights pass by L1, since nobody reads them twice;
// activations and scales, which rows and warps share, come through it.
//
// In machine code (sm_89, float16, 4 bits) one token takes 5.9 instructions a weight: 1.4 to widen it, 1 FMA, half a
// widening of x and of scales, the rest shifts and addresses. While a weight arrives, an RTX A4000 can issue 11, a T4
// 12, an RTX 4060 Ti 19, an L4 24 (lanes * clock / weights a second, by their data sheets). Each further token adds
// 2.2, so memory is the limit up to three tokens or more, and arithmetic beyond. There, and on cards with more
// bandwidth (A100, H100), the tensor cores do better: gemm.cu takes 4.5 for any number up to eight. Which of the two
// serves how many tokens is measured (dispatch.toml).
//
// q - z is exact in 16 bits; products and sums are float32; the scale multiplies once for the sixteen inputs of a lane.

#include "products.cuh"

namespace kb {

// Chunks of which a lane has its part under way: 64 bytes. Eight tokens need the registers for their sums; the
// arithmetic of one chunk is then longer than the latency of the next warp's load.
template <int BITS, int TOKENS>
constexpr int PARTS = TOKENS < 8 ? 4 / VECTORS<BITS> : 1;

// Where a lane finds what belongs to its two rows.
template <class T>
struct Rows {
    const Vector *weights;  // of the row of chunks; a chunk is VECTORS * LANES further
    const T *scales;        // of row g, group 0; g + 8 is 8 further, a group 16
    const int16_t *zeros;   // likewise

    __device__ __forceinline__ Rows(const kb_tiles &tiles, int row, int lane)
        : weights(static_cast<const Vector *>(tiles.tiles) + vector_at(tiles, row, 0, 0, lane)),
          scales(static_cast<const T *>(tiles.scales) + scale_at(tiles, int64_t(row) * ROWS + row_of(lane, 0), 0)),
          zeros(tiles.zeros + scale_at(tiles, int64_t(row) * ROWS + row_of(lane, 0), 0)) {}
};

// A lane's part of one chunk: the weights of its two rows, and their scales and zero points.
template <class T, int BITS>
struct Part {
    Vector weights[VECTORS<BITS>];
    T scale_low, scale_high;
    int16_t zero_low, zero_high;
};

template <class T, int BITS>
__device__ __forceinline__ Part<T, BITS> load_part(const Rows<T> &rows, int chunk, int group) {
    Part<T, BITS> part;
    KB_UNROLL
    for (int v = 0; v < VECTORS<BITS>; ++v)
        part.weights[v] = same_bits<Vector>(load_once(rows.weights + (chunk * VECTORS<BITS> + v) * LANES));
    part.scale_low = __ldg(rows.scales + group * ROWS);
    part.scale_high = __ldg(rows.scales + group * ROWS + 8);
    part.zero_low = __ldg(rows.zeros + group * ROWS);
    part.zero_high = __ldg(rows.zeros + group * ROWS + 8);
    return part;
}

// Eight neighbouring inputs 8 h .. 8 h + 7 of a lane: q - z, of row g (j even) or g + 8 (j odd).
template <class T, int BITS>
__device__ __forceinline__ void widen_steps(const Vector (&weights)[VECTORS<BITS>], int h, int odd,
                                            const Affine<T, BITS> &affine, float (&steps)[8]) {
    KB_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t two = affine.steps(integers<BITS>(weights, 2 * h + i / 2, i % 2 * 2 + odd));
        steps[2 * i] = widen(first<T>(two));
        steps[2 * i + 1] = widen(second<T>(two));
    }
}

// Adds what one part contributes to the sums of the lane's two rows.
template <class T, int BITS, int TOKENS>
__device__ __forceinline__ void add_part(const Part<T, BITS> &part, const T *x, int tokens, int k, int position,
                                          float (&low)[TOKENS], float (&high)[TOKENS]) {
    const Affine<T, BITS> affine_low(part.zero_low, part.scale_low), affine_high(part.zero_high, part.scale_high);
    float sum_low[TOKENS] = {}, sum_high[TOKENS] = {};
    KB_UNROLL
    for (int h = 0; h < 2; ++h) {
        float steps_low[8], steps_high[8];
        widen_steps(part.weights, h, 0, affine_low, steps_low);
        widen_steps(part.weights, h, 1, affine_high, steps_high);
        const int at = position + 8 * h;
        KB_UNROLL
        for (int token = 0; token < TOKENS; ++token) {
            Vector eight = {};
            if (token < tokens && at < k)  // k is a multiple of 8: all eight inputs are there, or none
                eight = same_bits<Vector>(load_again(x + token * k + at));
            KB_UNROLL
            for (int i = 0; i < 8; ++i) {
                const uint32_t two = eight.word[i / 2];
                const float value = widen(i % 2 ? second<T>(two) : first<T>(two));
                sum_low[token] += steps_low[i] * value;
                sum_high[token] += steps_high[i] * value;
            }
        }
    }
    KB_UNROLL
    for (int token = 0; token < TOKENS; ++token) {
        low[token] += widen(part.scale_low) * sum_low[token];
        high[token] += widen(part.scale_high) * sum_high[token];
    }
}

// Three blocks of 256 threads a processor leave 80 registers a thread, and more spill; two leave 128.
template <class T, int BITS, int TOKENS>
__global__ void __launch_bounds__(THREADS, TOKENS == 1 ? 3 : 2)
    gemv_kernel(kb_tiles tiles, Groups groups, const T *x, T *y, float *partial, int tokens) {
    constexpr int AHEAD = PARTS<BITS, TOKENS>;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, row = blockIdx.x;
    const Range range = share(static_cast<int>(chunk_columns(tiles)), gridDim.y, blockIdx.y);

    const Rows<T> rows(tiles, row, lane);

    float low[TOKENS] = {}, high[TOKENS] = {};
    for (int turn = 0; gemv_chunk(range, warp, turn) < range.end; turn += AHEAD) {
        Part<T, BITS> parts[AHEAD];
        KB_UNROLL
        for (int p = 0; p < AHEAD; ++p) {
            const int chunk = gemv_chunk(range, warp, turn + p);
            if (chunk < range.end)
                parts[p] = load_part<T, BITS>(rows, chunk, groups.of(chunk * COLUMNS + lane % 4 * RUN));
        }
        KB_UNROLL
        for (int p = 0; p < AHEAD; ++p) {
            const int chunk = gemv_chunk(range, warp, turn + p);
            if (chunk < range.end)
                add_part<T, BITS, TOKENS>(parts[p], x, tokens, tiles.k, chunk * COLUMNS + lane % 4 * RUN, low, high);
        }
    }

    // Split-K within the block: over the four lanes that share rows, then over the warps, in order.
    float *sums = shared<float>();  // [WARPS, TOKENS, ROWS]
    KB_UNROLL
    for (int token = 0; token < TOKENS; ++token) {
        const float sum_low = quad_sum(low[token]), sum_high = quad_sum(high[token]);
        if (lane % 4 == 0) {
            sums[(warp * TOKENS + token) * ROWS + row_of(lane, 0)] = sum_low;
            sums[(warp * TOKENS + token) * ROWS + row_of(lane, 1)] = sum_high;
        }
    }
    __syncthreads();
    const int token = threadIdx.x / ROWS, output = row * ROWS + threadIdx.x % ROWS;
    if (token >= tokens || output >= tiles.n) return;
    float sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += sums[w * TOKENS * ROWS + threadIdx.x];
    put(sum, int64_t(token) * tiles.n + output, int64_t(tokens) * tiles.n, y, partial);
}

template <class T, int BITS, int TOKENS>
int launch_gemv(const Product &product, Schedule schedule) {
    constexpr size_t shared_bytes = sizeof(float) * WARPS * TOKENS * ROWS;
    return launch_product<T>("gemv", gemv_kernel<T, BITS, TOKENS>, shared_bytes, product, schedule);
}

template <class T, int BITS>
int gemv_of(const Product &product, Schedule schedule) {
    if (product.tokens == 1) return launch_gemv<T, BITS, 1>(product, schedule);
    if (product.tokens == 2) return launch_gemv<T, BITS, 2>(product, schedule);
    if (product.tokens <= 4) return launch_gemv<T, BITS, 4>(product, schedule);
    return launch_gemv<T, BITS, 8>(product, schedule);
}

}  // namespace kb

int kb_gemv(const kb_tiles *tiles, const void *x, void *y, int tokens, void *workspace, int64_t bytes, void *stream) {
    using namespace kb;
    KB_TRY(kb_check_tiles(tiles));
    KB_TRY(check_tokens(tokens, GEMV_TOKENS));
    KB_TRY(check_device());
    const Product product{*tiles, x, y, tokens, workspace, bytes, stream};
    const Schedule schedule = gemv_schedule(tiles->n, tiles->k, processors());
    KB_TRY(check_product(product, schedule));
    if (tiles->dtype == KB_FLOAT16)
        return tiles->bits == 4 ? gemv_of<Half, 4>(product, schedule) : gemv_of<Half, 8>(product, schedule);
    return tiles->bits == 4 ? gemv_of<Bfloat, 4>(product, schedule) : gemv_of<Bfloat, 8>(product, schedule);
}
