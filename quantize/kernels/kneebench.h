/* The C ABI of the kernels. One header for both builds of the same sources: nvcc's, whose pointers are device pointers,
 * and g++'s, which runs the kernels on the CPU for the tests: its pointers are host pointers, the stream is ignored.
 *
 *     checkpoint (AWQ, GPTQ) ── kb_prepare, once ──► tiles ── kb_gemv   1 to 8 tokens
 *           │                                             ├── kb_gemm   1 to 64 tokens, sm_80 and up
 *           └── kb_dequantize ──► [n, k]                  └── kb_expand ──► [n, k], for a library's product
 *
 * Every function returns 0, or an error code that kb_message explains. Arguments are checked before anything is read;
 * nothing is allocated and nothing waits, so that each call can be captured in a CUDA graph. A weight is
 * round16((q - z) * s), rounded once, in the type of the scales.
 */
#ifndef KNEEBENCH_H
#define KNEEBENCH_H

#include <stdint.h>

#define KB_VERSION 1

#if defined(__GNUC__)
#define KB_EXPORT __attribute__((visibility("default")))
#else
#define KB_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { KB_FLOAT16 = 0, KB_BFLOAT16 = 1 };
enum { KB_AWQ = 0, KB_GPTQ = 1, KB_GPTQ_V2 = 2 };
enum { KB_GEMV = 0, KB_GEMM = 1 };

enum {
    KB_OK = 0,
    KB_NULL_POINTER = 1, /* an array that is needed is not there */
    KB_ALIGNMENT = 2,    /* an array does not begin at a multiple of 16 bytes */
    KB_SIZE = 3,         /* n, k, groups or group_size */
    KB_BITS = 4,         /* bits that this function, or this layout, does not have */
    KB_LAYOUT = 5,       /* neither KB_AWQ, KB_GPTQ nor KB_GPTQ_V2, or one that knows no g_idx */
    KB_DTYPE = 6,        /* neither KB_FLOAT16 nor KB_BFLOAT16, or two that differ */
    KB_TOKENS = 7,       /* more tokens than the kernel takes, or none */
    KB_WORKSPACE = 8,    /* fewer bytes than kb_workspace says */
    KB_DEVICE = 9,       /* the GPU is too old for the kernel */
    KB_LAUNCH = 10       /* CUDA refused the launch, or an earlier kernel failed */
};

/* A linear layer as a checkpoint stores it: n outputs, k inputs, all arrays without gaps.
 *
 *              qweight                 qzeros                      scales           g_idx
 *     AWQ      int32 [k, n/8]          int32 [groups, n/8]         [groups, n]      none
 *     GPTQ     int32 [k*bits/32, n]    int32 [groups, n*bits/32]   [groups, n]      int32 [k], the group of each input
 *
 * n and k are multiples of 8 (of 16 for 2 bits, of 32 for 3 bits) up to 2^20. group_size is a multiple of 32, or k (the
 * -1 of a checkpoint's configuration), and groups * group_size = k. qzeros NULL: every zero point is 2^(bits - 1).
 * g_idx NULL: the group of input i is i / group_size. GPTQ v1 stores z - 1 in each field, v2 stores z.
 */
typedef struct {
    const int32_t *qweight, *qzeros;
    const void *scales;
    const int32_t *g_idx;
    int32_t n, k, groups, group_size, bits, layout, dtype;
} kb_stored;

/* The same layer in the kernels' own order, which tiles.cuh draws. Np is n rounded up to 16, Kp is k rounded up to 64.
 *
 *     tiles   uint8 [Np/16, Kp/64, bits/4, 32, 16]      scales  [Np/16, groups, 16], as dtype      zeros  like scales
 */
typedef struct {
    void *tiles;
    void *scales;
    int16_t *zeros;
    int32_t n, k, groups, group_size, bits, dtype;
} kb_tiles;

/* KB_VERSION of the library, which a caller compares with the one it was written for. */
KB_EXPORT int kb_version(void);

/* What `code` means: what was given and what is allowed, if it is the last error of this thread. Never NULL. */
KB_EXPORT const char *kb_message(int code);

/* Check what the functions below check first, and do nothing else. `bits` has a bit set for each width that is allowed:
 * 1 << 4 | 1 << 8 for 4 and 8. */
KB_EXPORT int kb_check_stored(const kb_stored *stored, int bits);
KB_EXPORT int kb_check_tiles(const kb_tiles *tiles);

/* Stored layer -> tiles; 4 and 8 bits. perm: int32 [k], the input that lies at each position (act-order: the stable
 * sort of g_idx), or NULL. A group with a position whose perm is outside 0..k-1, or whose g_idx is not position /
 * group_size, gets NaN for all its scales; nothing is read there. */
KB_EXPORT int kb_prepare(const kb_stored *stored, const int32_t *perm, const kb_tiles *out, void *stream);

/* Stored layer -> weights [n, k] in the type of the scales; 2, 3, 4 and 8 bits. An input whose g_idx is outside
 * 0..groups-1 gets NaN, and nothing is read. */
KB_EXPORT int kb_dequantize(const kb_stored *stored, void *out, void *stream);

/* Tiles -> weights [n, k]. With perm, inputs are in the model's order, and one that no position names is NaN; with perm
 * NULL, they are in the prepared order. */
KB_EXPORT int kb_expand(const kb_tiles *tiles, const int32_t *perm, void *out, void *stream);

/* y [tokens, n] = x [tokens, k] times the weights; x and y are in the type of the scales, x in the prepared order.
 * kb_gemv takes 1 to 8 tokens, kb_gemm 1 to 64. workspace: kb_workspace's bytes, whatever they hold. */
KB_EXPORT int kb_gemv(const kb_tiles *tiles, const void *x, void *y, int tokens, void *workspace, int64_t bytes,
                      void *stream);
KB_EXPORT int kb_gemm(const kb_tiles *tiles, const void *x, void *y, int tokens, void *workspace, int64_t bytes,
                      void *stream);

/* Bytes of workspace that `kernel` (KB_GEMV, KB_GEMM) needs, or an error code below 0. */
KB_EXPORT int64_t kb_workspace(const kb_tiles *tiles, int tokens, int kernel);

#ifdef __cplusplus
}
#endif

#endif
