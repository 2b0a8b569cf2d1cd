// Weights in 16 bits: from a checkpoint's layout (kb_dequantize) and from tiles (kb_expand).
//
// Both are bound by what they write, 2 bytes a weight, so a warp's stores are the plan: whole sectors of 32 bytes, side
// by side. Loads are 16 bytes a thread, and touch whole sectors too.
//
//     GPTQ    a word has neighbouring inputs of one output, which is how weights lie: a thread loads 16 bytes, words of
//             4 outputs, and stores 16 bytes or more of each. Eight lanes beside each other make 128 bytes of a row.
//     AWQ     a word has 8 outputs of one input: a thread loads the words of 8 inputs and turns them round in
//             registers, so that it too stores 8 inputs of an output at once.
//     tiles   a lane has 16 inputs of two rows. Two lanes swap halves, so that they store one sector together.

#include "checks.cuh"
#include "stored.cuh"
#include "tiles.cuh"

namespace kb {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * LANES;

// ---- GPTQ -----------------------------------------------------------------------------------------------------------

constexpr int QUAD = 4;  // outputs of a thread: 16 bytes of words

// The piece of a stream that a thread takes at once: whole words, whole 16 bytes of weights, inside one group.
template <int BITS> struct Piece {
    static constexpr int inputs = BITS == 2 ? 16 : BITS == 3 ? 32 : 8;
    static constexpr int words = inputs * BITS / 32;
};

// Lanes of a warp: 8 pieces along the inputs by 4 quads along the outputs.
constexpr int ALONG = 8;
constexpr int ACROSS = LANES / ALONG;

// Neighbours share a group: one zero point and one scale for each of the thread's outputs.
template <class T, int BITS>
__device__ __forceinline__ void weights_of_neighbours(const kb_stored &s, int output, int input,
                                                      const uint32_t (&words)[QUAD][Piece<BITS>::words],
                                                      uint32_t (&made)[QUAD][Piece<BITS>::inputs / 2]) {
    const Neighbours<T, QUAD> four = four_of_gptq<T, BITS>(s, output, input / s.group_size);
    KB_UNROLL for (int o = 0; o < QUAD; o++) {
        const Affine<T, BITS> affine(four.zero[o], four.scales.of[o]);
        KB_UNROLL for (int i = 0; i < Piece<BITS>::inputs; i += 2)
            made[o][i / 2] = affine.weights(two_fields<BITS>(words[o], i));
    }
}

// g_idx gives each input a group of its own, or one that does not exist.
template <class T, int BITS>
__device__ __forceinline__ void weights_by_index(const kb_stored &s, int output, int input,
                                                 const uint32_t (&words)[QUAD][Piece<BITS>::words],
                                                 uint32_t (&made)[QUAD][Piece<BITS>::inputs / 2]) {
    KB_UNROLL for (int i = 0; i < Piece<BITS>::inputs; i++) {
        const int group = s.g_idx[input + i];
        float weights[QUAD];
        KB_UNROLL for (int o = 0; o < QUAD; o++) weights[o] = NOT_A_NUMBER;
        if (group >= 0 && group < s.groups) {
            const Neighbours<T, QUAD> four = four_of_gptq<T, BITS>(s, output, group);
            KB_UNROLL for (int o = 0; o < QUAD; o++) {
                const int q = static_cast<int>(from_field<BITS>(words[o], i) & ((1u << BITS) - 1));
                weights[o] = static_cast<float>(q - four.zero[o]) * widen(four.scales.of[o]);  // exact: rounded below
            }
        }
        KB_UNROLL for (int o = 0; o < QUAD; o++) {
            const uint32_t bits = same_bits<uint16_t>(narrow<T>(weights[o]));
            made[o][i / 2] = i % 2 ? made[o][i / 2] | bits << 16 : bits;
        }
    }
}

template <class T, int BITS, bool INDEXED>
__global__ void dequantize_gptq(kb_stored s, T *out) {
    constexpr int inputs = Piece<BITS>::inputs, count = Piece<BITS>::words;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int input = (blockIdx.y * ALONG + lane % ALONG) * inputs;
    const int output = ((blockIdx.x * WARPS + warp) * ACROSS + lane / ALONG) * QUAD;
    if (input >= s.k || output >= s.n) return;
    uint32_t words[QUAD][count];
    KB_UNROLL for (int w = 0; w < count; w++) {
        const int64_t row = static_cast<int64_t>(input / inputs) * count + w;
        const Vector loaded = same_bits<Vector>(load_once(s.qweight + row * s.n + output));
        KB_UNROLL for (int o = 0; o < QUAD; o++) words[o][w] = loaded.word[o];
    }
    uint32_t made[QUAD][inputs / 2];
    if (INDEXED)
        weights_by_index<T, BITS>(s, output, input, words, made);
    else
        weights_of_neighbours<T, BITS>(s, output, input, words, made);
    KB_UNROLL for (int o = 0; o < QUAD; o++) {
        Vector *row = reinterpret_cast<Vector *>(out + static_cast<int64_t>(output + o) * s.k + input);
        KB_UNROLL for (int v = 0; v < inputs / 8; v++)
            row[v] = {{made[o][4 * v], made[o][4 * v + 1], made[o][4 * v + 2], made[o][4 * v + 3]}};
    }
}

// ---- AWQ ------------------------------------------------------------------------------------------------------------

constexpr int TURN = 8;  // inputs of a thread: what one store of 16 bytes holds

// A thread turns WORDS words by 8 inputs: 4, loaded as 16 bytes, where a row is made of such pieces; else 1.
template <class T, int WORDS>
__global__ void dequantize_awq(kb_stored s, T *out) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int input = (blockIdx.y * ALONG + lane % ALONG) * TURN;
    const int column = ((blockIdx.x * WARPS + warp) * ACROSS + lane / ALONG) * WORDS;  // of words: 8 outputs each
    const int columns = s.n / 8;
    if (input >= s.k || column >= columns) return;
    uint32_t words[TURN][WORDS];
    KB_UNROLL for (int i = 0; i < TURN; i++) {
        const int32_t *from = s.qweight + static_cast<int64_t>(input + i) * columns + column;
        if constexpr (WORDS == 4) {
            const Vector loaded = same_bits<Vector>(load_once(from));
            KB_UNROLL for (int w = 0; w < WORDS; w++) words[i][w] = loaded.word[w];
        } else {
            words[i][0] = static_cast<uint32_t>(*from);
        }
    }
    const int group = input / s.group_size;
    KB_UNROLL for (int w = 0; w < WORDS; w++) {
        const int output = (column + w) * 8;
        const Neighbours<T, 8> eight = eight_of_awq<T>(s, output, group);
        KB_UNROLL for (int r = 0; r < 8; r++) {
            const Affine<T, 4> affine(eight.zero[r], eight.scales.of[r]);
            Vector made;
            KB_UNROLL for (int i = 0; i < TURN; i += 2)
                made.word[i / 2] = affine.weights(two_inputs(words[i][w], words[i + 1][w], r));
            *reinterpret_cast<Vector *>(out + static_cast<int64_t>(output + r) * s.k + input) = made;
        }
    }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Eight weights of one row: half 0 or 1 of a lane's sixteen inputs. `upper` chooses the row g + 8.
template <class T, int BITS>
__device__ __forceinline__ Vector eight(const Vector (&lane)[VECTORS<BITS>], int half, int upper,
                                        const Affine<T, BITS> &affine) {
    Vector made;
    KB_UNROLL for (int i = 0; i < 4; i++)
        made.word[i] = affine.weights(integers<BITS>(lane, 2 * half + i / 2, upper + i % 2 * 2));
    return made;
}

// Lanes 2 m and 2 m + 1 have 32 bytes each, beside each other. After the swap one store of both fills the first 32
// bytes and another the second: an even lane's halves go where its own first half and its neighbour's first half would,
// an odd lane's to the second halves.
__device__ __forceinline__ void swap_halves(Vector &first, Vector &second, bool odd) {
    KB_UNROLL for (int i = 0; i < 4; i++) {
        const uint32_t given = odd ? first.word[i] : second.word[i];
        const uint32_t taken = __shfl_xor_sync(everyone, given, 1);
        (odd ? first.word[i] : second.word[i]) = taken;
    }
}

__device__ __forceinline__ Vector vector_of(const kb_tiles &tiles, int64_t place) {
    return same_bits<Vector>(load_once(static_cast<const Vector *>(tiles.tiles) + place));
}

template <class T, int BITS, bool PERMUTED>
__global__ void expand_tiles(kb_tiles tiles, const int32_t *perm, T *out) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int64_t j = static_cast<int64_t>(blockIdx.y) * WARPS + warp, i = blockIdx.x;
    if (j >= chunk_columns(tiles)) return;
    Vector words[VECTORS<BITS>];
    KB_UNROLL for (int v = 0; v < VECTORS<BITS>; v++)
        words[v] = vector_of(tiles, vector_at(tiles, i, j, v, lane));
    const int column = static_cast<int>(j) * COLUMNS + lane % 4 * RUN;
    const int group = group_of(tiles, column);
    KB_UNROLL for (int upper = 0; upper < 2; upper++) {
        const int64_t row = i * ROWS + row_of(lane, upper), place = scale_at(tiles, row, group);
        const Affine<T, BITS> affine(tiles.zeros[place], static_cast<const T *>(tiles.scales)[place]);
        Vector halves[2] = {eight(words, 0, upper, affine), eight(words, 1, upper, affine)};
        if (PERMUTED) {
            KB_UNROLL for (int x = 0; x < RUN; x++) {
                const int position = column + x;
                if (row >= tiles.n || position >= tiles.k) continue;
                const int input = perm[position];
                if (input < 0 || input >= tiles.k) continue;
                const uint32_t both = halves[x / 8].word[x % 8 / 2];
                out[row * tiles.k + input] = x % 2 ? second<T>(both) : first<T>(both);
            }
        } else {
            const bool odd = lane % 2;
            swap_halves(halves[0], halves[1], odd);
            const int from = column - 8 * odd;
            KB_UNROLL for (int h = 0; h < 2; h++)
                if (row < tiles.n && from + 16 * h < tiles.k)
                    *reinterpret_cast<Vector *>(out + row * tiles.k + from + 16 * h) = halves[h];
        }
    }
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <class T, int BITS> int dequantize_bits(const kb_stored &s, T *out, void *stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(s.n, WARPS * ACROSS * QUAD)),
                    static_cast<unsigned>(ceil_div(s.k, ALONG * Piece<BITS>::inputs)));
    const auto kernel = s.g_idx ? dequantize_gptq<T, BITS, true> : dequantize_gptq<T, BITS, false>;
    return launched("dequantize_gptq", kb_launch(kernel, grid, THREADS, 0, stream, s, out));
}

