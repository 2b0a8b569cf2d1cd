// Reading a layer as a checkpoint stores it: AWQ "gemm", GPTQ v1 and v2 (quantize/packing.py writes the same).
//
// All of them are streams of fields: field i of a stream is bits BITS * i .. BITS * i + BITS - 1, lowest first, counted
// through the stream's 32-bit words, and a field of 3 bits may begin in one word and end in the next.
//
//                   the weights' streams                        the zero points' streams           a field holds
//     AWQ           one for each input, along the outputs       one for each group, likewise       q, z; see below
//     GPTQ v1       one for each output, along the inputs       one for each group, along outputs  q, z - 1
//     GPTQ v2       as v1                                       as v1                              q, z
//
// AWQ puts eight neighbouring outputs into a word in the order 0 2 4 6 1 3 5 7, the lowest nibble first.
//
// A field of GPTQ v1 that holds 2^BITS - 1 is the zero point 2^BITS here, as in the kernels of ExLlama and vLLM.
// quantize/packing.py adds 1 to whole words and reads 0 there, with a carry into the next field. The two differ where a
// writer stored a zero point of 0, and for 3 bits in fields that cross words; what we write (4 and 8 bits, symmetric)
// has neither.
#pragma once

#include "kneebench.h"
#include "numbers.cuh"

namespace kb {

// COUNT fields of a stream in memory, whose words are `stride` apart: field i in the lowest bits, the next above it,
// and above them anything. At most 32 bits together.
template <int BITS, int COUNT> KB_HOST_DEVICE uint32_t fields(const int32_t *words, int i, int64_t stride) {
    const int word = i * BITS / 32, shift = i * BITS % 32;
    uint32_t found = static_cast<uint32_t>(words[word * stride]) >> shift;
    if (shift + BITS * COUNT > 32) found |= static_cast<uint32_t>(words[(word + 1) * stride]) << (32 - shift);
    return found;
}

// Field i of what `fields` found.
template <int BITS> KB_HOST_DEVICE int pick(uint32_t found, int i) {
    return static_cast<int>(found >> BITS * i & ((1u << BITS) - 1));
}

// Field i of a stream in registers, in the lowest bits of the result; what follows is above it. i is a constant after
// unrolling.
template <int BITS, int WORDS> KB_HOST_DEVICE uint32_t from_field(const uint32_t (&words)[WORDS], int i) {
    const int word = i * BITS / 32, shift = i * BITS % 32;
    if (shift + BITS <= 32) return words[word] >> shift;
    return words[word] >> shift | words[word + 1 < WORDS ? word + 1 : word] << (32 - shift);
}

// The low halves of two words side by side, or their high halves.
KB_HOST_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return prmt(a, b, 0x5410); }
KB_HOST_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return prmt(a, b, 0x7632); }

// Fields i and i + 1.
template <int BITS, int WORDS> KB_HOST_DEVICE Two<BITS> two_fields(const uint32_t (&words)[WORDS], int i) {
    return {low_halves(from_field<BITS>(words, i), from_field<BITS>(words, i + 1)), 0};
}

// The nibble of an AWQ word that holds output r (0..7) of its eight: even outputs are in the low half.
KB_HOST_DEVICE constexpr int awq_nibble(int r) { return r / 2 + r % 2 * 4; }

// Output r of two AWQ words, neighbours along the inputs.
KB_HOST_DEVICE Two<4> two_inputs(uint32_t a, uint32_t b, int r) {
    return {r % 2 ? high_halves(a, b) : low_halves(a, b), awq_nibble(r) % 4 * 4};
}

// The same, counted through the row's words.
KB_HOST_DEVICE constexpr int awq_field(int output) { return output / 8 * 8 + awq_nibble(output % 8); }

// ---- one by one, for any layout -------------------------------------------------------------------------------------

template <int BITS> KB_HOST_DEVICE int integer(const kb_stored &s, int output, int input) {
    if (s.layout == KB_AWQ)
        return pick<4>(fields<4, 1>(s.qweight + static_cast<int64_t>(input) * (s.n / 8), awq_field(output), 1), 0);
    return pick<BITS>(fields<BITS, 1>(s.qweight + output, input, s.n), 0);
}

template <int BITS> KB_HOST_DEVICE const int32_t *zero_row(const kb_stored &s, int group) {
    return s.qzeros + static_cast<int64_t>(group) * (s.n * BITS / 32);
}

template <int BITS> KB_HOST_DEVICE int zero_point(const kb_stored &s, int output, int group) {
    if (!s.qzeros) return 1 << (BITS - 1);
    const int field = s.layout == KB_AWQ ? awq_field(output) : output;
    return pick<BITS>(fields<BITS, 1>(zero_row<BITS>(s, group), field, 1), 0) + (s.layout == KB_GPTQ);
}

template <class T> KB_HOST_DEVICE T scale(const kb_stored &s, int output, int group) {
    return static_cast<const T *>(s.scales)[static_cast<int64_t>(group) * s.n + output];
}

// ---- of neighbouring outputs at once --------------------------------------------------------------------------------

// Zero points and scales of COUNT outputs, the first a multiple of COUNT, in one group: one load each.
template <class T, int COUNT> struct Neighbours {
    int zero[COUNT];
    struct alignas(sizeof(T) * COUNT) Scales {
        T of[COUNT];
    } scales;

    KB_HOST_DEVICE void load_scales(const kb_stored &s, int output, int group) {
        const T *from = static_cast<const T *>(s.scales) + static_cast<int64_t>(group) * s.n + output;
        scales = *reinterpret_cast<const Scales *>(from);
    }
};

template <class T, int BITS> KB_HOST_DEVICE Neighbours<T, 4> four_of_gptq(const kb_stored &s, int output, int group) {
    Neighbours<T, 4> four;
    four.load_scales(s, output, group);
    const uint32_t found = s.qzeros ? fields<BITS, 4>(zero_row<BITS>(s, group), output, 1) : 0;
    KB_UNROLL for (int o = 0; o < 4; o++)
        four.zero[o] = s.qzeros ? pick<BITS>(found, o) + (s.layout == KB_GPTQ) : 1 << (BITS - 1);
    return four;
}

template <class T> KB_HOST_DEVICE Neighbours<T, 8> eight_of_awq(const kb_stored &s, int output, int group) {
    Neighbours<T, 8> eight;
    eight.load_scales(s, output, group);
    const uint32_t word = s.qzeros ? fields<4, 8>(zero_row<4>(s, group), output, 1) : 0x88888888u;
    KB_UNROLL for (int r = 0; r < 8; r++) eight.zero[r] = pick<4>(word, awq_nibble(r));
    return eight;
}

}  // namespace kb
