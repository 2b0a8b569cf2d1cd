// y = x W^T for one to 64 tokens on the tensor cores, straight from the packed weights; sm_80 and up.
//
// A block is 128 outputs, 16 for each of its eight warps, and all tokens. It walks along the inputs, a chunk of 64 at a
// time.
//
//     memory ── cp.async, STAGES - 1 chunks ahead ──► shared memory ──► registers ──► mma
//
//       weights          512 bytes a warp (4 bits)            unpacked once, then used for every eight tokens
//       scales, zeros    of both halves of the chunk          two rows' of the lane's group
//       x                all tokens, 64 inputs                32 bytes a lane for every eight tokens: the B fragments
//
// A lane reads back the weights that it copied itself, in the order of its registers (tiles.cuh): shared memory is only
// the room that loads under way need and registers do not have. As many stages as 48 KiB hold, at most four, so that
// two blocks and more fit into a processor of 100 KiB (RTX 30, 40 and 50, A4000, L4): 16 to 40 KiB of weights under
// way, where 8 hide the latency of memory (schedule.cuh).
//
// Banks: a lane reads 16 bytes at once, and eight lanes are served together. Their weights are 128 contiguous bytes.
// Their x begins at 144 g + 32 c: in units of 16 bytes modulo 8 that is g + 2 c, and eight lanes have two neighbouring
// g and every c, so all differ. Without the 16 bytes at the end of a row, all tokens would meet in the same banks.
//
// One __syncthreads a chunk says both that chunk j is there for all (each thread has waited for its own copies), and
// that all have finished with chunk j - 1, whose buffer the next copies fill.

#include "mma.cuh"
#include "products.cuh"

namespace kb {

constexpr int TOKEN_TILE = 8;        // columns of a product
constexpr int SHARED_BYTES = 49152;  // what every card gives a block unasked

// What lies in shared memory of one chunk of the inputs.
template <class T, int BITS, int TILES>
struct Stage {
    Vector weights[WARPS][VECTORS<BITS>][LANES];
    Vector x[TOKEN_TILE * TILES][COLUMNS / 8 + 1];  // a token's 64 inputs, and 16 bytes that nobody reads
    uint16_t numbers[WARPS][2][4][8];  // of inputs 0..31 and 32..63, as a group has 32 or more: 16 scales, 16 zeros
};

template <class T, int BITS, int TILES>
constexpr int FITTING = SHARED_BYTES / sizeof(Stage<T, BITS, TILES>);

template <class T, int BITS, int TILES>
constexpr int STAGES = FITTING<T, BITS, TILES> < 4 ? FITTING<T, BITS, TILES> : 4;

// What a thread copies of each chunk: its lane's weights; eight scales or zero points of its warp, in lanes 0..7; eight
// inputs of every 32nd token. Everything that does not depend on the chunk is worked out once.
template <class T, int BITS, int TILES>
struct Copier {
    static constexpr int PIECES = TOKEN_TILE * TILES * 8;  // of 16 bytes, in x's part of a stage
    static constexpr int STEP = THREADS / 8;               // tokens from one of a thread's pieces to the next

    const Vector *weights;  // of chunk 0; NULL in a warp without a row
    const void *numbers;    // of group 0
    const T *x;             // of chunk 0 and the first token, which may lie beyond the last
    int k, tokens, lane, warp, token, eighth;
    Groups groups;

    __device__ __forceinline__ Copier(const kb_tiles &tiles, Groups g, const T *inputs, int count, int row)
        : weights(nullptr), numbers(nullptr), k(tiles.k), tokens(count), lane(threadIdx.x % LANES),
          warp(threadIdx.x / LANES), token(threadIdx.x / 8), eighth(threadIdx.x % 8 * 8), groups(g) {
        x = inputs + int64_t(token) * k + eighth;
        if (row >= chunk_rows(tiles)) return;
        weights = static_cast<const Vector *>(tiles.tiles) + vector_at(tiles, row, 0, 0, lane);
        const int64_t at = scale_at(tiles, int64_t(row) * ROWS, 0) + lane % 2 * 8;
        const T *scales = static_cast<const T *>(tiles.scales) + at;
        numbers = lane % 4 < 2 ? static_cast<const void *>(scales) : tiles.zeros + at;
    }