template <class T> int dequantize(const kb_stored &s, T *out, void *stream) {
    if (s.layout == KB_AWQ) {
        const int words = s.n % 32 ? 1 : 4;
        const dim3 grid(static_cast<unsigned>(ceil_div(s.n / 8, WARPS * ACROSS * words)),
                        static_cast<unsigned>(ceil_div(s.k, ALONG * TURN)));
        const auto kernel = words == 4 ? dequantize_awq<T, 4> : dequantize_awq<T, 1>;
        return launched("dequantize_awq", kb_launch(kernel, grid, THREADS, 0, stream, s, out));
    }
    switch (s.bits) {
        case 2: return dequantize_bits<T, 2>(s, out, stream);
        case 3: return dequantize_bits<T, 3>(s, out, stream);
        case 4: return dequantize_bits<T, 4>(s, out, stream);
        default: return dequantize_bits<T, 8>(s, out, stream);
    }
}

// Every byte 0xff: NaN in both types.
inline int fill_with_nan(void *out, size_t bytes, void *stream) {
#if defined(__CUDACC__)
    return static_cast<int>(cudaMemsetAsync(out, 0xff, bytes, static_cast<cudaStream_t>(stream)));
#else
    (void)stream;
    memset(out, 0xff, bytes);
    return 0;
#endif
}

