// Attention for one head size and element type: plain, its tangent, and the difference of two contexts.
//
// Built with -DHEAD_SIZE=72 (a multiple of 8), -DSTAGES=1|2, -DMOVING_KEYS=0|1 and, for float16, -DHALF.
// A block of four warps owns 64 queries of one head; each warp owns 16 of them and sees every key. Keys pass in tiles,
// copied while the tile before is computed (two stages). Matrices are held as mma.sync's m16n8k16 lays them out:
// lane l has the rows l / 4 and l / 4 + 8, and of every 8 columns those at 2 (l % 4) and one more.
#include "primitives.cuh"

constexpr int QUERIES = 64;                       // of a block
constexpr int THREADS = 128;                      // 16 queries a warp
constexpr int KEYS = HEAD_SIZE <= 80 ? 64 : HEAD_SIZE <= 160 ? 32 : 16;  // of a tile
constexpr int TANGENT_KEYS = HEAD_SIZE <= 160 ? 32 : 16;  // of a tile where keys and values have tangents beside them
constexpr int WIDTH = (HEAD_SIZE + 15) / 16 * 16; // of a row; what is beyond HEAD_SIZE are zeros
constexpr int PITCH = WIDTH + 8;                  // 16 bytes more: the 8 rows of a matrix lie in different banks
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Tensor {  // [batch, head, row, HEAD_SIZE], strides in elements, rows dense and aligned to 16 bytes
    u16* data;
    long long batch, head, row;
};

struct Shape {
    int batch, heads, queries, keys;
    float scale;              // of q k^T
    const int* key_lengths;   // [batch], or null: all keys
};

struct Place {  // of this block
    int batch, head, first_query, keys;
};

INLINE Place place_of(const Shape& shape) {
    int tiles = (shape.queries + QUERIES - 1) / QUERIES;
    int both = blockIdx.x / tiles, batch = both / shape.heads;
    int keys = shape.key_lengths ? shape.key_lengths[batch] : shape.keys;
    return {batch, both % shape.heads, static_cast<int>(blockIdx.x % tiles) * QUERIES, keys < shape.keys ? keys : shape.keys};
}

INLINE const u16* rows_of(const Tensor& x, const Place& at) { return x.data + at.batch * x.batch + at.head * x.head; }

INLINE int lane_of() { return threadIdx.x % 32; }
INLINE int warp_of() { return threadIdx.x / 32; }

// Rows first .. first + Rows - 1 of x into a tile, zeros from row `limit` on.
template <int Rows>
INLINE void load_tile(u16* tile, const u16* x, long long stride, int first, int limit) {
    for (int i = threadIdx.x; i < Rows * (WIDTH / 8); i += THREADS) {
        int row = i / (WIDTH / 8), column = i % (WIDTH / 8) * 8;
        bool valid = first + row < limit && column < HEAD_SIZE;
        copy_async(tile + row * PITCH + column, valid ? x + (first + row) * stride + column : x, valid);
    }
}

// load(i, stage) copies tile i, compute(i, stage) uses it: the copy of the next tile runs beside the computation.
template <class Load, class Compute>
INLINE void for_each_tile(int tiles, Load load, Compute compute) {
    if (tiles > 0) load(0, 0);
    commit_copies();
    for (int i = 0; i < tiles; ++i) {
        if (STAGES == 2 && i + 1 < tiles) load(i + 1, (i + 1) % 2);
        if (STAGES == 2) commit_copies();
        wait_for_copies<STAGES - 1>();
        __syncthreads();
        compute(i, i % STAGES);
        __syncthreads();
        if (STAGES == 1 && i + 1 < tiles) load(i + 1, 0);
        if (STAGES == 1) commit_copies();
    }
}

