// The host's half of simt.h: a block of CUDA threads as fibers. What it promises is written there.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::kb::simt::self->thread)
#define blockIdx (::kb::simt::block->index)
#define blockDim (::kb::simt::block->size)
#define gridDim (::kb::simt::block->grid)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

namespace kb::simt {

// ---- settings of the machine, for tests -----------------------------------------------------------------------

inline unsigned order = 0;      // of threads: 0 forwards, 1 backwards, else shuffled with this seed
inline int processors = 4;      // the device that is played
inline int architecture = 90;

// ---- fibers ---------------------------------------------------------------------------------------------------

constexpr size_t stack_bytes = 128 * 1024;
constexpr unsigned warp_size = 32;

// Where threads meet. A thread that arrives notes the round, and goes on once the round is another.
struct Meeting {
    const char *what = nullptr;  // the collective, as the first to arrive named it
    unsigned arrived = 0;
    uint64_t round = 0;
    void *items[warp_size] = {};  // of a warp's meeting: what each lane brings, on its own stack
};

struct Copy {
    void *to;
    unsigned char bytes[16];
};

struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    dim3 thread;
    const Meeting *waits_at = nullptr;
    const char *waits_for = nullptr;
    uint64_t waits_since = 0;
    bool ended = false;
    std::vector<Copy> open;                   // copies of the group not yet committed
    std::vector<std::vector<Copy>> groups;    // committed, not yet waited for; the oldest first
    void *fake_stack = nullptr;               // AddressSanitizer's

    bool ready() const { return !ended && (!waits_at || waits_at->round != waits_since); }
};

struct Block {
    dim3 index, size, grid;
    unsigned char *shared_begin = nullptr;
    size_t shared_bytes = 0;
    Meeting everyone;
    std::vector<Meeting> warps;
    std::vector<Fiber> fibers;
    const std::function<void()> *body = nullptr;
    ucontext_t scheduler{};
    const void *scheduler_stack = nullptr;  // AddressSanitizer wants to know where a switch goes
    size_t scheduler_stack_bytes = 0;
    std::string failure;
};

inline thread_local Block *block = nullptr;
inline thread_local Fiber *self = nullptr;

// Back to the scheduler; returns when the scheduler resumes this fiber, or never, if it ended or the block failed.
inline void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(self->ended ? nullptr : &self->fake_stack, block->scheduler_stack,
                                   block->scheduler_stack_bytes);
#endif
    swapcontext(&self->context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

inline void resume(Fiber &fiber) {
    self = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    void *mine = nullptr;
    __sanitizer_start_switch_fiber(&mine, fiber.stack.get(), stack_bytes);
#endif
    swapcontext(&block->scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
    self = nullptr;
}

inline std::string place(const Fiber &fiber) {
    return "block " + std::to_string(block->index.x) + "," + std::to_string(block->index.y) + " thread " +
           std::to_string(fiber.thread.x);
}

// The kernel is wrong: the block stops here, and the launch returns an error.
[[noreturn]] inline void fail(const std::string &why) {
    if (block->failure.empty()) {
        block->failure = place(*self) + ": " + why;
    }
    for (;;) leave();
}

inline void begin_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
    (*block->body)();
    self->ended = true;
    leave();
}

inline void prepare(Fiber &fiber, unsigned thread) {
    fiber.thread = dim3(thread, 0, 0);
    fiber.ended = false;
    fiber.waits_at = nullptr;
    fiber.open.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin_fiber, 0);
}

// ---- meetings -------------------------------------------------------------------------------------------------

