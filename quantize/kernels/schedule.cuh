// Who works on what: the shapes of the launches, as pure functions, so that a test can walk them for every size and see
// that each chunk (16 outputs x 64 inputs, tiles.cuh) is taken exactly once.
//
//     inputs ──►    split 0          split 1          split 2            a split: a share of the chunks of a row
//     16 outputs  [ 0 1 2 0 1 2 0 ] [ 0 1 2 0 1 2 0 ] [ 0 1 2 0 1 2 ]    gemv: a block, whose warps take turns
//     16 outputs  [ . . . . . . . ] [ . . . . . . . ] [ . . . . . . ]    gemm: a warp; a block is eight rows
//
// Splits add into the same outputs. Each writes its own float32 sums to the workspace, and a second kernel adds those
// in the order of the splits (reduce.cuh): the same bits every time on a card, at the price of one more launch. So one
// split is the rule, and more are for layers that would leave processors idle.
#pragma once

#include "tiles.cuh"

namespace kb {

constexpr int WARPS = 8;  // of a block, of both kernels
constexpr int THREADS = WARPS * LANES;

struct Range {
    int begin, end;
};

// Part `part` of `count` things cut into `parts` shares that differ by one at most.
KB_HOST_DEVICE Range share(int count, int parts, int part) {
    return {static_cast<int>(static_cast<int64_t>(count) * part / parts),
            static_cast<int>(static_cast<int64_t>(count) * (part + 1) / parts)};
}

struct Schedule {
    int blocks;  // along the outputs
    int splits;  // along the inputs
};

// As many splits as fill `wanted` blocks, but none with fewer than `least` chunks.
KB_HOST_DEVICE int splits(int blocks, int chunks, int wanted, int least) {
    const int useful = wanted / blocks, possible = chunks / least;
    const int count = useful < possible ? useful : possible;
    return count < 1 ? 1 : count;
}

// gemv: a block is one row of chunks. Memory is kept busy by loads under way, 2 KiB a warp: even one block a processor
// has 16 KiB, and by Little's law the fastest of the cards (RTX 5080: 960 GB/s, 84 processors) needs 8 KiB if memory
// takes 700 ns. So a split only pays where there are fewer rows than processors, and where each warp keeps eight
// chunks.
KB_HOST_DEVICE Schedule gemv_schedule(int64_t n, int64_t k, int processors) {
    const int rows = static_cast<int>(ceil_div(n, ROWS)), chunks = static_cast<int>(ceil_div(k, COLUMNS));
    return {rows, splits(rows, chunks, processors, 8 * WARPS)};
}

// The chunk that `warp` takes at its turn 0, 1, ...; beyond the range's end it has none. Neighbouring warps take
// neighbouring chunks: the block reads 4 KiB (4 bits) in one piece.
KB_HOST_DEVICE int gemv_chunk(Range range, int warp, int turn) { return range.begin + warp + WARPS * turn; }

// gemm: a block is eight rows of chunks, a warp each: an activation is fetched from L2 once for 128 outputs rather than
// for 16. Two blocks fit into a processor, so two for each are wanted; four chunks fill the pipeline.
KB_HOST_DEVICE Schedule gemm_schedule(int64_t n, int64_t k, int processors) {
    const int blocks = static_cast<int>(ceil_div(n, ROWS * WARPS)), chunks = static_cast<int>(ceil_div(k, COLUMNS));
    return {blocks, splits(blocks, chunks, 2 * processors, 4)};
}

KB_HOST_DEVICE int gemm_row(int block, int warp) { return block * WARPS + warp; }

// Bytes of the partial sums [splits, tokens, n].
KB_HOST_DEVICE int64_t partial_bytes(Schedule schedule, int tokens, int64_t n) {
    return schedule.splits == 1 ? 0 : static_cast<int64_t>(sizeof(float)) * schedule.splits * tokens * n;
}

}  // namespace kb