// s [16, Keys] += q k^T for this warp's rows of the tile of queries.
template <int Keys>
INLINE void add_scores(float (&s)[Keys / 8][4], const u16* queries, const u16* keys) {
    int lane = lane_of();
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        u32 a[4];
        load_matrices(a, queries + (warp_of() * 16 + lane % 16) * PITCH + k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < Keys; n += 16) {
            u32 b[4];
            load_matrices(b, keys + (n + lane % 8 + lane / 16 * 8) * PITCH + k + lane / 8 % 2 * 8);
            multiply_add(s[n / 8], a, b[0], b[1]);
            multiply_add(s[n / 8 + 1], a, b[2], b[3]);
        }
    }
}

// out [16, HEAD_SIZE] += weights [16, Keys] values; the weights are rounded to 16 bits.
template <int Keys>
INLINE void add_weighted(float (&out)[WIDTH / 8][4], const float (&weights)[Keys / 8][4], const u16* values) {
    int lane = lane_of();
#pragma unroll
    for (int n = 0; n < Keys; n += 16) {
        const float(&left)[4] = weights[n / 8];
        const float(&right)[4] = weights[n / 8 + 1];
        u32 a[4] = {pair_of(left[0], left[1]), pair_of(left[2], left[3]), pair_of(right[0], right[1]),
                    pair_of(right[2], right[3])};
#pragma unroll
        for (int d = 0; d < WIDTH; d += 16) {
            u32 b[4];
            load_matrices_transposed(b, values + (n + lane % 16) * PITCH + d + lane / 16 * 8);
            multiply_add(out[d / 8], a, b[0], b[1]);
            multiply_add(out[d / 8 + 1], a, b[2], b[3]);
        }
    }
}

// Over the four lanes that share a row.
INLINE float sum_of_row(float x) {
    x += from_lane_xor(x, 1);
    return x + from_lane_xor(x, 2);
}
INLINE float largest_of_row(float x) {
    x = larger(x, from_lane_xor(x, 1));
    return larger(x, from_lane_xor(x, 2));
}

// f(row, column, index of the pair's first element in a matrix's quadruple) for every pair of this thread's output.
template <class F>
INLINE void for_each_pair(int first_query, int queries, F f) {
#pragma unroll
    for (int d = 0; d < WIDTH / 8; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = first_query + warp_of() * 16 + lane_of() / 4 + 8 * half, column = d * 8 + lane_of() % 4 * 2;
            if (row < queries && column < HEAD_SIZE) f(row, column, d, 2 * half);
        }
}

// out = softmax(scale q k^T) v, and its log-sum-exp, for this warp's rows; zeros and minus infinity without keys.
// Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691.
INLINE void attend(float (&out)[WIDTH / 8][4], float (&lse)[2], const u16* queries, u16* tiles, const Tensor& k,
                   const Tensor& v, const Place& at, float scale) {
    constexpr int TILE = KEYS * PITCH;
    const u16 *key_rows = rows_of(k, at), *value_rows = rows_of(v, at);
    float top[2] = {minus_infinity(), minus_infinity()}, total[2] = {0, 0};
    auto load = [&](int i, int stage) {
        load_tile<KEYS>(tiles + 2 * stage * TILE, key_rows, k.row, i * KEYS, at.keys);
        load_tile<KEYS>(tiles + (2 * stage + 1) * TILE, value_rows, v.row, i * KEYS, at.keys);
    };
    auto compute = [&](int i, int stage) {
        float s[KEYS / 8][4] = {};
        add_scores<KEYS>(s, queries, tiles + 2 * stage * TILE);
        float highest[2] = {top[0], top[1]}, rescale[2];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                bool valid = i * KEYS + n * 8 + lane_of() % 4 * 2 + e % 2 < at.keys;
                s[n][e] = valid ? s[n][e] * scale * LOG2_E : minus_infinity();
                highest[e / 2] = larger(highest[e / 2], s[n][e]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            highest[half] = largest_of_row(highest[half]);
            rescale[half] = power_of_2(top[half] - highest[half]);
            top[half] = highest[half];
            total[half] *= rescale[half];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[n][e] = power_of_2(s[n][e] - top[e / 2]);
                total[e / 2] += s[n][e];
            }
#pragma unroll
        for (int d = 0; d < WIDTH / 8; ++d)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[d][e] *= rescale[e / 2];
        add_weighted<KEYS>(out, s, tiles + (2 * stage + 1) * TILE);
    };
    for_each_tile((at.keys + KEYS - 1) / KEYS, load, compute);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        total[half] = sum_of_row(total[half]);
        lse[half] = (top[half] + log_2(total[half])) * LN_2;
        total[half] = total[half] > 0 ? 1 / total[half] : (total[half] == 0 ? 0 : total[half]);  // NaN stays
    }
