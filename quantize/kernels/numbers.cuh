// Numbers of 16 bits, on the GPU and on the CPU, and the one formula of a weight.
//
// Half and Bfloat are CUDA's own types under nvcc. Where there is no CUDA they are two bytes with a rounding (to
// nearest, ties to even) written here: the host build needs no CUDA header. Two numbers travel in one 32-bit register,
// the first in its low half, as the tensor cores and the packed instructions want them.
//
//     Two        q0, q1                  two integers of up to 8 bits, 16 bits apart in a word
//     steps      q0 - z, q1 - z          in 16-bit floats, exact: from -256 to 255, which is 8 significant bits
//     weights    round((q - z) * s)      one rounding, as the product of 16-bit floats has
//
// An integer becomes a float without a conversion: OR it into the mantissa of a power of two so large that its last bit
// counts one, and subtract that power and the zero point together. 0x6400 | q is 1024 + q in half (10 bits of
// mantissa); 0x4300 | q is 128 + q in bfloat16 (7 bits: enough for integers of 4 bits, not of 8); 0x4b000000 | q is
// 2^23 + q in float.
#pragma once

#include <cstdint>
#include <cstring>

#include "simt.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#define KB_HOST_DEVICE __host__ __device__ __forceinline__

namespace kb {

#if defined(__CUDACC__)
using Half = __half;
using Bfloat = __nv_bfloat16;
#else
struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};
#endif

constexpr float NOT_A_NUMBER = __builtin_nanf("");

// The same bytes as another type.
template <class To, class From> KB_HOST_DEVICE To same_bits(const From &from) {
    static_assert(sizeof(To) == sizeof(From), "two types of one size");
    To to;
    memcpy(static_cast<void *>(&to), &from, sizeof(To));
    return to;
}

// ---- float <-> 16 bits, on the CPU ----------------------------------------------------------------------------------

// Bits of the half nearest to `value`. The float is cut to a half's mantissa; what was cut off decides the rounding,
// and a carry out of the mantissa is a step of the exponent, which is right up to infinity.
inline uint16_t nearest_half(float value) {
    const uint32_t bits = same_bits<uint32_t>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);  // NaN
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    if (exponent < -25) return static_cast<uint16_t>(sign);  // less than half of the smallest, 2^-24
    uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;  // 24 bits, with the leading one
    const int cut = exponent < -14 ? -1 - exponent : 13;      // below 2^-14 a half keeps fewer bits
    const uint32_t rest = mantissa & ((1u << cut) - 1), middle = 1u << (cut - 1);
    mantissa >>= cut;
    mantissa += rest > middle || (rest == middle && (mantissa & 1u));
    const uint32_t base = exponent < -14 ? 0u : static_cast<uint32_t>(exponent + 14) << 10;  // the one adds a step
    return static_cast<uint16_t>(sign | (base + mantissa));
}

inline float half_value(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    if (exponent == 31) return same_bits<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return same_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    const float small = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -small : small;
}

inline uint16_t nearest_bfloat(float value) {
    const uint32_t bits = same_bits<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float bfloat_value(uint16_t bits) { return same_bits<float>(static_cast<uint32_t>(bits) << 16); }

// ---- float <-> 16 bits, on both -------------------------------------------------------------------------------------

KB_HOST_DEVICE float widen(Half value) {
#if defined(__CUDA_ARCH__)
    return __half2float(value);
#else
    return half_value(same_bits<uint16_t>(value));
#endif
}

KB_HOST_DEVICE float widen(Bfloat value) {
#if defined(__CUDA_ARCH__)
    return __bfloat162float(value);
#else
    return bfloat_value(same_bits<uint16_t>(value));
#endif
}

// The 16-bit number nearest to `value`: narrow<Half>(x), narrow<Bfloat>(x).
template <class T> KB_HOST_DEVICE T narrow(float value);

template <> KB_HOST_DEVICE Half narrow<Half>(float value) {
#if defined(__CUDA_ARCH__)
    return __float2half_rn(value);
#else
    return same_bits<Half>(nearest_half(value));
#endif
}

template <> KB_HOST_DEVICE Bfloat narrow<Bfloat>(float value) {
#if defined(__CUDA_ARCH__)
    return __float2bfloat16_rn(value);
#else
    return same_bits<Bfloat>(nearest_bfloat(value));
#endif
}

// ---- two numbers in a register --------------------------------------------------------------------------------------

template <class T> KB_HOST_DEVICE uint32_t pair(T first, T second) {
    return same_bits<uint16_t>(first) | static_cast<uint32_t>(same_bits<uint16_t>(second)) << 16;
}

template <class T> KB_HOST_DEVICE T first(uint32_t pair) { return same_bits<T>(static_cast<uint16_t>(pair)); }

template <class T> KB_HOST_DEVICE T second(uint32_t pair) { return same_bits<T>(static_cast<uint16_t>(pair >> 16)); }

template <class T> KB_HOST_DEVICE uint32_t narrow_pair(float a, float b) { return pair(narrow<T>(a), narrow<T>(b)); }

template <class T> struct Packed;  // CUDA's type of two numbers

#if defined(__CUDACC__)
template <> struct Packed<Half> {
    using type = __half2;
};
template <> struct Packed<Bfloat> {
    using type = __nv_bfloat162;
};
#endif

// a - b in both halves. The CPU rounds the float's difference, which is the same wherever that is exact: integers are.
template <class T> KB_HOST_DEVICE uint32_t subtract(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    using Two = typename Packed<T>::type;
    return same_bits<uint32_t>(__hsub2(same_bits<Two>(a), same_bits<Two>(b)));
#else
    return narrow_pair<T>(widen(first<T>(a)) - widen(first<T>(b)), widen(second<T>(a)) - widen(second<T>(b)));
#endif
}

// a * b in both halves, each rounded once: the product of 11 bits by 11 is exact in a float.
template <class T> KB_HOST_DEVICE uint32_t multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    using Two = typename Packed<T>::type;
    return same_bits<uint32_t>(__hmul2_rn(same_bits<Two>(a), same_bits<Two>(b)));
#else
    return narrow_pair<T>(widen(first<T>(a)) * widen(first<T>(b)), widen(second<T>(a)) * widen(second<T>(b)));
#endif
}

