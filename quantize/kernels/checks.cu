// The part of the C ABI that launches nothing: version, messages, and the checks of sizes and pointers.

#include "checks.cuh"

namespace kb {

// Far above any layer, and low enough that a grid's dimensions and the bits of a row fit in 32 bits.
constexpr int LARGEST = 1 << 20;

int check_count(const char *name, int count, int bits) {
    const int step = bits == 2 ? 16 : bits == 3 ? 32 : 8;  // whole words, and rows of whole 16 bytes
    if (count > 0 && count <= LARGEST && count % step == 0) return KB_OK;
    return refuse(KB_SIZE, "%s is %d: a multiple of %d up to %d for %d bits", name, count, step, LARGEST, bits);
}

int check_sizes(int n, int k, int groups, int group_size, int bits) {
    KB_TRY(check_count("n", n, bits));
    KB_TRY(check_count("k", k, bits));
    if (group_size != k && (group_size <= 0 || group_size % 32))
        return refuse(KB_SIZE, "group_size is %d: a multiple of 32, or k (%d) for one group a row", group_size, k);
    if (groups <= 0 || static_cast<int64_t>(groups) * group_size != k)
        return refuse(KB_SIZE, "%d groups of %d for k = %d: groups * group_size is k", groups, group_size, k);
    return KB_OK;
}

int check_dtype(int dtype) {
    if (dtype == KB_FLOAT16 || dtype == KB_BFLOAT16) return KB_OK;
    return refuse(KB_DTYPE, "dtype is %d: %d (float16) and %d (bfloat16) are allowed", dtype, KB_FLOAT16, KB_BFLOAT16);
}

int check_bits(int bits, int allowed) {
    if (bits >= 1 && bits <= 8 && (allowed >> bits & 1)) return KB_OK;
    char list[32] = "";
    for (int i = 1, end = 0; i <= 8; i++)
        if (allowed >> i & 1) end += snprintf(list + end, sizeof list - end, end ? ", %d" : "%d", i);
    return refuse(KB_BITS, "bits is %d: %s are allowed", bits, list);
}

}  // namespace kb

using namespace kb;

int kb_version(void) { return KB_VERSION; }

const char *kb_message(int code) {
    if (code == last.code && code != KB_OK) return last.text;
    switch (code) {
        case KB_OK: return "no error";
        case KB_NULL_POINTER: return "an array that is needed is NULL";
        case KB_ALIGNMENT: return "an array does not begin at a multiple of 16 bytes";
        case KB_SIZE: return "n, k, groups or group_size is not allowed";
        case KB_BITS: return "a number of bits that is not allowed";
        case KB_LAYOUT: return "a layout that is not allowed";
        case KB_DTYPE: return "a type that is not allowed";
        case KB_TOKENS: return "a number of tokens that is not allowed";
        case KB_WORKSPACE: return "the workspace is smaller than kb_workspace says";
        case KB_DEVICE: return "the GPU is too old for this kernel";
        case KB_LAUNCH: return "the kernel was not launched, or an earlier one failed";
        default: return "an unknown error code";
    }
}

int kb_check_stored(const kb_stored *stored, int bits) {
    if (!stored) return refuse(KB_NULL_POINTER, "stored is NULL: a layer is needed");
    const kb_stored &s = *stored;
    if (s.layout != KB_AWQ && s.layout != KB_GPTQ && s.layout != KB_GPTQ_V2)
        return refuse(KB_LAYOUT, "layout is %d: %d (AWQ), %d (GPTQ) and %d (GPTQ v2) are allowed", s.layout, KB_AWQ,
                      KB_GPTQ, KB_GPTQ_V2);
    KB_TRY(check_bits(s.bits, s.layout == KB_AWQ ? bits & 1 << 4 : bits));
    KB_TRY(check_dtype(s.dtype));
    KB_TRY(check_sizes(s.n, s.k, s.groups, s.group_size, s.bits));
    if (s.layout == KB_AWQ && s.g_idx) return refuse(KB_LAYOUT, "g_idx with layout AWQ: only GPTQ's layouts have one");
    KB_TRY(check_array("qweight", s.qweight));
    KB_TRY(check_array("scales", s.scales));
    if (s.qzeros) KB_TRY(check_array("qzeros", s.qzeros));
    if (s.g_idx) KB_TRY(check_array("g_idx", s.g_idx));
    return KB_OK;
}

int kb_check_tiles(const kb_tiles *tiles) {
    if (!tiles) return refuse(KB_NULL_POINTER, "tiles is NULL: a prepared layer is needed");
    const kb_tiles &t = *tiles;
    KB_TRY(check_bits(t.bits, 1 << 4 | 1 << 8));
    KB_TRY(check_dtype(t.dtype));
    KB_TRY(check_sizes(t.n, t.k, t.groups, t.group_size, t.bits));
    KB_TRY(check_array("tiles", t.tiles));
    KB_TRY(check_array("scales", t.scales));
    KB_TRY(check_array("zeros", t.zeros));
    return KB_OK;
}