#pragma unroll
    for (int d = 0; d < WIDTH / 8; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[d][e] *= total[e / 2];
}

struct ForwardArguments {
    Shape shape;
    Tensor q, k, v, out;
    float* lse;  // [batch, heads, queries]
};

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(ForwardArguments a) {
    SHARED_MEMORY(memory);
    u16* queries = reinterpret_cast<u16*>(memory);
    Place at = place_of(a.shape);
    load_tile<QUERIES>(queries, rows_of(a.q, at), a.q.row, at.first_query, a.shape.queries);
    float out[WIDTH / 8][4] = {}, lse[2];
    attend(out, lse, queries, queries + QUERIES * PITCH, a.k, a.v, at, a.shape.scale);
    u16* rows = const_cast<u16*>(rows_of(a.out, at));
    for_each_pair(at.first_query, a.shape.queries, [&](int row, int column, int d, int e) {
        *reinterpret_cast<u32*>(rows + row * a.out.row + column) = pair_of(out[d][e], out[d][e + 1]);
        if (column == 0) a.lse[(at.batch * a.shape.heads + at.head) * static_cast<long long>(a.shape.queries) + row] = lse[e / 2];
    });
}

struct DifferenceArguments {
    Shape shape;  // of the first context
    Tensor q, k, v, other_k, other_v, out;
    int other_keys;
    float weight;                  // of the other context
    const int* other_key_lengths;  // [batch], or null: all keys
};

#if HEAD_SIZE <= 160  // it holds two outputs
// out = A(q, k, v) - weight A(q, k', v'): one pass over q for two contexts.
extern "C" __global__ void __launch_bounds__(THREADS) attention_difference(DifferenceArguments a) {
    SHARED_MEMORY(memory);
    u16 *queries = reinterpret_cast<u16*>(memory), *tiles = queries + QUERIES * PITCH;
    Place at = place_of(a.shape), other = at;
    other.keys = a.other_key_lengths ? a.other_key_lengths[at.batch] : a.other_keys;
    other.keys = other.keys < a.other_keys ? other.keys : a.other_keys;
    load_tile<QUERIES>(queries, rows_of(a.q, at), a.q.row, at.first_query, a.shape.queries);
    float out[WIDTH / 8][4] = {}, subtracted[WIDTH / 8][4] = {}, lse[2];
    attend(out, lse, queries, tiles, a.k, a.v, at, a.shape.scale);
    attend(subtracted, lse, queries, tiles, a.other_k, a.other_v, other, a.shape.scale);
    u16* rows = const_cast<u16*>(rows_of(a.out, at));
    for_each_pair(at.first_query, a.shape.queries, [&](int row, int column, int d, int e) {
        *reinterpret_cast<u32*>(rows + row * a.out.row + column) =
            pair_of(out[d][e] - a.weight * subtracted[d][e], out[d][e + 1] - a.weight * subtracted[d][e + 1]);
    });
}
#endif

struct TangentArguments {
    Shape shape;
    Tensor q, k, v, out, tq, tk, tv, tangent;  // tk and tv are not read unless MOVING_KEYS
    const float* lse;                          // [batch, heads, queries], of the primal
};

