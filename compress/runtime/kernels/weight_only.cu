// y = x W^T for few rows of x, with W of 4-bit, 8-bit or 16-bit codes read once: the linear of a decode step.
//
// A block computes 16 rows of W. Its warps share the columns; each lane loads 16 bytes of codes at a time, turns them into
// float16 and hands them to the tensor cores (m16n8k16) with x as the narrow operand, so that up to 8 * TILES rows of x cost
// the same bytes. The order of columns inside a run of 32 is ours to choose as long as x is read alike: lane t of a quad takes
// columns 8 t to 8 t + 7, which are 16 neighbouring bytes of x.
//
// Codes become float16 without a conversion: 0x6400 | q is the float16 1024 + q, and 0x6400 | 16 q is 1024 + 16 q (q < 16).
// Both are exact, and so are the subtractions of 1024 + zero point that follow: the product sees q - zero_point exactly.
// Scales are applied to float32 sums of a group.
//
// Set by the compiler's command line: BITS (4, 8, 16), GROUP (columns that share a scale, a multiple of 32; 0: the whole row), RUN
// (groups, or with GROUP 0 runs of 64 columns, that a warp takes at once; RUN * GROUP is a multiple of 64), TILES (1, 2, 4 or
// 8), WARPS, ROWS (tiles of 16 rows of W that a block takes), GATED (1: of each 16 rows the first eight are a gate's and the others
// their values; what is written is silu(gate) * value), NORMED (1: x is a residual stream times a norm's weight and some factor of
// each row; y is of the row over its root mean square, which is known from `squares` when the sums are done), ADDED (1: y is added to
// a residual stream, and what is written beside it is the next norm's x and squares, so that no kernel is needed between the two).
//
// Layouts (`weight_only.pack`), with K padded to a multiple of 64 and N to one of 16:
//   codes   uint4 [N / 16][K / 64][BITS / 4][32]     lane's codes of a 16 x 64 tile
//   scales  half  [N / 16][groups][16]                zeros  uchar, alike (absent with BITS 16)

typedef unsigned int u32;
typedef unsigned short half_bits;  // a float16, as it lies in memory: no header of CUDA's is needed

#define QUARTERS (BITS / 4)
// With many rows of x registers run short: no run is fetched ahead, and scales go into the float16 weights instead of the sums.
#define MANY (TILES >= 4)
#define UNITS ((GROUP ? GROUP : 64) / 32)  // runs of 32 columns, two steps each, that share a scale

// Programmatic dependent launch: a kernel starts while the one before it ends, and waits where it needs that one's results.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_later_kernels_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 bits) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(mask), "r"(bits));
    return out;
}

__device__ __forceinline__ u32 sub2(u32 a, u32 b) {
    u32 out;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
    u32 out;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

__device__ __forceinline__ float to_float(half_bits h) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(h));
    return out;
}

__device__ __forceinline__ half_bits to_half(float f) {
    half_bits out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(f));
    return out;
}

__device__ __forceinline__ u32 twice(u32 bits) { return bits | (bits << 16); }

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What must be subtracted from a row's codes, for the two ways they are taken out of their word.
struct Zero {
    u32 plain, shifted;  // 1024 + z; -(64 + z)
};

__device__ __forceinline__ Zero zero_of(int z) {
    return {twice(0x6400 + z), twice(0xd400 + 16 * z)};  // the shifted one is asked for 4-bit codes only
}

// The lane's share of one m16n8k16 step as float16 pairs: rows g, g + 8, g, g + 8.
__device__ __forceinline__ void unpack(u32 (&a)[4], const uint4* codes, int step, Zero low, Zero high) {
#if BITS == 4
    u32 word = reinterpret_cast<const u32*>(codes)[step];
    const u32 sixteenth = 0x2c002c00;
    a[0] = sub2(and_or(word, 0x000f000f, 0x64006400), low.plain);
    a[1] = fma2(and_or(word, 0x00f000f0, 0x64006400), sixteenth, high.shifted);
    word >>= 8;
    a[2] = sub2(and_or(word, 0x000f000f, 0x64006400), low.plain);
    a[3] = fma2(and_or(word, 0x00f000f0, 0x64006400), sixteenth, high.shifted);
#elif BITS == 8
    const u32* words = reinterpret_cast<const u32*>(codes) + 2 * step;
    a[0] = sub2(__byte_perm(words[0], 0x64646464, 0x5140), low.plain);
    a[2] = sub2(__byte_perm(words[0], 0x64646464, 0x5342), low.plain);
    a[1] = sub2(__byte_perm(words[1], 0x64646464, 0x5140), high.plain);
    a[3] = sub2(__byte_perm(words[1], 0x64646464, 0x5342), high.plain);
#else
    const u32* words = reinterpret_cast<const u32*>(codes) + 4 * step;
    a[0] = words[0];
    a[1] = words[1];
    a[2] = words[2];
    a[3] = words[3];
#endif
}

