// The kernels' own layout: tiles. What one warp wants next lies next, and a lane's registers for a tensor core come out
// of a word with one instruction each.
//
// A layer is cut into chunks of 16 outputs (rows) by 64 inputs; a chunk is what one warp reads at once, 16 bytes a lane
// (4 bits) or two times 16 (8 bits), and chunks along the inputs follow each other:
//
//     tiles  [Np/16, Kp/64, bits/4, 32 lanes, 16 bytes]                Np, Kp: rounded up to 16 and 64
//
//     inputs of a chunk    0 .. 15      16 .. 31     32 .. 47     48 .. 63
//     rows 0 and 8         lane 0       lane 1       lane 2       lane 3
//     rows 1 and 9         lane 4       lane 5       lane 6       lane 7         lane l: rows g and g + 8, g = l / 4,
//        ...                                                                     inputs 16 c .. 16 c + 15, c = l % 4
//     rows 7 and 15        lane 28      lane 29      lane 30      lane 31
//
// So a lane's inputs are 32 contiguous bytes of the activations, and lie in one group (groups are multiples of 32).
// They are taken four at a time, t = 0..3: inputs 4 t .. 4 t + 3 of the lane's rows make the A fragment of one
// mma.m16n8k16, four registers of two numbers. The order of the k slots in a product is free as long as A and B agree;
// here slots 2 c, 2 c + 1 hold inputs 16 c + 4 t + {0, 1} and slots 2 c + 8, 2 c + 9 hold 16 c + 4 t + {2, 3}, so that
// the B fragment is x[16 c + 4 t .. + 3], eight contiguous bytes.
//
//                 inputs 4 t, 4 t + 1     inputs 4 t + 2, 4 t + 3
//     row g             a0                      a2
//     row g + 8         a1                      a3
//
//     4 bits: word t of the lane's vector. Register j is nibble j, its first number, and nibble j + 4, its second:
//     (word >> 4 j) & 0x000f000f.
//
//         bit  28      24      20      16      12       8       4       0
//             a3 2nd  a2 2nd  a1 2nd  a0 2nd  a3 1st  a2 1st  a1 1st  a0 1st
//
//     8 bits: vector t / 2, words 2 (t % 2) and the next. Register j is (word >> 8 (j % 2)) & 0x00ff00ff.
//
//         bit  24      16       8       0
//             a1 2nd  a0 2nd  a1 1st  a0 1st      first word
//             a3 2nd  a2 2nd  a3 1st  a2 1st      second word
//
// scales [Np/16, groups, 16] and zeros [Np/16, groups, 16] (int16: GPTQ v1 has z up to 2^bits) are in the same order of
// rows. Padding: rows beyond n have q = 0, z = 0 and s = 0; inputs beyond k have q = z of the row's last group (or the
// largest q where z is larger). A kernel reads activations beyond k as zeros, and clamps the group of such an input.
#pragma once

#include "kneebench.h"
#include "numbers.cuh"

namespace kb {

constexpr int ROWS = 16;     // outputs of a chunk
constexpr int COLUMNS = 64;  // inputs of a chunk
constexpr int LANES = 32;
constexpr int RUN = 16;      // neighbouring inputs of a lane
constexpr int FRAGMENTS = 4;  // A fragments of a lane: t

// Sixteen bytes, moved at once.
struct alignas(16) Vector {
    uint32_t word[4];
};

template <int BITS> constexpr int VECTORS = BITS / 4;  // of a lane in a chunk

KB_HOST_DEVICE constexpr int64_t ceil_div(int64_t count, int64_t step) { return (count + step - 1) / step; }

KB_HOST_DEVICE int64_t chunk_rows(const kb_tiles &tiles) { return ceil_div(tiles.n, ROWS); }
KB_HOST_DEVICE int64_t chunk_columns(const kb_tiles &tiles) { return ceil_div(tiles.k, COLUMNS); }

// Where vector `v` of `lane` lies, counted in vectors: chunk (i, j) covers outputs 16 i.. and inputs 64 j..
KB_HOST_DEVICE int64_t vector_at(const kb_tiles &tiles, int64_t i, int64_t j, int v, int lane) {
    return ((i * chunk_columns(tiles) + j) * (tiles.bits / 4) + v) * LANES + lane;
}

// Where the scale and the zero point of an output's group lie.
KB_HOST_DEVICE int64_t scale_at(const kb_tiles &tiles, int64_t output, int group) {
    return (output / ROWS * tiles.groups + group) * ROWS + output % ROWS;
}

// The group of a position. Padding belongs to the last.
KB_HOST_DEVICE int group_of(const kb_tiles &tiles, int position) {
    const int group = position / tiles.group_size;
    return group < tiles.groups ? group : tiles.groups - 1;
}

// ---- the place of one integer in its chunk --------------------------------------------------------------------------

// Where in a lane's vectors the number `later` (0: the first, 1: the second) of register j of fragment t lies.
struct Slot {
    int vector, word, shift;
};

template <int BITS> KB_HOST_DEVICE constexpr Slot slot_of(int t, int j, int later) {
    static_assert(BITS == 4 || BITS == 8, "tiles hold 4 or 8 bits");
    if (BITS == 4) return {0, t, 4 * j + 16 * later};
    return {t / 2, t % 2 * 2 + j / 2, j % 2 * 8 + 16 * later};
}

// The row (0..15) of register j of `lane`, and the input (0..63) of its first number in fragment t; the second's is
// the next.
KB_HOST_DEVICE constexpr int row_of(int lane, int j) { return lane / 4 + j % 2 * 8; }
KB_HOST_DEVICE constexpr int input_of(int lane, int t, int j) { return lane % 4 * RUN + 4 * t + j / 2 * 2; }

// ---- words to registers ---------------------------------------------------------------------------------------------

// The integers of register j (0..3) of fragment t (0..3). t and j are constants after unrolling.
template <int BITS> KB_HOST_DEVICE Two<BITS> integers(const Vector (&lane)[VECTORS<BITS>], int t, int j) {
    const Slot slot = slot_of<BITS>(t, j, 0);
    return {lane[slot.vector].word[slot.word], slot.shift};
}

// The A fragment t of a lane as weights; `low` is the zero point and scale of row g, `high` of row g + 8.
template <class T, int BITS>
KB_HOST_DEVICE void fragment(const Vector (&lane)[VECTORS<BITS>], int t, const Affine<T, BITS> &low,
                             const Affine<T, BITS> &high, uint32_t (&a)[4]) {
    a[0] = low.weights(integers<BITS>(lane, t, 0));
    a[1] = high.weights(integers<BITS>(lane, t, 1));
    a[2] = low.weights(integers<BITS>(lane, t, 2));
    a[3] = high.weights(integers<BITS>(lane, t, 3));
}

}  // namespace kb
