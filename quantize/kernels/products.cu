// How much workspace a product needs.

#include "products.cuh"

using namespace kb;

static int check_workspace(const kb_tiles *tiles, int tokens, int kernel) {
    KB_TRY(kb_check_tiles(tiles));
    if (kernel != KB_GEMV && kernel != KB_GEMM)
        return refuse(KB_LAYOUT, "kernel is %d: %d (gemv) and %d (gemm) are allowed", kernel, KB_GEMV, KB_GEMM);
    KB_TRY(check_tokens(tokens, kernel == KB_GEMV ? GEMV_TOKENS : GEMM_TOKENS));
    return check_device();
}

int64_t kb_workspace(const kb_tiles *tiles, int tokens, int kernel) {
    const int code = check_workspace(tiles, tokens, kernel);
    if (code != KB_OK) return -code;
    const auto schedule = kernel == KB_GEMV ? gemv_schedule : gemm_schedule;
    return partial_bytes(schedule(tiles->n, tiles->k, processors()), tokens, tiles->n);
}