// Codes, scales and zero points of one run of a warp, on their way from memory.
struct Run {
    uint4 codes[RUN * UNITS / 2][QUARTERS];
    half_bits scales[RUN][2];
    unsigned char zeros[RUN][2];
};

__device__ __forceinline__ uint4 stream_in(const uint4* from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}

__device__ __forceinline__ void fetch(Run& run, const uint4* mine, const half_bits* scales, const unsigned char* zeros, int first,
                                      int column_tiles, int groups) {
#pragma unroll
    for (int i = 0; i < RUN * UNITS / 2; ++i)
#pragma unroll
        for (int q = 0; q < QUARTERS; ++q)
            run.codes[i][q] =
                first + i < column_tiles ? stream_in(mine + ((first + i) * QUARTERS + q) * 32) : make_uint4(0, 0, 0, 0);
#if BITS != 16
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
        const int group = GROUP ? first * 2 / UNITS + r : 0;
        const bool there = group < groups;
        run.scales[r][0] = there ? scales[group * 16] : 0;
        run.scales[r][1] = there ? scales[group * 16 + 8] : 0;
        run.zeros[r][0] = there ? zeros[group * 16] : 0;
        run.zeros[r][1] = there ? zeros[group * 16 + 8] : 0;
    }
#endif
}

// Past the first cache, which may hold what lay there before this kernel waited.
__device__ __forceinline__ float fresh(const float* at) {
    float out;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(out) : "l"(at));
    return out;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffff, v, d);
    return v;
}

// x: half [M, K], not __restrict__: the kernel before may still write it when this one starts, and what is const and __restrict__ may be
// read at any time; y: half [M, N], or with GATED half [M, N / 2]. column_tiles: of 64 columns in a row of W; row_tiles: of 16 rows.
// NORMED: squares float [M, K / 16], sums of 16 squares of the stream; `before` float [M]: the factor that x has; `factor` float [M]:
// one over the root mean square, written here. ADDED: stream float [M, N]; weight float [N]: the next norm's; y half [M, N]: stream
// * weight * before; squares float [M, N / 16], written here. `before` and squares are read by `fresh` alone.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    linear(const uint4* __restrict__ codes, const half_bits* __restrict__ scales, const unsigned char* __restrict__ zeros,
           const half_bits* x, const half_bits* __restrict__ bias, half_bits* __restrict__ y, int M, int N, int K,
           int row_tiles, int column_tiles, int groups, float* __restrict__ squares, const float* __restrict__ before,
           float* __restrict__ factor, float* __restrict__ stream, const float* __restrict__ weight, int eps_bits) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row = lane >> 2, quad = lane & 3;
    const long long block = (long long)blockIdx.x * ROWS;
    const int rows_here = min(ROWS, row_tiles - (int)block);
    constexpr int TILES_A_RUN = RUN * UNITS / 2;
    const uint4* mine = codes + block * column_tiles * QUARTERS * 32 + lane;
    const half_bits* my_scales = scales + block * groups * 16 + row;
    const unsigned char* my_zeros = zeros + block * groups * 16 + row;

    Run now[ROWS];
    int first = warp * TILES_A_RUN;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
        if (i < rows_here && first < column_tiles)
            fetch(now[i], mine + (long long)i * column_tiles * QUARTERS * 32, my_scales + i * groups * 16,
                  my_zeros + i * groups * 16, first, column_tiles, groups);
    // The weights above do not depend on what ran before; x does.
    wait_for_earlier_kernels();
    let_later_kernels_start();

    // What the end needs of the first row of x is asked for now.
