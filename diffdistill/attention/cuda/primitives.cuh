// What a warp does in one instruction, on a GPU (sm_80 and newer) as PTX; elsewhere `emulator.h` gives the same names.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;

#ifdef DIFFDISTILL_EMULATOR
#include "emulator.h"
#else

#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define INLINE __device__ __forceinline__

INLINE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, later; zeros if not `valid`, and then nothing is read.
INLINE void copy_async(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0));
}
INLINE void commit_copies() { asm volatile("cp.async.commit_group;\n"); }
// Waits until all but the newest `Pending` groups of this thread's copies have arrived.
template <int Pending>
INLINE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending));
}

// Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
INLINE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
INLINE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

#ifdef HALF
#define MMA_TYPES "f16.f16"
INLINE float first_of(u32 pair) {
    float x;
    asm("{.reg .b16 lo, hi;\n mov.b32 {lo, hi}, %1;\n cvt.f32.f16 %0, lo;}" : "=f"(x) : "r"(pair));
    return x;
}
INLINE float second_of(u32 pair) { return first_of(pair >> 16); }
INLINE u32 pair_of(float first, float second) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
#else
#define MMA_TYPES "bf16.bf16"
INLINE float first_of(u32 pair) { return __uint_as_float(pair << 16); }
INLINE float second_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
INLINE u32 pair_of(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
#endif

// c [16, 8] += a [16, 16] b [16, 8], in float32.
INLINE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES ".f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

INLINE float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
INLINE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE float log_2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE float larger(float x, float y) { return fmaxf(x, y); }
INLINE float minus_infinity() { return __uint_as_float(0xff800000u); }

#endif
