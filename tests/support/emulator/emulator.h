// The primitives of a warp on a CPU: every thread of a block is a fiber, and one fiber runs at a time.
//
// A warp runs as far as it can before another one may go on, in either order of the warps, and an asynchronous copy
// arrives as late as it may, or as early: so a forgotten barrier or wait shows. Shared memory starts as NaNs. What stops
// the program with a message: an access outside of shared memory, or not aligned; a race, by who used what between which
// barriers; eight rows of a matrix that share banks.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__
#define __launch_bounds__(...)
#define INLINE inline
#define SHARED_MEMORY(name) unsigned char* name = emulator::shared_memory

namespace emulator {
struct Index {
    unsigned x;
};
extern Index thread, block;
extern unsigned char* shared_memory;
struct Lane {  // what the other lanes of a warp may read
    u32 a[4], b[2];
    float number;
    const void* row;
};
extern Lane lanes[1024];
inline Lane& lane(int i) { return lanes[(thread.x & ~31u) + i]; }
void meet_warp();
void meet_block();
void queue_copy(void* to, const void* from, bool valid);
void close_group();
void wait_for_groups(int pending);
void read_row(const void* p);
void check_banks(const void* const (&rows)[8]);

inline float bits_as_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline u32 float_as_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}
#ifdef HALF
inline float widen(u16 x) {
    _Float16 half;
    memcpy(&half, &x, 2);
    return half;
}
inline u16 narrow(float x) {
    _Float16 half = static_cast<_Float16>(x);
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
#else
inline float widen(u16 x) { return bits_as_float(static_cast<u32>(x) << 16); }
inline u16 narrow(float x) {  // to the nearest, ties to even
    if (std::isnan(x)) return 0x7fff;
    u32 bits = float_as_bits(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#endif
}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block

inline void __syncthreads() { emulator::meet_block(); }
inline void copy_async(void* to, const void* from, bool valid) { emulator::queue_copy(to, from, valid); }
inline void commit_copies() { emulator::close_group(); }
template <int Pending>
inline void wait_for_copies() {
    emulator::wait_for_groups(Pending);
}

namespace emulator {
inline void share_row(const void* row) {
    read_row(row);
    lane(thread.x % 32).row = row;
    meet_warp();
    if (thread.x % 8) return;
    const void* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = lane(thread.x % 32 + i).row;
    check_banks(rows);
}
}  // namespace emulator

inline void load_matrices(u32 (&r)[4], const void* row) {
    emulator::share_row(row);
    int lane = threadIdx.x % 32;
    for (int j = 0; j < 4; ++j)
        memcpy(&r[j], static_cast<const u16*>(emulator::lane(8 * j + lane / 4).row) + 2 * (lane % 4), 4);
    emulator::meet_warp();
}
inline void load_matrices_transposed(u32 (&r)[4], const void* row) {
    emulator::share_row(row);
    int lane = threadIdx.x % 32;
    for (int j = 0; j < 4; ++j) {
        auto element = [&](int i) { return static_cast<const u16*>(emulator::lane(8 * j + 2 * (lane % 4) + i).row)[lane / 4]; };
        r[j] = element(0) | static_cast<u32>(element(1)) << 16;
    }
    emulator::meet_warp();
}

inline float first_of(u32 pair) { return emulator::widen(pair & 0xffff); }
inline float second_of(u32 pair) { return emulator::widen(pair >> 16); }
inline u32 pair_of(float first, float second) {
    return emulator::narrow(first) | static_cast<u32>(emulator::narrow(second)) << 16;
}

// Element (row, k) of a is in lane 4 (row % 8) + k % 8 / 2, register row / 8 + 2 (k / 8); (k, column) of b likewise.
inline void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    auto& mine = emulator::lane(threadIdx.x % 32);
    memcpy(mine.a, a, 16);
    mine.b[0] = b0;
    mine.b[1] = b1;
    emulator::meet_warp();
    int lane = threadIdx.x % 32;
    for (int half = 0; half < 2; ++half)
        for (int n = 0; n < 2; ++n) {
            float sum = 0;
            for (int k = 0; k < 16; k += 2) {
                u32 x = emulator::lane(lane / 4 * 4 + k % 8 / 2).a[half + 2 * (k / 8)];
                u32 y = emulator::lane((2 * (lane % 4) + n) * 4 + k % 8 / 2).b[k / 8];
                sum += first_of(x) * first_of(y) + second_of(x) * second_of(y);
            }
            c[2 * half + n] += sum;
        }
    emulator::meet_warp();
}

inline float from_lane_xor(float x, int mask) {
    int lane = threadIdx.x % 32;
    emulator::lane(lane).number = x;
    emulator::meet_warp();
    float other = emulator::lane(lane ^ mask).number;
    emulator::meet_warp();
    return other;
}
inline float power_of_2(float x) { return exp2f(x); }
inline float log_2(float x) { return log2f(x); }
inline float larger(float x, float y) { return fmaxf(x, y); }
inline float minus_infinity() { return -INFINITY; }