#if NORMED
    const int squares_a_row = K / 16;
    float held[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int at = threadIdx.x + i * 32 * WARPS;
        held[i] = at < squares_a_row ? fresh(squares + at) : 0.f;
    }
#elif ADDED
    float held[2] = {};
    if (threadIdx.x < 16 * ROWS && block * 16 + threadIdx.x < N) {
        held[0] = fresh(stream + block * 16 + threadIdx.x);
        held[1] = weight[block * 16 + threadIdx.x];
    }
#endif

    float sum[ROWS][TILES][4] = {};
    while (first < column_tiles) {
        const int after = first + WARPS * TILES_A_RUN;
#if !MANY
        Run next[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            if (i < rows_here && after < column_tiles)
                fetch(next[i], mine + (long long)i * column_tiles * QUARTERS * 32, my_scales + i * groups * 16,
                      my_zeros + i * groups * 16, after, column_tiles, groups);
#endif
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
#if MANY
            float(&part)[ROWS][TILES][4] = sum;
#else
            float part[ROWS][TILES][4] = {};
#endif
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                const int unit = r * UNITS + u;
                const int column = first * 64 + unit * 32 + quad * 8;
                uint4 xs[TILES];
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const int token = t * 8 + row;
                    xs[t] = token < M && column < K ? *reinterpret_cast<const uint4*>(x + (long long)token * K + column)
                                                    : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    const Zero low = zero_of(now[i].zeros[r][0]), high = zero_of(now[i].zeros[r][1]);
                    u32 a[2][4];
                    unpack(a[0], now[i].codes[unit / 2], 2 * (unit % 2), low, high);
                    unpack(a[1], now[i].codes[unit / 2], 2 * (unit % 2) + 1, low, high);
#if MANY && BITS != 16
                    if (GROUP) {
                        const u32 scale_low = twice(now[i].scales[r][0]), scale_high = twice(now[i].scales[r][1]);
#pragma unroll
                        for (int p = 0; p < 8; ++p) a[p / 4][p % 4] = mul2(a[p / 4][p % 4], p % 2 ? scale_high : scale_low);
                    }
#endif
#pragma unroll
                    for (int t = 0; t < TILES; ++t) {
                        multiply(part[i][t], a[0], xs[t].x, xs[t].y);
                        multiply(part[i][t], a[1], xs[t].z, xs[t].w);
                    }
                }
            }
#if !MANY
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const float scale_low = BITS == 16 || !GROUP ? 1.f : to_float(now[i].scales[r][0]);
                const float scale_high = BITS == 16 || !GROUP ? 1.f : to_float(now[i].scales[r][1]);
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    sum[i][t][0] += scale_low * part[i][t][0];
                    sum[i][t][1] += scale_low * part[i][t][1];
                    sum[i][t][2] += scale_high * part[i][t][2];
                    sum[i][t][3] += scale_high * part[i][t][3];
                }
            }
#endif
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
#if !MANY
            now[i] = next[i];
#else
            if (i < rows_here && after < column_tiles)
                fetch(now[i], mine + (long long)i * column_tiles * QUARTERS * 32, my_scales + i * groups * 16,
                      my_zeros + i * groups * 16, after, column_tiles, groups);
#endif
        }
        first = after;
    }

#if NORMED
    __shared__ float squares_of[8 * TILES][WARPS];
    for (int token = 0; token < M; ++token) {
        float s = token ? 0.f : held[0] + held[1];
        for (int i = threadIdx.x + (token ? 0 : 64 * WARPS); i < squares_a_row; i += 32 * WARPS)
            s += fresh(squares + (long long)token * squares_a_row + i);
        s = warp_sum(s);
        if (!lane) squares_of[token][warp] = s;
    }
#endif
    __shared__ float parts[WARPS][8][16 * ROWS + 1];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        if (t) __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            parts[warp][2 * quad][16 * i + row] = sum[i][t][0];
            parts[warp][2 * quad + 1][16 * i + row] = sum[i][t][1];
            parts[warp][2 * quad][16 * i + row + 8] = sum[i][t][2];
            parts[warp][2 * quad + 1][16 * i + row + 8] = sum[i][t][3];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 8 * 16 * ROWS; i += 32 * WARPS) {
            const int token = t * 8 + i / (16 * ROWS), r = i % (16 * ROWS);
            const int out = block * 16 + r;
#if !ADDED
            if (token >= M || out >= N || (GATED && (r & 8))) continue;
#endif
            float total = 0.f, other = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                total += parts[w][i / (16 * ROWS)][r];
                if (GATED) other += parts[w][i / (16 * ROWS)][r + 8];
            }