// tangent = P tv + (P * tS) v - rowsum(P * tS) out, with P = exp(S - lse), S = scale q k^T, tS = scale (tq k^T + q tk^T).
extern "C" __global__ void __launch_bounds__(THREADS) attention_tangent(TangentArguments a) {
    constexpr int TILE = TANGENT_KEYS * PITCH, TILES = MOVING_KEYS ? 4 : 2;
    SHARED_MEMORY(memory);
    u16 *queries = reinterpret_cast<u16*>(memory), *moving = queries + QUERIES * PITCH, *tiles = moving + QUERIES * PITCH;
    Place at = place_of(a.shape);
    load_tile<QUERIES>(queries, rows_of(a.q, at), a.q.row, at.first_query, a.shape.queries);
    load_tile<QUERIES>(moving, rows_of(a.tq, at), a.tq.row, at.first_query, a.shape.queries);
    float lse[2], out[WIDTH / 8][4] = {}, drift[2] = {0, 0};  // drift: rowsum(P * tS)
    const float* lse_rows = a.lse + (at.batch * a.shape.heads + at.head) * static_cast<long long>(a.shape.queries);
    for (int half = 0; half < 2; ++half) {
        int row = at.first_query + warp_of() * 16 + lane_of() / 4 + 8 * half;
        lse[half] = row < a.shape.queries ? lse_rows[row] * LOG2_E : 0;
    }
    auto load = [&](int i, int stage) {
        u16* to = tiles + stage * TILES * TILE;
        load_tile<TANGENT_KEYS>(to, rows_of(a.k, at), a.k.row, i * TANGENT_KEYS, at.keys);
        load_tile<TANGENT_KEYS>(to + TILE, rows_of(a.v, at), a.v.row, i * TANGENT_KEYS, at.keys);
        if (MOVING_KEYS) {
            load_tile<TANGENT_KEYS>(to + 2 * TILE, rows_of(a.tk, at), a.tk.row, i * TANGENT_KEYS, at.keys);
            load_tile<TANGENT_KEYS>(to + 3 * TILE, rows_of(a.tv, at), a.tv.row, i * TANGENT_KEYS, at.keys);
        }
    };
    auto compute = [&](int i, int stage) {
        const u16* tile = tiles + stage * TILES * TILE;
        float p[TANGENT_KEYS / 8][4] = {}, ts[TANGENT_KEYS / 8][4] = {};
        add_scores<TANGENT_KEYS>(p, queries, tile);
        add_scores<TANGENT_KEYS>(ts, moving, tile);
        if (MOVING_KEYS) add_scores<TANGENT_KEYS>(ts, queries, tile + 2 * TILE);
#pragma unroll
        for (int n = 0; n < TANGENT_KEYS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                bool valid = i * TANGENT_KEYS + n * 8 + lane_of() % 4 * 2 + e % 2 < at.keys;
                p[n][e] = valid ? power_of_2(p[n][e] * a.shape.scale * LOG2_E - lse[e / 2]) : 0;
                ts[n][e] *= p[n][e] * a.shape.scale;
                drift[e / 2] += ts[n][e];
            }
        add_weighted<TANGENT_KEYS>(out, ts, tile + TILE);
        if (MOVING_KEYS) add_weighted<TANGENT_KEYS>(out, p, tile + 3 * TILE);
    };
    for_each_tile((at.keys + TANGENT_KEYS - 1) / TANGENT_KEYS, load, compute);
    drift[0] = sum_of_row(drift[0]);
    drift[1] = sum_of_row(drift[1]);
    const u16* primal = rows_of(a.out, at);
    u16* rows = const_cast<u16*>(rows_of(a.tangent, at));
    for_each_pair(at.first_query, a.shape.queries, [&](int row, int column, int d, int e) {
        u32 both = *reinterpret_cast<const u32*>(primal + row * a.out.row + column);
        *reinterpret_cast<u32*>(rows + row * a.tangent.row + column) = pair_of(
            out[d][e] - drift[e / 2] * first_of(both), out[d][e + 1] - drift[e / 2] * second_of(both));
    });
}