// Waits until `members` threads have come to `meeting`; the last one does `work` for all before anybody goes on.
template <class Work>
void meet(Meeting &meeting, unsigned members, const char *what, Work work) {
    if (meeting.arrived == 0) meeting.what = what;
    if (std::strcmp(meeting.what, what) != 0) fail(std::string("is at ") + what + ", others are at " + meeting.what);
    if (++meeting.arrived == members) {
        work();
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    self->waits_at = &meeting;
    self->waits_for = what;
    self->waits_since = meeting.round;
    leave();
    self->waits_at = nullptr;
}

// The lanes of a warp bring an item each; `work` sees all 32 of them.
template <class Item, class Work>
void meet_warp(const char *what, Item &mine, Work work) {
    Meeting &warp = block->warps[self->thread.x / warp_size];
    warp.items[self->thread.x % warp_size] = &mine;
    meet(warp, warp_size, what, [&] {
        Item *items[warp_size];
        for (unsigned lane = 0; lane < warp_size; ++lane) items[lane] = static_cast<Item *>(warp.items[lane]);
        work(items);
    });
}

// This lane's value out of lane `source`; out of itself where there is no such lane.
template <class T>
T shuffle(const char *what, unsigned mask, T value, unsigned source) {
    if (mask != 0xffffffffu) fail(std::string(what) + " with a mask that leaves lanes out");
    struct Item {
        T brings, takes;
        unsigned source;
    } mine{value, value, source < warp_size ? source : self->thread.x % warp_size};
    meet_warp(what, mine, [](Item **items) {
        for (unsigned lane = 0; lane < warp_size; ++lane) items[lane]->takes = items[items[lane]->source]->brings;
    });
    return mine.takes;
}

// ---- memory ---------------------------------------------------------------------------------------------------

inline const void *aligned(const void *address, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return address;
    fail("an access of " + std::to_string(bytes) + " bytes is misaligned");
}

inline void copy_issue(void *to, const void *from, int bytes) {
    Copy copy{to, {}};
    if (bytes < 0 || bytes > 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
    aligned(to, 16);
    if (bytes) std::memcpy(copy.bytes, aligned(from, 16), size_t(bytes));
    std::memset(to, 0xff, 16);  // from now on until it is waited for, nobody may rely on what is here
    self->open.push_back(copy);
}

inline void copy_commit() { self->groups.push_back(std::exchange(self->open, {})); }

inline void copy_wait(unsigned left) {
    while (self->groups.size() > left) {
        for (const Copy &copy : self->groups.front()) std::memcpy(copy.to, copy.bytes, 16);
        self->groups.erase(self->groups.begin());
    }
}

// ---- tensor cores ---------------------------------------------------------------------------------------------

inline float float16_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value;
    if (exponent == 31) {
        value = fraction ? NAN : INFINITY;
    } else if (exponent == 0) {
        value = std::ldexp(float(fraction), -24);
    } else {
        value = std::ldexp(float(1024 + fraction), exponent - 25);
    }
    return bits >> 15 ? -value : value;
}

inline float bfloat16_value(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// `value` is what 16 bits stand for.
inline void mma(const char *what, float (*value)(uint16_t), float (&d)[4], const uint32_t (&a)[4],
                const uint32_t (&b)[2]) {
    struct Item {
        float *d;
        const uint32_t *a, *b;
    } mine{d, a, b};
    meet_warp(what, mine, [&](Item **items) {
        float left[16][16], right[16][8];  // [row, k], [k, column]
        for (unsigned lane = 0; lane < warp_size; ++lane) {
            const unsigned g = lane / 4, c = lane % 4;
            for (unsigned half = 0; half < 2; ++half) {
                const auto piece = [&](uint32_t word) { return value(uint16_t(word >> (16 * half))); };
                left[g][2 * c + half] = piece(items[lane]->a[0]);
                left[g + 8][2 * c + half] = piece(items[lane]->a[1]);
                left[g][2 * c + half + 8] = piece(items[lane]->a[2]);
                left[g + 8][2 * c + half + 8] = piece(items[lane]->a[3]);
                right[2 * c + half][g] = piece(items[lane]->b[0]);
                right[2 * c + half + 8][g] = piece(items[lane]->b[1]);
            }
        }
        for (unsigned lane = 0; lane < warp_size; ++lane) {
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                float sum = items[lane]->d[i];
                for (unsigned k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                items[lane]->d[i] = sum;
            }
        }
    });
}

// ---- the scheduler --------------------------------------------------------------------------------------------

// The i-th of `count` things in the order of the settings, in the `pass`-th look over them.
inline unsigned chosen(unsigned i, unsigned count, unsigned pass) {
    if (order == 0) return i;
    if (order == 1) return count - 1 - i;
    uint32_t turn = (order * 2654435761u) ^ (pass * 40503u);
    turn ^= turn >> 15;
    const bool power = (count & (count - 1)) == 0;  // of two: then any odd step visits all; else they are only rotated
    const unsigned step = power && count > 1 ? 2 * (turn % (count / 2)) + 1 : 1;
    return (i * step + (turn >> 8)) % count;
}

// Runs the block's fibers until all have ended; false where it failed.
inline bool run_block() {
    const unsigned warps = unsigned(block->warps.size());
    for (unsigned pass = 0;; ++pass) {
        bool moved = false, all_ended = true;  // in this look over all warps
        for (unsigned i = 0; i < warps; ++i) {
            const unsigned warp = chosen(i, warps, pass);
            for (bool warp_moved = true; warp_moved;) {  // as far ahead as this warp can go
                warp_moved = false;
                for (unsigned j = 0; j < warp_size; ++j) {
                    Fiber &fiber = block->fibers[warp * warp_size + chosen(j, warp_size, pass)];
                    if (!fiber.ready()) continue;
                    resume(fiber);
                    if (!block->failure.empty()) return false;
                    moved = warp_moved = true;
                }
            }
        }
        for (const Fiber &fiber : block->fibers) all_ended = all_ended && fiber.ended;
        if (all_ended) return true;
        if (moved) continue;
        for (const Fiber &fiber : block->fibers) {
            if (fiber.ended) continue;
            block->failure = place(fiber) + " waits for ever at " + fiber.waits_for;
            return false;
        }
    }
}

inline int run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()> &body) {
    const bool block_fits = threads > 0 && threads <= 1024 && threads % warp_size == 0 && shared_bytes <= 48 * 1024;
    if (!block_fits || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z != 1) {
        std::fprintf(stderr, "simt: %u x %u x %u blocks of %u threads with %zu bytes cannot be launched\n", grid.x,
                     grid.y, grid.z, threads, shared_bytes);
        return 1;
    }
    Block here;
    here.size = dim3(threads);
    here.grid = grid;
    here.body = &body;
    here.fibers.resize(threads);
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            void *bytes = nullptr;  // exactly as many as asked for, so that AddressSanitizer sees one too many
            if (posix_memalign(&bytes, 16, shared_bytes)) std::abort();
            const std::unique_ptr<void, void (*)(void *)> memory(bytes, std::free);
            here.shared_begin = static_cast<unsigned char *>(bytes);
            here.shared_bytes = shared_bytes;
            std::memset(here.shared_begin, 0xff, shared_bytes);  // NaN in every type we use
            here.index = dim3(x, y);
            here.everyone = Meeting();
            here.warps.assign(threads / warp_size, Meeting());
            Block *const outer = std::exchange(block, &here);
            for (unsigned i = 0; i < threads; ++i) prepare(here.fibers[i], i);
            const bool good = run_block();
            block = outer;
            if (!good) {
                std::fprintf(stderr, "simt: %s\n", here.failure.c_str());
                return 1;
            }
        }
    }
    return 0;
}

}  // namespace kb::simt