#if BITS != 16
            if (!GROUP && out < N) {
                total *= to_float(scales[block * 16 + r]);
                if (GATED) other *= to_float(scales[block * 16 + r + 8]);
            }
#endif
#if NORMED
            float all = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) all += squares_of[token][w];
            const float now_is = rsqrtf(all / K + __int_as_float(eps_bits)), missing = now_is / fresh(before + token);
            if (!blockIdx.x && !r) factor[token] = now_is;
            total *= missing;
            other *= missing;
#endif
#if ADDED
            const bool there = token < M && out < N;
            float value = 0.f;
            if (there) {
                const bool kept = i < 16 * ROWS && !t;  // token 0, whose i is the thread's own
                if (bias) total += to_float(bias[out]);
                value = (kept ? held[0] : fresh(stream + (long long)token * N + out)) + total;
                stream[(long long)token * N + out] = value;
                y[(long long)token * N + out] = to_half(value * fresh(before + token) * (kept ? held[1] : weight[out]));
            }
            float s = value * value;
#pragma unroll
            for (int d = 8; d; d >>= 1) s += __shfl_xor_sync(0xffffffff, s, d);
            if (!(r & 15) && token < M && block + r / 16 < row_tiles) squares[(long long)token * row_tiles + block + r / 16] = s;
            continue;
#endif
            if (GATED) {
                y[(long long)token * (N / 2) + (block * 16 + (r & ~15)) / 2 + (r & 7)] =
                    to_half(total / (1.f + __expf(-total)) * other);
                continue;
            }
            if (bias) total += to_float(bias[out]);
            y[(long long)token * N + out] = to_half(total);
        }
    }
}

// W itself as half [N, K], for products with many rows. One warp a tile of 16 x 64.
extern "C" __global__ void dequantize(const uint4* __restrict__ codes, const half_bits* __restrict__ scales,
                                      const unsigned char* __restrict__ zeros, half_bits* __restrict__ w, int N, int K,
                                      int column_tiles, int groups) {
    const int lane = threadIdx.x & 31, row = lane >> 2, quad = lane & 3;
    const long long tile = (long long)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    const long long block = tile / column_tiles;
    const int column_tile = tile % column_tiles;
    if (block * 16 >= N) return;
    uint4 held[QUARTERS];
#pragma unroll
    for (int q = 0; q < QUARTERS; ++q) held[q] = codes[(tile * QUARTERS + q) * 32 + lane];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int column = column_tile * 64 + half * 32 + quad * 8;
        if (column >= K) return;
        Zero low = {}, high = {};
        u32 scale_low = 0x3c003c00, scale_high = scale_low;
#if BITS != 16
        const long long at = (block * groups + (GROUP ? column / (GROUP ? GROUP : 1) : 0)) * 16 + row;
        low = zero_of(zeros[at]);
        high = zero_of(zeros[at + 8]);
        scale_low = twice(scales[at]);
        scale_high = twice(scales[at + 8]);
#endif
        u32 a[2][4];
        unpack(a[0], held, 2 * half, low, high);
        unpack(a[1], held, 2 * half + 1, low, high);
        const u32* pairs = a[0];
        u32 out[4];
        if (block * 16 + row < N) {
            for (int i = 0; i < 4; ++i) out[i] = mul2(pairs[2 * i], scale_low);
            *reinterpret_cast<uint4*>(w + (block * 16 + row) * K + column) = *reinterpret_cast<uint4*>(out);
        }
        if (block * 16 + row + 8 < N) {
            for (int i = 0; i < 4; ++i) out[i] = mul2(pairs[2 * i + 1], scale_high);
            *reinterpret_cast<uint4*>(w + (block * 16 + row + 8) * K + column) = *reinterpret_cast<uint4*>(out);
        }
    }
}