    // Begins to copy.
    __device__ __forceinline__ void fetch(Stage<T, BITS, TILES> &stage, int chunk) const {
        if (weights) {
            KB_UNROLL
            for (int v = 0; v < VECTORS<BITS>; ++v)
                copy_async(&stage.weights[warp][v][lane], weights + (chunk * VECTORS<BITS> + v) * LANES, 16);
            if (lane < 8) {
                const int half = lane / 4, group = groups.of(chunk * COLUMNS + half * 32);
                copy_async(stage.numbers[warp][half][lane % 4],
                           static_cast<const uint16_t *>(numbers) + group * ROWS, 16);
            }
        }
        const bool inside = chunk * COLUMNS + eighth < k;  // k is a multiple of 8: all eight inputs are there, or none
        KB_UNROLL
        for (int i = 0; i * THREADS < PIECES; ++i) {
            if (PIECES % THREADS && threadIdx.x >= PIECES) break;
            const bool there = inside && token + i * STEP < tokens;  // else zeros, and nothing is read
            copy_async(&stage.x[token + i * STEP][eighth / 8], x + (chunk * COLUMNS + i * STEP * k), there ? 16 : 0);
        }
    }
};

// Multiplies one chunk: four fragments of weights by every token tile.
template <class T, int BITS, int TILES>
__device__ __forceinline__ void multiply_stage(const Stage<T, BITS, TILES> &stage, float (&sums)[TILES][4]) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, c = lane % 4;
    Vector weights[VECTORS<BITS>];
    KB_UNROLL
    for (int v = 0; v < VECTORS<BITS>; ++v) weights[v] = stage.weights[warp][v][lane];
    const auto &numbers = stage.numbers[warp][c / 2];
    const Affine<T, BITS> low(same_bits<int16_t>(numbers[2][g]), same_bits<T>(numbers[0][g]));
    const Affine<T, BITS> high(same_bits<int16_t>(numbers[3][g]), same_bits<T>(numbers[1][g]));
    KB_UNROLL
    for (int h = 0; h < 2; ++h) {
        uint32_t even[4], odd[4];  // fragments t = 2 h and 2 h + 1
        fragment<T, BITS>(weights, 2 * h, low, high, even);
        fragment<T, BITS>(weights, 2 * h + 1, low, high, odd);
        KB_UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
            const Vector eight = stage.x[tile * TOKEN_TILE + g][2 * c + h];  // inputs 16 c + 8 h .. + 7
            multiply_add<T>(sums[tile], even, {eight.word[0], eight.word[1]});
            multiply_add<T>(sums[tile], odd, {eight.word[2], eight.word[3]});
        }
    }
}

template <class T, int BITS, int TILES>
__global__ void __launch_bounds__(THREADS, 2)
    gemm_kernel(kb_tiles tiles, Groups groups, const T *x, T *y, float *partial, int tokens) {
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800
    constexpr int DEPTH = STAGES<T, BITS, TILES>;
    static_assert(DEPTH >= 2, "one chunk is multiplied while another is under way");
    Stage<T, BITS, TILES> *stages = shared<Stage<T, BITS, TILES>>();
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, row = gemm_row(blockIdx.x, warp);
    const Range range = share(static_cast<int>(chunk_columns(tiles)), gridDim.y, blockIdx.y);
    const Copier<T, BITS, TILES> copier(tiles, groups, x, tokens, row);

    float sums[TILES][4] = {};
    for (int ahead = 0; ahead < DEPTH - 1; ++ahead) {
        if (range.begin + ahead < range.end) copier.fetch(stages[ahead], range.begin + ahead);
        copy_commit();  // an empty group where there is no chunk, so that copy_wait counts the same
    }
    int reading = 0, filling = DEPTH - 1;
    for (int chunk = range.begin; chunk < range.end; ++chunk) {
        copy_wait<DEPTH - 2>();
        __syncthreads();
        if (chunk + DEPTH - 1 < range.end) copier.fetch(stages[filling], chunk + DEPTH - 1);
        copy_commit();
        if (row < chunk_rows(tiles)) multiply_stage(stages[reading], sums);
        reading = reading + 1 == DEPTH ? 0 : reading + 1;
        filling = filling + 1 == DEPTH ? 0 : filling + 1;
    }

    KB_UNROLL
    for (int tile = 0; tile < TILES; ++tile) {
        KB_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int token = tile * TOKEN_TILE + lane % 4 * 2 + i % 2, output = row * ROWS + lane / 4 + i / 2 * 8;
            if (token < tokens && output < tiles.n)
                put(sums[tile][i], int64_t(token) * tiles.n + output, int64_t(tokens) * tiles.n, y, partial);
        }
    }
#endif
}

template <class T, int BITS, int TILES>
int launch_gemm(const Product &product, Schedule schedule) {
    constexpr size_t shared_bytes = STAGES<T, BITS, TILES> * sizeof(Stage<T, BITS, TILES>);
    return launch_product<T>("gemm", gemm_kernel<T, BITS, TILES>, shared_bytes, product, schedule);
}

template <class T, int BITS>
int gemm_of(const Product &product, Schedule schedule) {
    if (product.tokens <= 8) return launch_gemm<T, BITS, 1>(product, schedule);
    if (product.tokens <= 16) return launch_gemm<T, BITS, 2>(product, schedule);
    if (product.tokens <= 32) return launch_gemm<T, BITS, 4>(product, schedule);
    return launch_gemm<T, BITS, 8>(product, schedule);
}

}  // namespace kb

int kb_gemm(const kb_tiles *tiles, const void *x, void *y, int tokens, void *workspace, int64_t bytes, void *stream) {
    using namespace kb;
    KB_TRY(kb_check_tiles(tiles));
    KB_TRY(check_tokens(tokens, GEMM_TOKENS));
    KB_TRY(check_device());
    if (architecture() < 80)
        return refuse(KB_DEVICE, "compute capability %d.%d: gemm needs 8.0", architecture() / 10, architecture() % 10);
    const Product product{*tiles, x, y, tokens, workspace, bytes, stream};
    const Schedule schedule = gemm_schedule(tiles->n, tiles->k, processors());
    KB_TRY(check_product(product, schedule));
    if (tiles->dtype == KB_FLOAT16)
        return tiles->bits == 4 ? gemm_of<Half, 4>(product, schedule) : gemm_of<Half, 8>(product, schedule);
    return tiles->bits == 4 ? gemm_of<Bfloat, 4>(product, schedule) : gemm_of<Bfloat, 8>(product, schedule);
}