// ---- what CUDA has under these names --------------------------------------------------------------------------

inline void __syncthreads() {
    using namespace kb::simt;
    meet(block->everyone, block->size.x, "__syncthreads", [] {});
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    if (mask != 0xffffffffu) kb::simt::fail("__syncwarp with a mask that leaves lanes out");
    kb::simt::meet(kb::simt::block->warps[threadIdx.x / 32], 32, "__syncwarp", [] {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    return kb::simt::shuffle("__shfl_sync", mask, value, unsigned(source) % 32);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return kb::simt::shuffle("__shfl_xor_sync", mask, value, threadIdx.x % 32 ^ unsigned(bits));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    return kb::simt::shuffle("__shfl_down_sync", mask, value, threadIdx.x % 32 + by);
}

template <class T>
T __ldg(const T *address) {
    return *address;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

// ---- settings, exported for tests -----------------------------------------------------------------------------

// The order of threads (0 forwards, 1 backwards, else shuffled with this seed), and the device played: its
// multiprocessors and compute capability times ten.
extern "C" __attribute__((used, visibility("default"))) inline void kb_simt_set(int order, int processors,
                                                                                 int architecture) {
    kb::simt::order = unsigned(order);
    kb::simt::processors = processors;
    kb::simt::architecture = architecture;
}