// ---- two instructions that compilers do not always find -------------------------------------------------------------

// Any function of three bits, 32 times: bit 4 a + 2 b + c of TABLE is the result for (a, b, c), so the table of an
// expression is the same expression of 0xf0, 0xcc and 0xaa.
constexpr uint32_t TABLE_A = 0xf0, TABLE_B = 0xcc, TABLE_C = 0xaa;

template <uint32_t TABLE> KB_HOST_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return result;
#else
    uint32_t result = 0;
    for (int row = 0; row < 8; row++)
        if (TABLE >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return result;
#endif
}

// Four bytes out of eight, a's being 0..3 and b's 4..7: nibble i of `choice`, 0..7, names the source of byte i.
KB_HOST_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t choice) {
#if defined(__CUDA_ARCH__)
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(choice));
    return result;
#else
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(bytes >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i;
    return result;
#endif
}

// ---- from integers to weights ---------------------------------------------------------------------------------------

// Two integers of a word: bits `shift`.. and `shift` + 16.., BITS each; the other bits are anything. 8 bits have a
// shift of 0 or 8.
template <int BITS> struct Two {
    uint32_t word;
    int shift;

    // Both ORed into a number of 16 bits whose low BITS bits are 0: 0x6400 for half, 0x4300 for bfloat16.
    template <uint32_t BASE> KB_HOST_DEVICE uint32_t ored_into() const {
        if (BITS == 8) return prmt(word, BASE >> 8, shift ? 0x4341 : 0x4240);  // bytes: q0, BASE, q1, BASE
        constexpr uint32_t mask = (1u << BITS) - 1;
        return lop3<(TABLE_A & TABLE_B) | TABLE_C>(word >> shift, mask | mask << 16, BASE | BASE << 16);
    }
};

// What an integer is ORed into, and how many bits of it that leaves exact.
template <class T> struct Base;
template <> struct Base<Half> {
    static constexpr uint32_t bits = 0x6400;  // 1024
    static constexpr int room = 10;
};
template <> struct Base<Bfloat> {
    static constexpr uint32_t bits = 0x4300;  // 128
    static constexpr int room = 7;
};

// The zero point and scale of one output's group, held in registers as the arithmetic wants them.
template <class T, int BITS> struct Affine {
    static_assert(BITS <= Base<T>::room, "the integers must fit: 8 bits of bfloat16 are written below");
    uint32_t bias, scale;

    // 1024 + z, or 128 + z, twice. z is at most 2^BITS, which is still exact.
    KB_HOST_DEVICE Affine(int zero, T s)
        : bias(Base<T>::bits * 0x10001u + 0x10001u * static_cast<uint32_t>(zero)), scale(pair(s, s)) {}

    KB_HOST_DEVICE uint32_t steps(Two<BITS> q) const {
        return subtract<T>(q.template ored_into<Base<T>::bits>(), bias);
    }
    KB_HOST_DEVICE uint32_t weights(Two<BITS> q) const { return multiply<T>(steps(q), scale); }
};

template <> struct Affine<Bfloat, 8> {
    float bias;
    uint32_t scale;

    KB_HOST_DEVICE Affine(int zero, Bfloat s) : bias(0x1p23f + static_cast<float>(zero)), scale(pair(s, s)) {}

    KB_HOST_DEVICE uint32_t steps(Two<8> q) const {
        const uint32_t base = 0x4b000000u, first_byte = static_cast<uint32_t>(q.shift) / 8;  // 2^23
        const float low = same_bits<float>(prmt(q.word, base, 0x7650 + first_byte)) - bias;
        const float high = same_bits<float>(prmt(q.word, base, 0x7652 + first_byte)) - bias;
        return narrow_pair<Bfloat>(low, high);
    }
    KB_HOST_DEVICE uint32_t weights(Two<8> q) const { return multiply<Bfloat>(steps(q), scale); }
};

}  // namespace kb