template <class T, int BITS> int expand(const kb_tiles &tiles, const int32_t *perm, T *out, void *stream) {
    const dim3 grid(static_cast<unsigned>(chunk_rows(tiles)),
                    static_cast<unsigned>(ceil_div(chunk_columns(tiles), WARPS)));
    if (perm) {
        const size_t bytes = sizeof(T) * static_cast<size_t>(tiles.n) * static_cast<size_t>(tiles.k);
        KB_TRY(launched("memset", fill_with_nan(out, bytes, stream)));
    }
    const auto kernel = perm ? expand_tiles<T, BITS, true> : expand_tiles<T, BITS, false>;
    return launched("expand_tiles", kb_launch(kernel, grid, THREADS, 0, stream, tiles, perm, out));
}

template <class T> int expand(const kb_tiles &tiles, const int32_t *perm, T *out, void *stream) {
    return tiles.bits == 4 ? expand<T, 4>(tiles, perm, out, stream) : expand<T, 8>(tiles, perm, out, stream);
}

}  // namespace kb

int kb_dequantize(const kb_stored *stored, void *out, void *stream) {
    using namespace kb;
    KB_TRY(kb_check_stored(stored, 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8));
    KB_TRY(check_array("out", out));
    return stored->dtype == KB_FLOAT16 ? dequantize(*stored, static_cast<Half *>(out), stream)
                                       : dequantize(*stored, static_cast<Bfloat *>(out), stream);
}

int kb_expand(const kb_tiles *tiles, const int32_t *perm, void *out, void *stream) {
    using namespace kb;
    KB_TRY(kb_check_tiles(tiles));
    if (perm) KB_TRY(check_array("perm", perm));
    KB_TRY(check_array("out", out));
    return tiles->dtype == KB_FLOAT16 ? expand(*tiles, perm, static_cast<Half *>(out), stream)
                                      : expand(*tiles, perm, static_cast<Bfloat *>(out), stream);
}
